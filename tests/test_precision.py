"Mixed precision: which dtype a device gets, the GradScaler options, and autocast that is left as it was."

import copy
import inspect
import sys
import types
import warnings
from functools import partial

import pytest
import torch
from conftest import BATCH_EVENTS, in_a_thread, new_dls
from fastai.callback.core import Callback, CancelBatchException, CancelFitException, CancelTrainException
from fastai.data.core import DataLoaders
from fastai.learner import Learner, Recorder, load_learner
from fastai.optimizer import OptimWrapper
from torch import nn
from torch.amp import GradScaler

from channelslast import devices, precision
from channelslast.devices import AMPMode, accelerated_dtypes, autocast_dtype, training_device
from channelslast.precision import FastaiMixedPrecision, MixedPrecision

OPTIONS = dict(init_scale=8.0, growth_factor=3.0, backoff_factor=0.25, growth_interval=5, enabled=True)


def mixed_precisions(learn):
    return [cb for cb in learn.cbs if isinstance(cb, FastaiMixedPrecision)]


def autocast_state():
    depth = torch.autocast_increment_nesting(), torch.autocast_decrement_nesting()
    return depth, [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]


class Spy(Callback):
    "Records the dtype of the model's output inside autocast, and the scaler."

    order = MixedPrecision.order - 1

    def after_pred(self):
        self.dtype = self.pred.dtype
        self.scaler_enabled = self.learn.scaler.is_enabled()


def wrapped(opt, **options):
    "An `opt_func` that wraps a PyTorch optimizer."
    return lambda params, **kwargs: OptimWrapper(params, partial(opt, **options), **kwargs)


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 3))


# Which dtype a device gets


@pytest.fixture
def unknown_devices():
    "Devices are asked what they can do anew, in this test and after it."
    accelerated_dtypes.cache_clear()
    yield
    accelerated_dtypes.cache_clear()


@pytest.mark.parametrize(
    "features, expected",
    [
        ({"avx2", "avx512_bf16"}, (torch.bfloat16,)),
        ({"amx_bf16", "amx_fp16"}, (torch.bfloat16, torch.float16)),
        ({"neon", "fp16_arith"}, (torch.float16,)),
        ({"avx2", "f16c"}, ()),
    ],
    ids=["bf16", "both", "fp16", "none"],
)
def test_cpu_accelerates_what_it_has_instructions_for(unknown_devices, monkeypatch, features, expected):
    monkeypatch.setattr(devices, "_cpu_features", lambda: features)
    assert accelerated_dtypes("cpu") == expected


def test_cpu_features_are_known_without_pytorch_telling(unknown_devices, monkeypatch):
    told = accelerated_dtypes("cpu")
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    accelerated_dtypes.cache_clear()
    assert accelerated_dtypes("cpu") == told


def test_cpu_features_of_another_system_than_linux_are_none(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    for system in ("Darwin", "Windows"):
        monkeypatch.setattr(devices.platform, "system", lambda system=system: system)
        assert devices._cpu_features() == set()


def test_cpu_features_are_those_that_pytorch_says_it_has(monkeypatch):
    features = {"avx2": True, "amx_bf16": False, "cache_size": 32}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    assert devices._cpu_features() == {"avx2"}


@pytest.mark.parametrize(
    "capability, expected",
    [
        ((9, 0), (torch.float16, torch.bfloat16)),
        ((8, 0), (torch.float16, torch.bfloat16)),
        ((7, 5), (torch.float16,)),
        ((7, 0), (torch.float16,)),
        ((6, 1), ()),
    ],
    ids=str,
)
def test_gpu_accelerates_by_compute_capability(unknown_devices, monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert accelerated_dtypes("cuda") == expected


def test_every_gpu_under_rocm_has_both(unknown_devices, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert accelerated_dtypes("cuda") == (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("has_scaler, expected", [(True, (torch.float16, torch.bfloat16)), (False, ())])
def test_mps_needs_a_pytorch_with_its_grad_scaler(unknown_devices, monkeypatch, has_scaler, expected):
    monkeypatch.setattr(devices, "is_autocast_available", lambda device_type: True)  # PyTorch 2.4 has it not yet
    monkeypatch.setattr(devices, "ismin_torch", lambda version: has_scaler)
    assert accelerated_dtypes("mps") == expected


def test_training_device_is_the_one_that_fastai_trains_on(new_learner, monkeypatch):
    assert training_device(new_learner(dls=new_dls(3, 8, 8, device="meta"))) == torch.device("meta")
    by_hand = new_learner(dls=new_dls(3, 8, 8, device="meta"), default_cbs=False)
    assert training_device(by_hand) == torch.device("cpu")
    plain_dls = new_learner(dls=DataLoaders([1], [1]), loss_func=nn.MSELoss())
    monkeypatch.setattr(devices, "default_device", lambda: torch.device("meta"))
    assert training_device(plain_dls) == torch.device("meta")


def test_device_without_autocast_trains_in_float32():
    assert accelerated_dtypes("meta") == ()
    dtype, why = autocast_dtype("fp16", "meta")
    assert dtype is None and "meta" in why and "float32" in why


def test_float16_on_a_cpu_without_it_becomes_bfloat16(bf16_cpu):
    dtype, why = autocast_dtype("fp16", "cpu")
    assert dtype is torch.bfloat16 and "fp16" in why and "bfloat16" in why
    assert autocast_dtype("bf16", "cpu") == (torch.bfloat16, "")


@pytest.mark.parametrize("amp_mode", ["fp16", "bf16"])
def test_cpu_without_half_precision_trains_in_float32(plain_cpu, amp_mode, new_learner):
    dtype, why = autocast_dtype(amp_mode, "cpu")
    assert dtype is None and amp_mode in why and "float32" in why
    spy = Spy()
    with pytest.warns(UserWarning, match="training in float32"):
        new_learner(cbs=[MixedPrecision(amp_mode), spy]).fit(1)
    assert spy.dtype is torch.float32 and not spy.scaler_enabled


def test_bfloat16_on_a_gpu_without_it_is_an_error_that_says_what_to_pass(monkeypatch):
    monkeypatch.setattr(devices, "accelerated_dtypes", lambda device: (torch.float16,))
    with pytest.raises(ValueError, match=r"amp_mode='bf16'.*cuda.*amp_mode='fp16'"):
        autocast_dtype("bf16", "cuda")


def test_float16_on_a_gpu_without_tensor_cores_stays_and_says_so(monkeypatch):
    monkeypatch.setattr(devices, "accelerated_dtypes", lambda device: ())
    dtype, why = autocast_dtype("fp16", "cuda")
    assert dtype is torch.float16 and "Tensor Cores" in why


# Arguments


@pytest.mark.parametrize("amp_mode", ["fp8", "FP16", None, 16, []])
def test_amp_mode_that_does_not_exist_lists_those_that_do(amp_mode):
    with pytest.raises(ValueError, match=r"amp_mode=.*'fp16', 'bf16'") as error:
        MixedPrecision(amp_mode)
    assert repr(amp_mode) in str(error.value)


def test_unknown_option_is_a_type_error_that_lists_the_options():
    with pytest.raises(TypeError, match=r"initial_scale=3.*init_scale, growth_factor, backoff_factor"):
        MixedPrecision(initial_scale=3)
    with pytest.raises(TypeError, match="device="):
        MixedPrecision(device="cpu")


@pytest.mark.parametrize(
    "option",
    [
        {"init_scale": 0},
        {"init_scale": "big"},
        {"init_scale": -1.0},
        {"growth_factor": 1.0},
        {"growth_factor": 0.5},
        {"backoff_factor": 1.0},
        {"backoff_factor": 1.5},
        {"backoff_factor": 0},
        {"backoff_factor": -0.5},
        {"growth_interval": 2.5},
        {"growth_interval": 0},
        {"growth_interval": -1},
        {"enabled": 1},
    ],
    ids=str,
)
def test_illegal_value_of_an_option_is_a_value_error(option):
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"{name}={value!r} is not legal.*pass"):
        MixedPrecision(**option)


@pytest.mark.parametrize(
    "option",
    [{"init_scale": 0.5}, {"growth_factor": 1.5}, {"growth_interval": 1}, {"backoff_factor": 0.9}, {"enabled": False}],
    ids=str,
)
def test_legal_value_of_an_option_is_taken(option):
    assert MixedPrecision(**option).kwargs == option


def test_options_are_those_of_pytorch():
    assert set(precision._SCALER_OPTIONS) == set(inspect.signature(GradScaler).parameters) - {"device"}
    GradScaler("cpu", **OPTIONS)
    MixedPrecision(**OPTIONS)


def test_options_without_effect_warn():
    with pytest.warns(UserWarning, match="init_scale: without effect, bfloat16"):
        MixedPrecision("bf16", init_scale=8.0)
    with pytest.warns(UserWarning, match="init_scale: without effect, enabled=False"):
        MixedPrecision("fp16", init_scale=8.0, enabled=False)


def test_options_that_the_device_makes_void_warn(bf16_cpu, new_learner):
    with pytest.warns(UserWarning, match=r"bfloat16 instead; without effect there: init_scale"):
        new_learner().to_fp16(init_scale=8.0)


def test_options_that_have_an_effect_do_not_warn(fp16_cpu):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MixedPrecision(enabled=False)
        assert MixedPrecision(init_scale=8.0).dtype_on("cpu") is torch.float16
    with pytest.warns(UserWarning, match="^backoff_factor, init_scale: without effect"):
        MixedPrecision(enabled=False, backoff_factor=0.9, init_scale=8.0)


def test_autocast_is_put_back_with_dtype_and_cache():
    state = precision.AutocastState("cpu")
    with in_autocasts_of(torch.float16, cache_enabled=False):
        inner = precision.AutocastState("cpu")
        with in_autocasts_of(torch.bfloat16, cache_enabled=True):
            inner.restore()
            assert torch.get_autocast_dtype("cpu") is torch.float16 and torch.is_autocast_enabled("cpu")
            assert not torch.is_autocast_cache_enabled()
            assert torch.autocast_increment_nesting() == 2 and torch.autocast_decrement_nesting() == 1
            torch.autocast_increment_nesting()  # for the context that `restore` has left
    assert precision.AutocastState("cpu").dtype is state.dtype and not torch.is_autocast_enabled("cpu")


def in_autocasts_of(dtype, cache_enabled):
    return torch.autocast("cpu", dtype, cache_enabled=cache_enabled)


def test_help_shows_every_option():
    for function in (MixedPrecision, Learner.to_fp16):
        parameters = set(inspect.signature(function).parameters) - {"self", "amp_mode"}
        assert parameters == set(OPTIONS)


# Training


def test_model_runs_in_bfloat16_and_the_loss_in_float32(new_learner, bf16_cpu):
    class Dtypes(Spy):
        def after_loss(self):
            self.loss_dtype = self.learn.pred.dtype, self.loss.dtype

    spy = Dtypes()
    learn = new_learner(cbs=[MixedPrecision("bf16"), spy])
    learn.fit(1)
    assert spy.dtype is torch.bfloat16 and spy.loss_dtype == (torch.float32, torch.float32)
    assert all(param.dtype is torch.float32 for param in learn.model.parameters())


def test_warns_once_for_any_number_of_fits(bf16_cpu, new_learner):
    learn = new_learner(cbs=MixedPrecision("fp16"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learn.fit(1)
        learn.fit(1)
        learn.validate()
    assert len([w for w in caught if "bfloat16 instead" in str(w.message)]) == 1


@pytest.mark.parametrize("enabled", [True, False])
def test_grad_scaler_gets_its_options(fp16_cpu, monkeypatch, new_learner, enabled):
    learn = new_learner(linear, cbs=MixedPrecision(**OPTIONS | {"enabled": enabled}))
    seen = {}

    def record(cb):
        seen.update(enabled=cb.learn.scaler.is_enabled(), **cb.learn.scaler.state_dict())

    learn.fit(1, cbs=Callback(before_train=record))
    assert seen.pop("enabled") is enabled
    if enabled:
        expected = {"scale": 8.0, "growth_factor": 3.0, "backoff_factor": 0.25, "growth_interval": 5}
        assert {name: seen[name] for name in expected} == expected


def float16_step_equals_float32_step(new_learner, opt_func, device="cpu"):
    def fit(cbs, overflow=False):
        learn = new_learner(linear, opt_func=opt_func, cbs=cbs, device=device)
        before = [param.detach().clone() for param in learn.model.parameters()]

        def poison(cb):
            if overflow and cb.train_iter == 1:
                next(cb.model.parameters()).grad[0, 0] = float("inf")

        learn.fit(1, cbs=Callback(after_backward=poison))
        return [param.detach().cpu() for param in learn.model.parameters()], [p.cpu() for p in before], learn

    half, _, learn = fit(MixedPrecision("fp16", init_scale=1024.0))
    full, before, _ = fit(None)
    for a, b, c in zip(half, full, before):
        assert (a - b).norm() < 0.02 * (b - c).norm()
    skipped, _, learn = fit(MixedPrecision("fp16", init_scale=1024.0), overflow=True)
    assert all(torch.isfinite(param).all() for param in skipped)
    return learn


@pytest.mark.parametrize("fused", [False, True])
def test_scaled_step_equals_the_unscaled_one(fp16_cpu, new_learner, fused):
    learn = float16_step_equals_float32_step(new_learner, wrapped(torch.optim.SGD, fused=fused))
    assert "found_inf" not in vars(learn.opt.opt)


def test_optimizer_that_only_says_that_it_is_fused_still_skips_an_overflow(fp16_cpu, new_learner):
    class Own(torch.optim.Optimizer):
        def __init__(self, params, lr=0.1):
            super().__init__(params, dict(lr=lr, fused=True))

        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                for param in group["params"]:
                    param -= group["lr"] * param.grad

    float16_step_equals_float32_step(new_learner, wrapped(Own))


def test_overflow_skips_the_fused_step_and_lowers_the_scale(fp16_cpu, new_learner):
    learn = new_learner(linear, opt_func=wrapped(torch.optim.SGD, fused=True), cbs=MixedPrecision(init_scale=1024.0))
    weights, scales = [], []

    def poison(cb):
        weights.append(cb.model[1].weight.detach().clone())
        if cb.iter == 1:
            cb.model[1].weight.grad[0, 0] = float("nan")

    def record(cb):
        scales.append(cb.learn.scaler.get_scale())

    recorder = Callback(after_batch=record)
    recorder.run_valid = False
    learn.fit(1, cbs=[Callback(after_backward=poison), recorder])
    assert scales == [1024.0, 512.0, 512.0]
    assert not torch.equal(weights[0], weights[1]) and torch.equal(weights[1], weights[2])


def test_step_is_right_if_grad_scaler_stops_looking_for_fused_optimizers(fp16_cpu, new_learner, monkeypatch):
    def step(scaler, optimizer, *args, **kwargs):
        "GradScaler's step for optimizers that know nothing of it."
        state = scaler._per_optimizer_states[id(optimizer)]
        return scaler._maybe_opt_step(optimizer, state, *args, **kwargs)

    monkeypatch.setattr(GradScaler, "step", step)
    float16_step_equals_float32_step(new_learner, wrapped(torch.optim.SGD, fused=True))


def test_grad_scaler_still_looks_for_fused_optimizers():
    assert "_step_supports_amp_scaling" in inspect.getsource(GradScaler.step)


# Autocast is left as it was


class RaiseAt(Callback):
    run_valid = False

    def __init__(self, event, error, order):
        self.order = order
        self.error = error
        setattr(self, event, self.fail)

    def fail(self):
        if self.iter == 1:
            raise self.error


@pytest.mark.parametrize("order", [-5, 30])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), RuntimeError("no"), CancelFitException(), CancelBatchException()], ids=repr
)
@pytest.mark.parametrize("event", BATCH_EVENTS)
def test_exception_at_any_event_leaves_autocast_as_it_was(event, error, order, bf16_cpu, new_learner):
    learn = new_learner(cbs=MixedPrecision("bf16"))
    before = autocast_state()
    try:
        learn.fit(1, cbs=RaiseAt(event, error, order))
    except type(error):  # fastai lets a CancelBatchException from `after_batch` out
        pass
    assert autocast_state() == before
    learn.fit(1)
    assert autocast_state() == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no"), MemoryError()], ids=repr)
@pytest.mark.parametrize("where", ["forward", "loss", "backward", "step"])
def test_exception_inside_a_batch_leaves_autocast_as_it_was(where, error, bf16_cpu, new_learner, monkeypatch):
    learn = new_learner(cbs=MixedPrecision("bf16"))
    learn.create_opt()
    target = {
        "forward": (learn.model[3], "forward"),
        "loss": (learn, "loss_func"),
        "backward": (learn, "_backward"),
        "step": (learn.opt, "step"),
    }[where]

    def fail(*args, **kwargs):
        raise error

    before = autocast_state()
    with monkeypatch.context() as patched:
        patched.setattr(*target, fail)
        with pytest.raises(type(error)):
            learn.fit(1)
        assert autocast_state() == before
    learn.fit(1)
    assert autocast_state() == before


@pytest.mark.parametrize("event", ["before_backward", "after_backward", "before_step", "after_step"])
def test_interrupted_fit_leaves_no_scaled_gradients_behind(fp16_cpu, new_learner, event):
    def gradient_norms(learn):
        norms = []
        cb = Callback(before_step=lambda cb: norms.append(cb.model[1].weight.grad.norm().item()))
        cb.order = MixedPrecision.order + 1
        learn.fit(1, cbs=cb)
        return norms

    learn = new_learner(linear, opt_func=wrapped(torch.optim.SGD, fused=True), lr=1e-9, cbs=MixedPrecision("fp16"))
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, cbs=RaiseAt(event, KeyboardInterrupt(), 50))
    assert "found_inf" not in vars(learn.opt.opt)
    assert gradient_norms(learn.to_fp32()) == pytest.approx(gradient_norms(new_learner(linear, lr=1e-9)), rel=1e-3)


@pytest.mark.parametrize("event", ["before_backward", "after_step"])
def test_interrupted_learner_can_be_exported(fp16_cpu, new_learner, tmp_path, event):
    learn = new_learner(linear, path=tmp_path, cbs=MixedPrecision("fp16"))
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, cbs=RaiseAt(event, KeyboardInterrupt(), -5))
    learn.logger = print
    learn.dls.new_empty = types.MethodType(lambda dls: new_dls(3, 8, 8), learn.dls)
    learn.export()
    load_learner(tmp_path / "export.pkl", cpu=False).validate()


def test_fit_that_a_cancel_exception_ends_keeps_its_scaler_till_then(fp16_cpu, new_learner):
    scalers = []
    learn = new_learner(linear, cbs=MixedPrecision("fp16"))
    watch = Callback(after_cancel_train=lambda cb: scalers.append(cb.learn.scaler))
    learn.fit(1, cbs=[RaiseAt("after_backward", CancelTrainException(), 50), watch])
    assert scalers[0] is not None


def test_interrupt_leaves_no_weights_of_old_in_autocasts_cache(bf16_cpu, new_learner):
    learn = new_learner(cbs=MixedPrecision("bf16"))
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, cbs=RaiseAt("after_pred", KeyboardInterrupt(), 0))
    with torch.no_grad():
        for param in learn.model.parameters():
            param += 1
    x, _ = learn.dls.train[0]
    fresh = copy.deepcopy(learn.model).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(learn.model.eval()(x), fresh(x))


def test_inner_validation_leaves_autocast_as_it_was(bf16_cpu, new_learner):
    class Inner(Callback):
        run_valid = False

        def after_pred(self):
            self.enabled = torch.is_autocast_enabled("cpu")
            inner = self.learn
            saved = inner.dl, inner.xb, inner.yb, inner.pred
            inner.training = False
            inner._do_epoch_validate(dl=inner.dls.valid)
            inner.training = True
            self.still = torch.is_autocast_enabled("cpu")
            inner.dl, inner.xb, inner.yb, inner.pred = saved

    inner = Inner()
    before = autocast_state()
    new_learner(cbs=[MixedPrecision("bf16"), inner]).fit(1)
    assert inner.enabled and inner.still
    assert autocast_state() == before


@pytest.mark.parametrize("function", ["__enter__", "__exit__"])
@pytest.mark.parametrize("line", range(1, 12))
def test_interrupt_inside_autocast_itself_leaves_it_as_it_was(bf16_cpu, new_learner, function, line):
    code = getattr(torch.autocast, function).__code__
    steps = 0

    def trace(frame, event, arg):
        return count_lines if frame.f_code is code else None

    def count_lines(frame, event, arg):
        nonlocal steps
        if event == "line":
            steps += 1
            if steps == line:
                raise KeyboardInterrupt
        return count_lines

    def interrupt():
        learn = new_learner(cbs=MixedPrecision("bf16"))
        before = autocast_state()
        with pytest.raises(KeyboardInterrupt):
            sys.settrace(trace)
            try:
                learn.fit(1)
            finally:
                sys.settrace(None)
        assert autocast_state() == before
        learn.fit(1)

    in_a_thread(interrupt)


# `to_fp16` and its like


def test_one_mixed_precision_whatever_the_order_of_calls(bf16_cpu, learn):
    for _ in range(2):
        for call in (learn.to_fp16, learn.to_bf16, learn.to_fp16, learn.to_fp16):
            assert call() is learn
            assert len(mixed_precisions(learn)) == 1
    assert learn.mixed_precision.amp_mode is AMPMode.FP16
    assert not mixed_precisions(learn.to_fp32())


def test_fastai_mixed_precision_is_replaced_with_its_options(bf16_cpu, new_learner):
    learn = new_learner(cbs=FastaiMixedPrecision(init_scale=16.0))
    learn.to_fp16()
    assert [type(cb) for cb in mixed_precisions(learn)] == [MixedPrecision]
    assert learn.mixed_precision.kwargs == {"init_scale": 16.0}


def test_fastai_mixed_precision_in_bf16_is_replaced_without_a_word(bf16_cpu, new_learner):
    learn = new_learner(cbs=FastaiMixedPrecision("bf16"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fastai's autocasts on CUDA alone, and says so
        learn.fit(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn.to_bf16()
    assert [type(cb) for cb in mixed_precisions(learn)] == [MixedPrecision]


@pytest.mark.parametrize("cls", [MixedPrecision, FastaiMixedPrecision])
def test_newest_of_several_trains_alone(fp16_cpu, new_learner, cls):
    learn = new_learner(linear, cbs=cls("fp16", init_scale=4.0))
    scales = []
    watch = Callback(before_step=lambda cb: scales.append(cb.learn.scaler.get_scale()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fastai's autocasts on CUDA alone, and says so
        learn.fit(1, cbs=[MixedPrecision("fp16", init_scale=64.0), watch])
        assert set(scales) == {64.0}
        if cls is MixedPrecision:
            learn.fit(1, cbs=watch)
            assert scales[-1] == 4.0


def test_older_one_trains_again_after_a_fit_with_a_newer_was_interrupted(bf16_cpu, new_learner):
    spy = Spy()
    learn = new_learner(cbs=[FastaiMixedPrecision("bf16"), MixedPrecision("bf16"), spy])
    older = learn.cbs[-3], learn.cbs[-2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fastai's autocasts on CUDA alone, and says so
        with pytest.raises(KeyboardInterrupt):
            learn.fit(1, cbs=[MixedPrecision("bf16"), RaiseAt("after_loss", KeyboardInterrupt(), 0)])
        assert all(cb.run for cb in older)
        learn.fit(1)
    assert spy.dtype is torch.bfloat16


def test_newest_of_several_decides(bf16_cpu, new_learner):
    newest = MixedPrecision("bf16")
    learn = new_learner(cbs=[MixedPrecision("fp16"), newest])
    assert mixed_precisions(learn.to_bf16()) == [newest]


def test_same_options_again_change_nothing(fp16_cpu, learn):
    before = learn.to_fp16(init_scale=16.0).mixed_precision
    assert learn.to_fp16(init_scale=16.0).mixed_precision is before


def test_subclass_of_the_users_stays(bf16_cpu, new_learner):
    class Mine(FastaiMixedPrecision):
        pass

    mine = Mine()
    learn = new_learner(cbs=mine).to_fp16()
    assert mixed_precisions(learn) == [mine]


def test_model_attribute_of_the_callbacks_name_is_no_obstacle(bf16_cpu, new_learner):
    learn = new_learner()
    learn.model.mixed_precision = "the model's"
    learn.to_fp16().to_bf16().add_cb(FastaiMixedPrecision())
    assert len(mixed_precisions(learn.to_fp16())) == 1
    assert not mixed_precisions(learn.to_fp32())


# On a GPU


@pytest.mark.cuda
@pytest.mark.parametrize("fused", [False, True])
def test_scaled_step_on_a_gpu(new_learner, fused):
    float16_step_equals_float32_step(new_learner, wrapped(torch.optim.AdamW, fused=fused), device="cuda")


@pytest.mark.cuda
def test_recorded_losses_are_those_of_the_steps(new_learner):
    losses = []
    learn = new_learner(device="cuda").to_fp16()
    learn.fit(1, cbs=Callback(after_backward=lambda cb: losses.append(cb.loss.item())))
    smooth, expected = 0.0, []
    for i, loss in enumerate(losses):
        smooth = loss + 0.98 * (smooth - loss)
        expected.append(smooth / (1 - 0.98 ** (i + 1)))
    assert torch.allclose(torch.stack(learn.recorder.losses).cpu(), torch.tensor(expected), rtol=1e-4)


@pytest.mark.cuda
def test_fused_step_does_not_wait_for_the_gpu(new_learner):
    learn = new_learner(device="cuda", opt_func=wrapped(torch.optim.AdamW, fused=True)).to_fp16()
    learn.fit(1)

    class NoSync(Callback):
        order = MixedPrecision.order + 1

        def before_backward(self):
            torch.cuda.set_sync_debug_mode("error")

    class SyncAgain(Callback):
        order = Recorder.order + 1

        def after_batch(self):
            torch.cuda.set_sync_debug_mode("default")

    try:
        learn.fit(1, cbs=[NoSync(), SyncAgain()])
    finally:
        torch.cuda.set_sync_debug_mode("default")
