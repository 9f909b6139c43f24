"What raises in the middle of a fit, a search or a summary leaves behind a Learner as sound as a new one."

import copy
import gc
import signal
import sys
from collections import Counter
from contextlib import suppress
from itertools import count, product
from pathlib import Path

import pytest
import torch
from conftest import TinyNet, in_a_thread, own_interrupts_fail, wrapped_adamw
from fastai.callback.core import (
    Callback,
    CancelBackwardException,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CancelStepException,
    CancelTrainException,
    CancelValidException,
)
from fastai.optimizer import SGD, Adam
from torch import nn

from channelslast import memory_format
from channelslast.find import plan
from channelslast.formats import TrainFormat
from channelslast.memory_format import is_channels_last

BEFORE_A_STEP = [
    "before_fit",
    "before_epoch",
    "before_train",
    "before_batch",
    "after_pred",
    "after_loss",
    "before_backward",
    "after_backward",
    "before_step",
]
AFTER_A_STEP = [
    "after_step",
    "after_batch",
    "after_train",
    "before_validate",
    "after_validate",
    "after_epoch",
    "after_fit",
]
INSIDE = ["data", "forward", "loss", "backward", "step"]
FORMATS = [TrainFormat(True), TrainFormat(True, "bf16"), TrainFormat(False, "bf16")]
ERRORS = [KeyboardInterrupt, RuntimeError, torch.cuda.OutOfMemoryError]


class RaisesAt(Callback):
    "Raise at the `n`-th time of an event."

    def __init__(self, event, error, order, n=1):
        self.error, self.order, self.run = error, order, True
        self.n, self.times = n, count(1)  # an iterator goes on where a search puts back all else
        setattr(self, event, self.raise_once)

    def raise_once(self):
        if next(self.times) == self.n:
            raise self.error


def raise_inside(learn, where, error, n_batches=1):
    "Have that part of a training step raise, data after `n_batches`; returns what undoes it."

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            raise error

    def fail(*args, **kwargs):
        raise error

    if where == "data":
        batches = learn.dls.train

        class Broken(list):
            def __iter__(self):
                yield from batches[:n_batches]
                raise error

        learn.dls.loaders[0] = Broken(batches)
        return lambda: learn.dls.loaders.__setitem__(0, batches)
    if where in ("forward", "backward"):
        hook = fail if where == "forward" else lambda module, inputs, output: Fails.apply(output)
        return learn.model[3].register_forward_hook(hook).remove
    if where == "loss":
        loss_func, learn.loss_func = learn.loss_func, fail
        return lambda: setattr(learn, "loss_func", loss_func)
    if learn.opt is None:
        learn.create_opt()
    learn.opt.step = fail
    return lambda: delattr(learn.opt, "step")


def state_of(learn):
    "Weights, buffers and optimizer state, copied."
    opt = learn.opt.state_dict() if learn.opt is not None else None
    return copy.deepcopy((learn.model.state_dict(), opt))


def assert_equal_states(first, second):
    for a, b in zip(flatten(first), flatten(second), strict=True):
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


def flatten(nested):
    if isinstance(nested, dict):
        nested = [item for pair in nested.items() for item in pair]
    if isinstance(nested, (list, tuple)) or type(nested).__name__ == "L":
        for item in nested:
            yield from flatten(item)
    else:
        yield nested


def assert_autocast_is_off():
    assert not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda")
    assert torch.autocast_increment_nesting() == 1 and torch.autocast_decrement_nesting() == 0


def assert_sound(learn, fmt):
    "Autocast is off, the callbacks are those of a Learner that never failed, tensors are in one format."
    assert_autocast_is_off()
    names = [cb.name for cb in learn.cbs]
    assert len(names) == len(set(names)) and all(cb.run for cb in learn.cbs)
    assert ("channels_last" in names) is fmt.channels_last
    assert ("mixed_precision" in names) is (fmt.amp_mode is not None)
    assert learn.train_format == fmt
    for param in learn.model.parameters():
        assert param.ndim != 4 or is_channels_last(param) is fmt.channels_last
        assert param.grad is None or param.grad.stride() == param.stride()
    state = learn.opt.opt.state if hasattr(learn.opt, "opt") else learn.opt.state
    for param, values in state.items():
        for value in values.values():
            if torch.is_tensor(value) and value.shape == param.shape:
                assert value.stride() == param.stride()


def fit_again(learn):
    "The next fit, from the same random state."
    torch.manual_seed(1)
    learn.fit(2)
    return learn.recorder.values, learn.recorder.losses, state_of(learn)


def assert_next_fit_is_that_of_a_new_learner(learn, new, fmt):
    "Nothing but weights, buffers and optimizer state is left of the fit that failed."
    model, opt = state_of(learn)
    fresh = new().to_format(fmt)
    fresh.model.load_state_dict(model)
    fresh.create_opt()
    fresh.opt.load_state_dict(opt)
    assert_equal_states(fit_again(learn), fit_again(fresh))


def model_with_dropout():
    "Which shows the random state."
    return nn.Sequential(*list(TinyNet())[:-1], nn.Dropout(), nn.Linear(16, 3))


@pytest.fixture
def new(new_learner):
    "A function that makes the Learner, always the same."
    return lambda: new_learner(model_with_dropout)


def interrupt(learn, error, **kwargs):
    with pytest.raises(type(error)):
        learn.fit(2, **kwargs)


# The tests' own interrupts


def test_interrupt_that_leaves_a_test_fails_it():
    with pytest.raises(AssertionError, match="has left it"), own_interrupts_fail():
        raise KeyboardInterrupt


def test_interrupt_from_outside_ends_the_run():
    with pytest.raises(KeyboardInterrupt), own_interrupts_fail():
        signal.raise_signal(signal.SIGINT)


# A fit


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("event, order", list(product([*BEFORE_A_STEP, *AFTER_A_STEP], (-5, 100))))
def test_error_at_any_event(new, bf16_cpu, fmt, error, event, order):
    learn = new().to_format(fmt)
    before = state_of(learn)[0]
    interrupt(learn, error("now"), cbs=RaisesAt(event, error("now"), order))
    if event != "before_fit":
        assert_sound(learn, fmt)
    if event in BEFORE_A_STEP:
        weights = [name for name, _ in learn.model.named_parameters()]
        assert_equal_states([before[name] for name in weights], [learn.model.state_dict()[name] for name in weights])
    assert_next_fit_is_that_of_a_new_learner(learn, new, fmt)
    assert_sound(learn, fmt)


@pytest.mark.parametrize("opt_func", [Adam, wrapped_adamw])
@pytest.mark.parametrize("event", [*BEFORE_A_STEP[3:], *AFTER_A_STEP[:2]])
def test_interrupt_in_the_middle_of_training(new_learner, bf16_cpu, opt_func, event):
    fmt = TrainFormat(True, "bf16")
    learn = new_learner(model_with_dropout, opt_func=opt_func).to_format(fmt)
    learn.fit(1)
    interrupt(learn, KeyboardInterrupt(), cbs=RaisesAt(event, KeyboardInterrupt(), 100, n=5))
    assert_sound(learn, fmt)
    assert_next_fit_is_that_of_a_new_learner(learn, lambda: new_learner(model_with_dropout, opt_func=opt_func), fmt)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", INSIDE)
def test_error_inside_a_step(new, bf16_cpu, fmt, error, where):
    learn = new().to_format(fmt)
    undo = raise_inside(learn, where, error("now"))
    interrupt(learn, error("now"))
    undo()
    assert_sound(learn, fmt)
    assert_next_fit_is_that_of_a_new_learner(learn, new, fmt)


@pytest.mark.parametrize("event", BEFORE_A_STEP)
@pytest.mark.parametrize("error", [KeyboardInterrupt, CancelFitException])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_next_fit_equals_one_that_was_never_interrupted(new, bf16_cpu, fmt, event, error):
    "But for the running statistics of batch norm, which a forward pass in training updates."
    learn, other = (new().to_format(fmt) for _ in range(2))
    for module in (*learn.model.modules(), *other.model.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    with suppress(KeyboardInterrupt):
        learn.fit(1, cbs=RaisesAt(event, error(), 100))
    losses, values, (model, opt) = fit_again(learn)
    for name in [name for name in model if name.endswith("num_batches_tracked")]:
        model[name] = other.model.state_dict()[name] + 6
    assert_equal_states((losses, values, (model, opt)), fit_again(other))


@pytest.mark.parametrize("where", ["validate", "get_preds"])
@pytest.mark.parametrize("event", ["before_batch", "after_pred", "after_loss", "after_batch", "after_validate"])
def test_interrupted_validation(new, bf16_cpu, where, event):
    fmt = TrainFormat(True, "bf16")
    learn = new().to_format(fmt)
    learn.fit(1)
    with pytest.raises(KeyboardInterrupt):
        getattr(learn, where)(dl=learn.dls.valid, cbs=RaisesAt(event, KeyboardInterrupt(), 100))
    assert_sound(learn, fmt)
    assert_next_fit_is_that_of_a_new_learner(learn, new, fmt)


# fastai's own exceptions


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_autocast_is_off_also_where_putting_back_fails(new, bf16_cpu, fmt):
    def fail():
        raise RuntimeError("no gradients")

    learn = new().to_format(fmt)
    learn.create_opt()
    learn.opt.zero_grad = fail
    with pytest.raises(KeyboardInterrupt) as caught:
        learn.fit(1, cbs=RaisesAt("after_pred", KeyboardInterrupt(), 100))
    assert any("no gradients" in note for note in caught.value.__notes__)
    assert_autocast_is_off()


class FailsToCleanUp(Callback):
    def __init__(self, error):
        self.error, self.n_calls = error, 0

    def after_exception(self, error):
        self.n_calls += 1
        raise self.error


@pytest.mark.parametrize("error", [KeyError("mine"), KeyboardInterrupt()])
def test_error_while_cleaning_up_does_not_replace_the_users(new, bf16_cpu, error):
    learn, cleaners = new().to_format(TrainFormat(True, "bf16")), [FailsToCleanUp(OSError("full")) for _ in range(2)]
    with pytest.raises(type(error)) as caught:
        learn.fit(1, cbs=[*cleaners, RaisesAt("after_pred", error, 100)])
    assert caught.value is error and [cb.n_calls for cb in cleaners] == [1, 1]
    assert sum("full" in note for note in error.__notes__) == 2
    assert_autocast_is_off()


def test_interrupt_while_cleaning_up_reaches_the_user(new, bf16_cpu):
    learn, cleaners = new().to_format(TrainFormat(True, "bf16")), [FailsToCleanUp(KeyboardInterrupt()) for _ in "ab"]
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, cbs=[*cleaners, RaisesAt("after_pred", KeyError("mine"), 100)])
    assert [cb.n_calls for cb in cleaners] == [1, 1]
    assert_autocast_is_off()


@pytest.mark.parametrize("error", [CancelTrainException, CancelEpochException, CancelFitException])
def test_error_while_cleaning_up_is_not_lost_with_an_exception_that_fastai_catches(new, error):
    learn = new().to_format(TrainFormat(True))
    with pytest.raises(OSError, match="full"):
        learn.fit(1, cbs=[FailsToCleanUp(OSError("full")), RaisesAt("after_pred", error(), 100)])


def test_interrupted_validation_leaves_gradients(new):
    learn = new().to_format(TrainFormat(True))
    learn.fit(1)
    learn.model(torch.randn(2, 3, 8, 8)).sum().backward()
    grads = [param.grad.clone() for param in learn.model.parameters()]
    with pytest.raises(KeyboardInterrupt):
        learn.validate(cbs=RaisesAt("after_pred", KeyboardInterrupt(), 100))
    assert all(torch.equal(param.grad, grad) for param, grad in zip(learn.model.parameters(), grads))


def test_batches_without_an_optimizer_raise_their_own_error(new):
    learn = new().to_format(TrainFormat(True))
    learn.dl, learn.training = learn.dls.train, True
    learn("before_fit")
    with pytest.raises(KeyboardInterrupt), learn.added_cbs(RaisesAt("after_pred", KeyboardInterrupt(), 100)):
        learn.all_batches()


@pytest.mark.parametrize("order", [-5, 100])
@pytest.mark.parametrize("event", ["before_step", "after_step"])
@pytest.mark.parametrize("error", [CancelStepException, CancelBatchException, CancelTrainException])
def test_cancelled_step_of_a_scaled_loss(new_learner, fp16_cpu, error, event, order):
    "On two batches of a tiny network, for float16 is slow here."
    if error is CancelStepException and event == "after_step":
        pytest.skip("fastai does not catch it there")
    learn = new_learner(model_with_dropout).to_format(TrainFormat(True, "fp16"))
    for dl in (learn.dls.train, learn.dls.valid):
        del dl[2:]
    learn.fit(2, cbs=RaisesAt(event, error(), order))
    assert_sound(learn, TrainFormat(True, "fp16"))
    learn.fit(1)


CANCELS = {
    CancelBatchException: [*BEFORE_A_STEP[3:], "after_step"],
    CancelBackwardException: ["before_backward"],
    CancelStepException: ["before_step"],
    CancelTrainException: [*BEFORE_A_STEP[2:], "after_step", "after_batch"],
    CancelValidException: ["before_validate"],
    CancelEpochException: [*BEFORE_A_STEP[1:], "after_step", "after_batch", "after_train"],
    CancelFitException: [*BEFORE_A_STEP, *AFTER_A_STEP[:-1]],
}


@pytest.mark.parametrize(
    "error, event", [(error, event) for error, events in CANCELS.items() for event in events], ids=str
)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_cancelling_does_what_it_does_in_fastai(new_learner, bf16_cpu, fmt, error, event):
    def new():
        return new_learner(model_with_dropout, opt_func=SGD)

    learn, plain = new().to_format(fmt), new()
    for each in (learn, plain):
        torch.manual_seed(0)
        each.fit(2, cbs=RaisesAt(event, error(), 100, n=2 if event not in AFTER_A_STEP[2:] else 1))
    assert_sound(learn, fmt)
    assert plain.recorder.iters == learn.recorder.iters and len(plain.recorder.losses) == len(learn.recorder.losses)
    tolerance = {"atol": 1e-5} if fmt.amp_mode is None else {"atol": 0.05}
    for a, b in zip(learn.model.parameters(), plain.model.parameters()):
        assert torch.allclose(a, b, rtol=1e-4, **tolerance)
    if error not in (CancelBatchException, CancelTrainException, CancelEpochException):
        assert_next_fit_is_that_of_a_new_learner(learn, new, fmt)


# A search and a summary


PACKAGE = str(Path(memory_format.__file__).parent)


class InterruptAt:
    "Raises `KeyboardInterrupt` at the `n`-th time that the package runs that line; without a line, counts all lines."

    def __init__(self, line=None, n=1):
        self.line, self.left, self.counts, self.is_on = line, n, Counter(), False

    def __enter__(self):
        self.is_on = True
        sys.settrace(lambda frame, *args: self.trace if frame.f_code.co_filename.startswith(PACKAGE) else None)
        return self

    def __exit__(self, *args):
        self.is_on = False
        sys.settrace(None)

    def trace(self, frame, event, arg):
        if not self.is_on:  # the frame of a generator that goes on later, while another traces
            return None
        if event == "line":
            line = frame.f_code.co_filename, frame.f_lineno
            self.counts[line] += 1
            self.left -= line == self.line
            if self.left == 0:
                self.__exit__()
                raise KeyboardInterrupt
        return self.trace


def summarise(learn):
    learn.format_summary()


def search(learn):
    learn.format_find([TrainFormat(True), TrainFormat(False)], show_plot=False)


@pytest.fixture
def quick_search(monkeypatch):
    for name, value in {"N_ROUNDS": 2, "FEW_STEPS": 1, "ENOUGH_STEPS": 1, "ENOUGH_S": 0}.items():
        monkeypatch.setattr(plan, name, value)


@pytest.mark.parametrize("call, every", [(summarise, 17), (search, 97)])  # 1 has been run by hand
def test_interrupt_at_any_line_leaves_the_learner_as_it_was(new, bf16_cpu, quick_search, assert_unchanged, call, every):
    "At the first time and the last that it comes to the line."

    def try_lines():
        learn = new().to_channelslast(amp_mode="bf16")
        learn.fit(1)
        learn.model(torch.randn(2, 3, 8, 8)).sum().backward()
        with InterruptAt() as all_lines:
            call(learn)
        check = assert_unchanged(learn)
        lines = sorted(all_lines.counts)
        assert len(lines) > 400
        n_fired = n_tried = 0
        for line in lines[::every]:
            for n in sorted({1, all_lines.counts[line]}):
                n_tried += 1
                for _ in range(4):  # a search does not take the same steps each time, nor as many
                    with suppress(KeyboardInterrupt), InterruptAt(line, n) as interrupt:
                        call(learn)
                    try:
                        check()
                        assert_autocast_is_off()
                    except AssertionError as error:
                        raise AssertionError(f"interrupted at {line}, time {n}") from error
                    if interrupt.left <= 0:
                        n_fired += 1
                        break
                    n = max(1, interrupt.counts[line])
        assert n_fired > 0.9 * n_tried

    in_a_thread(try_lines)


@pytest.mark.parametrize("call", [summarise, search])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, torch.cuda.OutOfMemoryError, CancelFitException])
@pytest.mark.parametrize("event", BEFORE_A_STEP)
def test_error_at_any_event_of_a_search(new, bf16_cpu, quick_search, assert_unchanged, call, event, error):
    learn = new().to_channelslast(amp_mode="bf16")
    learn.fit(1)
    if call is summarise and event == "before_step":
        pytest.skip("a summary makes no step")
    raises = RaisesAt(event, error("now"), 100, n=3 if call is search else 1)
    learn.add_cb(raises)
    check = assert_unchanged(learn)
    with suppress(KeyboardInterrupt, RuntimeError, ValueError):
        call(learn)
    assert next(raises.times) > raises.n
    check()
    learn.remove_cb(RaisesAt)
    assert_sound(learn, TrainFormat(True, "bf16"))
    assert_next_fit_is_that_of_a_new_learner(learn, new, TrainFormat(True, "bf16"))


@pytest.mark.parametrize("call", [summarise, search])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, torch.cuda.OutOfMemoryError])
@pytest.mark.parametrize("where", INSIDE)
def test_error_inside_a_step_of_a_search(new, bf16_cpu, quick_search, assert_unchanged, call, where, error):
    learn = new().to_channelslast(amp_mode="bf16")
    learn.fit(1)
    if call is summarise and where == "step":
        pytest.skip("a summary makes no step")
    undo = raise_inside(learn, where, error("now"), n_batches=0 if call is summarise else 1)  # which reads but one
    check = assert_unchanged(learn)
    with pytest.raises((error, RuntimeError), match="now"):
        call(learn)
    check()
    undo()
    assert_next_fit_is_that_of_a_new_learner(learn, new, TrainFormat(True, "bf16"))


# Out of memory on a GPU


class Hungry(nn.Module):
    "Takes more memory than the GPU has, in the forward or in the backward pass."

    def __init__(self, where):
        super().__init__()
        self.where, self.is_on = where, True

    def forward(self, x):
        if self.is_on and self.where == "forward":
            too_large(x)
        if self.is_on and self.where == "backward":
            x = x.clone().requires_grad_()
            x.register_hook(too_large)
        return x


def too_large(x):
    total = torch.cuda.get_device_properties(x.device).total_memory
    return torch.empty(2 * total, dtype=torch.uint8, device=x.device)


@pytest.mark.cuda
@pytest.mark.parametrize("where", ["forward", "backward", "step"])
@pytest.mark.parametrize("fmt", [TrainFormat(True), TrainFormat(True, "fp16"), TrainFormat(True, "bf16")], ids=str)
def test_gpu_out_of_memory(new_learner, where, fmt):
    def new():
        return new_learner(lambda: nn.Sequential(Hungry(where), *TinyNet()), device="cuda")

    learn, other = new().to_format(fmt), new().to_format(fmt)
    learn.model[0].is_on, other.model[0].is_on = where != "step", False
    for each in (learn, other):
        for module in each.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0
    cbs = Callback(before_step=lambda cb: too_large(cb.x)) if where == "step" else None
    with pytest.raises(torch.cuda.OutOfMemoryError):
        learn.fit(1, cbs=cbs)
    learn.model[0].is_on = False
    gc.collect()
    torch.cuda.empty_cache()
    assert not torch.is_autocast_enabled("cuda")
    assert all(is_channels_last(param) for param in learn.model.parameters() if param.ndim == 4)
    assert all(param.grad is None or not param.grad.any() for param in learn.model.parameters())
    for each in (learn, other):
        torch.manual_seed(1)
        each.fit(1)
    for a, b in zip(learn.model.parameters(), other.model.parameters()):
        assert torch.allclose(a, b, atol=1e-3)


@pytest.mark.cuda
@pytest.mark.parametrize("call", [summarise, search])
def test_gpu_out_of_memory_in_a_search(new_learner, assert_unchanged, quick_search, call):
    learn = new_learner(lambda: nn.Sequential(Hungry("forward"), *TinyNet()), device="cuda").to_channelslast()
    learn.model.to("cuda")
    check = assert_unchanged(learn)
    with pytest.raises((torch.cuda.OutOfMemoryError, RuntimeError), match="out of memory"):
        call(learn)
    check()
    learn.model[0].is_on = False
    call(learn)
    check()
    learn.fit(1)


@pytest.mark.cuda
@pytest.mark.parametrize("event", BEFORE_A_STEP)
def test_interrupt_while_the_loss_is_scaled(new_learner, event):
    "float16 multiplies loss and gradients by a scale that the next fit does not know."
    learn, other = (new_learner(device="cuda").to_channelslast(init_scale=1024.0) for _ in range(2))
    for each in (learn, other):
        for module in each.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, cbs=RaisesAt(event, KeyboardInterrupt(), 100))
    assert not torch.is_autocast_enabled("cuda")
    for each in (learn, other):
        torch.manual_seed(1)
        each.fit(1)
    for a, b in zip(learn.model.parameters(), other.model.parameters()):
        assert torch.allclose(a, b, atol=1e-3)
