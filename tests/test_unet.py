"fastai's U-Net with more channels in its last layers: the same model, and its values."

import pytest
import torch
import torch.nn.functional as F
from conftest import new_dls
from fastai.callback.core import Callback
from fastai.layers import ConvLayer, MergeLayer, NormType, PixelShuffle_ICNR, ResBlock
from fastai.torch_core import ismin_torch
from fastai.vision.learner import create_unet_model
from fastai.vision.models import xresnet
from fastai.vision.models.unet import DynamicUnet
from fastcore.foundation import L
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from channelslast import TrainFormat, format_summary, keep_channels_last, swaps, unet
from channelslast.swaps import swapped_classes
from channelslast.unet import forms_of_last_layers, forms_of_upsampling

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
OPTIONS = [{}, {"self_attention": True, "blur": True}, {"y_range": (0, 1)}, {"act_cls": nn.SiLU}]


LAST_LAYERS = {"MergeLayer": 1, "Conv2d": 3}


def forms_on_any_device(model, device):
    return [pair for module in model.modules() for pair in forms_of_last_layers(module)]


@pytest.fixture
def pads(monkeypatch):
    "All devices are such that the last layers are padded there."
    monkeypatch.setattr(swaps, "PARTS", [forms_on_any_device])


class PaddedConvs(TorchDispatchMode):
    "The shapes of weights of convolutions that take 104 channels."

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default and args[1].shape[1] == 104:
            self.found.append(tuple(args[1].shape))
        return func(*args, **(kwargs or {}))


PADDED = [(104, 104, 3, 3), (104, 104, 3, 3), (2, 104, 1, 1)]


def new_unet(device="cpu", **options):
    torch.manual_seed(0)
    model = create_unet_model(xresnet.xresnet18, 2, (32, 32), pretrained=False, **options)
    return model.to(device, memory_format=torch.channels_last).eval()


def new_images(device="cpu", n=2):
    return torch.randn(n, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)


def step(model, images, dtype=torch.bfloat16):
    "The output, the gradients by name, and the convolutions of 104 channels."
    model.zero_grad()
    with PaddedConvs() as padded, torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
        output = model(images)
    output.float().square().mean().backward()
    return output.detach(), {name: param.grad.clone() for name, param in model.named_parameters()}, padded.found


def block_of(model):
    return next(layer for layer in model.layers if type(layer) is ResBlock)


def assert_close(step, other):
    (output, gradients, _), (other_output, other_gradients, _) = step, other
    torch.testing.assert_close(output.float(), other_output.float(), rtol=0.02, atol=0.02)
    assert type(output) is type(other_output) and output.dtype is other_output.dtype
    for name, gradient in gradients.items():
        assert other_gradients[name].stride() == gradient.stride()
        torch.testing.assert_close(other_gradients[name], gradient, rtol=0.05, atol=0.05 * gradient.abs().max().item())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values_and_gradients_are_those_of_the_model(options, device, pads, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    model, images = new_unet(device, **options), new_images(device)
    own = step(model, images)
    with keep_channels_last(model):
        padded = step(model, images)
    assert own[2] == [] and padded[2] == PADDED
    assert_close(padded, own)


def test_they_are_equal_to_the_bit_for_images_that_half_precision_holds(pads):
    "The sum that the block ends with is rounded once then, in both forms."
    model, images = new_unet(), new_images().bfloat16().float()
    output, gradients, _ = step(model, images)
    with keep_channels_last(model):
        padded, padded_gradients, _ = step(model, images)
    assert torch.equal(padded, output)
    assert all(torch.equal(padded_gradients[name], gradient) for name, gradient in gradients.items())


def test_in_float32_nothing_is_padded(pads):
    with keep_channels_last(new_unet()) as model:
        assert step(model, new_images(), None)[2] == []


def test_half_precision_weights_are_padded_too(pads):
    model = new_unet().bfloat16()
    with keep_channels_last(model), PaddedConvs() as padded:
        model(new_images().bfloat16())
    assert padded.found == PADDED


def test_autocast_merges_in_half_precision(pads):
    model, images = new_unet(), new_images()
    with keep_channels_last(model), torch.autocast("cpu", torch.bfloat16):
        merge = next(layer for layer in model.layers if type(layer) is MergeLayer)
        result = torch.randn(2, 96, 32, 32, dtype=torch.bfloat16)
        result.orig = images
        merged = merge(result)
    assert merged.dtype is torch.bfloat16 and merged.shape[1] == 104 and not merged[:, 99:].any()


def test_model_inside_is_the_users_own(pads):
    model, images = new_unet(), new_images()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    ids = [id(param) for param in model.parameters()]
    with keep_channels_last(model):
        assert swapped_classes(model) == LAST_LAYERS
        step(model, images)
        assert torch.is_tensor(model(x=images))
        assert [id(param) for param in model.parameters()] == ids
    assert swapped_classes(model) == {} and not any("forward" in vars(module) for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert getattr(images, "orig", None) is None


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_block_may_be_checkpointed(use_reentrant, pads):
    model, images = new_unet(), new_images()
    own = step(model, images)
    block = block_of(model)
    forward = block.forward
    block.forward = lambda x: checkpoint(forward, x, use_reentrant=use_reentrant)
    with keep_channels_last(model):
        checkpointed = step(model, images)
    assert checkpointed[2][: len(PADDED)] == PADDED
    assert_close(checkpointed, own)


class Rescales(nn.Module):
    def forward(self, x):
        return F.normalize(x, dim=1)


def with_other_block(**options):
    model = new_unet()
    model.layers[[*model.layers].index(block_of(model))] = ResBlock(1, 99, 99, norm_type=None, **options)
    return model


def with_layer_of_others():
    model = with_other_block()
    block_of(model).convpath.append(Rescales())
    return model


def with_last(*layers):
    "A U-Net whose output is made by other layers."
    model = new_unet()
    at = [*model.layers].index(block_of(model)) + 1
    model.layers[at] = ConvLayer(99, 2, ks=1, norm_type=None, act_cls=None)
    model.layers[at][0] = layers[0]
    model.layers[at].extend(layers[1:])
    return model


def with_own_forward():
    model = new_unet()
    conv = block_of(model).convpath[0][0]
    conv.forward = lambda x: nn.Conv2d.forward(conv, x)
    return model


def with_forward_of_its_own():
    model = new_unet()
    model.forward = lambda x: DynamicUnet.forward(model, x)
    return model


def without_padding():
    "A block of 104 channels."
    model = new_unet()
    at = [*model.layers].index(block_of(model))
    model.layers[at] = ResBlock(1, 104, 104, norm_type=None)
    return model


def that_adds():
    model = new_unet()
    next(layer for layer in model.layers if type(layer) is MergeLayer).dense = False
    return model


class OtherUnet(DynamicUnet):
    def forward(self, x):
        return super().forward(x) * 2


def other_unet():
    body = nn.Sequential(*list(xresnet.xresnet18().children())[:4])
    return OtherUnet(body, 2, (32, 32))


@pytest.mark.parametrize(
    "new",
    [
        lambda: new_unet(last_cross=False),
        lambda: new_unet(norm_type=NormType.Batch),
        lambda: new_unet(norm_type=NormType.Spectral),
        lambda: with_other_block(groups=3),
        lambda: with_other_block(padding_mode="reflect"),
        lambda: with_last(nn.ConvTranspose2d(99, 2, 1)),
        lambda: with_last(nn.Conv2d(99, 2, 1, padding=1, padding_mode="circular")),
        with_layer_of_others,
        with_own_forward,
        with_forward_of_its_own,
        without_padding,
        that_adds,
        other_unet,
        lambda: nn.Sequential(nn.Conv2d(3, 9, 1)),
    ],
    ids=[
        *("no last cross", "norms", "spectral norm", "groups", "reflected", "last transposed", "last circular"),
        *(
            "layer of others",
            "forward of a layer",
            "forward of the model",
            "no need",
            "a sum",
            "own forward",
            "no U-Net",
        ),
    ],
)
def test_other_last_layers_stay(new, pads):
    with keep_channels_last(new()) as model:
        assert not LAST_LAYERS.keys() & swapped_classes(model).keys()


def with_first_layer():
    model = new_unet()
    block_of(model).convpath.insert(0, nn.Identity())
    return model


@pytest.mark.parametrize(
    "new",
    [lambda: with_last(nn.Conv2d(99, 2, 1), nn.Conv2d(2, 2, 1)), with_first_layer],
    ids=["a layer after the last", "a layer before the first"],
)
def test_layers_around_them_may_be_any(new, pads):
    model, images = new(), new_images()
    own = step(model, images)
    with keep_channels_last(model):
        padded = step(model, images)
    assert padded[2] == PADDED
    assert_close(padded, own)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_full_backward_hook"])
def test_hooks_see_the_models_own_channels(register, pads):
    seen = []
    model = new_unet()
    getattr(block_of(model).convpath[0], register)(lambda module, inputs, outputs: seen.append(outputs))
    with keep_channels_last(model):
        assert step(model, new_images())[2] == []
    (outputs,) = seen
    assert (outputs if torch.is_tensor(outputs) else outputs[0]).shape[1] == 99


def test_summary_says_so(pads):
    model = new_unet().train()
    with torch.autocast("cpu", torch.bfloat16):
        own = format_summary(model, new_images())
        with keep_channels_last(model):
            summary = format_summary(model, new_images())
    assert own.swapped == {} and set(own.padded_convs.values()) == {(99, 99), (99, 2)}
    assert summary.swapped.items() >= LAST_LAYERS.items()
    assert set(summary.padded_convs.values()) == {(104, 2)}
    assert any(layer.module.startswith("layers.11.convpath") for layer in summary.layers)


def test_summary_of_a_learner_says_so(new_learner, pads):
    learn = new_learner(new_unet, new_dls(3, 32, 32))
    learn.loss_func = lambda output, target: output.float().square().mean()
    assert learn.to_format("channels last bf16").format_summary().swapped.items() >= LAST_LAYERS.items()


@pytest.mark.skipif(not ismin_torch("2.7"), reason="PyTorch 2.6 traces no change of a tensor's class")
def test_it_compiles_in_one_graph(pads):
    model, images = new_unet(), new_images()
    counter = CompileCounterWithBackend("aot_eager")
    with keep_channels_last(model), torch.autocast("cpu", torch.bfloat16):
        own = torch.Tensor(model(images).float())
        compiled = torch.compile(model, backend=counter)
        for _ in range(2):
            torch.testing.assert_close(torch.Tensor(compiled(images).float()), own, rtol=0.02, atol=0.02)
    assert counter.frame_count == 1


def test_they_are_swapped_on_a_gpu_alone():
    model = new_unet()
    (parts,) = swaps.PARTS
    assert list(parts(model, torch.device("cpu"))) == []
    found = [module for module, _ in parts(model, torch.device("cuda"))]
    upsampling = [module for module in model.modules() if type(module) is PixelShuffle_ICNR]
    assert set(found) == {*upsampling, *[module for module, _ in forms_of_last_layers(model)]}


# Upsampling


def upsample(layer, image):
    "Upsample and merge, as a U-Net does; return the result and all gradients."
    layer.zero_grad()
    image = image.detach().requires_grad_()
    merged = torch.cat([layer(image), torch.ones_like(layer(image))[:, :8]], 1)
    grad = torch.randn(merged.shape, generator=torch.Generator().manual_seed(0)).to(merged)
    merged.backward(grad.contiguous(memory_format=torch.channels_last))
    return merged.detach(), [param.grad.clone() for param in layer.parameters()], image.grad


def new_upsampling(**options):
    options = {"nf": 24, "norm_type": None, **options}
    return PixelShuffle_ICNR(16, **options).to(memory_format=torch.channels_last)


@pytest.fixture
def deals_out(monkeypatch):
    "All devices are such that upsampling deals out its channels there."
    found = lambda model, device: [pair for module in model.modules() for pair in forms_of_upsampling(module)]  # noqa: E731
    monkeypatch.setattr(swaps, "PARTS", [found])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"blur": True}, {"scale": 4}, {"nf": 5}, {"act_cls": None}], ids=str)
def test_upsampling_has_the_values_of_the_layer(options, dtype, device, deals_out, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    layer = new_upsampling(**options).to(device, dtype)
    image = torch.randn(2, 16, 5, 6, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    values, grads, image_grad = upsample(layer, image)
    with keep_channels_last(layer):
        assert swapped_classes(layer)["PixelShuffle_ICNR"] == 1
        own_values, own_grads, own_image_grad = upsample(layer, image)
    if dtype is not torch.float64:  # whose kernel computes the last channels in another way
        assert torch.equal(own_values, values)
    torch.testing.assert_close(own_values, values)
    for own, grad in zip([*own_grads, own_image_grad], [*grads, image_grad], strict=True):
        # a sum of bfloat16 in another order, to the precision of what is summed: a small element is what is left of it
        tolerances = {"rtol": 0.016, "atol": 0.01 * grad.abs().max().item()} if dtype is torch.bfloat16 else {}
        torch.testing.assert_close(own, grad, **tolerances)


def test_upsampling_has_gradients_of_gradients(deals_out):
    layer = new_upsampling(act_cls=nn.SiLU).double()
    with keep_channels_last(layer):
        assert torch.autograd.gradgradcheck(layer, torch.randn(1, 16, 2, 3, dtype=torch.float64, requires_grad=True))


def with_hook():
    layer = new_upsampling()
    layer[0].register_forward_hook(lambda *args: None)
    return layer


@pytest.mark.parametrize(
    "new",
    [
        lambda: new_upsampling(norm_type=NormType.Batch),
        lambda: new_upsampling(norm_type=NormType.Weight),
        with_hook,
        lambda: nn.Sequential(*new_upsampling()),
    ],
    ids=["BatchNorm", "weight norm", "hook", "another class"],
)
def test_other_upsampling_stays(new, deals_out):
    with keep_channels_last(new()) as layer:
        assert "PixelShuffle_ICNR" not in swapped_classes(layer)


def test_upsampling_compiles_in_one_graph(deals_out):
    layer, counter = new_upsampling(), CompileCounterWithBackend("aot_eager")
    image = torch.randn(2, 16, 5, 6).contiguous(memory_format=torch.channels_last)
    with keep_channels_last(layer):
        compiled = torch.compile(layer, backend=counter, fullgraph=True)
        torch.testing.assert_close(compiled(image), layer(image))
    assert counter.frame_count == 1


class Swapped(Callback):
    "What is swapped while it trains."

    def after_pred(self):
        self.found = swapped_classes(self.model)


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fmt", [TrainFormat(True, "fp16"), TrainFormat(True, "bf16", cuda_graph=True)], ids=str)
def test_learner_trains_with_and_without(new_learner, fmt, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    losses = []
    for is_padded in (True, False):
        if not is_padded:
            monkeypatch.setattr(unet, "forms_of_last_layers", lambda module: [])
        learn = new_learner(lambda: new_unet("cuda"), new_dls(3, 32, 32, device="cuda"), device="cuda")
        learn.loss_func, learn.metrics = lambda output, target: output.float().square().mean(), L()
        swapped = Swapped()
        learn.to_format(fmt).fit(2, 1e-4, cbs=swapped)
        assert (swapped.found.items() >= LAST_LAYERS.items()) is is_padded
        losses.append(torch.stack(learn.recorder.losses))
    torch.testing.assert_close(*losses, rtol=0.02, atol=0.01)
