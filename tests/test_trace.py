"What the tracer says of single operators and small models, against the strides that they really return."

import copy
import weakref
from dataclasses import dataclass

import operators
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._higher_order_ops.map import map as map_rows
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from channelslast.memory_format import module_to_memory_format
from channelslast.trace import FormatTracer, LayerFormat, tensors_in

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


class Op(nn.Module):
    "A function as a module; with children, so that its code is that of a module around others."

    def __init__(self, function, **children):
        super().__init__()
        self.function = function
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, *args):
        return self.function(*args)


class Scale(nn.Module):
    "Keeps any format, and needs a gradient."

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return x * self.scale


def images(*shape, device="cpu"):
    return torch.randn(*shape, device=device).to(memory_format=FORMATS[len(shape)])


def trace(model, *inputs, channels_last=True):
    "Trace a step whose loss has a gradient in channels last (or contiguous) format."
    module_to_memory_format(model, channels_last)
    with FormatTracer(model) as tracer:
        output = model(*inputs)
        memory_format = FORMATS.get(output.ndim) if channels_last else None
        gradient = torch.randn_like(output, memory_format=memory_format or torch.contiguous_format)
        loss = (output * gradient).sum()
        tracer.own_loss(loss)
        loss.backward()
    return tracer


def events(tracer, **wanted):
    return [event for event in tracer.events if all(getattr(event, name) == value for name, value in wanted.items())]


def losers(tracer):
    return {layer.module: layer.loses_in for layer in tracer.layers.values() if layer.loses_in}


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
    if name == "channel_shuffle" and torch.__version__ < "2.5":
        pytest.skip("PyTorch 2.4 has no gradient of channel_shuffle")
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


needs_clean_dropout = pytest.mark.skipif(
    torch.__version__ < "2.5", reason="PyTorch 2.4 multiplies by a contiguous mask in Dropout"
)


def clean_model():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.GELU(),
        nn.ConvTranspose2d(8, 16, 2, stride=2),
        nn.Dropout(0.1),
        nn.Conv2d(16, 4, 1),
    )


@needs_clean_dropout
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


# Not fooled by


@pytest.mark.parametrize(
    "shape, layers",
    [
        ((2, 1, 8, 8), [nn.Conv2d(1, 1, 3), nn.Softmax(1), nn.Conv2d(1, 4, 1)]),
        ((2, 8, 1, 1), [nn.Conv2d(8, 8, 1), nn.Softmax(1), nn.Conv2d(8, 4, 1)]),
    ],
    ids=["one channel", "1x1 pixels"],
)
@pytest.mark.parametrize("channels_last", [True, False])
def test_tensors_in_both_formats_at_once_are_no_losses(shape, layers, channels_last):
    model = module_to_memory_format(nn.Sequential(*layers), channels_last)
    with FormatTracer(model) as tracer:
        output = model(images(*shape) if channels_last else torch.randn(shape))
        output.backward(torch.randn_like(output))
    assert tracer.events == []


def test_global_average_and_its_expanded_gradient_are_no_loss():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    tracer = trace(model, images(2, 3, 8, 8))
    assert losers(tracer) == {}
    assert list(tracer.dense_gradients) == ["1"]  # what comes of it is told apart


def test_views_and_slices_keep_the_format():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Op(lambda x: x[:, 2:6].detach()[:, :, 1:4].narrow(1, 0, 3)))
    tracer = trace_forward(model, images(2, 3, 8, 8))
    assert tracer.events == []


def trace_forward(model, *inputs):
    module_to_memory_format(model)
    with FormatTracer(model) as tracer, torch.no_grad():
        model(*inputs)
    return tracer


def test_permuted_view_is_no_loss_and_no_layer():
    model = nn.Sequential(Scale(), Op(lambda x: x.permute(0, 2, 3, 1)))
    with FormatTracer(model) as tracer:
        output = model(images(2, 4, 8, 8))
        output.backward(torch.randn_like(output))
    assert losers(tracer) == {} and "1" not in tracer.layers


def test_one_image_of_a_batch_keeps_the_format():
    first = Op(lambda x: x[0][None])
    tracer = trace_forward(nn.Sequential(Scale(), first, nn.Conv2d(8, 8, 1)), images(2, 8, 4, 4))
    assert losers(tracer) == {} and tracer.events == []


def test_new_tensors_are_no_losses():
    zeros = Op(lambda x: (x.new_zeros(x.shape), torch.empty_like(x, memory_format=torch.contiguous_format), x * 2)[2])
    assert trace_forward(nn.Sequential(nn.Conv2d(3, 8, 1), zeros), images(2, 3, 8, 8)).events == []


def test_flatten_before_a_head_loses_nothing_but_its_copy_is_told():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 2))
    tracer = trace_forward(model, images(2, 3, 8, 8))
    assert losers(tracer) == {} and tracer.channels_last_share == 1.0
    (event,) = tracer.events
    assert (event.module, event.kind, event.nbytes) == ("1", "converted", 2 * 8 * 36 * 4)


class Attention(nn.Module):
    "A transformer's block on images: (B, C, H, W) to tokens (B, N, C) and back."

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        query, key, value = self.qkv(tokens).reshape(len(x), -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        tokens = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(tokens.shape)
        return tokens.transpose(1, 2).reshape(x.shape)


def test_attention_on_tokens_keeps_the_format():
    tracer = trace(nn.Sequential(nn.Conv2d(3, 8, 1), Attention(), nn.Conv2d(8, 4, 1)), images(2, 3, 4, 4))
    assert losers(tracer) == {} and tracer.events == []
    assert tracer.channels_last_share == 1.0


def test_layers_on_channels_at_the_end_of_the_shape_are_no_losses():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)
            self.mlp = nn.Linear(8, 8)

        def forward(self, x):
            return self.mlp(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)

    tracer = trace(nn.Sequential(nn.Conv2d(3, 8, 3), Block(), nn.Conv2d(8, 4, 1)), images(2, 3, 8, 8))
    assert tracer.events == [] and losers(tracer) == {} and tracer.channels_last_share == 1.0


def test_constant_that_a_module_returns_beside_its_images_is_no_loss():
    conv = nn.Conv2d(3, 8, 3, padding=1)
    grid = torch.ones(2, 2, 8, 8)
    model = nn.Sequential(Op(lambda x: (conv(x), grid), conv=conv), Op(lambda both: both[0]))
    assert losers(trace(model, images(2, 3, 8, 8))) == {}


def test_result_that_is_no_image_is_no_loss():
    gram = Op(lambda x: torch.einsum("bchw,bdhw->bcd", x, x)[:, None].expand(-1, 4, -1, -1) * 1.0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), gram)
    assert losers(trace_forward(model, images(2, 3, 12, 12))) == {}


def test_gradient_in_the_contiguous_format_of_its_input_is_no_loss():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3))
    assert "2" not in losers(trace(model, images(2, 3, 8, 8)))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_segments_are_seen_again_in_the_backward_pass(use_reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.block = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Softmax(1))

        def forward(self, x):
            return checkpoint(self.block, self.conv(x), use_reentrant=use_reentrant)

    tracer = trace(Checkpointed(), images(2, 3, 8, 8))
    (event,) = events(tracer, module="block.1", phase="forward")
    assert event.count == 2  # once more, to compute the gradient
    assert losers(tracer) == {"block.1": ("forward", "backward")}
    assert {event.module for event in tracer.events} <= {"conv", "block.0", "block.1", "(loss)"}


@dataclass(slots=True)
class Outputs:
    out: torch.Tensor
    aux: torch.Tensor


@pytest.mark.parametrize(
    "pack",
    [lambda x, y: (x, [y]), lambda x, y: {"out": x, "aux": {"deep": y}}, Outputs],
    ids=["tuple", "dict", "dataclass"],
)
def test_nested_outputs(pack):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Conv2d(3, 8, 3)
            self.heads = Op(lambda x: pack(x.softmax(1), x * 2))

        def forward(self, x):
            return self.heads(self.body(x))

    model = module_to_memory_format(Two())
    with FormatTracer(model) as tracer:
        output = model(images(2, 3, 8, 8))
        first = output.out if isinstance(output, Outputs) else output["out"] if isinstance(output, dict) else output[0]
        tracer.own_loss(first.sum())
        (first * images(2, 8, 6, 6)).sum().backward()
    assert losers(tracer) == {"heads": ("forward", "backward")}


def through_3d(x):
    return (x.flatten(2) @ torch.ones(x.shape[2:].numel(), x.shape[2:].numel())).reshape(x.shape)


def test_loss_in_a_modules_own_code_between_its_children():
    first, last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
    block = Op(lambda x: last(through_3d(first(x))), first=first, last=last)
    tracer = trace(nn.Sequential(nn.Conv2d(3, 8, 1), block), images(2, 3, 8, 8))
    assert losers(tracer) == {"1": ("forward", "backward")}
    assert tracer.channels_last_share < 1
    (lost,) = events(tracer, module="1", phase="forward")
    assert (lost.op, lost.kind, lost.shape) == ("aten.bmm", "lost", (2, 8, 8, 8))


def test_loss_of_a_child_does_not_hide_that_of_the_module_around_it():
    child, conv = nn.Softmax(1), nn.Conv2d(8, 8, 1)
    block = Op(lambda x: through_3d(conv(child(x))), child=child, conv=conv)
    tracer = trace(nn.Sequential(nn.Conv2d(3, 8, 1), block), images(2, 3, 8, 8))
    assert losers(tracer) == {"1": ("forward", "backward"), "1.child": ("forward", "backward")}


def test_each_stretch_of_a_modules_own_code_is_judged_by_itself():
    conv = nn.Conv2d(8, 8, 1)
    block = Op(lambda x: through_3d(conv(x.softmax(1))), conv=conv)
    tracer = trace(nn.Sequential(nn.Conv2d(3, 8, 1), block), images(2, 3, 8, 8))
    assert {event.op for event in events(tracer, module="1", phase="forward", kind="lost")} == {
        "aten._softmax",
        "aten.bmm",
    }


def test_own_loss_on_the_way_to_a_child_that_takes_tokens():
    linear = nn.Linear(4, 4)
    block = Op(lambda x: linear(F.glu(x, 1).flatten(2).transpose(1, 2)), linear=linear)
    model = module_to_memory_format(nn.Sequential(nn.Conv2d(3, 8, 1), block))
    with FormatTracer(model) as tracer:
        tokens = model(images(2, 3, 8, 8))
        tokens.backward(torch.randn_like(tokens))
    assert losers(tracer) == {"1": ("backward",)}


def test_own_code_is_not_blamed_for_what_a_child_made_and_it_hands_on():
    norm = nn.InstanceNorm2d(8)
    block = Op(lambda x: (norm(x), x * 2), norm=norm)
    tracer = trace(nn.Sequential(nn.Conv2d(3, 8, 1), block, Op(lambda both: both[1])), images(2, 3, 8, 8))
    assert losers(tracer) == {"1.norm": ("forward",)}


def test_module_that_goes_back_to_channels_last_loses_nothing_but_its_copies_are_told():
    there_and_back = Op(lambda x: x.contiguous().to(memory_format=torch.channels_last))
    tracer = trace_forward(nn.Sequential(nn.Conv2d(3, 8, 1), there_and_back), images(2, 3, 8, 8))
    assert losers(tracer) == {}
    assert [event.kind for event in events(tracer, module="1")] == ["converted", "converted"]


def test_loss_by_way_of_3d_where_the_input_is_the_models_own():
    x = images(2, 8, 8, 8).requires_grad_()
    assert losers(trace(nn.Sequential(Op(through_3d)), x)) == {"0": ("forward", "backward")}


def test_images_made_of_tokens():
    to_image = Op(lambda tokens: tokens.transpose(1, 2).reshape(2, 8, 4, 4))
    tracer = trace_forward(nn.Sequential(to_image, nn.Softmax(1)), torch.randn(2, 16, 8))
    assert losers(tracer) == {"1": ("forward",)} and tracer.channels_last_share == 0.0
    assert trace_forward(nn.Sequential(to_image, nn.ReLU()), torch.randn(2, 16, 8)).channels_last_share == 1.0


def test_hook_of_the_caller_is_code_of_its_module():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU())
    model[1].register_forward_pre_hook(lambda module, args: (args[0].softmax(1),))
    assert {event.module for event in events(trace(model, images(2, 3, 8, 8)), op="aten._softmax")} == {"1"}


def test_module_on_tokens_between_children_that_hands_contiguous_on():
    linear = nn.Linear(8, 8)
    block = Op(lambda x: linear(x.flatten(2).transpose(1, 2)).transpose(1, 2).contiguous().view(x.shape), linear=linear)
    tracer = trace(nn.Sequential(nn.Conv2d(3, 8, 1), block, nn.Conv2d(8, 8, 1)), images(2, 3, 4, 4))
    assert "forward" in losers(tracer)["1"]


def test_module_used_twice_loses_where_one_use_does():
    class Switches(nn.Module):
        def forward(self, x):
            return x * 2 if x.shape[-1] > 4 else x.softmax(1)

    switch, first, down, last = Switches(), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 2, 2), nn.Conv2d(8, 8, 1)
    children = dict(switch=switch, first=first, down=down, last=last)
    model = nn.Sequential(Op(lambda x: last(switch(down(switch(first(x))))), **children))
    assert losers(trace(model, images(2, 3, 8, 8))) == {"0.switch": ("forward", "backward")}


def test_module_used_on_both_formats_loses_what_it_is_given_in_channels_last():
    glu, norm, first, last = nn.GLU(1), nn.InstanceNorm2d(8), nn.Conv2d(3, 8, 1), nn.Conv2d(4, 8, 1)

    def forward(x):
        x = first(x)
        return last(glu(x)) + last(glu(norm(x)))

    model = nn.Sequential(Op(forward, glu=glu, norm=norm, first=first, last=last))
    assert losers(trace(model, images(2, 3, 8, 8))) == {"0.norm": ("forward",), "0.glu": ("backward",)}


def test_images_of_the_shape_of_a_weight():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Softmax(1))
    assert losers(trace(model, images(8, 8, 3, 3))) == {"1": ("forward", "backward")}


def test_loss_with_a_gradient_inside_belongs_to_the_loss():
    model = module_to_memory_format(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()))
    with FormatTracer(model) as tracer:
        output = model(images(2, 3, 8, 8))
        (gradient,) = torch.autograd.grad(output.sum(), model[0].weight, create_graph=True)
        loss = output.contiguous().softmax(1).sum() + gradient.square().sum()
        tracer.own_loss(loss)
        loss.backward()
    assert losers(tracer) == {}
    assert events(tracer, module="(loss)", phase="forward", kind="converted")


def test_node_of_a_users_function_that_keeps_a_variable():
    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.variable = 3
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient.contiguous() * 2

    model = nn.Sequential(nn.Conv2d(3, 8, 1), Op(Keeps.apply), nn.Conv2d(8, 8, 1))
    assert losers(trace(model, images(2, 3, 8, 8))) == {"1": ("backward",)}


@pytest.mark.filterwarnings("ignore")
def test_script_is_code_of_the_module_around_it():
    script = torch.jit.script(nn.Sequential(nn.ReLU(), nn.Softmax(1)))
    tracer = trace(nn.Sequential(nn.Conv2d(3, 8, 1), script, nn.Conv2d(8, 8, 1)), images(2, 3, 8, 8))
    assert "forward" in losers(tracer)[""]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make", [torch.jit.script, lambda model: torch.jit.trace(model, images(2, 3, 8, 8))], ids=["script", "trace"]
)
def test_model_that_is_a_script_is_one_module(make):
    model = make(module_to_memory_format(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Softmax(1))))
    tracer = trace(model, images(2, 3, 8, 8))
    assert list(tracer.layers) == [""] and "forward" in losers(tracer)[""]
    seen = tracer.events
    model(images(2, 3, 8, 8))
    assert tracer.events == seen


def test_tensors_in_what_modules_take_and_return():
    a, b = torch.ones(1), torch.ones(2)
    assert [id(tensor) for tensor in tensors_in([a, {"b": (b, 3)}, Outputs(b, a), LayerFormat, "c", None])] == [
        id(tensor) for tensor in (a, b, b, a)
    ]


def test_tensors_in_what_holds_itself():
    inner = torch.ones(1)
    pair = [inner, inner]
    pair.append(pair)
    assert len(tensors_in(pair)) == 2
    assert len(tensors_in([pair, pair])) == 4


def test_operators_of_parallel_branches_belong_to_their_own():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 1)
            self.a_branch_with_a_long_name = nn.Sequential(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()))
            self.b = nn.GLU(1)
            self.c = nn.Conv2d(4, 8, 1)

        def forward(self, x):
            x = self.stem(x)
            long = self.a_branch_with_a_long_name(x)
            return self.c(self.b(x)) + long

    tracer = trace(Branches(), images(2, 3, 8, 8))
    assert losers(tracer) == {"b": ("backward",)}
    (event,) = events(tracer, kind="lost")
    assert (event.module, event.op, event.phase) == ("b", "aten.glu_backward", "backward")


def test_operators_before_a_module_that_is_called_by_keyword_are_not_its_own():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.last = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.last(input=F.glu(self.conv(input=x), 1))

    tracer = trace(nn.Sequential(Block()), images(2, 3, 8, 8))
    assert losers(tracer) == {"0": ("backward",)}


def test_weights_are_no_images():
    model = nn.Sequential(weight_norm(nn.Conv2d(3, 8, 3)), nn.Conv2d(8, 8, 3))
    tracer = trace(model, images(2, 3, 12, 12))
    assert losers(tracer) == {} and tracer.channels_last_share == 1.0
    assert events(tracer, module="0", kind="hidden")  # its weight comes in contiguous format, as is told


def test_functional_operators_belong_to_the_module_that_calls_them():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.last = nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return self.last(self.conv(x).softmax(1))

    tracer = trace(nn.Sequential(nn.Identity(), Block()), images(2, 3, 8, 8))
    assert losers(tracer) == {"1": ("forward", "backward")}
    assert {(event.op, event.kind) for event in events(tracer, module="1")} == {
        ("aten._softmax", "lost"),
        ("aten._softmax_backward_data", "lost"),
    }


def test_functional_operator_on_a_contiguous_tensor_gives_a_contiguous_gradient_without_blame():
    class Pools(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.InstanceNorm2d(8)
            self.conv = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return self.conv(F.max_pool2d(self.norm(x), 2))

    tracer = trace(nn.Sequential(nn.Conv2d(3, 8, 1), Pools()), images(2, 3, 8, 8))
    assert losers(tracer) == {"1.norm": ("forward",)}


def test_inputs_that_need_gradients_have_theirs():
    x = images(2, 8, 8, 8).requires_grad_()
    tracer = trace(nn.Sequential(nn.Softmax(1)), x)
    assert losers(tracer) == {"0": ("forward", "backward")}
    assert x.grad is not None


# Tensors that are no plain ones


class Wraps(torch.Tensor):
    "A tensor that has no memory of its own, as those of quantized and distributed training."

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, requires_grad=inner.requires_grad
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args = [arg.inner if isinstance(arg, Wraps) else arg for arg in args]
        result = func(*args, **(kwargs or {}))
        return Wraps(result) if isinstance(result, torch.Tensor) else result


def test_tensors_that_wrap_others_are_no_images():
    wraps = Op(lambda x: Wraps(x.detach()).permute(0, 2, 3, 1).permute(0, 3, 1, 2).mul(2).inner + x)
    tracer = trace(nn.Sequential(nn.Conv2d(3, 8, 1), wraps, nn.Conv2d(8, 8, 1)), images(2, 3, 8, 8))
    assert losers(tracer) == {} and tracer.channels_last_share == 1.0


def crops(x, **kwargs):
    return torch.nested.as_nested_tensor([x[0], x[1, :, :4]], **kwargs)


def rows_of_tokens(x):
    tokens = x.flatten(2).transpose(1, 2)
    rows = torch.nested.as_nested_tensor([tokens[0], tokens[1, :10]], layout=torch.jagged)
    heads = rows.unflatten(-1, (2, 4)).transpose(1, 2)  # 4D
    return F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(-2).values()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "function",
    [lambda x: torch.nested.to_padded_tensor(crops(x) * 2, 0.0), rows_of_tokens],
    ids=["strided", "jagged"],
)
def test_nested_tensors_are_no_images(function):
    tracer = trace_forward(nn.Sequential(nn.Conv2d(3, 8, 1), Op(function)), images(2, 3, 8, 8))
    assert tracer.layers["0"].share("forward") == 1.0


@pytest.mark.parametrize(
    "function",
    [
        lambda module, x: torch.vmap(module)(torch.stack([x, x])).sum(0),
        lambda module, x: module(x) + torch.func.jacrev(lambda x: module(x).mean((2, 3)))(x[:1, :, :4, :4]).sum(),
        lambda module, x: torch.func.jvp(module, (x,), (x,))[1],
    ],
    ids=["vmap", "jacrev", "jvp"],
)
def test_modules_below_transforms_of_functions(function):
    module = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Softmax(1))
    block = Op(lambda x: function(module, x), module=module)
    tracer = trace(nn.Sequential(nn.Conv2d(3, 8, 1), block, nn.Conv2d(8, 8, 1)), images(2, 3, 8, 8))
    assert tracer.layers["0"].share("forward") == 1.0 and "2" in tracer.layers


# Higher-order operators


def branches():
    "A model that chooses between its two children with `torch.cond`."
    conv = nn.Conv2d(3, 8, 1)
    a = nn.Sequential(nn.InstanceNorm2d(8), nn.Conv2d(8, 8, 1))
    b = nn.Conv2d(8, 8, 1)

    def forward(x):
        return torch.cond(x.sum() < torch.inf, a, b, (conv(x),))

    return Op(forward, conv=conv, a=a, b=b)


def loop():
    conv, body = nn.Conv2d(3, 8, 1), nn.Sequential(nn.InstanceNorm2d(8), nn.Conv2d(8, 8, 1))

    def forward(x):
        step = (torch.tensor(0), conv(x))
        return while_loop(lambda i, x: i < 2, lambda i, x: (i + 1, body(x)), step)[1]

    return Op(forward, conv=conv, a=body)


def attention():
    conv, a = nn.Conv2d(3, 16, 1), nn.Sequential(nn.InstanceNorm2d(16))

    def forward(x):
        x = a(conv(x))
        tokens = x.flatten(2).transpose(1, 2)[:, None]
        return flex_attention(tokens, tokens, tokens, score_mod=lambda score, b, h, q, k: score + q - k)[:, 0]

    return Op(forward, conv=conv, a=a).requires_grad_(False)  # it has no gradient on a CPU


def mapped():
    conv, a = nn.Conv2d(3, 8, 1), nn.Sequential(nn.InstanceNorm2d(8))
    return Op(lambda x: map_rows(lambda rows: rows * 2, a(conv(x))), conv=conv, a=a)


def scanned():
    conv, a = nn.Conv2d(3, 8, 1), nn.Sequential(nn.InstanceNorm2d(8))

    def forward(x):
        x = a(conv(x))
        return scan(lambda carry, row: (carry + row, carry * row), x[0], x)[1]

    return Op(forward, conv=conv, a=a)


HIGHER_ORDER = {
    "cond": branches,
    "while_loop": loop,
    "flex_attention": attention,
    "map": mapped,
    "scan": scanned,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("has_flag", [True, False], ids=["with the flag of PyTorch 2.9", "without"])
@pytest.mark.parametrize("name", HIGHER_ORDER)
def test_higher_order_operators_are_seen_through(name, has_flag, monkeypatch):
    monkeypatch.setattr(TorchDispatchMode, "supports_higher_order_operators", False)
    if not has_flag:
        monkeypatch.setattr("channelslast.trace._Operators.supports_higher_order_operators", False)
    model, x = module_to_memory_format(HIGHER_ORDER[name]()), images(2, 3, 8, 8)
    with torch.compiler.set_stance("force_eager"), FormatTracer(model) as tracer:
        output = model(x)
        if output.requires_grad:
            output.backward(torch.randn_like(output))
    assert "forward" in losers(tracer)["a.0"]
    assert {event.op for event in events(tracer, module="a.0", phase="forward")} == {"aten.clone"}
    if name == "cond":
        assert list(tracer.layers) == ["conv", "a.0", "a.1"]  # `b` did not run
        assert [param.grad is None for param in model.parameters()] == [False] * 4 + [True] * 2


def test_choice_of_cond_gets_the_gradients_of_the_plain_module():
    model, x = module_to_memory_format(branches()), images(2, 3, 8, 8)
    with torch.compiler.set_stance("force_eager"), FormatTracer(model):
        model(x).square().sum().backward()
    expected = torch.autograd.grad(model.a(model.conv(x)).square().sum(), model.conv.weight)
    torch.testing.assert_close(model.conv.weight.grad, *expected)


@pytest.mark.skipif(not hasattr(TorchDispatchMode, "supports_higher_order_operators"), reason="PyTorch before 2.9")
def test_higher_order_operator_below_a_mode_of_the_models_own():
    class Passes(TorchDispatchMode):
        supports_higher_order_operators = True
        n = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.n += 1
            return func(*args, **(kwargs or {}))

    class Watches(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, x):
            with Passes() as self.mode, torch.no_grad():
                return torch.cond(x.sum() < torch.inf, torch.relu, torch.sin, (self.conv(x),))

    model, x = module_to_memory_format(Watches()), images(2, 3, 8, 8)
    expected = model(x)
    n = model.mode.n
    with torch.compiler.set_stance("force_eager"), FormatTracer(model) as tracer:
        assert torch.equal(model(x), expected)
    assert model.mode.n == n > 1 and list(tracer.layers) == ["conv"]


def test_higher_order_operators_where_pytorch_does_not_tell_its_modes(monkeypatch):
    monkeypatch.setattr("channelslast.trace._python_dispatch", None)
    model = module_to_memory_format(branches())
    with torch.compiler.set_stance("force_eager"), FormatTracer(model) as tracer:
        model(images(2, 3, 8, 8))
    assert list(tracer.layers) == ["conv", "a.0", "a.1"]


# Precision


@needs_clean_dropout
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


# Failures


class Views(nn.Module):
    def forward(self, x):
        return x.view(len(x), -1)


def test_view_names_its_module_and_operator():
    model = module_to_memory_format(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.ReLU(), Views())))
    tracer = FormatTracer(model)
    with pytest.raises(RuntimeError, match="view size is not compatible") as raised, tracer:
        model(images(2, 3, 8, 8))
    assert tracer.error == ("1.1", "aten.view", str(raised.value)) and tracer.raised(raised.value)


def test_hooks_are_gone_afterwards():
    model, x = clean_model(), images(2, 3, 16, 16)
    tracer = trace(model, x)
    seen = len(tracer.layers), tracer.events, tracer.channels_last_share
    model(x).sum().backward()
    assert (len(tracer.layers), tracer.events, tracer.channels_last_share) == seen
    assert not tracer._handles


def test_activations_are_held_no_longer_than_without():
    alive = []

    class Looks(nn.Module):
        def forward(self, x):
            alive.append(sum(reference() is not None for reference in seen))
            seen.append(weakref.ref(x))
            return x.clone() + 1

    seen = []
    model = nn.Sequential(nn.Conv2d(3, 8, 1), *[Looks() for _ in range(6)])
    tracer = FormatTracer(model)
    with tracer:
        model(images(2, 3, 8, 8))
    assert max(alive) <= 1
    assert not tracer._owners and not tracer._known and not tracer._stretches  # nor the graph


def test_failure_to_start_leaves_no_hooks(monkeypatch):
    model = clean_model()

    def fails(*args, **kwargs):
        raise RuntimeError("no hooks here")

    monkeypatch.setattr(model[3], "register_forward_hook", fails)
    with pytest.raises(RuntimeError, match="no hooks"), FormatTracer(model):
        pass
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_exception_that_the_model_catches_is_no_confusion():
    class Fails(nn.Module):
        def forward(self, x):
            raise ValueError("no")

    class Tries(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)
            self.fails = Fails()

        def forward(self, x):
            x = self.conv(x)
            try:
                return self.fails(x)
            except ValueError:
                return x.softmax(1)

    assert losers(trace(nn.Sequential(Tries()), images(2, 3, 8, 8))) == {"0": ("forward", "backward")}


def test_what_is_no_exception_and_the_model_catches_is_no_confusion():
    class Stop(BaseException):
        pass

    def fails(x):
        raise Stop

    conv, inner, last = nn.Conv2d(3, 8, 1), Op(fails), nn.Conv2d(8, 8, 1)

    def forward(x):
        x = conv(x)
        try:
            return last(inner(x))
        except Stop:
            return x.softmax(1)

    tracer = trace(nn.Sequential(Op(forward, conv=conv, inner=inner, last=last)), images(2, 3, 8, 8))
    assert losers(tracer) == {"0": ("forward", "backward")}
    assert {(event.module, event.phase) for event in events(tracer, kind="hidden")} == {("0.conv", "backward")}


@pytest.mark.parametrize("make, loser", [(copy.copy, "0.norm.0"), (copy.deepcopy, "0")])
def test_copy_of_a_module_is_code_of_the_one_that_makes_it(make, loser):
    conv, norm = nn.Conv2d(3, 8, 1), nn.Sequential(nn.InstanceNorm2d(8))
    copies = []

    def forward(x):
        copies.append(make(norm))
        return copies[-1](conv(x))

    tracer = trace(nn.Sequential(Op(forward, conv=conv, norm=norm), nn.Conv2d(8, 8, 1)), images(2, 3, 8, 8))
    assert losers(tracer) == {loser: ("forward", "backward")}  # a shallow copy holds the children themselves
    seen = tracer.events
    copies[0](images(2, 8, 8, 8))  # with the hooks that a copy keeps
    assert tracer.events == seen
