"A Learner with lean events calls the same callbacks as fastai, in the same order, whatever they are."

import copy
import pickle
from contextlib import nullcontext, suppress

import pytest
import torch
from conftest import BATCH_EVENTS, TinyNet
from fastai.callback.core import (
    Callback,
    CancelBackwardException,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CancelStepException,
    CancelTrainException,
    CancelValidException,
    event,
)
from fastai.callback.hook import ActivationStats
from fastai.callback.mixup import MixUp
from fastai.callback.progress import ProgressCallback
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import Learner, load_learner
from fastcore.foundation import L

from channelslast import events
from channelslast import learner as room
from channelslast.events import LeanEvents
from channelslast.formats import TrainFormat

EVENTS = [name for name in vars(event) if not name.startswith("_") and name != "after_create"]
CANCELS = [
    CancelBatchException,
    CancelBackwardException,
    CancelStepException,
    CancelTrainException,
    CancelValidException,
    CancelEpochException,
    CancelFitException,
]


def logger(log, name="logger", order=0, only=EVENTS, base=Callback, **members):
    "A callback with a class of its own, which appends each event to `log`."

    def method(event_name):
        def append(self):
            log.append((name, event_name, self.learn is None or self.training))

        return append

    return type(name, (base,), {"order": order, **{each: method(each) for each in only}, **members})()


def at(event_name, do, n=2, order=0, **members):
    "A callback that calls `do` with itself at the `n`-th time of an event."
    times = []

    def method(self):
        times.append(1)
        if len(times) == n:
            do(self)

    return type("At", (Callback,), {"order": order, event_name: method, **members})()


def raises(error):
    def do(cb):
        raise error

    return do


# Each: the callbacks of a fit, given a log that they write to


def ties(log):
    return [logger(log, name, order) for name, order in (("c", 5), ("a", 5), ("b", -20), ("d", 5), ("e", 1000))]


def changing_order(log):
    late = logger(log, "late", 10)
    return [late, logger(log, "other", 11), at("after_pred", lambda cb: setattr(late, "order", 12))]


def order_as_property(log):
    return [logger(log, "a", order=property(lambda self: len(log) % 3)), logger(log, "b", 1)]


def switched_off(log):
    off, also = logger(log, "off", 5), logger(log, "also", 5, run_valid=False)
    return [
        off,
        also,
        logger(log, "valid", 5, run_train=False),
        at("after_loss", lambda cb: setattr(off, "run", False)),
        at("before_step", lambda cb: setattr(also, "run_train", False), n=3),
    ]


def added(log):
    new = logger(log, "new", -30)
    return [logger(log), at("after_pred", lambda cb: cb.learn.add_cb(new)), logger(log, "last", 9)]


def added_with_the_name_of_an_event(log):
    class AfterLoss(Callback):
        def __call__(self, event_name=None):
            log.append(("after loss", event_name))

    return [logger(log), at("after_pred", lambda cb: cb.learn.add_cb(AfterLoss()))]


def removed(log):
    before, after = logger(log, "before", -5), logger(log, "after", 5)
    silent = logger(log, "silent", 6, only=["before_fit"])
    return [before, after, silent, at("after_loss", lambda cb: cb.learn.remove_cbs([before, after, silent]))]


def removed_for_a_while(log):
    def validate(cb):
        with cb.learn.removed_cbs(L(other)):
            cb.learn("after_pred")

    other = logger(log, "other", 5)
    return [other, logger(log), at("before_step", validate)]


def replaced_cbs(log):
    new = logger(log, "new", 1)

    def replace(cb):
        new.learn = cb.learn
        cb.learn.cbs = L([*cb.learn.cbs, new])

    return [logger(log), at("before_backward", replace)]


def validated_inside(log):
    return [logger(log), at("after_step", lambda cb: cb.learn.get_preds(inner=True))]


def several_events_at_once(log):
    return [logger(log), at("after_step", lambda cb: cb.learn(["after_pred", "after_loss"]))]


def unknown_event(log):
    return [logger(log), at("after_step", lambda cb: cb.learn("after_everything"))]


def after_fit_inside(log):
    off = logger(log, "off", 5)
    return [off, at("after_pred", lambda cb: [setattr(off, "run", False), cb.learn("after_fit")])]


def set_on_the_callback(log):
    plain = logger(log, "plain", only=["before_fit"])
    one = Callback(after_pred=lambda cb: log.append("after_pred, as an argument"))

    def later():
        log.append("after_loss, set")

    return [plain, one, at("after_pred", lambda cb: setattr(plain, "after_loss", later))]


def own_getattr(log):
    def __getattr__(self, name):
        if name.startswith("after_"):
            return lambda: log.append(("found", name))
        return Callback.__getattr__(self, name)

    return [logger(log, "dynamic", only=[], __getattr__=__getattr__)]


def own_getattribute(log):
    def __getattribute__(self, name):
        log.append(name) if name == "after_loss" else None
        return Callback.__getattribute__(self, name)

    return [logger(log, "watched", only=[], __getattribute__=__getattribute__)]


def own_call(log):
    def __call__(self, event_name):
        log.append(("called", event_name))
        return Callback.__call__(self, event_name)

    return [logger(log, "calls", only=["after_loss"], __call__=__call__)]


def own_default(log):
    class Other:
        def after_loss(self):
            log.append("after_loss of another")

    return [logger(log, "delegates", only=[], _default="other", other=Other(), training=True)]


def own_default_on_the_callback(log):
    cb = logger(log, "delegates", only=[])
    cb.other = type("Other", (), {"training": True, "after_loss": lambda self: log.append("after_loss of another")})()
    return [cb, at("after_pred", lambda _: setattr(cb, "_default", "other"))]


def not_a_method(log):
    return [logger(log, "wrong", only=[], after_loss=None)]


def no_message(log):
    return [logger(log), at("after_loss", raises(ValueError()))]


def message(log):
    return [logger(log), at("before_step", raises(ValueError("of mine", 3)))]


def interrupt(log):
    return [logger(log), at("before_backward", raises(KeyboardInterrupt()))]


def of_fastai(log):
    return [
        logger(log),
        GradientAccumulation(16),
        GradientClip(),
        EarlyStoppingCallback("valid_loss"),
        SaveModelCallback(),
        MixUp(),
        ActivationStats(with_hist=False),
        ProgressCallback(),
    ]


KINDS = [
    ties,
    changing_order,
    order_as_property,
    switched_off,
    added,
    added_with_the_name_of_an_event,
    removed,
    removed_for_a_while,
    replaced_cbs,
    validated_inside,
    several_events_at_once,
    unknown_event,
    after_fit_inside,
    set_on_the_callback,
    own_getattr,
    own_getattribute,
    own_call,
    own_default,
    own_default_on_the_callback,
    not_a_method,
    no_message,
    message,
    interrupt,
    of_fastai,
]


@pytest.fixture
def new(new_learner, tmp_path):
    "A function that makes the Learner, always the same, which asks for lean events."

    def make(cls=Learner, **kwargs):
        learn = new_learner(path=tmp_path, **kwargs).to_format(TrainFormat(True, fused_optimizer=True))
        learn.__class__ = cls
        return learn

    return make


def outcome(learn, cbs):
    "What a fit leaves, and raises."
    seen, error = [], None
    with learn.added_cbs(Callback(before_batch=lambda cb: seen.append(type(vars(cb.learn).get("_call_one"))))):
        torch.manual_seed(1)
        try:
            learn.fit(2, cbs=cbs)
        except BaseException as raised:
            error = raised
    return seen, {
        "error": (type(error), getattr(error, "args", None)),
        "weights": [param.tolist() for param in learn.model.parameters()],
        "losses": [loss.item() for loss in learn.recorder.losses],
        "values": [list(values) for values in learn.recorder.values],
        "callbacks": [(cb.name, cb.run, cb.learn is learn) for cb in learn.cbs],
        "attributes": sorted(vars(learn)),
        "epoch": (learn.epoch, learn.train_iter),
    }


def assert_as_fastai(new, kind, monkeypatch, lean=True):
    log, plain_log = [], []
    seen, ours = outcome(new(), kind(log))
    assert seen[0] is (LeanEvents if lean else type(None))
    with monkeypatch.context() as patched:
        patched.setattr(room, "lean_events", lambda learn: nullcontext())
        seen, fastais = outcome(new(), kind(plain_log))
    assert set(seen) == {type(None)}
    assert log == plain_log
    for name in fastais:
        assert ours[name] == fastais[name], name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_callbacks_are_called(new, monkeypatch, kind):
    assert_as_fastai(new, kind, monkeypatch)


@pytest.mark.parametrize("error", CANCELS)
@pytest.mark.parametrize("event_name", EVENTS[1:])
def test_cancelling_at_any_event(new, monkeypatch, event_name, error):
    n = 1 if event_name not in BATCH_EVENTS else 2

    def kind(log):
        return [logger(log, "first", -50), at(event_name, raises(error()), n), logger(log, "last", 50)]

    if event_name in ("before_epoch", "before_train"):  # before the first batch
        log, plain_log = [], []
        outcome(new(), kind(log))
        monkeypatch.setattr(room, "lean_events", lambda learn: nullcontext())
        outcome(new(), kind(plain_log))
        assert log == plain_log
    else:
        assert_as_fastai(new, kind, monkeypatch)


class OwnCallOne(Learner):
    def _call_one(self, event_name):
        super()._call_one(event_name)


class OwnCall(Learner):
    def __call__(self, event_name):
        super().__call__(event_name)


class OwnGetattr(Learner):
    def __getattr__(self, name):
        return super().__getattr__(name)


@pytest.mark.parametrize("cls", [OwnCallOne, OwnCall, OwnGetattr])
def test_a_learner_with_a_way_of_its_own_keeps_it(new, monkeypatch, cls):
    assert_as_fastai(lambda: new(cls), ties, monkeypatch, lean=False)


def test_a_patched_learner_keeps_its_way(new, monkeypatch):
    own = Learner._call_one
    monkeypatch.setattr(Learner, "_call_one", lambda self, event_name: own(self, event_name))
    assert_as_fastai(new, ties, monkeypatch, lean=False)


def test_a_way_set_on_the_learner_stays(new):
    learn = new()
    mine = learn._call_one = lambda event_name: Learner._call_one(learn, event_name)
    learn.fit(1)
    assert learn._call_one is mine


@pytest.mark.parametrize("where", ["model", "learner"])
def test_methods_of_the_learner_and_the_model_are_called_as_in_fastai(new, monkeypatch, where):
    def kind(log):
        return [logger(log, "silent", only=[]), logger(log)]

    def with_method():
        learn = new()
        vars(learn.model if where == "model" else learn)["after_pred"] = lambda: None
        return learn

    assert_as_fastai(with_method, kind, monkeypatch, lean=False)


@pytest.mark.parametrize("error", [None, RuntimeError("now"), KeyboardInterrupt()])
@pytest.mark.parametrize("event_name", [*BATCH_EVENTS, "before_validate", "after_epoch"])
def test_nothing_stays_on_the_learner(new, error, event_name):
    learn = new()
    names = {*vars(learn)}
    with suppress(RuntimeError, KeyboardInterrupt):
        learn.fit(1, cbs=at(event_name, raises(error), n=1) if error else None)
    assert "_call_one" not in vars(learn) and "_call_one" not in {*vars(learn)} - names


def test_only_a_learner_that_asks_for_it_gets_them(new_learner):
    learn = new_learner().to_format(TrainFormat(True))
    seen, _ = outcome(learn, [])
    assert set(seen) == {type(None)}


def test_neither_files_nor_copies_hold_them(new, tmp_path):
    learn, made = new(), {}

    def make(cb):
        assert isinstance(vars(learn)["_call_one"], LeanEvents)
        made["copy"] = copy.deepcopy(learn)  # before there is a loss, which nobody can copy
        made["pickle"] = pickle.dumps(learn)
        learn.dls.new_empty = lambda: None
        learn.export("export.pkl")
        assert isinstance(vars(learn)["_call_one"], LeanEvents)
        raise CancelFitException  # an export takes the batch away

    learn.loss_func = torch.nn.CrossEntropyLoss()  # which can be pickled
    learn.metrics = []
    learn.logger = print
    with learn.added_cbs(before_a_batch := BeforeABatch()):
        before_a_batch.do(make)
        learn.fit(1)
    assert events.__name__ not in str(made["pickle"])
    exported = (tmp_path / "export.pkl").read_bytes()
    assert b"channelslast" not in exported
    for copied in (made["copy"], pickle.loads(made["pickle"]), load_learner(tmp_path / "export.pkl", cpu=False)):
        assert not isinstance(vars(copied).get("_call_one"), LeanEvents)
        copied.remove_cbs(BeforeABatch)
        assert copied.model is not learn.model
        copied("after_pred")


class BeforeABatch(Callback):
    "Calls a function before the first batch; what copies of it do not call."

    function = None

    def do(self, function):
        type(self).function = staticmethod(function)

    def before_batch(self):
        function, type(self).function = type(self).function, None
        if function is not None:
            function(self)


def test_weights_are_those_of_fastais_events(new, monkeypatch):
    "With a model of several layers, and dropout."

    def deep():
        return new(model=lambda: torch.nn.Sequential(*list(TinyNet())[:-1], torch.nn.Dropout(), torch.nn.Linear(16, 3)))

    assert_as_fastai(deep, of_fastai, monkeypatch)
