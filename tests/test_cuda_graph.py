"`TrainFormat.cuda_graph` on a Learner: it trains as its eager twin does, whatever comes next."

import copy
import gc
import pickle
import warnings

import pytest
import torch
from conftest import TinyNet, new_dls, wrapped_adamw
from fastai.callback.core import Callback, CancelBatchException, CancelStepException
from fastai.callback.hook import ActivationStats
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import fine_tune, fit_one_cycle, lr_find  # noqa: F401, methods of Learner
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import BnFreeze, GradientAccumulation, GradientClip
from fastai.learner import Learner
from fastai.optimizer import SGD, Adam, Lookahead, ranger
from torch import nn

from channelslast import TrainFormat
from channelslast.graphs import CudaGraph, GraphedModule, callback

FORMATS = [TrainFormat(True), TrainFormat(True, "fp16"), TrainFormat(False, "bf16")]


@pytest.fixture(autouse=True)
def deterministic(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def with_graph(fmt):
    return TrainFormat(**{**vars(fmt), "cuda_graph": True})


def model_with_dropout():
    return nn.Sequential(*list(TinyNet())[:-1], nn.Dropout(0.3), nn.Linear(16, 3))


@pytest.fixture
def twins(new_learner):
    "A function that makes an eager Learner and one with graphs, equal in all else."

    def make(fmt=FORMATS[1], model=model_with_dropout, dls=None, **kwargs):
        def one(fmt):
            made = dict(kwargs)
            made["cbs"] = [cb() for cb in made.get("cbs", [])]
            data = dls() if dls else new_dls(3, 8, 8, n=44, device="cuda")
            return new_learner(model, data, device="cuda", **made).to_format(fmt)

        return one(fmt), one(with_graph(fmt))

    return make


def state(learn):
    values = [*learn.model.state_dict().values()]
    for state in (learn.opt.opt.state if hasattr(learn.opt, "opt") else learn.opt.state).values():
        values += [value for value in state.values() if torch.is_tensor(value)]
    return values


def assert_same(eager, graph):
    for a, b in zip(state(eager), state(graph), strict=True):
        assert torch.equal(a, b)


def train_both(eager, graph, train=lambda learn: learn.fit(2)):
    for learn in (eager, graph):
        torch.manual_seed(3)
        train(learn)
    assert eager.recorder.losses == graph.recorder.losses
    for a, b in zip(eager.recorder.values, graph.recorder.values, strict=True):
        assert list(a) == list(b)
    assert_same(eager, graph)


def n_replays(learn, train):
    "How many batches `train` trained by replay."
    seen = []

    class Counts(Callback):
        order = 2000

        def after_batch(self):
            seen.append(self.learn.cuda_graph.graphed.n_replays)

    with learn.added_cbs(Counts()):
        train(learn)
    return seen


@pytest.mark.cuda
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("opt_func", [Adam, SGD, ranger, wrapped_adamw])
def test_trains_as_eager_to_the_bit(twins, fmt, opt_func):
    eager, graph = twins(fmt, opt_func=opt_func)
    train_both(eager, graph)
    train_both(eager, graph, lambda learn: learn.fit(1))
    assert graph.train_format == with_graph(fmt)


@pytest.mark.cuda
def test_all_but_the_last_short_batch_are_replayed(twins):
    _, graph = twins()
    seen = n_replays(graph, lambda learn: learn.fit(1))
    train = seen[:6]
    assert train == [2, 4, 6, 8, 10, 10], "forward and backward of five full batches, and not of the short one"


@pytest.mark.cuda
@pytest.mark.parametrize(
    "cbs",
    [
        [lambda: GradientAccumulation(n_acc=16)],
        [lambda: GradientClip(0.1)],
        [MixUp],
        [BnFreeze],
        [lambda: GradientAccumulation(n_acc=24), lambda: GradientClip(0.1), MixUp],
    ],
    ids=["GradientAccumulation", "GradientClip", "MixUp", "BnFreeze", "all"],
)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_with_callbacks_of_fastai(twins, cbs, fmt):
    train_both(*twins(fmt, cbs=cbs))


class Averages(Callback):
    "Keep an average of the weights, and validate with it."

    def before_fit(self):
        self.average = [param.detach().clone() for param in self.model.parameters()]

    def after_step(self):
        for average, param in zip(self.average, self.model.parameters()):
            average.lerp_(param.detach(), 0.1)

    def swap(self):
        for i, param in enumerate(self.model.parameters()):
            self.average[i], param.data = param.data, self.average[i]

    before_validate = after_validate = swap


class Skips(Callback):
    "Cancel a batch before its model runs, one after, and a step."

    order = 1500

    def before_batch(self):
        if self.training and self.iter == 1:
            raise CancelBatchException

    def after_loss(self):
        if self.training and self.iter == 2:
            raise CancelBatchException

    def before_step(self):
        if self.iter == 3:
            raise CancelStepException


class ChangesTheModel(Callback):
    def before_epoch(self):
        if self.epoch == 1:
            self.model[-2].p = 0.1
        if self.epoch == 2:
            self.model[-1].weight = nn.Parameter(self.model[-1].weight.detach() * 0.5)


@pytest.mark.cuda
@pytest.mark.parametrize("cb", [Averages, Skips, ChangesTheModel])
def test_with_callbacks_that_change_what_comes_next(twins, cb):
    train_both(*twins(cbs=[cb]), lambda learn: learn.fit(4))


@pytest.mark.cuda
def test_progressive_resizing(twins):
    def train(learn):
        for size in (8, 12, 8):
            learn.dls = new_dls(3, size, size, n=44, device="cuda")
            learn.fit(1)

    train_both(*twins(), train)


@pytest.mark.cuda
def test_lr_find_fine_tune_and_one_cycle(twins):
    def splitter(model):
        return [list(model[:4].parameters()), list(model[4:].parameters())]

    def train(learn):
        learn.lr_find(show_plot=False, num_it=10)
        learn.fine_tune(2, freeze_epochs=1)
        learn.fit_one_cycle(1, slice(1e-4, 1e-3))

    train_both(*twins(splitter=splitter), train)


@pytest.mark.cuda
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("event", ["before_batch", "after_pred", "before_backward", "before_step", "after_batch"])
def test_interrupt_and_the_next_fit(twins, error, event):
    class Raises(Callback):
        order = 1500

        def raise_at_the_third(self):
            if self.training and self.iter == 2:
                raise error("now")

    setattr(Raises, event, Raises.raise_at_the_third)

    def train(learn):
        with pytest.raises(error):
            learn.fit(1, cbs=Raises())
        assert isinstance(learn.model, nn.Module)
        learn.fit(1)

    train_both(*twins(), train)


class InterruptsOnce(nn.Module):
    calls = 0

    def forward(self, x):
        type(self).calls += 1
        if type(self).calls == 3:
            raise KeyboardInterrupt
        return x


@pytest.mark.cuda
def test_interrupt_in_a_capture(twins):
    eager, graph = twins(model=lambda: nn.Sequential(InterruptsOnce(), *model_with_dropout()))
    before = [value.cpu() for value in graph.model.state_dict().values()]
    InterruptsOnce.calls = 0
    with pytest.raises(KeyboardInterrupt):
        graph.fit(1)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(before, graph.model.state_dict().values()))
    train_both(eager, graph)


@pytest.mark.cuda
def test_hooks_of_callbacks_are_called(twins):
    eager, graph = twins()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train_both(eager, graph, lambda learn: learn.fit(1, cbs=ActivationStats()))
    with pytest.warns(UserWarning, match=r"No CUDA graph.*has hooks"):
        graph.fit(1, cbs=ActivationStats(every=1))
    train_both(*twins())


@pytest.mark.cuda
def test_files_in_the_middle_of_training(twins, tmp_path):
    eager, graph = twins(cbs=[lambda: SaveModelCallback(every_epoch=True, with_opt=True)], path=tmp_path)
    train_both(eager, graph, lambda learn: (learn.fit(2), learn.load("model_0", with_opt=True), learn.fit(1)))


@pytest.mark.cuda
def test_copies_and_pickles_in_the_middle_of_training(twins, tmp_path):
    class Copies(Callback):
        order = 2000

        def after_batch(self):
            copy.deepcopy(self.model)
            pickle.loads(pickle.dumps(self.model))

    eager, graph = twins(path=tmp_path)
    train_both(eager, graph, lambda learn: learn.fit(1, cbs=Copies()))
    copied = copy.deepcopy(graph.model)
    assert "forward" not in vars(copied)
    assert graph.train_format.cuda_graph


@pytest.mark.cuda
def test_model_that_cannot_be_captured_trains_eagerly_with_one_warning(twins):
    class Waits(nn.Module):
        def forward(self, x):
            return x * (2.0 if x.sum().item() > 1e9 else 1.0)

    eager, graph = twins(model=lambda: nn.Sequential(model_with_dropout(), Waits()))
    with pytest.warns(UserWarning, match=r"No CUDA graph of Sequential.*`1`") as told:
        train_both(eager, graph)
    assert len([w for w in told if "CUDA graph" in str(w.message)]) == 1
    assert "`1`" in graph.cuda_graph.reason


@pytest.mark.cuda
def test_going_back_and_forth(twins):
    eager, graph = twins()
    train_both(eager, graph, lambda learn: learn.fit(1))
    graph.to_format(TrainFormat(True, "fp16"))
    assert not any(isinstance(cb, CudaGraph) for cb in graph.cbs)
    train_both(eager, graph, lambda learn: learn.fit(1))
    eager.to_format(TrainFormat(False, "fp16"))
    graph.to_format(TrainFormat(False, "fp16", cuda_graph=True))
    train_both(eager, graph, lambda learn: learn.fit(1))


@pytest.mark.cuda
def test_gpu_memory_is_given_back_after_a_fit(twins):
    _, graph = twins()
    graph.fit(1)
    assert graph.cuda_graph.graphed is None


@pytest.mark.cuda
def test_to_channelslast_and_to_contiguous_keep_the_graph(twins):
    _, graph = twins()
    assert graph.to_contiguous().train_format == TrainFormat(False, "fp16", cuda_graph=True)
    assert graph.to_channelslast(amp_mode="bf16").train_format == TrainFormat(True, "bf16", cuda_graph=True)


# Without a GPU


def test_without_cuda_it_is_an_error_and_nothing_has_changed(learn):
    before, cbs = learn.train_format, list(learn.cbs)
    with pytest.raises(ValueError, match=r"cuda_graph=True.*'cpu'.*CUDA"):
        learn.to_format(TrainFormat(True, "bf16", cuda_graph=True))
    assert learn.train_format == before and list(learn.cbs) == cbs


@pytest.mark.parametrize("name", ["cuda_graph", "fused_optimizer"])
@pytest.mark.parametrize("value", [1, None, "yes"])
def test_values_that_are_no_bool(name, value):
    with pytest.raises(ValueError, match=rf"{name}={value!r}: pass True or False"):
        TrainFormat(**{name: value})


def test_modes_of_compile_that_make_graphs_of_their_own():
    for mode in ("reduce-overhead", "max-autotune"):
        with pytest.raises(ValueError, match=rf"cuda_graph=True with compile='{mode}'.*compile='default'"):
            TrainFormat(compile=mode, cuda_graph=True)
    assert str(TrainFormat(True, "fp16", "default", cuda_graph=True)) == "channels last fp16 compiled graph"


def test_callback_puts_the_model_back_before_it_runs(learn):
    "The stand-in is there for one call, whatever graphs do."
    seen = []

    class Sees(Callback):
        order = 2000

        def after_pred(self):
            seen.append(self.learn.model)

    learn.add_cbs([CudaGraph(), Sees()])
    with pytest.warns(UserWarning, match="not on one CUDA device"):
        learn.fit(1)
    assert all(model is learn.model for model in seen) and isinstance(learn, Learner)


def test_summary_watches_the_model_itself(learn, bf16_cpu, recwarn):
    learn.add_cb(CudaGraph())
    cbs = list(learn.cbs)
    assert learn.format_summary().layers
    assert list(learn.cbs) == cbs and not [told for told in recwarn if "CUDA graph" in str(told.message)]


def test_other_methods_leave_what_the_learner_holds(learn, bf16_cpu):
    "Whatever it is: what cannot run here was put there by hand."
    learn.add_cb(CudaGraph())
    assert learn.to_channelslast(amp_mode="bf16").train_format.cuda_graph
    assert learn.to_contiguous(to_fp32=True).train_format == TrainFormat(cuda_graph=True)


def test_reason_is_kept_until_the_next_fit(learn):
    learn.add_cb(CudaGraph())
    with pytest.warns(UserWarning):
        learn.fit(1)
    reason = learn.cuda_graph.reason
    learn.validate()
    assert reason and learn.cuda_graph.reason == reason


def lookahead_adam(params, **kwargs):
    return Lookahead(Adam(params, **kwargs))


class RunsAsItIs(GraphedModule):
    "In the place of captured graphs, where there is no GPU."

    n_zeros = 0

    def __call__(self, *inputs):
        return self.module(*inputs)

    def gradients_are_zero(self):
        RunsAsItIs.n_zeros += 1


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("opt_func", [Adam, lookahead_adam, wrapped_adamw])
def test_gradients_are_known_to_be_zero_after_fastais_own_steps(new_learner, monkeypatch, opt_func, is_fused):
    monkeypatch.setattr(callback, "GraphedModule", RunsAsItIs)
    monkeypatch.setattr(RunsAsItIs, "n_zeros", 0)
    learn = new_learner(opt_func=opt_func).to_format(TrainFormat(fused_optimizer=is_fused))
    learn.fit(1, cbs=CudaGraph())
    assert RunsAsItIs.n_zeros == (0 if opt_func is wrapped_adamw else len(learn.dls.train))
