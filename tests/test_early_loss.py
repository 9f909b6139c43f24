"The loss of a batch, read while the GPU goes on: the Recorder records what it does without."

import pytest
from conftest import ReadsLoss
from fastai.callback.core import Callback
from fastai.learner import AvgSmoothLoss


class Doubles(Callback):
    "Puts another loss in the place of the model's, before or after the copy is given."

    def __init__(self, order):
        self.order = order

    def after_batch(self):
        self.learn.loss = self.loss * 2


@pytest.mark.parametrize("cbs", [[], [lambda: Doubles(8)], [lambda: Doubles(10)]], ids=["alone", "before", "after"])
def test_recorder_records_the_same(new_learner, cbs):
    recorded = []
    for early in ([], [ReadsLoss()]):
        learn = new_learner()
        learn.fit(2, cbs=[*early, *[cb() for cb in cbs]])
        recorded.append(
            (list(map(float, learn.recorder.losses)), [list(values)[:-1] for values in learn.recorder.values])
        )
    assert recorded[0] == recorded[1]


def test_nothing_is_left_on_the_recorder(new_learner):
    learn, cb = new_learner(), ReadsLoss()
    learn.add_cb(cb)
    learn.recorder.smooth_loss.accumulate = None
    cb.after_exception(KeyboardInterrupt())
    assert learn.recorder.smooth_loss.accumulate.__func__ is AvgSmoothLoss.accumulate
    learn.remove_cb(learn.recorder)
    cb.after_exception(KeyboardInterrupt())
