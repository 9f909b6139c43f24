"The tracer on tensors that are no plain ones and on models that fail, and that it leaves no hooks."

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from tracing import Op, Views, clean_model, events, images, losers, trace, trace_forward

from channelslast.memory_format import module_to_memory_format
from channelslast.summary import FormatTracer

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


# Failures


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
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


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
    x = images(2, 3, 8, 8)
    saved = weakref.ref(x)  # by the convolution's node
    with tracer:
        output = model(x)
    assert max(alive) <= 1
    del x
    assert saved() is not None
    del output
    assert saved() is None and tracer.layers  # the tracer keeps no graph


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
