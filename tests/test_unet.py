"fastai's U-Net with more channels in its last layers: the same model, and its values."

import pytest
import torch
import torch.nn.functional as F
from conftest import new_dls
from fastai.layers import NormType, ResBlock
from fastai.vision.learner import create_unet_model
from fastai.vision.models import xresnet
from fastai.vision.models.unet import DynamicUnet
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from channelslast import TrainFormat, format_summary, keep_channels_last, unet
from channelslast.swaps import MODEL_SWAPS, swapped_classes
from channelslast.unet import _can_be_padded

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
OPTIONS = [{}, {"self_attention": True, "blur": True}, {"y_range": (0, 1)}, {"act_cls": nn.SiLU}]


@pytest.fixture
def pads(monkeypatch):
    "A device on which the last layers are padded."
    monkeypatch.setattr(type(MODEL_SWAPS[0]), "is_due", lambda self, module, device: _can_be_padded(module))


@pytest.fixture
def calls(monkeypatch):
    "The calls of layers with padded parameters."
    found = []
    real = unet.functional_call

    def call(layer, *args):
        found.append(layer)
        return real(layer, *args)

    monkeypatch.setattr(unet, "functional_call", call)
    return found


def new_unet(device="cpu", **options):
    torch.manual_seed(0)
    model = create_unet_model(xresnet.xresnet18, 2, (32, 32), pretrained=False, **options)
    return model.to(device, memory_format=torch.channels_last).eval()


def new_images(device="cpu", n=2):
    return torch.randn(n, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)


def step(model, images, dtype=torch.bfloat16):
    "The output, and the gradients by name."
    model.zero_grad()
    with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
        output = model(images)
    output.float().square().mean().backward()
    return output.detach(), {name: param.grad.clone() for name, param in model.named_parameters()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values_and_gradients_are_those_of_the_model(options, device, pads, calls, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    model, images = new_unet(device, **options), new_images(device)
    output, gradients = step(model, images)
    assert not calls
    with keep_channels_last(model):
        padded, padded_gradients = step(model, images)
    assert len(calls) == 2 and type(padded) is type(output)
    torch.testing.assert_close(padded.float(), output.float(), rtol=0.02, atol=0.02)
    for name, gradient in gradients.items():
        assert padded_gradients[name].stride() == gradient.stride()
        torch.testing.assert_close(padded_gradients[name], gradient, rtol=0.05, atol=0.05 * gradient.abs().max().item())


def test_on_a_cpu_they_are_equal_to_the_bit(pads):
    model, images = new_unet(), new_images()
    output, gradients = step(model, images)
    with keep_channels_last(model):
        padded, padded_gradients = step(model, images)
    assert torch.equal(padded, output)
    assert all(torch.equal(padded_gradients[name], gradient) for name, gradient in gradients.items())


def test_in_float32_nothing_is_padded(pads, calls):
    with keep_channels_last(new_unet()) as model:
        step(model, new_images(), None)
    assert not calls


def test_half_precision_weights_are_padded_too(pads, calls):
    model = new_unet().bfloat16()
    with keep_channels_last(model):
        model(new_images().bfloat16())
    assert len(calls) == 2


def test_model_inside_is_the_users_own(pads):
    model = new_unet()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    ids = [id(param) for param in model.parameters()]
    with keep_channels_last(model):
        assert swapped_classes(model) == {"DynamicUnet": 1}
        step(model, new_images())
        assert [id(param) for param in model.parameters()] == ids
    assert swapped_classes(model) == {} and "forward" not in vars(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(hasattr(layer, "orig") for layer in model.layers)


class Rescales(nn.Module):
    def forward(self, x):
        return F.normalize(x, dim=1)


def with_other_block(**options):
    model = new_unet()
    at = [type(layer) for layer in model.layers].index(ResBlock)
    model.layers[at] = ResBlock(1, 99, 99, norm_type=None, **options)
    return model


def with_layer_of_others():
    model = with_other_block()
    next(layer for layer in model.layers if type(layer) is ResBlock).convpath.append(Rescales())
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
        with_layer_of_others,
        other_unet,
    ],
    ids=["no last cross", "norms", "spectral norm", "groups", "layer of others", "own forward"],
)
def test_other_last_layers_stay(new, pads):
    with keep_channels_last(new()) as model:
        assert "DynamicUnet" not in swapped_classes(model) and "OtherUnet" not in swapped_classes(model)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_full_backward_hook"])
def test_hooks_see_the_models_own_channels(register, pads, calls):
    seen = []
    model = new_unet()
    block = next(layer for layer in model.layers if type(layer) is ResBlock)
    getattr(block.convpath[0], register)(lambda module, inputs, outputs: seen.append(outputs))
    with keep_channels_last(model):
        step(model, new_images())
    (outputs,) = seen
    assert (outputs if torch.is_tensor(outputs) else outputs[0]).shape[1] == 99 and not calls


def test_summary_says_so(pads):
    model = new_unet().train()
    with torch.autocast("cpu", torch.bfloat16):
        assert format_summary(model, new_images()).swapped == {}
        with keep_channels_last(model):
            summary = format_summary(model, new_images())
    assert summary.swapped["DynamicUnet"] == 1
    assert any(layer.module.startswith("layers.11.convpath") for layer in summary.layers)


def test_it_compiles_in_one_graph(pads):
    model, images = new_unet(), new_images()
    counter = CompileCounterWithBackend("aot_eager")
    with keep_channels_last(model), torch.autocast("cpu", torch.bfloat16):
        own = torch.Tensor(model(images).float())
        compiled = torch.compile(model, backend=counter)
        for _ in range(2):
            torch.testing.assert_close(torch.Tensor(compiled(images).float()), own, rtol=0.02, atol=0.02)
    assert counter.frame_count == 1


@pytest.mark.cuda
def test_is_due_on_a_gpu_alone():
    for device, swapped in (("cpu", False), ("cuda", True)):
        with keep_channels_last(new_unet(device)) as model:
            assert ("DynamicUnet" in swapped_classes(model)) is swapped


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fmt", [TrainFormat(True, "fp16"), TrainFormat(True, "bf16", cuda_graph=True)], ids=str)
def test_learner_trains_with_and_without(new_learner, fmt, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    losses = []
    for is_due in (True, False):
        monkeypatch.setattr(type(MODEL_SWAPS[0]), "is_due", lambda self, module, device, is_due=is_due: is_due)
        learn = new_learner(lambda: new_unet("cuda"), new_dls(3, 32, 32, device="cuda"), device="cuda")
        learn.loss_func = lambda output, target: output.float().square().mean()
        learn.to_format(fmt).fit(2, 1e-4)
        losses.append(torch.stack(learn.recorder.losses))
    torch.testing.assert_close(*losses, rtol=0.02, atol=0.01)
