"What the options of a command or a training script mean: its device, its precision, its numbers."

import tempfile
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any

import torch
from fastai.torch_core import default_device
from fastcore.xtras import modified_env

from channelslast.devices import accelerated_dtypes, amp_mode_of

AMP_MODES = ("auto", "fp16", "bf16", "fp32")


class IllegalValue(ValueError):
    "A value that an option cannot have. Commands say `--name value: why`."

    def __init__(
        self,
        name: str,  # of the option
        value: Any,
        why: str,  # and what is legal
    ):
        super().__init__(f"{name}={value!r}: {why}")
        self.name, self.value, self.why = name, value, why


def find_device(
    device: str | None = None,  # cpu, cuda, cuda:1, mps, ...; None: fastai's choice
) -> torch.device:
    "Return the device of that name, after a try to use it; raises `IllegalValue` if that fails."
    try:
        found = torch.device(device) if device else default_device()
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        raise IllegalValue("device", device, str(error).partition("\n")[0]) from None
    return found


def choose_amp_mode(
    amp_mode: str,  # auto, fp16, bf16 or fp32
    device: torch.device,
) -> str | None:
    "Return 'fp16', 'bf16' or None for float32, for 'auto' what `device` is fastest at; raises `IllegalValue`."
    if amp_mode not in AMP_MODES:
        raise IllegalValue("amp_mode", amp_mode, f"pass one of {', '.join(AMP_MODES)}")
    if amp_mode == "auto":
        return amp_mode_of(next(iter(accelerated_dtypes(device)), None))
    return None if amp_mode == "fp32" else amp_mode


def add_format_options(
    parser: ArgumentParser,  # of a training script
) -> None:
    "Add `--amp-mode`, `--contiguous`, `--fastest` and `--device`."
    parser.add_argument(
        "--amp-mode", "--amp_mode", default="auto", help="auto (what the device is fastest at), fp16, bf16 or fp32"
    )
    parser.add_argument("--contiguous", action="store_true", help="train in contiguous format, to compare")
    parser.add_argument(
        "--fastest",
        action="store_true",
        help="search for the fastest format first; in the precision of --amp-mode, if that is not auto",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, ...; default: fastai's choice")


def check_positive(
    **numbers: float | None,  # options by name; None: not given
) -> None:
    "Raise `IllegalValue` for an option that is no number above 0."
    for name, value in numbers.items():
        if value is not None and not 0 < value < inf:
            raise IllegalValue(name, value, "pass a number above 0")


@contextmanager
def compile_caches(
    folder: Path | None = None,  # None: an empty one, removed afterwards, as of a user who compiles for the first time
) -> Iterator[None]:
    "Have PyTorch keep compiled code in `folder` alone, and forget what this process has compiled."
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as empty:
        caches = {"TORCHINDUCTOR_CACHE_DIR": str(folder or empty), "TRITON_CACHE_DIR": f"{folder or empty}/triton"}
        torch.compiler.reset()
        with modified_env(**caches):
            yield
