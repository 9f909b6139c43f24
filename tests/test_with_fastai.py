"ChannelsLast together with the rest of fastai: the same training as in contiguous format, and in the right format."

import copy
import pickle
from functools import partial
from itertools import permutations
from types import MappingProxyType

import numpy as np
import pytest
import torch
from conftest import new_dls
from fastai import distributed  # noqa: F401, for `to_parallel`
from fastai.callback import schedule  # noqa: F401, for `fine_tune`, `fit_one_cycle` and `lr_find`
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import BnFreeze, GradientAccumulation, GradientClip
from fastai.data.block import CategoryBlock, DataBlock
from fastai.interpret import ClassificationInterpretation, SegmentationInterpretation
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import foreground_acc
from fastai.optimizer import SGD, OptimWrapper
from fastai.torch_core import set_seed
from fastai.vision import learner  # noqa: F401, for `plot_top_losses` of images
from fastai.vision.core import PILImage, PILMask
from fastai.vision.data import ImageBlock, MaskBlock
from fastcore.basics import noop
from matplotlib import pyplot as plt
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from channelslast.callback import ChannelsLast
from channelslast.formats import TrainFormat
from channelslast.memory_format import is_channels_last
from channelslast.precision import FastaiMixedPrecision, MixedPrecision


class Net(nn.Module):
    "A convolutional classifier of 3-channel images in a body and a head, with a 1x1 convolution and a depthwise one."

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))

    def forward(self, x):
        return self.head(self.run_body(self.stem(x)))

    def run_body(self, x):
        return self.body(x)


class Spy(Callback):
    "Keeps what the model received in training, and the formats of its inputs and gradients whenever they were there."

    order = 100

    def __init__(self):
        self.clear()

    def clear(self):
        self.received, self.inputs, self.grads = [], set(), set()

    def before_batch(self):
        self.inputs.update(is_channels_last(x) for x in self.xb)
        if self.training:
            self.received.append(self.xb[0].clone())

    def after_backward(self):
        grads = [param.grad for param in self.model.parameters() if param.ndim == 4 and param.grad is not None]
        self.grads.update(is_channels_last(grad) for grad in grads)


momentum_sgd = partial(SGD, mom=0.9)


def body_and_head(model):
    return [[*model.stem.parameters(), *model.body.parameters()], [*model.head.parameters()]]


@pytest.fixture(params=[None, "bf16"], ids=["fp32", "bf16"])
def amp_mode(request, bf16_cpu):
    return request.param


@pytest.fixture
def twins(new_learner, amp_mode, tmp_path):
    "A function that makes a Learner twice, contiguous and channels last, in one precision, each with new callbacks."
    return partial(make_twins, new_learner, tmp_path, amp_mode)


def make_twins(new_learner, tmp_path, amp_mode, model=Net, cbs=(), scaler_options=MappingProxyType({}), **kwargs):
    learners = []
    for channels_last in (False, True):
        new_cbs = [Spy(), *(cb() for cb in cbs)]
        kwargs = {"opt_func": momentum_sgd, "splitter": body_and_head, **kwargs, "path": tmp_path / str(channels_last)}
        learn = new_learner(model, cbs=new_cbs, **kwargs)
        learners.append(learn.to_format(TrainFormat(channels_last, amp_mode), **scaler_options))
    return learners


def each(learners, train):
    "What `train` gives for each Learner, from the same random state."
    results = []
    for learn in learners:
        set_seed(0)
        with learn.no_mbar():
            results.append(train(learn))
    return results


def assert_close(ours, plain, amp_mode):
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if amp_mode is None else {"rtol": 5e-2, "atol": 5e-2}
    torch.testing.assert_close(torch.as_tensor(ours).float(), torch.as_tensor(plain).float(), **tolerance)


def assert_trained_alike(plain, ours):
    "Both Learners have the same losses, metrics and weights, and everything of `ours` alone is channels last."
    amp_mode = ours.train_format.amp_mode
    assert_close(torch.stack(ours.recorder.losses), torch.stack(plain.recorder.losses), amp_mode)
    assert_close(list(map(list, ours.recorder.values)), list(map(list, plain.recorder.values)), amp_mode)
    for a, b in zip(ours.model.state_dict().values(), plain.model.state_dict().values(), strict=True):
        assert_close(a, b, amp_mode)
    assert_format(plain, False)
    assert_format(ours, True)


def assert_format(learn, channels_last):
    "Weights, what the optimizer keeps of them, and all inputs and gradients that there were, are in one format."
    for param in learn.model.parameters():
        if param.ndim == 4:
            assert is_channels_last(param) is channels_last
    opt = learn.opt.opt if isinstance(learn.opt, OptimWrapper) else learn.opt
    kept = [(param, value) for param, state in opt.state.items() for value in state.values() if torch.is_tensor(value)]
    kept = [(param, value) for param, value in kept if param.ndim == 4 and value.ndim == 4]
    assert kept or not learn.spy.grads
    assert all(value.stride() == param.stride() for param, value in kept)
    assert learn.spy.inputs == {channels_last}
    assert learn.spy.grads <= {channels_last}


def count(learn, cls):
    return sum(isinstance(cb, cls) for cb in learn.cbs)


def copied_parameters(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def moved(before, model):
    "The parts of `model` of which a parameter is no longer what it was."
    return {
        name.split(".")[0] for name, param in model.named_parameters() if not torch.equal(param.detach(), before[name])
    }


# Callbacks


@pytest.mark.parametrize("mix", [MixUp, CutMix])
def test_mixed_images_train_alike(twins, mix):
    plain, ours = twins(cbs=[mix])
    each((plain, ours), lambda learn: learn.fit(2))
    assert_trained_alike(plain, ours)
    assert all(torch.equal(a, b) for a, b in zip(ours.spy.received, plain.spy.received, strict=True))
    data = [x for x, _ in new_dls(3, 8, 8).train]
    assert not all(torch.equal(seen, x) for seen, x in zip(ours.spy.received, data))


class CountSteps(Callback):
    n_steps = 0

    def after_step(self):
        self.n_steps += 1


def test_gradients_accumulate_over_batches(twins):
    plain, ours = twins(cbs=[lambda: GradientAccumulation(16), CountSteps])
    each((plain, ours), lambda learn: learn.fit(2))
    assert_trained_alike(plain, ours)
    assert ours.spy.grads == {True}
    assert ours.count_steps.n_steps == 3  # of 6 batches of 8


class GradientNorm(Callback):
    "Records the norm of all gradients after each backward pass, and again as the optimizer steps."

    order = GradientClip.order + 1

    def before_fit(self):
        self.norms, self.clipped = [], []

    def after_backward(self):
        self.norms.append(self.norm())

    def before_step(self):
        self.clipped.append(self.norm())

    def norm(self):
        return torch.stack([param.grad.norm() for param in self.model.parameters()]).norm().item()


def test_gradients_are_clipped(twins):
    plain, ours = twins(cbs=[lambda: GradientClip(0.1), GradientNorm])
    each((plain, ours), lambda learn: learn.fit(2))
    assert_trained_alike(plain, ours)
    assert min(ours.gradient_norm.norms) > 0.2
    assert ours.gradient_norm.clipped == pytest.approx([0.1] * 6, rel=1e-3)


def assert_mixed_accumulated_and_clipped_alike(plain, ours):
    each((plain, ours), lambda learn: learn.fit(2))
    assert_trained_alike(plain, ours)
    assert ours.spy.grads == {True}
    assert ours.count_steps.n_steps == 3
    assert ours.gradient_norm.clipped == pytest.approx([0.02] * 3, rel=1e-3)


ALL_AT_ONCE = (MixUp, lambda: GradientAccumulation(16), lambda: GradientClip(0.02), CountSteps, GradientNorm)


def test_callbacks_work_all_at_once(twins):
    assert_mixed_accumulated_and_clipped_alike(*twins(cbs=ALL_AT_ONCE))


@pytest.mark.cuda
def test_callbacks_work_all_at_once_with_a_loss_that_is_scaled(new_learner, tmp_path):
    options = {"init_scale": 256.0}
    twins = make_twins(new_learner, tmp_path, "fp16", cbs=ALL_AT_ONCE, scaler_options=options, device="cuda")
    assert_mixed_accumulated_and_clipped_alike(*twins)


class Average(Callback):
    "Validates with a moving average of the weights."

    def before_fit(self):
        self.averaged = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)

    def after_step(self):
        self.averaged.update_parameters(self.model)

    def before_validate(self):
        self.trained, self.learn.model = self.model, self.averaged.module

    def after_validate(self):
        self.learn.model = self.trained


class AverageLate(Average):
    "Copies the model once it is converted."

    order = ChannelsLast.order + 1


def parameters_channels_last(model):
    return all(is_channels_last(param) for param in model.parameters() if param.ndim == 4)


@pytest.mark.parametrize("average", [Average, AverageLate])
def test_averaged_weights_validate_alike(twins, average):
    plain, ours = twins(cbs=[lambda: average()])
    each((plain, ours), lambda learn: learn.fit(3))
    assert_trained_alike(plain, ours)
    averages = [getattr(learn, average().name).averaged.module for learn in (plain, ours)]
    for a, b in zip(averages[1].parameters(), averages[0].parameters()):
        assert_close(a, b, ours.train_format.amp_mode)
    values = ours.recorder.values[-1]
    ours.model = averages[1]
    assert list(ours.validate()) == pytest.approx(list(values[1:]), rel=1e-2)


@pytest.mark.parametrize("average", [Average, AverageLate])
def test_model_that_a_callback_validates_in_place_of_ours_is_channels_last(twins, average):
    formats = []

    class Formats(Callback):
        order = 100

        def after_pred(self):
            if not self.training:
                formats.append(parameters_channels_last(self.model))

    _, ours = twins(cbs=[average, Formats])
    ours.fit(2)
    assert set(formats) == {True}


@pytest.mark.parametrize("with_opt", [False, True])
def test_best_model_is_saved_contiguous_and_loaded_channels_last(twins, with_opt):
    weights = []

    def train(learn):
        learn.fit(2, cbs=Callback(after_epoch=lambda cb: weights.append(copied_parameters(cb.model))))

    # the highest loss counts as the best: that of the first epoch
    plain, ours = twins(cbs=[lambda: SaveModelCallback(with_opt=with_opt, comp=np.greater)])
    each((plain, ours), train)
    assert not moved(weights[2], ours.model) and moved(weights[3], ours.model)
    assert parameters_channels_last(ours.model)
    files = [torch.load(learn.path / "models" / "model.pth", weights_only=False) for learn in (plain, ours)]
    plain_state, state = (file["model"] if with_opt else file for file in files)
    for name, value in state.items():
        assert value.is_contiguous() and value.stride() == plain_state[name].stride()
        assert torch.equal(value, ours.model.state_dict()[name])
    each((plain, ours), lambda learn: learn.remove_cb(SaveModelCallback).fit(1))
    assert_trained_alike(plain, ours)


def test_checkpoint_of_every_epoch_is_the_model_of_that_epoch(twins):
    weights = []
    _, ours = twins(cbs=[lambda: SaveModelCallback(every_epoch=True)])
    ours.fit(2, cbs=Callback(after_epoch=lambda cb: weights.append(copied_parameters(cb.model))))
    for epoch, expected in enumerate(weights):
        state = torch.load(ours.path / "models" / f"model_{epoch}.pth", weights_only=False)
        for name, value in expected.items():
            assert state[name].is_contiguous() and torch.equal(state[name], value)
    assert_format(ours, True)


def test_fit_that_stops_early_can_be_taken_up_again(twins):
    def train(learn):
        learn.fit(5, cbs=EarlyStoppingCallback(min_delta=10.0))
        assert len(learn.recorder.values) == 2
        learn.fit(3)

    plain, ours = twins()
    each((plain, ours), train)
    assert len(ours.recorder.values) == 3
    assert_trained_alike(plain, ours)


def test_lr_find_suggests_alike_and_leaves_no_trace(twins, amp_mode):
    def train(learn):
        learn.fit(1)
        before = copied_parameters(learn.model)
        suggested = learn.lr_find(num_it=20, show_plot=False).valley
        assert not moved(before, learn.model)
        return suggested

    plain, ours = twins()
    suggested = each((plain, ours), train)
    assert parameters_channels_last(ours.model)
    if amp_mode is None:
        assert suggested[0] == pytest.approx(suggested[1])
    each((plain, ours), lambda learn: learn.fit(2))
    assert_trained_alike(plain, ours)


@pytest.mark.parametrize("make_opt", [torch.optim.SGD, torch.optim.AdamW])
def test_optimizers_of_pytorch_train_alike(twins, make_opt):
    opt_func = partial(OptimWrapper, opt=partial(make_opt, momentum=0.9) if make_opt is torch.optim.SGD else make_opt)
    plain, ours = twins(opt_func=opt_func, lr=1e-3)
    each((plain, ours), lambda learn: learn.fit_one_cycle(3))
    assert_trained_alike(plain, ours)


# Freezing


def test_frozen_layers_do_not_move_and_do_once_unfrozen(twins):
    def train(learn):
        before = copied_parameters(learn.model)
        learn.freeze()
        learn.fit(1)
        assert moved(before, learn.model) == {"head"}
        learn.unfreeze()
        learn.fit(1)
        assert moved(before, learn.model) == {"stem", "body", "head"}

    plain, ours = twins(train_bn=False)
    each((plain, ours), train)
    assert_trained_alike(plain, ours)


def test_fine_tune_trains_the_head_and_then_all(twins):
    learnt = []

    class Learnt(Callback):
        def before_fit(self):
            self.before = copied_parameters(self.model)

        def after_fit(self):
            learnt.append(moved(self.before, self.model))

    plain, ours = twins(cbs=[Learnt], train_bn=False)
    each((plain, ours), lambda learn: learn.fine_tune(2, base_lr=0.1))
    assert learnt == [{"head"}, {"stem", "body", "head"}] * 2
    assert_trained_alike(plain, ours)


def test_frozen_batchnorm_keeps_its_statistics(twins):
    def train(learn):
        learn.fit(1)
        learn.freeze()
        before = learn.model.body[1].running_mean.clone()
        learn.fit(1, cbs=BnFreeze())
        assert torch.equal(learn.model.body[1].running_mean, before)
        learn.fit(1)
        assert not torch.equal(learn.model.body[1].running_mean, before)

    plain, ours = twins(train_bn=False)
    each((plain, ours), train)
    assert_trained_alike(plain, ours)


# Data


def test_images_grow_between_fits(twins):
    def train(learn):
        for size in (8, 12, 17):
            learn.dls = new_dls(3, size, size)
            learn.fit(1)

    plain, ours = twins()
    each((plain, ours), train)
    assert_trained_alike(plain, ours)
    assert [x.shape[-1] for x in ours.spy.received] == [8] * 3 + [12] * 3 + [17] * 3


# Precision, before and after


CALLS = {  # what each makes of the memory format and the precision asked for, None: leaves it
    "to_fp16": (None, "fp16"),
    "to_bf16": (None, "bf16"),
    "to_fp32": (None, "fp32"),
    "to_channelslast": (True, "fp16"),
    "to_contiguous": (False, None),
}


@pytest.mark.parametrize("names", list(permutations(CALLS)), ids=" ".join)
def test_last_call_wins_in_every_order(new_learner, bf16_cpu, names):
    learn = new_learner(dls=new_dls(3, 8, 8, n=8), cbs=Spy())
    channels_last, asked = False, "fp32"
    for name in names:
        new_format, new_precision = CALLS[name]
        if new_precision == "fp16" and asked != "fp16":
            with pytest.warns(UserWarning, match="amp_mode='fp16'.*training in bfloat16 instead"):
                assert getattr(learn, name)() is learn
        else:
            assert getattr(learn, name)() is learn
        channels_last = channels_last if new_format is None else new_format
        asked = new_precision or asked
        assert learn.train_format == TrainFormat(channels_last, None if asked == "fp32" else "bf16")
        assert count(learn, FastaiMixedPrecision) == (asked != "fp32")
        assert count(learn, ChannelsLast) == channels_last
        autocast, before = set(), copied_parameters(learn.model)
        learn.spy.clear()
        learn.fit(1, cbs=Callback(after_pred=lambda cb, seen=autocast: seen.add(torch.is_autocast_enabled("cpu"))))
        assert autocast == {asked != "fp32"}
        assert moved(before, learn.model)
        assert_format(learn, channels_last)


# Other ways to run a model


@pytest.fixture
def no_gpu(monkeypatch):
    "Data parallel on a CPU also where there are GPUs."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_data_parallel_context_trains_alike(twins, no_gpu):
    models = []

    def train(learn):
        with learn.parallel_ctx():
            learn.fit(2, cbs=Callback(after_pred=lambda cb: models.append(type(cb.model))))

    plain, ours = twins()
    each((plain, ours), train)
    assert set(models) == {nn.DataParallel}
    assert type(ours.model) is Net
    assert_trained_alike(plain, ours)


@pytest.mark.parametrize("is_before", [True, False], ids=["before", "after"])
def test_to_parallel_before_and_after_to_channelslast(twins, no_gpu, is_before):
    def train(learn):
        fmt = learn.train_format
        learn.to_format(TrainFormat())
        if is_before:
            learn.to_parallel().to_format(fmt)
        else:
            learn.to_format(fmt).to_parallel()
        learn.fit(1)
        learn.detach_parallel().fit(1)

    plain, ours = twins()
    each((plain, ours), train)
    assert_trained_alike(plain, ours)


@pytest.mark.multi_gpu
def test_data_parallel_on_two_gpus_trains_alike(new_learner, tmp_path):
    plain, ours = make_twins(new_learner, tmp_path, "bf16", device="cuda")
    each((plain, ours), lambda learn: learn.to_parallel().fit(2))
    ours.spy.grads.discard(False)  # of the 1x1 kernels, which DataParallel's sum over the GPUs hands back contiguous
    assert_trained_alike(plain, ours)


@pytest.fixture
def graphs():
    "The formats of the 4D inputs and weights of each graph that PyTorch's compiler made, in eager mode."
    torch.compiler.reset()
    yield []
    torch.compiler.reset()


def eager_backend(graphs, graph, inputs):
    graphs.append({is_channels_last(x) for x in inputs if torch.is_tensor(x) and x.ndim == 4})
    return graph.forward


@pytest.mark.parametrize("is_before", [True, False], ids=["before", "after"])
def test_model_compiled_before_and_after_to_channelslast_trains_alike(twins, graphs, is_before):
    plain, ours = twins()
    backend = partial(eager_backend, graphs)
    if is_before:
        fmt = ours.train_format
        ours.to_contiguous(to_fp32=True)
        ours.model.compile(backend=backend)
        ours.to_channelslast(use_amp=fmt.amp_mode is not None, amp_mode=fmt.amp_mode or "bf16")
    else:
        ours.model.compile(backend=backend)
    each((plain, ours), lambda learn: learn.fit(2))
    assert ours.train_format == TrainFormat(True, plain.train_format.amp_mode, "default")
    assert graphs and all(formats == {True} for formats in graphs)
    assert_trained_alike(plain, ours)


def test_compiled_model_follows_from_one_format_to_the_other(twins, graphs):
    def train(learn):
        fmt = learn.train_format
        learn.to_contiguous().fit(1)
        learn.spy.clear()
        if fmt.channels_last:
            learn.to_channelslast(use_amp=fmt.amp_mode is not None, amp_mode=fmt.amp_mode or "bf16")
        learn.fit(1)

    plain, ours = twins()
    ours.model.compile(backend=partial(eager_backend, graphs))
    each((plain, ours), train)
    assert {False} in graphs and {True} in graphs
    assert_trained_alike(plain, ours)


def test_backward_of_a_compiled_model_gives_channels_last_gradients(twins, graphs):
    plain, ours = twins()
    ours.model.compile(backend="aot_eager")
    each((plain, ours), lambda learn: learn.fit(1))
    assert ours.spy.grads == {True}
    assert_trained_alike(plain, ours)


class Checkpointed(Net):
    "Runs its body a second time in the backward pass, in place of keeping the activations."

    def __init__(self, use_reentrant):
        super().__init__()
        self.use_reentrant = use_reentrant
        self.seen = []
        self.body.register_forward_pre_hook(self.see)

    def see(self, module, args):
        if self.training:
            self.seen.append((is_channels_last(args[0]), torch.is_autocast_enabled("cpu")))

    def run_body(self, x):
        return self.run_checkpointed(x) if self.training else super().run_body(x)

    def run_checkpointed(self, x):
        return checkpoint(self.body, x, use_reentrant=self.use_reentrant)


class CheckpointedInParts(Checkpointed):
    def __init__(self, use_reentrant):
        super().__init__(use_reentrant)
        self.body[0].register_forward_pre_hook(self.see)

    def run_checkpointed(self, x):
        return checkpoint_sequential(self.body, 2, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("model", [Checkpointed, CheckpointedInParts])
def test_activations_computed_again_are_those_of_the_forward_pass(twins, amp_mode, model, use_reentrant):
    plain, ours = twins(partial(model, use_reentrant))
    each((plain, ours), lambda learn: learn.fit(2))
    assert ours.model.seen == [(True, amp_mode is not None)] * 12  # twice for each of 6 batches
    assert_trained_alike(plain, ours)


# Looking at results


def random_image(i):
    return PILImage.create(np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8))


def label(i):
    return "abc"[i % 3]


def random_mask(i):
    return PILMask.create(np.random.default_rng(i).integers(0, 2, (8, 8), dtype=np.uint8))


def image_dls(target=CategoryBlock, get_y=label):
    block = DataBlock((ImageBlock, target), get_x=random_image, get_y=get_y)
    set_seed(0)
    return block.dataloaders(list(range(24)), bs=4, num_workers=0, device=torch.device("cpu"))


@pytest.fixture
def image_twins(twins):
    "Two Learners of images through fastai's data blocks, trained."

    def make(model=Net, new_dls=image_dls, **kwargs):
        plain, ours = twins(model, dls=new_dls(), **kwargs)
        plain.dls = new_dls()
        each((plain, ours), lambda learn: learn.fit(2))
        ours.spy.clear()
        plain.spy.clear()
        return plain, ours

    return make


@pytest.fixture
def drawn():
    "A function that tells the titles in the pictures drawn since the test began."
    backend = plt.get_backend()
    plt.switch_backend("agg")
    plt.close("all")
    yield lambda: [axes.get_title() for number in plt.get_fignums() for axes in plt.figure(number).axes]
    plt.close("all")
    plt.switch_backend(backend)


def pixels():
    "The pictures drawn."
    return [
        np.asarray(image.get_array())
        for number in plt.get_fignums()
        for axes in plt.figure(number).axes
        for image in axes.get_images()
    ]


@pytest.mark.parametrize(
    "predict",
    [
        lambda learn: learn.get_preds()[0],
        lambda learn: learn.tta(n=2, beta=None)[0],
        lambda learn: learn.predict(random_image(0))[2],
    ],
    ids=["get_preds", "tta", "predict"],
)
def test_predictions_are_alike(image_twins, amp_mode, predict):
    plain, ours = image_twins()
    expected, preds = each((plain, ours), predict)
    for a, b in zip(preds, expected, strict=True):
        assert_close(a, b, amp_mode)
    assert_format(ours, True)


def test_results_are_shown_alike(image_twins, amp_mode, drawn):
    plain, ours = image_twins()
    each([plain], lambda learn: learn.show_results(max_n=4))
    expected, pictures = drawn(), pixels()
    plt.close("all")
    each([ours], lambda learn: learn.show_results(max_n=4))
    assert len(drawn()) == len(pictures) == 4
    if amp_mode is None:
        assert drawn() == expected  # the target and the prediction of each
    assert all(np.array_equal(a, b) for a, b in zip(pixels(), pictures, strict=True))
    assert_format(ours, True)


def test_interpretation_of_a_classifier_is_alike(image_twins, amp_mode, drawn):
    plain, ours = image_twins()
    expected, found = each((plain, ours), ClassificationInterpretation.from_learner)
    assert_close(found.losses, expected.losses, amp_mode)
    if amp_mode is None:
        assert np.array_equal(found.confusion_matrix(), expected.confusion_matrix())
        assert torch.equal(found.top_losses()[1], expected.top_losses()[1])
    with ours.no_mbar():
        found.plot_top_losses(4)
        titles = drawn()
    assert len(titles) == 4 and all(title.count("/") == 3 for title in titles)
    assert_format(ours, True)


class Segmenter(Net):
    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(16, 2, 3, padding=1)


def test_interpretation_of_a_segmentation_model_is_alike(image_twins, amp_mode, drawn):
    dls = partial(image_dls, MaskBlock(["a", "b"]), random_mask)
    plain, ours = image_twins(Segmenter, dls, loss_func=CrossEntropyLossFlat(axis=1), metrics=foreground_acc)
    expected, found = each((plain, ours), SegmentationInterpretation.from_learner)
    assert_close(found.losses, expected.losses, amp_mode)
    with ours.no_mbar():
        found.plot_top_losses(2)
    assert [title.split(";")[0] for title in drawn()] == ["input", "target", "pred"] * 2
    assert_format(ours, True)


# Copies


def through_pickle(learn):
    return pickle.loads(pickle.dumps(learn))


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_copy_of_a_learner_trains_on_by_itself(twins, amp_mode, copied):
    plain, ours = twins()
    ours.logger = noop  # as fastai's `print`, this one can be pickled
    each((plain, ours), lambda learn: learn.fit(1))
    other = copied(ours)
    assert count(other, ChannelsLast) == 1 and count(other, MixedPrecision) == (amp_mode is not None)
    assert all(cb.learn is other for cb in other.cbs)
    before = copied_parameters(ours.model)
    each([plain, other], lambda learn: learn.fit(2))
    assert not moved(before, ours.model)
    assert_trained_alike(plain, other)
    each([ours], lambda learn: learn.fit(2))
    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), other.model.parameters()))
    other.to_contiguous(to_fp32=True)
    assert parameters_channels_last(ours.model) and not parameters_channels_last(other.model)
    assert ours.train_format == TrainFormat(True, amp_mode)
