"`channelslast summary`."

import sys
from argparse import Namespace
from typing import Any

import torch
from torch import Tensor, nn

from channelslast.cli.files import check_files, save_plots
from channelslast.cli.loop import Rejected, check_archs, for_each_arch
from channelslast.cli.record import summary_record
from channelslast.devices import autocast_dtype
from channelslast.memory_format import module_to_memory_format, supports_channels_last, to_memory_format
from channelslast.summary import FormatSummary, format_summary
from channelslast.zoo import (
    DEFAULT_SIZE,
    IllegalValue,
    check_positive,
    choose_amp_mode,
    default_size,
    find_device,
    image_dls,
    image_folder,
    new_model,
    synthetic_inputs,
)


def run(
    options: Namespace,
) -> None:
    check_positive(bs=options.bs, size=options.size)
    device = find_device(options.device)
    if not supports_channels_last(device):
        raise IllegalValue("device", device, "channels last is not reliable there, and is not used")
    dtype = choose_dtype(options.amp_mode, device)
    check_files(json=options.json, plot=options.plot)
    check_archs(options)
    found: dict[str, FormatSummary] = {}

    def run_one(arch: str) -> dict[str, Any]:
        model, inputs, size = model_with_inputs(arch, options, device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            try:
                found[arch] = format_summary(model, *inputs)
            except Exception as error:
                words = str(error).partition("\n")[0] or type(error).__name__
                raise Rejected(f"rejects {options.bs} images of {size} px: {words}") from error
        print(found[arch])
        return {"bs": options.bs, "size": size, **summary_record(found[arch])}

    n_failed = for_each_arch(options, run_one, device, is_flat=True)
    if options.plot is not None and found:
        plots = {f"{arch} on {result.device}": result for arch, result in found.items()}
        save_plots(options.plot, plots, heights=[3.0] * len(found), width=12)
    if n_failed:
        raise SystemExit(2)


def choose_dtype(
    amp_mode: str,  # auto, fp16, bf16 or fp32
    device: torch.device,
) -> torch.dtype | None:
    "Return the dtype in which `device` is to autocast, None for float32; print why if it is not the one asked for."
    mode = choose_amp_mode(amp_mode, device)
    if mode is None:
        return None
    try:
        dtype, why = autocast_dtype(mode, device)
    except ValueError as error:
        raise IllegalValue("amp_mode", amp_mode, str(error).partition(": ")[2]) from None
    if why:
        print(f"channelslast: {why}", file=sys.stderr)
    return dtype


def model_with_inputs(
    arch: str,
    options: Namespace,
    device: torch.device,
) -> tuple[nn.Module, tuple, int]:
    "Return a model and images for it, random or of a folder, all in channels last, and the images' size in pixels."
    size = options.size
    if options.path is None:
        model = new_model(arch, size=size or DEFAULT_SIZE)
        size = size or default_size(arch, model)
        inputs = synthetic_inputs(arch, model, options.bs, size, device)
    else:
        size = size or DEFAULT_SIZE
        dls = image_dls(image_folder(options.path), size, options.bs, device)
        model = new_model(arch, dls.c, kind="classification")
        inputs = (dls.one_batch()[0].as_subclass(Tensor),)
    return module_to_memory_format(model.to(device).train()), to_memory_format(inputs), size
