"What leaves a channels last Learner is canonical: checkpoints, exported Learners, and models for other runtimes."

import copy
import filecmp
import inspect
import subprocess
import sys
import warnings
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TinyNet, TinyVideoNet, new_dls, only_on, wrapped_adamw
from fastai.callback import schedule  # noqa: F401, for `fit_one_cycle`
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.tracker import (
    EarlyStoppingCallback,
    ReduceLROnPlateau,
    SaveModelCallback,
    TerminateOnNaNCallback,
    TrackerCallback,
)
from fastai.learner import Learner, load_learner, save_model
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam, ranger
from fastai.vision.data import ImageDataLoaders
from fastcore.basics import noop
from fastcore.foundation import L
from safetensors.torch import load_file, save_file
from safetensors.torch import load_model as load_safetensors
from safetensors.torch import save_model as save_safetensors
from torch import nn

from channelslast.callback import ChannelsLast
from channelslast.formats import TrainFormat
from channelslast.memory_format import is_channels_last, state_to_contiguous
from channelslast.precision import FastaiMixedPrecision, MixedPrecision


def image_net(n_out=3):
    "TinyNet of PyTorch's own classes alone, which a process without these tests can load."
    return nn.Sequential(*TinyNet(n_out))


def volume_net():
    return nn.Sequential(*TinyVideoNet())


SHAPES = {image_net: (3, 8, 8), volume_net: (2, 4, 8, 8)}
both_ranks = pytest.mark.parametrize("model", [image_net, volume_net])
every_optimizer = pytest.mark.parametrize("opt_func", [Adam, wrapped_adamw, ranger])


@pytest.fixture
def trained(new_learner, tmp_path):
    "A function that makes a Learner that has trained an epoch in channels last."

    def make(model=image_net, **kwargs):
        learn = new_learner(model, new_dls(*SHAPES[model]), path=tmp_path, **kwargs).to_channelslast(use_amp=False)
        learn.fit(1)
        return learn

    return make


def train_in_channels_last(model, dls, path=None, use_amp=False, **kwargs):
    "A Learner that has trained an epoch in channels last, of fastai's and PyTorch's own classes and functions alone."
    torch.manual_seed(0)
    learn = Learner(dls, model(), loss_func=CrossEntropyLossFlat(), lr=1e-2, path=path)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    learn.to_channelslast(use_amp, **kwargs).fit(1)
    return learn


def tensors_in(nested):
    if torch.is_tensor(nested):
        yield nested
    if isinstance(nested, dict):
        nested = [nested[key] for key in sorted(nested)]
    if isinstance(nested, (list, tuple, L)):
        for item in nested:
            yield from tensors_in(item)


def is_canonical(nested):
    "Whether all tensors in `nested`, of which one has a format to lose, have the strides that PyTorch gives new ones."
    tensors = list(tensors_in(nested))
    assert any(tensor.ndim in (4, 5) and min(tensor.shape[:2]) > 1 for tensor in tensors)
    return all(tensor.stride() == torch.empty(tensor.shape).stride() for tensor in tensors)


def is_in_channels_last(model):
    return all(is_channels_last(tensor) for tensor in model.parameters() if tensor.ndim in (4, 5))


def same(a, b):
    "Whether two states have the same values, to the bit."
    a, b = list(tensors_in(a)), list(tensors_in(b))
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b))


def contiguous_twin(model, new_model=image_net):
    "A contiguous model with the values of `model`: a new one, into which PyTorch copied them."
    twin = new_model()
    twin.load_state_dict(model.state_dict())
    return twin.eval()


# learn.save


@pytest.mark.parametrize(
    "model, opt_func", [(image_net, Adam), (image_net, wrapped_adamw), (image_net, ranger), (volume_net, Adam)]
)
def test_saved_file_is_byte_for_byte_that_of_a_contiguous_model(trained, model, opt_func, tmp_path):
    learn = trained(model, opt_func=opt_func)
    file = learn.save("file")
    state = torch.load(file, weights_only=False)
    assert is_canonical(state["model"]) and is_canonical(state["opt"])
    assert is_in_channels_last(learn.model)
    twin = contiguous_twin(learn.model, model)
    save_model(tmp_path / "file.pth", twin, learn.to_contiguous().opt)
    assert filecmp.cmp(file, tmp_path / "file.pth", shallow=False)


@both_ranks
def test_file_saved_without_the_optimizer_is_byte_for_byte_that_of_a_contiguous_model(trained, model, tmp_path):
    learn = trained(model)
    file = learn.save("file", with_opt=False)
    assert is_canonical(torch.load(file))
    save_model(tmp_path / "file.pth", contiguous_twin(learn.model, model), None)
    assert filecmp.cmp(file, tmp_path / "file.pth", shallow=False)


def test_saved_file_of_a_wrapped_model_is_that_of_the_model(trained):
    learn = trained()
    learn.model = nn.DataParallel(learn.model)
    state = torch.load(learn.save("wrapped", with_opt=False))
    assert state.keys() == image_net().state_dict().keys()
    assert is_canonical(state)


def test_saved_file_keeps_tied_weights_once(new_learner, tmp_path):
    def tied():
        model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        model[1].weight = model[0].weight
        return model

    learn = new_learner(tied, path=tmp_path).to_channelslast(use_amp=False)
    learn.fit(1)
    state = torch.load(learn.save("tied", with_opt=False))
    assert state["0.weight"].data_ptr() == state["1.weight"].data_ptr()
    assert is_canonical(state)


def test_save_shows_the_options_of_save_model_and_takes_them(new_learner, tmp_path):
    assert {"with_opt", "pickle_protocol"} <= set(inspect.signature(Learner.save).parameters)
    learn = new_learner(path=tmp_path)
    file = learn.save("unfitted", pickle_protocol=4)
    assert file == tmp_path / "models" / "unfitted.pth"
    assert is_canonical(torch.load(file, weights_only=False))


def test_saving_inside_an_epoch_does_not_disturb_it(trained):
    plain, saving = trained(), trained()
    plain.fit(1)
    saving.fit(1, cbs=Callback(after_batch=lambda cb: cb.learn.save(f"batch_{cb.iter}")))
    assert same(plain.model.state_dict(), saving.model.state_dict())
    assert is_in_channels_last(saving.model)


def wrapped_net():
    "image_net in the wrapper that `torch.compile` returns."
    return torch.compile(image_net(), backend="eager")


@pytest.mark.parametrize("saves", [image_net, wrapped_net])
@pytest.mark.parametrize("loads", [image_net, wrapped_net])
@pytest.mark.parametrize("by_fastai_alone", [False, True])
def test_file_of_a_wrapped_model_is_that_of_the_model(new_learner, tmp_path, saves, loads, by_fastai_alone):
    saving, loading = (new_learner(model, path=tmp_path).to_channelslast(use_amp=False) for model in (saves, loads))
    saving.fit(1)
    file = saving.save("file")
    assert torch.load(file, weights_only=False)["model"].keys() == image_net().state_dict().keys()
    if by_fastai_alone:
        save_model(file, saving.model, saving.opt)
    model = loading.model
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert loading.load("file") is loading
    assert loading.model is model and not model._load_state_dict_pre_hooks
    assert same(saving.model.state_dict(), loading.model.state_dict())
    assert same(saving.opt.state_dict(), loading.opt.state_dict())
    loading.fit(1)
    assert is_in_channels_last(loading.model)


def test_loading_that_fails_leaves_the_model_in_its_wrapper(new_learner, tmp_path):
    learn = new_learner(wrapped_net, path=tmp_path)
    model = learn.model
    torch.save({"something": "else"}, tmp_path / "other.pth")
    with pytest.raises(RuntimeError, match="Missing key"):
        learn.load(tmp_path / "other")
    assert learn.model is model and not model._load_state_dict_pre_hooks


def test_load_shows_the_options_of_load_model():
    assert {"file", "device", "with_opt", "strict"} <= set(inspect.signature(Learner.load).parameters)


# Checkpoint callbacks


class Snapshots(Callback):
    "The weights at the end of each epoch, in contiguous format, before any tracker sees them."

    order = TrackerCallback.order - 1

    def before_fit(self):
        self.states = []

    def after_epoch(self):
        self.states.append({name: value.clone().contiguous() for name, value in self.model.state_dict().items()})


class GetsBetter(Callback):
    "A validation loss that is what the test says, epoch by epoch."

    order = TrackerCallback.order - 1

    def __init__(self, *valid_losses):
        super().__init__()
        self.valid_losses = valid_losses

    def after_epoch(self):
        values = self.recorder.values[-1]
        values[list(self.recorder.metric_names[1:]).index("valid_loss")] = self.valid_losses[self.epoch]


# The files that a fit of three epochs, of which the second is the best, leaves, with the epochs they come from
CHECKPOINTS = {
    "best": (dict(), {"model": 1}),
    "best with optimizer": (dict(with_opt=True), {"model": 1}),
    "best by another comparison": (dict(comp=np.greater), {"model": 0}),
    "at the end": (dict(at_end=True), {"model": 2}),
    "every epoch with optimizer": (dict(every_epoch=True, with_opt=True), {"model_0": 0, "model_1": 1, "model_2": 2}),
    "every second epoch": (dict(every_epoch=2, fname="other"), {"other_0": 0, "other_2": 2}),
}


@pytest.mark.parametrize("options, epochs", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_checkpoint_callback_writes_contiguous_files(trained, options, epochs):
    learn, snapshots = trained(), Snapshots()
    learn.fit(3, cbs=[snapshots, GetsBetter(3.0, 1.0, 2.0), SaveModelCallback(**options)])
    assert {file.stem for file in learn.path.glob("models/*")} == set(epochs)
    for name, epoch in epochs.items():
        state = torch.load(learn.path / "models" / f"{name}.pth", weights_only=False)
        if options.get("with_opt"):
            assert is_canonical(state["opt"])
            state = state["model"]
        assert is_canonical(state)
        assert same(state, snapshots.states[epoch])


@both_ranks
def test_checkpoint_callback_loads_the_best_into_the_channels_last_model(trained, model):
    learn, snapshots = trained(model), Snapshots()
    learn.fit(3, cbs=[snapshots, GetsBetter(3.0, 1.0, 2.0), SaveModelCallback()])
    assert same(learn.model.state_dict(), snapshots.states[1])
    assert is_in_channels_last(learn.model)


@pytest.mark.parametrize(
    "tracker, n_epochs",
    [(EarlyStoppingCallback(patience=1), 3), (ReduceLROnPlateau(patience=1), 4), (TerminateOnNaNCallback(), 4)],
    ids=lambda value: type(value).__name__ if isinstance(value, Callback) else "",
)
def test_other_trackers_beside_it_change_nothing_about_the_file(trained, tracker, n_epochs):
    learn, snapshots = trained(), Snapshots()
    losses = GetsBetter(3.0, 1.0, 2.0, 4.0)
    with learn.no_logging():
        learn.fit(4, cbs=[snapshots, losses, SaveModelCallback(with_opt=True), tracker])
    state = torch.load(learn.path / "models" / "model.pth", weights_only=False)
    assert len(snapshots.states) == n_epochs
    assert is_canonical(state["model"]) and is_canonical(state["opt"])
    assert same(state["model"], snapshots.states[1]) and same(learn.model.state_dict(), snapshots.states[1])
    assert is_in_channels_last(learn.model)


def test_checkpoint_callback_of_a_user_writes_contiguous_files(trained):
    class SaveTwice(TrackerCallback):
        def after_epoch(self):
            super().after_epoch()
            if self.new_best:
                self.learn.save("weights", with_opt=False)
                self.learn.save("everything")

    learn = trained()
    learn.fit(1, cbs=SaveTwice())
    for name in ("weights", "everything"):
        assert is_canonical(torch.load(learn.path / "models" / f"{name}.pth", weights_only=False))


# Loading and going on


@both_ranks
@pytest.mark.parametrize("with_opt", [True, False])
def test_contiguous_checkpoint_loads_into_a_channels_last_learner(new_learner, trained, model, with_opt):
    learn = trained(model)
    plain = new_learner(model, new_dls(*SHAPES[model]), path=learn.path)
    plain.fit(2)
    plain.save("plain", with_opt=with_opt)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        learn.load("plain", with_opt=with_opt)
    assert is_in_channels_last(learn.model)
    assert same(plain.model.state_dict(), learn.model.state_dict())
    assert same(plain.opt.state_dict(), learn.opt.state_dict()) is with_opt


class BatchLosses(Callback):
    "The loss of each training batch."

    def before_fit(self):
        self.seen = []

    def after_loss(self):
        if self.training:
            self.seen.append(self.loss.detach().clone())


def fit_constant(learn, n_epochs, **kwargs):
    learn.fit(n_epochs, **kwargs)


def fit_one_cycle(learn, n_epochs, **kwargs):
    learn.fit_one_cycle(n_epochs, 1e-2, **kwargs)


@pytest.mark.parametrize(
    "model, opt_func, fit",
    [
        (image_net, Adam, fit_constant),
        (image_net, wrapped_adamw, fit_constant),
        (image_net, ranger, fit_constant),
        (image_net, Adam, fit_one_cycle),
        (volume_net, wrapped_adamw, fit_one_cycle),
    ],
)
def test_resumed_fit_equals_one_that_was_never_interrupted(new_learner, tmp_path, model, opt_func, fit):
    def channels_last_learner():
        learn = new_learner(model, new_dls(*SHAPES[model]), opt_func=opt_func, path=tmp_path)
        return learn.to_channelslast(use_amp=False)

    whole, resumed, losses, rest = channels_last_learner(), channels_last_learner(), BatchLosses(), BatchLosses()
    fit(whole, 3, cbs=[losses, SaveModelCallback(every_epoch=True, with_opt=True)])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        resumed.load("model_0")
    fit(resumed, 3, cbs=rest, start_epoch=1)
    assert len(rest.seen) == 6 and same(losses.seen[3:], rest.seen)
    assert_same_state(whole, resumed)


def assert_same_state(a, b):
    "Two Learners have the same weights, buffers and optimizer state, in the same memory."
    assert same(a.model.state_dict(), b.model.state_dict())
    assert same(a.opt.state_dict(), b.opt.state_dict())
    states = [list(tensors_in([learn.model.state_dict(), learn.opt.state_dict()])) for learn in (a, b)]
    assert [tensor.stride() for tensor in states[0]] == [tensor.stride() for tensor in states[1]]


def to_contiguous(learn):
    learn.to_contiguous()


def to_channelslast(learn):
    learn.to_channelslast(use_amp=False)


def to_channelslast_bf16(learn):
    learn.to_channelslast(amp_mode="bf16")


@pytest.mark.parametrize(
    "before, after, opt_func",
    [
        (to_contiguous, to_channelslast, Adam),
        (to_contiguous, to_channelslast, wrapped_adamw),
        (to_contiguous, to_channelslast, ranger),
        (to_channelslast, to_contiguous, Adam),
        (to_contiguous, to_channelslast_bf16, Adam),
        (to_channelslast_bf16, to_channelslast_bf16, wrapped_adamw),
    ],
)
def test_fit_resumed_in_another_format_equals_one_that_changed_it(
    new_learner, bf16_cpu, tmp_path, before, after, opt_func
):
    whole, resumed = (new_learner(image_net, opt_func=opt_func, path=tmp_path) for _ in range(2))
    before(whole)
    whole.fit(1)
    whole.save("first")
    after(whole)
    losses, rest = BatchLosses(), BatchLosses()
    whole.fit(2, cbs=losses)
    after(resumed)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        resumed.load("first")
    resumed.fit(2, cbs=rest)
    assert same(losses.seen, rest.seen)
    assert_same_state(whole, resumed)


# safetensors


@both_ranks
def test_state_made_contiguous_gives_the_safetensors_file_of_a_contiguous_model(trained, model, tmp_path):
    learn = trained(model)
    twin = contiguous_twin(learn.model, model)
    ours, reference, from_file = (tmp_path / f"{name}.safetensors" for name in ("ours", "reference", "from_file"))
    save_file(twin.state_dict(), reference)
    save_file(state_to_contiguous(learn.model.state_dict()), ours)
    save_file(torch.load(learn.save("file", with_opt=False)), from_file)
    assert filecmp.cmp(ours, reference, shallow=False) and filecmp.cmp(from_file, reference, shallow=False)
    assert same(load_file(ours), twin.state_dict())


@both_ranks
def test_save_model_of_safetensors_takes_the_channels_last_model(trained, model, tmp_path):
    learn, loaded = trained(model), model()
    save_safetensors(learn.model, tmp_path / "model.safetensors")
    load_safetensors(loaded, tmp_path / "model.safetensors")
    assert same(loaded.state_dict(), learn.model.state_dict())
    assert is_canonical(load_file(tmp_path / "model.safetensors"))
    assert is_in_channels_last(learn.model)


# ONNX


@pytest.fixture(scope="module", params=[image_net, volume_net])
def onnx_files(request, tmp_path_factory):
    """The files of a model that trained in channels last, and of a contiguous one with the same values.

    `direct` comes from the Learner in channels last, `contiguous` after `to_contiguous`.
    """
    pytest.importorskip("onnxscript")
    learn = train_in_channels_last(request.param, new_dls(*SHAPES[request.param]))
    x = torch.randn(2, *SHAPES[request.param])
    twin = contiguous_twin(learn.model, request.param)
    files = {}
    for name in ("direct", "contiguous", "reference"):
        if name == "contiguous":
            learn.to_contiguous()
        files[name] = tmp_path_factory.mktemp(name) / "model.onnx"
        torch.onnx.export(twin if name == "reference" else learn.model.eval(), (x,), str(files[name]))
    return SimpleNamespace(**files, x=x, expected=twin(x).detach())


@pytest.mark.filterwarnings("ignore")
def test_onnx_file_after_to_contiguous_is_that_of_a_contiguous_model(onnx_files):
    names = sorted(file.name for file in onnx_files.reference.parent.iterdir())  # weights may have a file of their own
    same_files, *_ = filecmp.cmpfiles(onnx_files.contiguous.parent, onnx_files.reference.parent, names, shallow=False)
    assert same_files == names


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["direct", "contiguous"])
def test_onnx_file_computes_the_same(onnx_files, name):
    session = pytest.importorskip("onnxruntime").InferenceSession(str(getattr(onnx_files, name)))
    (output,) = session.run(None, {session.get_inputs()[0].name: onnx_files.x.numpy()})
    assert torch.allclose(torch.from_numpy(output), onnx_files.expected, atol=1e-5)


# Exported Learners


@pytest.fixture
def digits_learner(digits_folder, tmp_path, monkeypatch):
    only_on(monkeypatch, "cpu", (torch.bfloat16,))
    return new_digits_learner(digits_folder, tmp_path)


def new_digits_learner(digits_folder, path, device="cpu"):
    "A Learner on image files that has trained in channels last bf16."
    dls = ImageDataLoaders.from_folder(digits_folder, valid_pct=0.2, seed=0, bs=20, num_workers=0, device=device)
    return train_in_channels_last(lambda: image_net(2), dls, path, use_amp=True, amp_mode="bf16")


def probabilities(learn, file):
    with learn.no_mbar():
        return learn.predict(file)[2]


def an_image(digits_folder):
    return next((digits_folder / "1").iterdir())


def test_exported_learner_loads_on_the_cpu_as_contiguous_float32(digits_learner, digits_folder):
    digits_learner.export()
    loaded = load_learner(digits_learner.path / "export.pkl")
    assert loaded.train_format == TrainFormat()
    assert not [cb for cb in loaded.cbs if isinstance(cb, (ChannelsLast, MixedPrecision))]
    assert same(loaded.model.state_dict(), digits_learner.model.state_dict())
    assert is_canonical(loaded.model.state_dict())
    expected = probabilities(digits_learner.to_contiguous(to_fp32=True), an_image(digits_folder))
    assert torch.equal(probabilities(loaded, an_image(digits_folder)), expected)


@pytest.mark.parametrize("cpu", [True, False])
def test_exported_learner_trains_on_as_it_is_told(digits_learner, cpu):
    digits_learner.export()
    loaded = load_learner(digits_learner.path / "export.pkl", cpu=cpu)
    assert loaded.train_format == TrainFormat()
    loaded.to_format(digits_learner.train_format)
    losses = []
    for learn in (digits_learner, loaded):
        learn.dls = digits_learner.dls
        learn.create_opt()
        torch.manual_seed(1)
        digits_learner.dls.train.rng.seed(1)
        recorded = BatchLosses()
        learn.fit(1, cbs=recorded)
        losses.append(recorded.seen)
    assert same(*losses)
    assert same(digits_learner.model.state_dict(), loaded.model.state_dict())
    assert is_in_channels_last(loaded.model)


@pytest.mark.parametrize("opt_func", [Adam, wrapped_adamw, ranger])
def test_exporting_does_not_disturb_the_learner(trained, opt_func):
    plain, exported = trained(opt_func=opt_func), trained(opt_func=opt_func)
    exported.dls.new_empty = lambda: None
    exported.logger = noop
    exported.export()
    assert is_in_channels_last(exported.model)
    exported.logger = plain.logger
    plain.fit(1)
    exported.fit(1)
    assert_same_state(plain, exported)


class UsersPrecision(MixedPrecision):
    pass


def learner_to_export(new_learner, path, cbs=()):
    "A Learner with callbacks of all kinds, in an order that is not that of their names."
    learn = new_learner(wrapped_net, path=path, cbs=[Snapshots(), ChannelsLast, GetsBetter(1.0), *cbs])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fastai's MixedPrecision autocasts on CUDA alone, and says so
        learn.fit(1)
    learn.dls.new_empty = noop
    learn.logger = noop
    return learn


def everything(learn):
    tensors = [*learn.model.parameters(), *learn.model.buffers()]
    opt = learn.opt.state_dict()
    return (
        {name: id(value) for name, value in vars(learn).items()},
        [id(cb) for cb in learn.cbs],
        [{name: id(value) for name, value in vars(cb).items()} for cb in learn.cbs],
        [(id(tensor), tensor.data_ptr(), tensor.stride()) for tensor in tensors],
        [(tensor.data_ptr(), tensor.stride()) for tensor in tensors_in(opt)],
        [dict(hypers) for hypers in learn.opt.hypers],
        learn.opt.frozen_idx,
        learn.train_format,
    )


@pytest.mark.parametrize("cbs", [[MixedPrecision("bf16")], [FastaiMixedPrecision()], [UsersPrecision("bf16")], []])
@pytest.mark.parametrize("error", [None, RuntimeError("disk full"), KeyboardInterrupt()], ids=repr)
def test_export_leaves_the_learner_exactly_as_it_was(new_learner, bf16_cpu, tmp_path, monkeypatch, cbs, error):
    learn = learner_to_export(new_learner, tmp_path, cbs)
    learn.opt.frozen_idx = 3
    before, seen = everything(learn), []

    def save(exported, *args, **kwargs):
        seen.append((type(exported.model), [type(cb).__module__.partition(".")[0] for cb in exported.cbs]))
        assert is_canonical(exported.model.state_dict())
        if error is not None:
            raise error

    monkeypatch.setattr(torch, "save", save)
    if error is None:
        learn.export()
    else:
        with pytest.raises(type(error)):
            learn.export()
    ((model, packages),) = seen
    assert model is nn.Sequential and "channelslast" not in packages
    assert everything(learn) == before
    learn.model(torch.randn(2, 3, 8, 8))
    monkeypatch.undo()
    learn.logger = noop
    learn.fit(1)
    assert is_in_channels_last(learn.model)


def test_export_that_cannot_be_written_leaves_the_learner_as_it_was(new_learner, tmp_path):
    learn = learner_to_export(new_learner, tmp_path)
    before = everything(learn)
    with pytest.raises(AttributeError):
        learn.export("never.pkl", "no pickle module")
    assert everything(learn) == before


@pytest.mark.parametrize("cbs", [[MixedPrecision("bf16")], [FastaiMixedPrecision()], [UsersPrecision("bf16")]])
def test_exported_file_names_nothing_of_this_package(new_learner, bf16_cpu, tmp_path, cbs):
    learner_to_export(new_learner, tmp_path, cbs).export()
    with zipfile.ZipFile(tmp_path / "export.pkl") as file:
        (pickled,) = [file.read(name) for name in file.namelist() if name.endswith("data.pkl")]
    assert b"channelslast" not in pickled and b"MixedPrecision" not in pickled and b"_dynamo" not in pickled


def test_exported_file_holds_contiguous_tensors(digits_learner):
    digits_learner.export()
    in_file = torch.load(digits_learner.path / "export.pkl", weights_only=False)
    assert is_canonical(in_file.model.state_dict())


def test_exported_file_after_to_contiguous_holds_contiguous_tensors(digits_learner):
    digits_learner.to_contiguous().export()
    in_file = torch.load(digits_learner.path / "export.pkl", weights_only=False)
    assert is_canonical(in_file.model.state_dict())
    assert same(in_file.model.state_dict(), digits_learner.model.state_dict())


# Where the package cannot be imported

WITHOUT_THE_PACKAGE = """
import sys
import warnings
from pathlib import Path


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "channelslast":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())

import torch
from fastai.learner import load_learner
from fastcore.foundation import L
from safetensors.torch import load_file

folder, image = Path(sys.argv[1]), sys.argv[2]
torch.serialization.add_safe_globals([L])  # fastai's optimizers keep their hyperparameters in one


def checkpoint(file):
    return {"state": torch.load(file, weights_only=True)}


def safetensors(file):
    return {"state": load_file(file)}


def torchscript(file):
    model = torch.jit.load(file)
    return {"state": model.state_dict(), "output": model(torch.load(file.parent / "x.pt"))}


def exported_program(file):
    program = torch.export.load(file)
    return {"state": program.state_dict, "output": program.module()(torch.load(file.parent / "x.pt"))}


def learner(file):
    learn = load_learner(file)
    with learn.no_mbar():
        output = learn.predict(image)[2]
    kept = [cb.name for cb in load_learner(file, cpu=False).cbs if cb.name in ("channels_last", "mixed_precision")]
    return {"state": learn.model.state_dict(), "output": output, "format": (type(learn.model).__name__, kept)}


readers = {
    ".pth": checkpoint,
    ".safetensors": safetensors,
    ".ts": torchscript,
    ".pt2": exported_program,
    ".pkl": learner,
}
results = {}
for file in folder.glob("*/*"):
    if file.suffix in readers:
        try:
            result = readers[file.suffix](file)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        results[f"{file.parent.name}/{file.name}"] = result

learn = load_learner(folder / "image_net" / "contiguous.pkl")
with warnings.catch_warnings():
    warnings.simplefilter("error", UserWarning)
    learn.load(folder / "image_net" / "Adam")
results["learn.load"] = {"model": learn.model.state_dict(), "opt": learn.opt.state_dict()}
torch.save(results, folder / "results.pt")
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory, digits_folder):
    """What a process without the package reads from the files of two channels last Learners, and what it should.

    Files called `direct` come from the Learner in channels last, those called `contiguous` after `to_contiguous`.
    """
    folder = tmp_path_factory.mktemp("files")
    image = an_image(digits_folder)
    expected = {}
    torch.compiler.reset()  # PyTorch 2.6 exports no model whose code was compiled as often as it may be
    with pytest.MonkeyPatch.context() as monkeypatch:
        only_on(monkeypatch, "cpu", (torch.bfloat16,))
        images = new_digits_learner(digits_folder, folder / "image_net")
        volumes = train_in_channels_last(volume_net, new_dls(*SHAPES[volume_net]), folder / "volume_net")
        for learn, new_model in ((images, lambda: image_net(2)), (volumes, volume_net)):
            learn.path.mkdir()
            expected[learn.path.name] = write_model_files(learn, new_model)
        for opt_func in (wrapped_adamw, ranger, Adam):
            images.opt_func = opt_func
            images.create_opt()
            images.to_channelslast(amp_mode="bf16").fit(1)
            file = images.save(images.path / opt_func.__name__)
            expected[file.name] = copy.deepcopy({"model": images.model.state_dict(), "opt": images.opt.state_dict()})
        images.export("direct.pkl")
        images.to_channelslast().export("asked for fp16.pkl")
        images.to_contiguous(to_fp32=True).export("contiguous.pkl")
        expected["pkl"] = {"state": images.model.state_dict(), "output": probabilities(images, image)}
        images.model = torch.compile(images.model)
        images.to_channelslast(amp_mode="bf16").export("compiled.pkl")
    script = [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(folder), str(image)]
    result = subprocess.run(script, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return SimpleNamespace(read=torch.load(folder / "results.pt", weights_only=False), expected=expected)


def write_model_files(learn, new_model):
    "Write the model of `learn` in every way; return what a contiguous model of the same values has and computes."
    learn.save(learn.path / "saved", with_opt=False)
    save_file(state_to_contiguous(learn.model.state_dict()), learn.path / "saved.safetensors")
    twin = contiguous_twin(learn.model, new_model)
    x = torch.randn(2, *next(iter(learn.dls.train))[0].shape[1:])
    torch.save(x, learn.path / "x.pt")
    for name in ("direct", "contiguous"):
        if name == "contiguous":
            learn.to_contiguous()
        model = learn.model.eval()
        torch.jit.save(torch.jit.trace(model, x), learn.path / f"{name}.ts")
        torch.export.save(torch.export.export(model, (x,)), learn.path / f"{name}.pt2")
    return {"state": twin.state_dict(), "output": twin(x).detach()}


both_folders = pytest.mark.parametrize("folder", ["image_net", "volume_net"])


@both_folders
@pytest.mark.parametrize("file", ["saved.pth", "saved.safetensors", "contiguous.ts", "contiguous.pt2"])
def test_file_reads_without_the_package_as_that_of_a_contiguous_model(elsewhere, folder, file):
    state, expected = elsewhere.read[f"{folder}/{file}"]["state"], elsewhere.expected[folder]["state"]
    assert state.keys() == expected.keys()
    assert same(state, expected)
    assert is_canonical(state)


@both_folders
@pytest.mark.parametrize("file", ["direct.ts", "direct.pt2", "contiguous.ts", "contiguous.pt2"])
def test_exported_model_computes_the_same_without_the_package(elsewhere, folder, file):
    read, expected = elsewhere.read[f"{folder}/{file}"], elsewhere.expected[folder]
    assert torch.allclose(read["output"], expected["output"], atol=1e-6)
    assert same(read["state"], expected["state"])


@every_optimizer
def test_checkpoint_with_optimizer_reads_without_the_package(elsewhere, opt_func):
    file = f"{opt_func.__name__}.pth"
    state = elsewhere.read[f"image_net/{file}"]["state"]
    assert same(state["model"], elsewhere.expected[file]["model"])
    assert same(state["opt"], elsewhere.expected[file]["opt"])
    assert is_canonical(state["model"]) and is_canonical(state["opt"])


def test_fastai_loads_a_checkpoint_without_the_package(elsewhere):
    assert same(elsewhere.read["learn.load"], elsewhere.expected["Adam.pth"])


@pytest.mark.parametrize("file", ["direct", "asked for fp16", "compiled", "contiguous"])
def test_exported_learner_loads_without_the_package(elsewhere, file):
    read, expected = elsewhere.read[f"image_net/{file}.pkl"], elsewhere.expected["pkl"]
    assert same(read["state"], expected["state"])
    assert is_canonical(read["state"])
    assert torch.allclose(read["output"], expected["output"], atol=1e-6)
    assert read["format"] == ("Sequential", [])


# On a GPU


@pytest.mark.cuda
def test_checkpoint_of_a_gpu_is_byte_for_byte_that_of_a_contiguous_model(new_learner, tmp_path):
    learn = new_learner(image_net, device="cuda", path=tmp_path).to_channelslast(use_amp=False)
    learn.fit(1)
    file = learn.save("file", with_opt=False)
    assert is_in_channels_last(learn.model)
    save_model(tmp_path / "file.pth", contiguous_twin(learn.model).to("cuda"), None)
    assert filecmp.cmp(file, tmp_path / "file.pth", shallow=False)


@pytest.mark.cuda
@pytest.mark.parametrize("cpu, device", [(True, "cpu"), (False, "cuda")])
def test_learner_exported_on_a_gpu_loads(digits_folder, tmp_path, cpu, device):
    learn = new_digits_learner(digits_folder, tmp_path, device="cuda")
    learn.export()
    loaded = load_learner(tmp_path / "export.pkl", cpu=cpu)
    assert {param.device.type for param in loaded.model.parameters()} == {device}
    assert loaded.train_format == TrainFormat()
    image = an_image(digits_folder)
    assert torch.allclose(probabilities(loaded, image), probabilities(learn, image), atol=0.02)
