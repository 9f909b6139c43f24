"Whose an operator is, and what a section of code did as a whole."

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint
from tracing import Op, Outputs, Scale, events, images, losers, trace, trace_forward

from channelslast.memory_format import module_to_memory_format
from channelslast.summary import FormatTracer

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
        tracer.claim_loss(first.sum())
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
        tracer.claim_loss(loss)
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
