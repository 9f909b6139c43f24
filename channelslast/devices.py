"What a device computes fast, the dtype in which to autocast on it, and the device on which a Learner trains."

import platform
from functools import cache
from pathlib import Path

import torch
from fastai.callback.core import TrainEvalCallback
from fastai.callback.fp16 import AMPMode
from fastai.learner import Learner
from fastai.torch_core import default_device, ismin_torch
from torch.amp import is_autocast_available

__all__ = ["AMPMode", "accelerated_dtypes", "autocast_dtype", "training_device"]

FP32 = "fp32"  # as an amp_mode: no mixed precision
_DTYPES = {AMPMode.FP16: torch.float16, AMPMode.BF16: torch.bfloat16}


@cache
def accelerated_dtypes(
    device: torch.device | str,  # where the model runs
) -> tuple[torch.dtype, ...]:
    """Return the half precision dtypes that `device` computes faster than float32, the one to prefer first.

    A CUDA GPU: float16 from compute capability 7.0 (Tensor Cores), bfloat16 from 8.0; every GPU under ROCm. A CPU: what
    its instruction set has arithmetic for (AVX512-BF16, AVX512-FP16, AMX, or Arm's BF16 and FP16). Other devices: what
    their autocast takes, unchecked.
    """
    device = torch.device(device)
    if not is_autocast_available(device.type):
        return ()
    if device.type == "mps" and not ismin_torch("2.8"):  # the first with GradScaler's kernels
        return ()
    if device.type == "cpu":
        return _accelerated_by_cpu()
    if device.type == "cuda" and not torch.version.hip:
        capability = torch.cuda.get_device_capability(device)
        needs = {torch.float16: (7, 0), torch.bfloat16: (8, 0)}
        return tuple(dtype for dtype, needed in needs.items() if capability >= needed)
    return (torch.float16, torch.bfloat16)


def autocast_dtype(
    amp_mode: str | AMPMode,  # the precision asked for, 'fp16', 'bf16' or 'fp32'
    device: torch.device | str,  # where the model runs
) -> tuple[torch.dtype | None, str]:
    """Return the dtype in which to autocast on `device`, and why it is not the one asked for, else ''.

    The dtype is None for no autocast. The reason is a sentence to warn with. Raises `ValueError` where only the caller
    can choose: bfloat16 on a CUDA GPU without it.
    """
    amp_mode, device = to_amp_mode(amp_mode), torch.device(device)
    if amp_mode is None:
        return None, ""
    dtype, accelerated = _DTYPES[amp_mode], accelerated_dtypes(device)
    asked = f"amp_mode='{amp_mode.value}'"
    if dtype in accelerated:
        return dtype, ""
    if device.type == "cuda" and dtype is torch.bfloat16:
        raise ValueError(f"{asked}: the GPU '{device}' has no bfloat16, pass amp_mode='fp16'")
    if device.type == "cuda":
        return dtype, f"{asked}: the GPU '{device}' has no Tensor Cores, float16 saves memory there but hardly time"
    instead = accelerated[0] if accelerated else None
    name = str(instead or torch.float32).removeprefix("torch.")
    return instead, f"{asked}: the device '{device}' has no fast arithmetic for it, training in {name} instead"


def training_device(
    learn: Learner,
) -> torch.device:
    "Return the device on which the next fit of `learn` trains: that of its DataLoaders, where fastai moves the model."
    device = None
    if any(isinstance(cb, TrainEvalCallback) for cb in learn.cbs):  # the callback that moves the model
        device = getattr(learn.dls, "device", default_device())
    if device is None:
        device = next((param.device for param in learn.model.parameters()), "cpu")
    return torch.device(device)


def to_amp_mode(
    amp_mode: str | AMPMode,  # 'fp16' or 'bf16'; 'fp32' for float32
) -> AMPMode | None:
    "Return `amp_mode` as an `AMPMode`, None for 'fp32'; raises a `ValueError` that lists the legal ones for any other."
    if amp_mode == FP32:
        return None
    try:
        return AMPMode(amp_mode)
    except ValueError:
        legal = ", ".join(repr(mode.value) for mode in AMPMode)
        float32 = f"'{FP32}' (or use_amp=False to `to_channelslast`, None to a TrainFormat)"
        raise ValueError(
            f"amp_mode={amp_mode!r} does not exist: pass one of {legal}, or for float32 {float32}"
        ) from None


def amp_mode_of(
    dtype: torch.dtype | None,  # in which to autocast, None for no autocast
) -> str | None:
    "Return the name of the precision: 'fp16', 'bf16', or None for float32."
    return next((mode.value for mode in AMPMode if _DTYPES[mode] is dtype), None)


def _accelerated_by_cpu() -> tuple[torch.dtype, ...]:
    features = _cpu_features()
    instructions = {
        torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16"},
        torch.float16: {"avx512_fp16", "amx_fp16", "fp16_arith", "asimdhp"},
    }
    return tuple(dtype for dtype, names in instructions.items() if names & features)


@cache
def has_fused_steps(
    device_type: str,
    dtype: torch.dtype,  # of a parameter
) -> bool:
    "Whether PyTorch's fused optimizers step such a parameter. Those of PyTorch 2.6 leave it as it is in half on a CPU."
    if device_type not in ("cuda", "cpu") or dtype not in (torch.float32, torch.float64, *_DTYPES.values()):
        return False
    if device_type == "cuda":
        return True
    param = torch.zeros(64, dtype=dtype, requires_grad=True)  # more than fit in a vector of the CPU's
    param.grad = torch.ones_like(param)
    torch.optim.SGD([param], lr=1.0, fused=True).step()
    return bool((param == -1).all())


def _cpu_features() -> set[str]:
    "Names of instruction sets: PyTorch's where it tells (`torch.cpu.get_capabilities`), else Linux's."
    if hasattr(torch.cpu, "get_capabilities"):
        return {name for name, has in torch.cpu.get_capabilities().items() if has is True}
    cpuinfo = Path("/proc/cpuinfo")
    if platform.system() != "Linux" or not cpuinfo.exists():
        return set()
    lines = cpuinfo.read_text().splitlines()
    return {name for line in lines if line.startswith(("flags", "Features")) for name in line.split(":")[1].split()}


def device_name(
    device: torch.device,
) -> str:
    "Return what a record calls `device`: the GPU's name, or the CPU with its threads."
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    return str(device)
