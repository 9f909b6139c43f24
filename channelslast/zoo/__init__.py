"Architectures of fastai, torchvision and timm, and data to train them on: for commands, scripts and benchmarks."

from channelslast.zoo.architectures import (
    DEFAULT_SIZE,
    arch_names,
    check_arch,
    default_size,
    new_model,
    similar_names,
)
from channelslast.zoo.data import (
    Batches,
    digits_folder,
    image_dls,
    image_folder,
    synthetic_dls,
    synthetic_inputs,
    synthetic_loss,
)
from channelslast.zoo.learners import OPTIMIZERS, fastais_own, fused_adamw, new_learner, to_fastai_channelslast
from channelslast.zoo.options import (
    IllegalValue,
    add_format_options,
    check_positive,
    choose_amp_mode,
    compile_caches,
    find_device,
)

__all__ = [
    "IllegalValue",
    "arch_names",
    "similar_names",
    "check_arch",
    "new_model",
    "DEFAULT_SIZE",
    "default_size",
    "synthetic_inputs",
    "synthetic_dls",
    "synthetic_loss",
    "digits_folder",
    "image_folder",
    "image_dls",
    "Batches",
    "new_learner",
    "OPTIMIZERS",
    "fused_adamw",
    "to_fastai_channelslast",
    "fastais_own",
    "add_format_options",
    "find_device",
    "choose_amp_mode",
    "check_positive",
    "compile_caches",
]
