"What the tracer says of single operators, against the strides that they really return."

import operators
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from tracing import FORMATS, Op, Scale, clean_model, events, images, losers, trace, trace_forward


def is_read_as_contiguous(tensor):
    "Whether the next operator finds contiguous: it hands its operand's format on. Never of what is both at once."
    result = tensor * 1
    ambiguous = 0 in tensor.stride() or result.is_contiguous(memory_format=FORMATS[tensor.ndim])
    return not ambiguous


# Every operator: the verdict equals the strides


CASES = [(4, name) for name in operators.OPERATORS] + [(5, name) for name in operators.OPERATORS_3D]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("ndim, name", CASES, ids=[f"{ndim}D {name}" for ndim, name in CASES])
def test_verdict_on_an_operator_equals_the_strides_it_returns(ndim, name, device):
    function = (operators.OPERATORS if ndim == 4 else operators.OPERATORS_3D)[name]
    op = (function if isinstance(function, nn.Module) else Op(function)).to(device)
    x = images(2, 8, 8, 8, device=device) if ndim == 4 else images(2, 8, 4, 8, 8, device=device)

    leaf = x.clone().requires_grad_()
    y = op(leaf)
    gradient = torch.randn_like(y).to(memory_format=FORMATS[y.ndim])
    (returned,) = torch.autograd.grad(y, leaf, gradient)
    expected = []
    if is_read_as_contiguous(y):
        expected.append("forward")
    takes_an_image = y.size(1) > 1 and max(y.shape[2:]) > 1
    if takes_an_image and is_read_as_contiguous(returned):
        expected.append("backward")

    tracer = trace(nn.Sequential(Scale(), op).to(device), x)
    assert losers(tracer).get("1", ()) == tuple(expected)

    if not isinstance(function, nn.Module):  # the same code between two modules inside its own
        before, after = Scale(), Scale()
        block = Op(lambda x: after(function(before(x))), before=before, after=after)
        tracer = trace(nn.Sequential(block).to(device), x)
        assert losers(tracer).get("0", ()) == tuple(expected)


# Models


def test_model_of_channels_last_operators_reports_nothing_and_a_share_of_one():
    tracer = trace(clean_model(), images(2, 3, 16, 16))
    assert tracer.channels_last_share == 1.0
    assert tracer.events == [] and losers(tracer) == {}
    assert len(tracer.layers) == 9
    assert all(layer.share("forward") == 1.0 for layer in tracer.layers.values())


def test_contiguous_model_is_contiguous_throughout():
    tracer = trace(clean_model(), torch.randn(2, 3, 16, 16), channels_last=False)
    assert tracer.channels_last_share == 0.0
    assert tracer.events == [] and losers(tracer) == {}
    assert all(layer.share("forward") == 0.0 for layer in tracer.layers.values())


def test_3d_model_of_channels_last_operators_is_clean():
    tracer = trace(nn.Sequential(Scale(), nn.BatchNorm3d(2), nn.ReLU(), nn.MaxPool3d(2)), images(2, 2, 4, 8, 8))
    assert tracer.channels_last_share == 1.0 and tracer.events == []


def test_loss_in_a_layer_is_named_with_what_it_costs_the_next():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.Conv2d(8, 8, 3))
    tracer = trace(model, images(2, 3, 8, 8))
    assert losers(tracer) == {"1": ("forward", "backward")}
    (lost,) = events(tracer, module="1", phase="forward")
    assert (lost.cls, lost.op, lost.kind) == ("InstanceNorm2d", "aten.clone", "converted")
    assert (lost.shape, lost.dtype, lost.count, lost.nbytes) == ((2, 8, 6, 6), torch.float32, 1, 2 * 8 * 6 * 6 * 4)
    (relaid,) = events(tracer, module="2", phase="forward")
    assert (relaid.op, relaid.kind, relaid.nbytes) == ("aten.convolution", "hidden", lost.nbytes)


def test_copies_of_converted_events_are_those_really_made():
    class Copies(TorchDispatchMode):
        nbytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            source = args[1 if func is torch.ops.aten.copy_.default else 0] if args else None
            result = func(*args, **(kwargs or {}))
            is_copy = func.overloadpacket.__name__ in ("clone", "_to_copy", "copy_")
            if is_copy and result.ndim == 4 and (source.stride(1) == 1) != (result.stride(1) == 1):
                self.nbytes += result.nbytes
            return result

    class Thrashing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.norm = nn.InstanceNorm2d(8)
            self.last = nn.Conv2d(8, 8, 3)

        def forward(self, x):
            x = self.conv(x).contiguous()
            x = self.norm(x.to(memory_format=torch.channels_last))
            return self.last(F.pad(x, (1, 1, 1, 1), mode="circular"))

    model, x = Thrashing(), images(2, 3, 8, 8)
    tracer = trace(model, x)
    y = model(x)
    gradient = torch.randn_like(y)
    with Copies() as copies:
        model(x).backward(gradient)
    assert copies.nbytes > 0
    assert sum(event.nbytes for event in events(tracer, kind="converted")) == copies.nbytes


def test_contiguous_input_of_a_channels_last_convolution_is_hidden():
    tracer = trace(nn.Sequential(nn.Conv2d(3, 8, 3)), torch.randn(2, 3, 8, 8))
    (event,) = events(tracer, phase="forward")
    assert (event.module, event.kind, event.shape, event.nbytes) == ("0", "hidden", (2, 3, 8, 8), 2 * 3 * 8 * 8 * 4)


def test_contiguous_weight_under_a_channels_last_input_is_hidden():
    model = nn.Sequential(nn.ConvTranspose2d(8, 4, 3))
    tracer = trace(model, images(2, 8, 8, 8), channels_last=False)
    assert {event.shape for event in events(tracer, kind="hidden", phase="forward")} == {(8, 4, 3, 3)}


def test_pointwise_operator_over_both_formats_is_mixed():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Op(lambda x: x + x.contiguous()))
    (event,) = events(trace(model, images(2, 3, 8, 8)), kind="mixed", phase="forward")
    assert (event.module, event.op, event.shape) == ("1", "aten.add", (2, 8, 8, 8))


def test_cat_over_both_formats_is_mixed():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Op(lambda x: torch.cat([x, x.contiguous()], 1)))
    (event,) = events(trace(model, images(2, 3, 8, 8)), module="1", kind="mixed")
    assert (event.phase, event.op, event.shape) == ("forward", "aten.cat", (2, 16, 8, 8))


def test_one_loss_is_one_event():
    tracer = trace(nn.Sequential(Scale(), nn.Softmax(1)), images(2, 8, 8, 8))
    assert [(event.phase, event.kind, event.count) for event in events(tracer, module="1")] == [
        ("forward", "lost", 1),
        ("backward", "lost", 1),
    ]


def test_numbers_that_are_no_activations_do_not_count():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Op(lambda x: x * (x > 0).contiguous()))
    assert trace_forward(model, images(2, 3, 8, 8)).channels_last_share == 1.0


def test_empty_batch_is_in_no_format():
    tracer = trace(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Softmax(1)), images(0, 3, 8, 8))
    assert tracer.channels_last_share is None and losers(tracer) == {}


def test_operators_of_a_count_are_one_event():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)
            self.norm = nn.InstanceNorm2d(8)

        def forward(self, x):
            return self.conv(self.norm(self.conv(self.norm(self.conv(x)))))

    tracer = trace(Twice(), images(2, 8, 4, 4))
    (event,) = events(tracer, module="norm", phase="forward")
    assert (event.count, event.nbytes) == (2, 2 * (2 * 8 * 4 * 4 * 4))
    assert losers(tracer) == {"norm": ("forward", "backward")}


# Precision


def test_casts_of_autocast_are_no_conversions():
    with torch.autocast("cpu", torch.bfloat16):
        tracer = trace(clean_model(), images(2, 3, 16, 16))
    assert tracer.events == [] and tracer.channels_last_share == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_channels_that_are_padded_in_half_precision_are_named(dtype):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 1), nn.ConvTranspose2d(16, 12, 2), nn.Conv2d(12, 12, 3, groups=12)
    )
    with torch.autocast("cpu", dtype):
        tracer = trace(model, images(1, 3, 4, 4))
    assert tracer.padded_convs == {"2": (16, 12)}  # the 3 are those of the images
    assert trace(model, images(1, 3, 4, 4)).padded_convs == {}


@pytest.mark.parametrize("c_in, c_out, is_named", [(1, 8, False), (4, 8, False), (3, 12, True)])
def test_channels_of_the_models_own_images_are_no_choice(c_in, c_out, is_named):
    with torch.autocast("cpu", torch.bfloat16):
        tracer = trace(nn.Sequential(nn.Conv2d(c_in, c_out, 3)), images(1, c_in, 4, 4))
    assert ("0" in tracer.padded_convs) == is_named
