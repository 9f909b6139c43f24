"CUDA graphs of a module: replayed, it trains as it would by itself, whatever comes next."

import copy
import gc
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from channelslast.graphs import GraphedModule
from channelslast.graphs.ground import Ground, set_since
from channelslast.memory_format import module_to_memory_format, own_memory_kept
from channelslast.zoo import new_model


class Net(nn.Sequential):
    "Convolutions without atomics, BatchNorm and dropout: eager twins are equal to the bit."

    def __init__(self, n_out=5):
        super().__init__(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Conv2d(16, 32, 3, padding=1, stride=2),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, n_out),
        )


def net_with(part):
    "A function that makes a `Net` with a module of the class `part` in its middle."

    def new():
        model = Net()
        model[2] = part()
        return model

    return new


@pytest.fixture(autouse=True)
def deterministic(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    yield
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def twins(new=Net):
    torch.manual_seed(0)
    model = new().cuda().to(memory_format=torch.channels_last)
    return model, copy.deepcopy(model)


def batches(n=8, bs=16, size=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, bs, 3, size, size, generator=generator)
    targets = torch.randint(0, 5, (n, bs), generator=generator)
    return [(x.cuda().to(memory_format=torch.channels_last), y.cuda()) for x, y in zip(images, targets)]


def train(call, model, data, dtype=None, zero="none", n_acc=1, opt=None, scaler=None, between=None):
    "Train on `data`; the losses."
    opt = opt or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = scaler or torch.amp.GradScaler("cuda", enabled=dtype is torch.float16, init_scale=2.0**10)
    losses = []
    torch.manual_seed(7)
    for i, (x, y) in enumerate(data):
        if between:
            between(i, model)
        with torch.autocast("cuda", dtype=dtype or torch.float16, enabled=dtype is not None):
            loss = F.cross_entropy(call(x), y)
        scaler.scale(loss / n_acc).backward()
        losses.append(loss.detach().clone())
        if (i + 1) % n_acc == 0:
            scaler.step(opt)
            scaler.update()
            if zero == "none":
                opt.zero_grad()
            else:
                opt.zero_grad(set_to_none=False)
                if zero == "said" and isinstance(call, GraphedModule):
                    call.gradients_are_zero()
    return torch.stack(losses).tolist()


def assert_same(first, second):
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("zero", ["none", "in place", "said"])
@pytest.mark.parametrize("n_acc", [1, 2])
def test_trains_as_eager_to_the_bit(dtype, zero, n_acc):
    eager, model = twins()
    graphed = GraphedModule(model)
    data = batches()
    expected = train(eager, eager, data, dtype, zero, n_acc)
    assert train(graphed, model, data, dtype, zero, n_acc) == expected
    assert graphed.n_graphs == 1 and graphed.reason is None and graphed.n_replays == 2 * len(data)
    assert_same(eager, model)


@pytest.mark.cuda
def test_capturing_changes_nothing():
    _, model = twins()
    before = copy.deepcopy(model.state_dict())
    python, cpu, gpu = random.getstate(), torch.get_rng_state(), torch.cuda.get_rng_state()
    graphed = GraphedModule(model)
    ((x, _),) = batches(1)
    assert graphed._graph_for((x,)) is not None
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert random.getstate() == python
    assert torch.equal(torch.get_rng_state(), cpu) and torch.equal(torch.cuda.get_rng_state(), gpu)
    assert all(param.grad is None for param in model.parameters())
    assert "forward" not in vars(model)


@pytest.mark.cuda
def test_last_short_batch_and_other_sizes_run_as_they_are():
    eager, model = twins()
    graphed = GraphedModule(model)
    data = [*batches(3), *batches(1, bs=1), *batches(2, bs=5, seed=2), *batches(3, seed=3)]
    assert train(graphed, model, data) == train(eager, eager, data)
    assert graphed.n_graphs == 1
    assert_same(eager, model)


@pytest.mark.cuda
def test_another_size_that_stays_is_captured():
    eager, model = twins()
    graphed = GraphedModule(model)
    data = [*batches(2), *batches(5, size=24), *batches(2, seed=5), *batches(2, size=24, seed=6)]
    assert train(graphed, model, data) == train(eager, eager, data)
    assert graphed.n_graphs == 2
    assert_same(eager, model)


@pytest.mark.cuda
def test_few_graphs_are_kept():
    _, model = twins()
    graphed = GraphedModule(model)
    train(graphed, model, [batch for size in range(8, 22, 2) for batch in batches(4, size=size)])
    assert graphed.n_graphs == 4


@pytest.mark.cuda
def test_evaluation_and_no_grad_run_as_they_are():
    eager, model = twins()
    graphed = GraphedModule(model)
    data = batches()
    assert train(graphed, model, data) == train(eager, eager, data)
    n_calls = graphed.n_replays
    with torch.no_grad():
        torch.manual_seed(3)
        first = graphed(data[0][0])
        torch.manual_seed(3)
        assert torch.equal(first, eager(data[0][0]))
    assert torch.equal(eager.eval()(data[0][0]), (model.eval(), graphed(data[0][0]))[1])
    assert graphed.n_replays == n_calls


def freeze_batch_norm(i, model):
    model[1].train(i < 3)


def freeze_body(i, model):
    model[0].requires_grad_(i < 3)


def move_weights(i, model):
    if i == 3:
        model.to(memory_format=torch.contiguous_format)


def replace_weight(i, model):
    if i == 3:
        model[-1].weight = nn.Parameter(model[-1].weight.detach() * 2)


def replace_module(i, model):
    if i == 3:
        model[2] = nn.SiLU()


def change_dropout(i, model):
    model[3].p = 0.3 if i < 4 else 0.1


def load(i, model):
    if i == 3:
        model.load_state_dict({name: value.clone() + 0.01 for name, value in model.state_dict().items()})


@pytest.mark.cuda
@pytest.mark.parametrize(
    "between", [freeze_batch_norm, freeze_body, move_weights, replace_weight, replace_module, change_dropout, load]
)
def test_change_of_the_model_in_between(between):
    eager, model = twins()
    graphed = GraphedModule(model)
    data = batches(12)
    assert train(graphed, model, data, between=between) == train(eager, eager, data, between=between)
    assert graphed.reason is None and graphed.n_graphs == 1
    assert_same(eager, model)


@pytest.mark.cuda
def test_hook_set_later_is_called():
    _, model = twins()
    graphed = GraphedModule(model)
    data = batches(3)
    train(graphed, model, data)
    seen = []
    model[4].register_forward_hook(lambda *args: seen.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(graphed, model, batches(5))
    assert len(seen) == 5


class Synchronizes(nn.Module):
    def forward(self, x):
        return x * (1.0 if x.mean().item() > 1e9 else 1.5)


class CopiesFromCpu(nn.Module):
    def forward(self, x):
        return x * torch.tensor([1.5]).to(x.device)


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.n = 0

    def forward(self, x):
        self.n += 1
        return x * self.n


class DrawsOnCpu(nn.Module):
    def forward(self, x):
        return x * random.random()


class ReplacesBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        self.mean = self.mean * 0.9 + x.detach().mean() * 0.1
        return x + self.mean


class KeepsState(nn.Module):
    "A hidden state, as a recurrent network that goes on from batch to batch has."

    def __init__(self):
        super().__init__()
        self.h = torch.zeros((), device="cuda")

    def __deepcopy__(self, memo):
        return KeepsState()

    def forward(self, x):
        self.h = self.h * 0.9 + x.detach().mean() * 0.1
        return x + self.h


class CountsLater(nn.Module):
    def forward(self, x):
        self.n = getattr(self, "n", 0) + 1
        return x * self.n


@pytest.mark.cuda
@pytest.mark.parametrize(
    "part", [Synchronizes, CopiesFromCpu, Counts, CountsLater, DrawsOnCpu, ReplacesBuffer, KeepsState]
)
def test_model_that_cannot_be_captured_trains_eagerly_with_one_warning(part):
    eager, model = twins(net_with(part))
    graphed = GraphedModule(model)
    data = batches(6)
    random.seed(0)
    expected = train(eager, eager, data)
    random.seed(0)
    with pytest.warns(UserWarning, match="No CUDA graph of Net, it runs as it is: ") as told:
        assert train(graphed, model, data) == expected
    assert len([w for w in told if "CUDA graph" in str(w.message)]) == 1
    assert graphed.n_graphs == 0
    if part in (Synchronizes, CopiesFromCpu):
        assert "`2`" in graphed.reason, graphed.reason
    print(part.__name__, graphed.reason)
    assert_same(eager, model)


@pytest.mark.cuda
def test_error_of_the_model_is_its_own():
    _, model = twins()
    graphed = GraphedModule(model)
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="expected input"):
        graphed(torch.randn(4, 7, 8, 8, device="cuda"))


class Hungry(nn.Module):
    "Takes more memory in a capture than there is."

    def forward(self, x):
        if torch.cuda.is_current_stream_capturing():
            torch.empty(2**50, dtype=torch.uint8, device="cuda")
        return x * 1.5


@pytest.mark.cuda
def test_out_of_memory_in_a_capture_runs_eagerly():
    eager, model = twins(net_with(Hungry))
    graphed = GraphedModule(model)
    data = batches(4)
    expected = train(eager, eager, data)
    with pytest.warns(UserWarning, match="OutOfMemoryError in `2`"):
        assert train(graphed, model, data) == expected
    assert_same(eager, model)


class Interrupts(nn.Module):
    n = 0

    def forward(self, x):
        Interrupts.n += 1
        if Interrupts.n == 5:
            raise KeyboardInterrupt
        return x


@pytest.mark.cuda
@pytest.mark.parametrize("at", [1, 2, 3], ids=["first warm-up", "second warm-up", "capture"])
def test_interrupt_in_a_capture(at, monkeypatch):
    eager, model = twins(net_with(Interrupts))
    data = batches(4)
    monkeypatch.setattr(Interrupts, "n", 5 - at)
    graphed = GraphedModule(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        graphed(data[0][0])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    graphed.release()
    monkeypatch.setattr(Interrupts, "n", 100)
    assert train(graphed, model, data) == train(eager, eager, data)
    assert graphed.n_graphs == 1
    assert_same(eager, model)


@pytest.mark.cuda
def test_outputs_and_gradients_are_not_overwritten():
    _, model = twins()
    graphed = GraphedModule(model)
    (x, y), (x2, y2) = batches(2)
    first = graphed(x)
    F.cross_entropy(first, y).backward()
    values, grads = first.detach().clone(), [param.grad.clone() for param in model.parameters()]
    second = graphed(x2)
    assert torch.equal(first, values)
    assert all(torch.equal(a, param.grad) for a, param in zip(grads, model.parameters()))
    F.cross_entropy(second, y2).backward()
    assert not any(torch.equal(a, param.grad) for a, param in zip(grads, model.parameters()))


@pytest.mark.cuda
def test_backward_of_an_earlier_call_is_an_error():
    _, model = twins()
    graphed = GraphedModule(model)
    (x, _), (x2, _) = batches(2)
    first = graphed(x)
    graphed(x2)
    with pytest.raises(RuntimeError, match="CUDA graph was replayed"):
        first.sum().backward()
    third = graphed(x)
    third.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="CUDA graph was replayed"):
        third.sum().backward()


class Branches(nn.Module):
    "Several inputs, nested outputs, a parameter that is not used and one that is used twice."

    def __init__(self):
        super().__init__()
        self.conv, self.head, self.unused = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), nn.Linear(2, 2)
        self.tied = nn.Linear(8, 5)
        self.tied.weight = self.head.weight

    def forward(self, a, b):
        a, b = (self.conv(x).relu().mean((2, 3)) for x in (a, b))
        return {"a": self.head(a), "more": (self.tied(b), b.detach())}


@pytest.mark.cuda
def test_several_inputs_nested_outputs_unused_and_tied_parameters():
    eager, model = twins(Branches)
    graphed = GraphedModule(model)
    for call, net in ((eager, eager), (graphed, model)):
        opt = torch.optim.SGD(net.parameters(), lr=0.1)
        for x, y in batches(4):
            out = call(x, x.flip(0))
            (F.cross_entropy(out["a"], y) + F.cross_entropy(out["more"][0], y)).backward()
            opt.step()
            opt.zero_grad()
            assert net.unused.weight.grad is None
    assert graphed.n_graphs == 1 and graphed.reason is None
    assert_same(eager, model)


@pytest.mark.cuda
def test_memory_is_given_back():
    _, model = twins()
    graphed = GraphedModule(model)
    train(graphed, model, batches(4, bs=64, size=64))
    model.zero_grad()
    gc.collect()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    graphed.release()
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < held


@pytest.mark.skipif(torch.version.cuda is None, reason="a PyTorch without CUDA")
def test_pytorch_clears_workspaces_for_us():
    assert hasattr(torch._C, "_cuda_clearCublasWorkspaces"), "see `_clear_workspaces` in graphs/capture.py"


@pytest.mark.cuda
@pytest.mark.parametrize("clears", [True, False])
def test_captures_one_after_the_other_keep_no_workspaces(clears, monkeypatch):
    if not clears:  # as in a PyTorch without it: one for each thread
        monkeypatch.delattr(torch._C, "_cuda_clearCublasWorkspaces")
    data = batches(2)
    held = []
    for _ in range(6):
        _, model = twins()
        graphed = GraphedModule(model)
        train(graphed, model, data)
        assert graphed.n_graphs == 1
        graphed.release()
        del graphed, model
        gc.collect()
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_reserved())
    assert held[-1] <= held[1]


@pytest.mark.cuda
def test_threads_that_pin_memory_do_not_disturb_a_capture():
    eager, model = twins()
    x = torch.randn(64, 3, 16, 16)
    y = torch.randint(0, 5, (64,))
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), batch_size=8, pin_memory=True, num_workers=2
    )
    graphed = GraphedModule(model)
    on_gpu = lambda: ((a.cuda(non_blocking=True), b.cuda(non_blocking=True)) for a, b in loader)  # noqa: E731
    assert train(graphed, model, on_gpu()) == train(eager, eager, on_gpu())
    assert graphed.n_graphs == 1


@pytest.mark.cuda
def test_compiled_model_is_captured_as_compiled():
    pytest.importorskip("triton")
    _, model = twins()
    eager = copy.deepcopy(model)
    for net in (model, eager):
        net.requires_grad_(True)[3].p = 0.0
        net._compiled_call_impl = None
    wrapped = nn.Sequential(*model)
    compiled = torch.compile(wrapped)
    graphed = GraphedModule(compiled)
    data = batches(6)
    expected = train(eager, eager, data)
    assert train(graphed, model, data) == pytest.approx(expected, rel=1e-3)
    assert graphed.n_graphs == 1 and graphed.reason is None


class BreaksOffACapture(nn.Module):
    "Waits for the GPU in a way that PyTorch's debug mode does not see."

    def forward(self, x):
        torch.cuda.current_stream().synchronize()
        return x * 1.5


@pytest.mark.cuda
def test_capture_that_cuda_breaks_off_leaves_nothing_behind():
    eager, model = twins(net_with(BreaksOffACapture))
    data = batches(6)
    expected = train(eager, eager, data)
    stream, reserved = torch.cuda.current_stream(), torch.cuda.memory_reserved()
    graphed = GraphedModule(model)
    with pytest.warns(UserWarning, match="No CUDA graph of Net"):
        assert train(graphed, model, data) == expected
    assert torch.cuda.current_stream() == stream
    assert_same(eager, model)
    first, second = twins()
    graphed = GraphedModule(second)
    assert train(graphed, second, data) == train(first, first, data)
    assert graphed.n_graphs == 1
    print(reserved, torch.cuda.memory_reserved())


class Keeper:
    def keep(self, module, inputs, output):
        self.kept = output


class WithHookOfItsOwn(nn.Module):
    "Keeps an activation by a hook, as fastai's U-Net does, and uses it."

    def __init__(self):
        super().__init__()
        self.body, self.head, self.keeper = Net(n_out=8), nn.Linear(8 + 16, 5), Keeper()
        self.body[0].register_forward_hook(self.keeper.keep)

    def forward(self, x):
        x = self.body(x)
        return self.head(torch.cat([x, self.keeper.kept.mean((2, 3))], 1))


@pytest.mark.cuda
def test_hooks_of_the_model_itself_are_captured():
    eager, model = WithHookOfItsOwn().cuda(), WithHookOfItsOwn().cuda()
    model.load_state_dict(eager.state_dict())
    graphed = GraphedModule(model)
    data = [*batches(3), *batches(5, size=24)]
    assert train(graphed, model, data) == train(eager, eager, data)
    assert graphed.n_graphs == 2 and graphed.reason is None
    assert_same(eager, model)


@pytest.mark.cuda
def test_hooks_of_others_train_eagerly():
    eager, model = twins()
    seen = []
    model[4].register_forward_hook(lambda *args: seen.append(1))
    graphed = GraphedModule(model)
    data = batches(5)
    with pytest.warns(UserWarning, match="`4` has hooks"):
        assert train(graphed, model, data) == train(eager, eager, data)
    assert len(seen) == 5
    assert_same(eager, model)


@pytest.mark.cuda
def test_spectral_and_weight_norm():
    def new():
        model = Net()
        model[0] = nn.utils.spectral_norm(model[0])
        model[4] = nn.utils.parametrizations.weight_norm(model[4])
        return model

    torch.manual_seed(0)
    eager, model = new().cuda(), new().cuda()
    model.load_state_dict(eager.state_dict())
    graphed = GraphedModule(model)
    data = batches(5)
    assert train(graphed, model, data) == train(eager, eager, data)
    assert graphed.n_graphs == 1 and graphed.reason is None
    assert_same(eager, model)


# What graphs rest on, which needs no GPU


def change_nothing(model):
    model(torch.randn(2, 3, 8, 8))


def set_attribute(model):
    model[3].p = 0.1


def set_array(model):
    model[3].p = np.zeros(2)


def add_hook(model):
    model[0].register_forward_pre_hook(lambda *args: None)


def to_double(model):
    model.double()


def change_strides(model):
    with own_memory_kept():
        module_to_memory_format(model)


@pytest.mark.parametrize(
    "change, holds",
    [
        (change_nothing, True),
        (change_strides, False),
        (set_attribute, False),
        (set_array, False),
        (add_hook, False),
        (to_double, False),
        (nn.Module.eval, False),
        (lambda model: model[0].requires_grad_(False), False),
        (lambda model: delattr(model[3], "p"), False),
        (lambda model: model.append(nn.ReLU()), False),
        (lambda model: setattr(model[9], "weight", nn.Parameter(model[9].weight.detach())), False),
    ],
)
def test_ground_holds_until_something_changes(change, holds):
    model = Net()
    ground = Ground(model)
    change(model)
    assert ground.holds() is holds and (ground.change() is None) is holds


def test_ground_names_the_attribute():
    model = Net()
    ground = Ground(model)
    model[3].p = 0.5
    assert ground.change() == "`p` of `3`"


class SetsInForward(nn.Module):
    def forward(self, x):
        self.seen = x
        return x


def attributes_of(model):
    return [(name, vars(module), dict(vars(module))) for name, module in model.named_modules()]


@pytest.mark.parametrize(
    "module, said",
    [
        (Net(), None),
        (nn.Sequential(SetsInForward()), "`seen` of `0`"),
        (nn.utils.spectral_norm(nn.Conv2d(3, 4, 1)), None),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), None),
        (WithHookOfItsOwn(), None),
    ],
)
def test_attributes_that_a_forward_pass_sets(module, said):
    before = attributes_of(module)
    module(torch.randn(2, 3, 8, 8))
    assert set_since(before) == said


@pytest.mark.parametrize(
    "arch", ["resnet18", "efficientnet_b0", "convnext_pico", "DynamicUnet", "mobilenetv3_small_050"]
)
def test_architectures_set_no_attributes(arch):
    model = new_model(arch, size=64)
    before = attributes_of(model)
    model(torch.randn(2, 3, 64, 64))
    assert set_since(before) is None


def test_module_without_a_gpu_runs_as_it_is():
    model = Net()
    graphed = GraphedModule(model)
    with pytest.warns(UserWarning, match="not on one CUDA device"):
        graphed(torch.randn(2, 3, 8, 8)).sum().backward()
    assert graphed.n_graphs == 0 and model[0].weight.grad is not None
