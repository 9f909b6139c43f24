"The loss of a batch, read while the GPU goes on: the Recorder records what it does without."

from types import SimpleNamespace

import pytest
from conftest import ReadsLoss
from fastai.callback.core import Callback
from fastai.learner import AvgSmoothLoss

from channelslast.early_loss import ReadsLossEarly


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


@pytest.mark.parametrize("is_cuda, reads_loss", [(True, True), (True, False), (False, True)])
def test_loss_on_a_gpu_is_read_by_one_callback(monkeypatch, is_cuda, reads_loss):
    given = []
    monkeypatch.setattr("channelslast.early_loss.EarlyLoss", lambda learn: SimpleNamespace(give=given.append))
    cb = ReadsLossEarly()
    cb.reads_loss, cb.learn = reads_loss, SimpleNamespace(loss=SimpleNamespace(is_cuda=is_cuda))
    cb.before_backward()
    cb.after_batch()
    cb.after_batch()  # of an evaluation
    assert given == [cb.learn] * (is_cuda and reads_loss)


def test_nothing_is_left_on_the_recorder(new_learner):
    learn, cb = new_learner(), ReadsLoss()
    learn.add_cb(cb)
    learn.recorder.smooth_loss.accumulate, cb.early_loss = None, object()
    cb.after_exception(KeyboardInterrupt())
    assert cb.early_loss is None
    assert learn.recorder.smooth_loss.accumulate.__func__ is AvgSmoothLoss.accumulate
    learn.remove_cb(learn.recorder)
    cb.after_exception(KeyboardInterrupt())
