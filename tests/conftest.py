"Data, models and Learners that the tests share: small, seeded, on the CPU."

import gc
import os
import random
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import Adam, OptimWrapper
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from channelslast import devices
from channelslast.early_loss import EarlyLoss, ReadsLossEarly
from channelslast.find import run
from channelslast.memory_format import is_channels_last

torch.set_num_threads(1)  # more wait for one another longer than they compute on tensors as small as these
os.environ.setdefault("OMP_NUM_THREADS", "1")  # in the processes that tests start, too

# Begun first: what takes long must not be left for the end, when the other workers have nothing to do
SLOWEST = {"test_distributed", "test_cli", "test_train", "test_all", "test_checkpoints"}


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in SLOWEST)
    n_gpus = torch.cuda.device_count()
    for item in items:
        for marker, needed in (("cuda", 1), ("multi_gpu", 2)):
            if marker in item.keywords and n_gpus < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA GPU(s)"))


from_outside = []  # the interrupts that were no test's own, as that of Ctrl-C


def pytest_configure():
    def interrupt(number, frame):
        from_outside.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, interrupt)


@contextmanager
def own_interrupts_fail():
    "A `KeyboardInterrupt` that a test has raised itself does not end the run: it fails the test that it leaves."
    n_before = len(from_outside)
    try:
        yield
    except KeyboardInterrupt as error:
        if len(from_outside) > n_before:
            raise
        raise AssertionError("the test's own KeyboardInterrupt has left it") from error


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call():
    with own_interrupts_fail():
        return (yield)


def pytest_collection_finish():
    "A collection of garbage need not look again at what the imports have left."
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # or libraries report at exit what they take for leaks


@pytest.fixture
def nothing_frozen():
    "As where no test has frozen what libraries hold."
    gc.unfreeze()
    yield
    gc.freeze()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(42)


@pytest.fixture
def bf16_cpu(monkeypatch):
    "A CPU that has arithmetic for bfloat16 and none for float16, whatever this one has."
    only_on(monkeypatch, "cpu", (torch.bfloat16,))


@pytest.fixture
def plain_cpu(monkeypatch):
    "A CPU that has arithmetic for no half precision."
    only_on(monkeypatch, "cpu", ())


@pytest.fixture
def fp16_cpu(monkeypatch):
    "A CPU that has arithmetic for float16. (This one may be very slow at it.)"
    only_on(monkeypatch, "cpu", (torch.float16,))


def only_on(monkeypatch, device_type, dtypes):
    "Wherever it was imported."
    real = devices.accelerated_dtypes
    for module in [module for name, module in sys.modules.items() if name.startswith("channelslast.")]:
        if vars(module).get("accelerated_dtypes") is real:
            monkeypatch.setattr(
                module,
                "accelerated_dtypes",
                lambda device: dtypes if torch.device(device).type == device_type else real(device),
            )


# Of fastai, in the order of a training batch
BATCH_EVENTS = [
    "before_batch",
    "after_pred",
    "after_loss",
    "before_backward",
    "after_backward",
    "before_step",
    "after_step",
    "after_batch",
]


class TinyNet(nn.Sequential):
    "A convolutional classifier of 3-channel images, with a 1x1 convolution and a depthwise one."

    def __init__(self, n_out=3):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.Conv2d(8, 16, 1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, n_out),
        )


class TinyVideoNet(nn.Sequential):
    "A 3D convolutional classifier of one-channel volumes."

    def __init__(self, n_out=3):
        super().__init__(
            nn.Conv3d(2, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, n_out)
        )


def new_dls(*shape, n=24, bs=8, n_out=3, device="cpu"):
    "DataLoaders of `n` random items of `shape` in `n_out` classes that a small network can tell apart, in order."
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, n_out, (n,), generator=generator)
    x = torch.randn(n, *shape, generator=generator) + y.view(-1, *[1] * len(shape))
    batches = Batches((x[i : i + bs].to(device), y[i : i + bs].to(device)) for i in range(0, n, bs))
    return DataLoaders(batches, Batches(batches), device=device)


class Batches(list):
    "Batches as a DataLoader, always in the same order."

    def to(self, device):
        self.device = device


def in_a_thread(function):
    "Call `function` in a thread of its own: what measures coverage uses `sys.settrace` in this one."
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function).result()


class ReadsLoss(ReadsLossEarly):
    "Has the loss read, and in several processes gathered, before the backward pass, as on a GPU in mixed precision."

    order = 9

    def before_backward(self):
        self.early_loss = EarlyLoss(self.learn)


def wrapped_adamw(params, **kwargs):
    return OptimWrapper(params, torch.optim.AdamW, **kwargs)


@pytest.fixture
def new_learner():
    "A function that makes a Learner, always the same from the same function that makes a model."

    def make(model=TinyNet, dls=None, device="cpu", **kwargs):
        torch.manual_seed(0)
        dls = dls or new_dls(3, 8, 8, device=device)
        kwargs = {"loss_func": CrossEntropyLossFlat(), "metrics": accuracy, "opt_func": Adam, "lr": 1e-2, **kwargs}
        learn = Learner(dls, model if isinstance(model, nn.Module) else model(), **kwargs)
        learn.remove_cb(ProgressCallback)
        learn.logger = lambda *args: None
        return learn

    return make


@pytest.fixture
def learn(new_learner):
    return new_learner()


@pytest.fixture
def tabular_learner(new_learner):
    "A function that makes a Learner whose model has no 4D or 5D weights."
    return lambda: new_learner(lambda: nn.Linear(5, 3), new_dls(5))


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory):
    "The first hundred zeros and ones of scikit-learn's digits, in two class folders."
    folder = tmp_path_factory.mktemp("images")
    digits = load_digits(n_class=2)
    for number, (image, label) in enumerate(zip(digits.images[:100], digits.target)):
        file = folder / str(label) / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray((image * 255 / 16).astype("uint8")).save(file)
    return folder


@pytest.fixture
def quick_search(monkeypatch):
    "Searches take two seconds."
    find_format = run.find_format
    monkeypatch.setattr(run, "find_format", lambda learn, stages, **options: find_format(learn, stages, budget=2))


def formats_of(model):
    "Whether the weights and buffers of `model` are channels last, of those that do not lie alike in both formats."
    found = set()
    for tensor in (*model.parameters(), *model.buffers()):
        memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.ndim)
        if memory_format and not (tensor.is_contiguous() and tensor.is_contiguous(memory_format=memory_format)):
            found.add(is_channels_last(tensor))
    return found


def tensors_of(model):
    "Name, object, memory, strides, hooks and values of each parameter and buffer, with its gradient."
    return [
        (
            name,
            id(tensor),
            tensor.data_ptr(),
            tensor.stride(),
            list(tensor._backward_hooks or ()),
            tensor.detach().clone(),
            tensor.requires_grad,
            tensor.grad,
        )
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    ]


def assert_same_tensors(before, after):
    assert len(before) == len(after)
    for (*facts, values, requires_grad, grad), (*facts_now, values_now, requires_grad_now, grad_now) in zip(
        before, after
    ):
        assert facts == facts_now and torch.equal(values, values_now)
        assert requires_grad == requires_grad_now and grad is grad_now


def state_of(learn):
    "Everything that a search must not change, by identity where there is one."
    return {
        "attributes": {name: id(value) for name, value in vars(learn).items()},
        "callbacks": [(id(cb), {name: id(value) for name, value in vars(cb).items()}) for cb in learn.cbs],
        "modules": [(id(module), module.training, set(vars(module))) for module in learn.model.modules()],
        "loaders": [id(loader) for loader in learn.dls.loaders],
        "format": learn.train_format,
        "autocast": torch.is_autocast_enabled("cpu"),
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
    }


@pytest.fixture
def assert_unchanged():
    "A function that takes a Learner, and one that tells whether it is as it was then."

    def begin(learn):
        tensors, state = tensors_of(learn.model), state_of(learn)

        def check():
            assert_same_tensors(tensors, tensors_of(learn.model))
            assert state_of(learn) == state

        return check

    return begin
