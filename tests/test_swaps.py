"Forms that keep channels last: their values, and the models that compute in them for a while."

import copy
import io
import pickle
import random

import pytest
import torch
from conftest import TinyNet, new_dls
from fastai.callback.core import Callback
from fastai.layers import PixelShuffle_ICNR, ToTensorBase
from fastai.learner import Learner, load_learner
from fastai.optimizer import SGD
from fastai.torch_core import TensorBase, TensorImage, ismin_torch
from fastai.vision.augment import Resize
from fastai.vision.data import ImageDataLoaders
from fastai.vision.learner import create_unet_model
from fastai.vision.models import xresnet
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from tracing import flat

from channelslast import TrainFormat, format_summary, forms, swaps
from channelslast.memory_format import CHANNELS_LAST, is_channels_last, module_to_memory_format, to_memory_format
from channelslast.swaps import SWAPS, is_swapped, keep_channels_last, swapped_classes

traces_classes = pytest.mark.skipif(not ismin_torch("2.11"), reason="PyTorch 2.6 traces no change of a tensor's class")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
HALVES = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, torch.float64, *HALVES]
PADS = {nn.ReflectionPad2d: "reflect", nn.ReplicationPad2d: "replicate", nn.CircularPad2d: "circular"}


@pytest.fixture
def loses(monkeypatch):
    "A device and PyTorch on which every operator loses channels last."
    answer_all(monkeypatch, True)


@pytest.fixture
def keeps(monkeypatch):
    "A device and PyTorch on which none does."
    answer_all(monkeypatch, False)


def answer_all(monkeypatch, answer):
    monkeypatch.setattr(swaps, "loses_format", lambda *args: answer)
    for swap in SWAPS:
        monkeypatch.setattr(swap, "answers", {})


def new_case(cls, draw):
    "A random module of a swapped class, and the shape of an image for it."
    b, c, h, w, d = (draw.randint(1, 4) for _ in range(5))
    c, factor = 2 * c, draw.randint(1, 4)
    if cls is nn.PixelShuffle:
        return cls(factor), (b, c * factor**2, h, w)
    if cls is nn.PixelUnshuffle:
        return cls(factor), (b, c, h * factor, w * factor)
    if cls is nn.ChannelShuffle:
        return cls(factor), (b, c * factor, h, w, d)[: draw.randint(4, 5)]
    if cls in PADS:
        h, w = h + 2, w + 2
        left, right, top, bottom = (draw.randint(0, size - 1) for size in (w, w, h, h))
        return cls((left, right, top, bottom)), (b, c, h, w)
    if cls is nn.GLU:
        return cls(1), (b, c, h, w, d)[: draw.randint(4, 5)]
    if cls is nn.AdaptiveAvgPool2d:
        return cls(draw.choice([1, (1, 1)])), (b, c, h, w)
    return cls(1), (b, c, h, w, d)


def gradients(forward, module, image, of_output):
    output = forward(module, image)
    return output, *torch.autograd.grad(output, image, of_output)


def in_layout(tensor, layout):
    "The values of `tensor`, as they may lie in memory."
    if layout == "channels last":
        return tensor.contiguous(memory_format=CHANNELS_LAST[tensor.ndim])
    if layout == "slice":  # of a channels last image with more channels
        wide = torch.cat([tensor, tensor], 1).contiguous(memory_format=CHANNELS_LAST[tensor.ndim])
        return wide[:, : tensor.shape[1]]
    if layout == "every other":  # column of a wide image
        return torch.stack([tensor, tensor], -1).flatten(-2)[..., ::2]
    return tensor.contiguous()


LAYOUTS = ["channels last", "contiguous", "slice", "every other"]


# The values


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("swap", SWAPS, ids=lambda swap: swap.cls.__name__)
def test_values_and_gradients_are_those_of_pytorchs_own(swap, device):
    for seed in range(40):
        draw = random.Random(seed)
        torch.manual_seed(seed)
        module, shape = new_case(swap.cls, draw)
        dtype, layout, gradient_layout = draw.choice(DTYPES), draw.choice(LAYOUTS), draw.choice(LAYOUTS)
        image = in_layout(torch.randn(shape, device=device).to(dtype), layout).requires_grad_()
        of_output = torch.randn(module(image).shape, device=device).to(dtype)
        own = gradients(swap.cls.forward, module, image, of_output)
        formed = gradients(swap.forward, module, image, in_layout(of_output, gradient_layout))
        assert torch.equal(own[0], formed[0]), seed
        assert own[0].dtype == formed[0].dtype
        if device == "cuda" and swap.cls in PADS:  # whose gradients add up in any order, each time
            tolerance = {"rtol": 0.02, "atol": 0.1} if dtype in HALVES else {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(own[1], formed[1], **tolerance)
        elif swap.cls is nn.GLU:
            torch.testing.assert_close(own[1], formed[1])
        else:
            assert torch.equal(own[1], formed[1]), seed


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("swap", SWAPS, ids=lambda swap: swap.cls.__name__)
def test_a_channels_last_image_and_its_gradient_stay_so(swap, device):
    for seed in range(10):
        draw = random.Random(seed)
        module, shape = new_case(swap.cls, draw)
        shape = (2, shape[1], *(size + (4 if swap.cls is not nn.PixelUnshuffle else 0) for size in shape[2:]))
        image = in_layout(torch.randn(shape, device=device), "channels last").requires_grad_()
        output = swap.forward(module, image)
        memory_format = CHANNELS_LAST[image.ndim]
        assert output.is_contiguous(memory_format=memory_format)
        of_output = in_layout(torch.randn(output.shape, device=device), "channels last")
        (gradient,) = torch.autograd.grad(output, image, of_output)
        assert gradient.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forms_take_images_in_any_layout(layout):
    image = in_layout(torch.randn(2, 8, 6, 6), layout)
    assert torch.equal(forms.pixel_shuffle(image, 2), nn.PixelShuffle(2)(image))
    assert torch.equal(forms.pixel_unshuffle(image, 3), nn.PixelUnshuffle(3)(image))
    assert torch.equal(forms.channel_shuffle(image, 4), nn.ChannelShuffle(4)(image))
    assert torch.equal(forms.glu(image), nn.GLU(1)(image))
    torch.testing.assert_close(forms.global_average(image), nn.AdaptiveAvgPool2d(1)(image))
    for cls, mode in PADS.items():
        assert torch.equal(forms.pad(image, (1, 2, 3, 0), mode), cls((1, 2, 3, 0))(image))


@pytest.mark.parametrize("device", DEVICES)
def test_values_under_autocast(device, loses):
    model = module_to_memory_format(lossy_model().to(device))
    images = to_memory_format(torch.randn(2, 3, 8, 8, device=device))
    with torch.autocast(device, torch.bfloat16):
        own = model(images)
        with keep_channels_last(model):
            formed = model(images)
    assert own.dtype == formed.dtype == torch.bfloat16
    torch.testing.assert_close(own, formed, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.PixelShuffle(3), (1, 8, 4, 4)),
        (nn.PixelShuffle(2), (1, 4, 4, 4, 4)),
        (nn.PixelUnshuffle(3), (1, 8, 4, 4)),
        (nn.PixelUnshuffle(2), (1, 4, 4, 4, 3)),
        (nn.ChannelShuffle(3), (1, 8, 4, 4)),
        (nn.ReflectionPad2d(4), (1, 8, 4, 4)),
        (nn.CircularPad2d(5), (1, 8, 4, 4)),
        (nn.ReplicationPad2d((1, 1, 0, -9)), (1, 8, 4, 4)),
        (nn.ReplicationPad2d(1), (1, 8, 4, 4, 4)),
        (nn.GLU(1), (1, 7, 4, 4)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_pytorch_refuses_is_refused_in_its_words(module, shape):
    image = in_layout(torch.randn(shape), "channels last")
    (swap,) = (swap for swap in SWAPS if isinstance(module, swap.cls))
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)) as own:
        module(image)
    with pytest.raises(type(own.value)) as formed:
        swap.forward(module, image)
    assert str(formed.value) == str(own.value)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.PixelShuffle(2), (8, 4, 4)),
        (nn.CircularPad2d((-1, 1, 1, 0)), (2, 8, 4, 4)),
        (nn.ReflectionPad2d(1), (8, 4, 4)),
        (nn.GLU(2), (2, 8, 4, 4)),
        (nn.GLU(-3), (2, 8, 4, 4)),
        (nn.AdaptiveAvgPool2d((1, None)), (2, 8, 4, 4)),
        (nn.AdaptiveAvgPool2d(1), (8, 4, 4)),
        (nn.AdaptiveAvgPool2d(2), (2, 8, 4, 4)),
    ],
    ids=lambda value: str(value) if isinstance(value, nn.Module) else "",
)
def test_what_has_no_form_is_computed_as_ever(module, shape):
    image = torch.randn(shape)
    image = in_layout(image, "channels last") if image.ndim == 4 else image
    (swap,) = (swap for swap in SWAPS if isinstance(module, swap.cls))
    assert torch.equal(swap.forward(copy.deepcopy(module), input=image), module(image))


# Whom it asks


def test_an_operator_that_loses_the_format_here_is_told_from_one_that_keeps_it():
    class Loses(nn.Module):
        def forward(self, x):
            return x.contiguous()

    class LosesInBackward(nn.Module):
        def forward(self, x):
            return x * x.sum().expand(x.shape)

    device = torch.device("cpu")
    for module, answer in ((Loses(), True), (nn.ReLU(), False), (nn.Conv2d(8, 8, 1).half(), False)):
        shape = (2, 8, 4, 4)
        assert swaps.loses_format(type(module).forward, module, shape, device, torch.float32) is answer
    with torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        pool = nn.AdaptiveAvgPool2d(1)
        asked = swaps.loses_format(type(pool).forward, pool, (2, 8, 4, 4), device, torch.float32)
    assert asked is swaps.loses_format(type(pool).forward, pool, (2, 8, 4, 4), device, torch.float32)


def test_each_kind_of_module_is_asked_once(monkeypatch):
    asked = []
    answer_all(monkeypatch, False)
    monkeypatch.setattr(swaps, "loses_format", lambda *args: asked.append(args))
    model = nn.Sequential(*[nn.PixelShuffle(2) for _ in range(3)], nn.PixelShuffle(3), nn.Conv2d(3, 8, 1))
    for _ in range(2):
        with keep_channels_last(model):
            pass
    assert len(asked) == 2 * len({dtype for *_, dtype in asked})


def test_asking_leaves_the_random_state_alone(monkeypatch):
    monkeypatch.setattr(SWAPS[0], "answers", {})
    before = torch.get_rng_state()
    with keep_channels_last(nn.Sequential(nn.PixelShuffle(2))):
        pass
    assert torch.equal(before, torch.get_rng_state())


def test_nothing_is_swapped_where_the_operators_keep_the_format(keeps):
    with keep_channels_last(lossy_model()) as model:
        assert swapped_classes(model) == {}


def test_nothing_is_swapped_where_channels_last_is_not_reliable(loses, monkeypatch):
    monkeypatch.setattr(swaps, "supports_channels_last", lambda device: False)
    with keep_channels_last(lossy_model()) as model:
        assert swapped_classes(model) == {}


# The model


def lossy_model(n_out=3):
    "Each class that this CPU loses the format in, or may."
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.CircularPad2d(1),
        nn.GLU(1),
        nn.Conv2d(4, 16, 3),
        nn.BatchNorm2d(16),
        nn.PixelShuffle(2),
        nn.ReflectionPad2d(1),
        nn.Conv2d(4, 8, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, n_out),
    )


SWAPPED = {
    "CircularPad2d": 1,
    "GLU": 1,
    "PixelShuffle": 1,
    "ReflectionPad2d": 1,
    "AdaptiveAvgPool2d": 1,
}


def attributes(model):
    return [set(vars(module)) for module in model.modules()]


def test_model_inside_and_after_is_the_same_to_all_who_look(loses):
    model = lossy_model()
    before = attributes(model), str(model), [type(module) for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    calls = []
    model[1].register_forward_hook(lambda module, inputs, output: calls.append(output.shape))
    with keep_channels_last(model) as same:
        assert same is model and swapped_classes(model) == SWAPPED
        assert (str(model), [type(module) for module in model.modules()]) == before[1:]
        assert list(model.state_dict()) == list(state)
        model(torch.randn(2, 3, 8, 8))
        assert calls == [(2, 8, 10, 10)]
    assert (attributes(model), str(model), [type(module) for module in model.modules()]) == before
    assert swapped_classes(model) == {}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_model_after_an_error_is_its_own(loses, error):
    model = lossy_model()
    before = attributes(model)
    with pytest.raises(error), keep_channels_last(model):
        raise error
    assert attributes(model) == before


def test_copies_and_files_made_inside_are_of_the_models_own(loses):
    model = lossy_model()
    before = attributes(model)
    with keep_channels_last(model):
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copies = [
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(file, weights_only=False),
            nn.Sequential(*map(copy.copy, model)),
        ]
        assert swapped_classes(model) == SWAPPED
    images = torch.randn(2, 3, 8, 8)
    for each in copies:
        assert attributes(each) == before and swapped_classes(each) == {}
        assert torch.equal(each(images), model(images))


def test_inside_twice_is_as_once(loses):
    model = lossy_model()
    before = attributes(model)
    with keep_channels_last(model):
        with keep_channels_last(model):
            assert swapped_classes(model) == SWAPPED
        assert swapped_classes(model) == SWAPPED
    assert attributes(model) == before


class Shuffles(nn.PixelShuffle):
    "With a name of its own alone."


class ShufflesOtherwise(nn.PixelShuffle):
    def forward(self, input):
        return super().forward(input) + 1


class CopiesItself(nn.PixelShuffle):
    def __deepcopy__(self, memo):
        return self


def test_subclasses_are_swapped_unless_they_compute_or_copy_otherwise(loses):
    model = nn.Sequential(Shuffles(2), ShufflesOtherwise(2), CopiesItself(2), nn.PixelShuffle(2), nn.PixelShuffle(2))
    model[3].forward = lambda x: x
    model[4] = torch.jit.script(model[4])
    with keep_channels_last(model):
        assert [is_swapped(module) for module in model] == [True, False, False, False, False]
    assert model[3](1) == 1


def test_data_parallel_runs_as_it_is(loses):
    with keep_channels_last(nn.DataParallel(lossy_model())) as model:
        assert swapped_classes(model) == {}


def test_other_pools_and_gates_stay(loses):
    model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.GLU(2), nn.MaxPool2d(2))
    with keep_channels_last(model):
        assert swapped_classes(model) == {}


def test_not_a_module():
    with pytest.raises(TypeError, match="model"), keep_channels_last("resnet50"):
        pass


# A Learner


class Sees(Callback):
    "What is swapped at each event."

    order = float("inf")

    def __init__(self):
        self.seen = {}

    def __call__(self, event_name):
        self.seen.setdefault(event_name, set()).add(tuple(swapped_classes(self.learn.model)))


INSIDE = {
    "before_batch",
    "after_pred",
    "after_loss",
    "before_backward",
    "after_backward",
    "before_step",
    "after_step",
    "after_cancel_step",
    "after_cancel_backward",
    "after_cancel_batch",
    "after_batch",
}


def learner(new_learner, device="cpu", **kwargs):
    learn = new_learner(lambda: lossy_model().to(device), new_dls(3, 8, 8, device=device), device=device, **kwargs)
    return learn.to_channelslast(use_amp=False)


def test_learner_trains_and_predicts_with_swaps_and_is_its_own_in_between(new_learner, loses):
    learn, sees = learner(new_learner), Sees()
    before = attributes(learn.model)
    learn.fit(2, cbs=sees)
    assert {event for event, seen in sees.seen.items() if seen == {(*SWAPPED,)}} == INSIDE & set(sees.seen)
    assert all(seen == {()} for event, seen in sees.seen.items() if event not in INSIDE)
    sees.seen.clear()
    learn.get_preds(dl=learn.dls.valid, cbs=sees)
    assert sees.seen["after_pred"] == {(*SWAPPED,)}
    assert attributes(learn.model) == before


def test_contiguous_learner_has_no_swaps(new_learner, loses):
    learn, sees = learner(new_learner).to_contiguous(), Sees()
    learn.fit(1, cbs=sees)
    assert set().union(*sees.seen.values()) == {()}


@pytest.mark.parametrize("compiled", [False, True])
def test_swaps_change_nothing_but_rounding(new_learner, monkeypatch, compiled):
    results = []
    for answer in (True, False):
        answer_all(monkeypatch, answer)
        torch.compiler.reset()
        learn = learner(new_learner, opt_func=SGD)
        if compiled:
            learn.model.compile(backend="aot_eager")
        learn.fit(2)
        results.append([*learn.recorder.losses, *learn.model.state_dict().values()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


class Keeps(Callback):
    "Copies and files made in the middle of a batch."

    def after_batch(self):
        if self.iter == 1 and self.training:
            assert swapped_classes(self.model)
            self.learn.save("inside")
            self.learn.export("inside.pkl")
            self.copies = [copy.deepcopy(self.model), pickle.loads(pickle.dumps(self.model))]


def test_what_a_callback_saves_in_the_middle_of_a_fit_is_the_users_own(loses, digits_folder, tmp_path):
    dls = ImageDataLoaders.from_folder(digits_folder, valid_pct=0.5, item_tfms=Resize(8), bs=8, num_workers=0)
    learn, keeps = Learner(dls, lossy_model(), path=tmp_path).to_channelslast(use_amp=False), Keeps()
    before = attributes(learn.model)
    learn.fit(1, cbs=keeps)
    loaded = load_learner(tmp_path / "inside.pkl").model
    for model in (*keeps.copies, loaded):
        assert attributes(model) == before and str(model) == str(learn.model)
    lossy_model().load_state_dict(torch.load(tmp_path / "models" / "inside.pth", weights_only=False)["model"])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("event", ["before_batch", "after_loss", "after_backward", "after_batch", "before_validate"])
def test_model_after_a_fit_that_raised_is_the_users_own(new_learner, loses, event, error):
    learn = learner(new_learner)
    before = attributes(learn.model)

    class Raises(Callback):
        pass

    def fail(self):
        raise error("here")

    setattr(Raises, event, fail)
    with pytest.raises(error):
        learn.fit(1, cbs=Raises())
    assert attributes(learn.model) == before
    learn.fit(1)


# Compiled, and as CUDA graphs


def test_compiled_learner_has_swaps_and_compiles_no_more_after_an_epoch(new_learner, loses):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    learn = learner(new_learner)
    learn.model.compile(backend=counter)
    counts = []

    class Counts(Callback):
        def after_train(self):
            counts.append(counter.frame_count)

    learn.fit(3, cbs=Counts())
    assert 0 < counts[1] == counts[2]  # the first epoch, and the validation after it
    assert "permute" in str([graph.code for graph in counter.graphs])


def test_compiled_model_outside_of_it_is_its_own(loses):
    torch.compiler.reset()
    model = module_to_memory_format(lossy_model())
    images = to_memory_format(torch.randn(2, 3, 8, 8))
    model.compile(backend="eager", fullgraph=True)
    with keep_channels_last(model):
        inside = model(images)
    torch.testing.assert_close(inside, model(images))


@pytest.mark.cuda
@pytest.mark.parametrize("fmt", ["channels last fp16", "channels last fp16 graph fused", "channels last bf16 compiled"])
def test_learner_on_a_gpu_trains_with_swaps_as_without(new_learner, fmt, monkeypatch):
    losses = []
    for _ in range(2):
        learn = learner(new_learner, "cuda").to_format(fmt)
        learn.fit(2)
        losses.append(torch.stack([*map(torch.as_tensor, learn.recorder.losses)]))
        if "graph" in fmt:
            assert learn.cuda_graph.reason is None
        answer_all(monkeypatch, False)
    torch.testing.assert_close(*losses, rtol=0.02, atol=0.02)


@pytest.mark.cuda
def test_operators_that_lose_the_format_on_a_gpu_are_swapped_there():
    model = lossy_model().cuda()
    images = to_memory_format(torch.randn(2, 3, 8, 8, device="cuda"))
    lost = {event.cls for event in format_summary(module_to_memory_format(model), images).events}
    with keep_channels_last(model):
        summary = format_summary(model, images)
    assert lost & SWAPPED.keys() <= summary.swapped.keys()
    assert not {event.cls for event in summary.events} & SWAPPED.keys()


# The summary


def test_summary_traces_the_model_with_swaps_and_names_them(loses):
    model = module_to_memory_format(lossy_model())
    images = to_memory_format(torch.randn(2, 3, 8, 8))
    own = format_summary(model, images)
    assert own.swapped == {} and own.events and "same values" not in str(own)
    with keep_channels_last(model):
        summary = format_summary(model, images)
    assert summary.swapped == SWAPPED
    assert summary.events == [] and summary.hints == [] and summary.channels_last_share == 1
    words = "Computed in another form with the same values, see `keep_channels_last`: 1 CircularPad2d, 1 GLU,"
    assert words in flat(summary) and words.replace("`keep_channels_last`", "<code>keep_channels_last</code>") in (
        summary._repr_html_()
    )
    assert {layer.cls for layer in summary.layers} == {*SWAPPED, "Conv2d", "BatchNorm2d"}
    assert all(
        layer.share(phase) == 1 for layer in summary.layers for phase in ("forward", "backward") if layer.share(phase)
    )


def test_summary_of_a_learner_has_the_swaps_that_it_trains_with(new_learner, loses):
    learn = learner(new_learner)
    before = attributes(learn.model)
    summary = learn.format_summary()
    assert summary.swapped == SWAPPED and not summary.losers
    assert attributes(learn.model) == before
    assert learn.to_contiguous().format_summary().swapped == {}


def test_summary_counts_the_modules_of_a_class(loses):
    model = nn.Sequential(nn.Conv2d(3, 64, 1), PixelShuffle_ICNR(64, 16, blur=True), nn.PixelShuffle(2))
    images = to_memory_format(torch.randn(2, 3, 4, 4))
    with keep_channels_last(module_to_memory_format(model)):
        summary = format_summary(model, images)
    assert summary.swapped == {"PixelShuffle": 2, "ReplicationPad2d": 1}
    assert "`keep_channels_last`: 2 PixelShuffle, 1 ReplicationPad2d." in flat(summary)


# fastai's tensor subclasses, compiled


def compiled_as(model, images):
    "What a compiled model returns next to what it does without, and how many graphs there were."
    torch.compiler.reset()
    own = model(images)
    counter = CompileCounterWithBackend("aot_eager")
    model.compile(backend=counter)
    for _ in range(2):
        output = model(images)
    output.sum().backward()
    assert type(output) is type(own)
    torch.testing.assert_close(torch.Tensor(output), torch.Tensor(own))
    return counter.frame_count


@traces_classes
@pytest.mark.parametrize("channels_last", [True, False])
def test_fastais_unet_compiles_in_one_graph(channels_last, loses):
    body = xresnet.xresnet18
    model = create_unet_model(body, 2, (32, 32), pretrained=False, self_attention=True, blur=True).eval()
    images = to_memory_format(torch.randn(2, 3, 32, 32), channels_last)
    with keep_channels_last(module_to_memory_format(model, channels_last)):
        assert compiled_as(model, images) == 1


class MakesImages(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(TensorImage(x)).relu()


class MakesThemInside(MakesImages):
    def forward(self, x):
        return (TensorBase(self.conv(x)) * 2).relu()


@traces_classes
@pytest.mark.parametrize("cls", [MakesImages, MakesThemInside])
def test_models_that_make_fastais_tensors_compile(cls):
    assert compiled_as(cls(), torch.randn(2, 3, 8, 8)) == 1


def test_fastais_tensors_keep_their_attributes_in_eager_mode():
    image = TensorImage(torch.ones(3, 4, 4), source="mine")
    assert type(image) is TensorImage and (image + 1).source == "mine"
    assert type(image.as_subclass(TensorBase)) is TensorBase and image.as_subclass(TensorBase).source == "mine"
    assert type(ToTensorBase()(torch.ones(2))) is TensorBase


@traces_classes
def test_learner_with_fastais_unet_trains_compiled(new_learner, loses):
    def unet():
        layers = [*list(TinyNet())[:4], PixelShuffle_ICNR(8, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
        return nn.Sequential(*layers, ToTensorBase())

    torch.compiler.reset()
    learn = new_learner(unet).to_format(TrainFormat(True))
    learn.model.compile(backend="aot_eager")
    learn.fit(1)
    assert is_channels_last(learn.model[0].weight) and torch.isfinite(torch.tensor(learn.recorder.losses)).all()
