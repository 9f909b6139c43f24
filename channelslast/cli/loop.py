"One architecture after the other, also after one that fails."

import gc
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch

from channelslast.cli.files import write_json
from channelslast.find.errors import in_one_line
from channelslast.zoo import IllegalValue, check_arch, image_folder


class Rejected(Exception):
    "A model fails on its images. The message goes on from the name of the architecture."


def check_archs(
    options: Namespace,
) -> None:
    "Raise `IllegalValue` for an architecture that does not exist, and for a folder without images."
    for arch in options.arch:
        check_arch(arch, kind="classification" if options.path else None)
    if options.path is not None:
        image_folder(options.path)


def for_each_arch(
    options: Namespace,
    run_one: Callable[[str], dict[str, Any]],  # prints the result of an architecture, and returns its record
    device: torch.device,
    is_flat: bool = False,  # the record of a single architecture is the whole file
) -> int:
    "Run each architecture, report a failed one in a line, write all to the file `--json`; return how many failed."
    records, n_failed = [], 0
    for arch in options.arch:
        if len(options.arch) > 1:
            print(f"{arch}:")
        try:
            record = run_one(arch)
        except IllegalValue:
            raise
        except Exception as error:
            n_failed += 1
            record = {"error": in_one_line(error)}
            if options.verbose:
                traceback.print_exc()
            words = f" {error}" if isinstance(error, Rejected) else f": {in_one_line(error)}"
            print(f"channelslast: error: {arch}{words}", file=sys.stderr)
        give_back_memory()  # before the next is built
        records.append({"arch": arch, **record})
        if options.json is not None:  # after each, for what an interrupt would lose
            is_alone = is_flat and len(options.arch) == 1
            write_json(options.json, records[0] if is_alone else {"results": records}, device)
    return n_failed


def give_back_memory() -> None:
    "Free what nothing refers to, Learners and their callbacks that refer to each other included."
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
