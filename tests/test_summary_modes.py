"Higher-order operators are seen through."

import pytest
import torch
from torch import nn
from torch._higher_order_ops.map import map as map_rows
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from tracing import Op, events, images, losers

from channelslast.memory_format import module_to_memory_format
from channelslast.summary import FormatTracer

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
    monkeypatch.setattr(TorchDispatchMode, "supports_higher_order_operators", False, raising=False)  # PyTorch 2.6
    if not has_flag:
        monkeypatch.setattr("channelslast.summary.modes.OperatorMode.supports_higher_order_operators", False)
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
    monkeypatch.setattr("channelslast.summary.modes._python_dispatch", None)
    model = module_to_memory_format(branches())
    with torch.compiler.set_stance("force_eager"), FormatTracer(model) as tracer:
        model(images(2, 3, 8, 8))
    assert list(tracer.layers) == ["conv", "a.0", "a.1"]
