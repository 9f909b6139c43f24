"`format_summary` of any PyTorch model."

from collections.abc import Callable
from typing import Any

import torch
from fastai.learner import Learner
from torch import Tensor, nn

from channelslast.nested import tensors_in
from channelslast.restore import unchanged_modules, unchanged_tensors
from channelslast.summary.observe import Observer, choose_profile, device_of
from channelslast.summary.result import FormatSummary

__all__ = ["format_summary"]


def format_summary(
    model: nn.Module,  # as it is to be trained, in either format
    *inputs: Any,  # what to call it with: tensors, and tuples, lists and dicts of them
    loss_func: Callable[[Any], Tensor] | None = None,  # of what the model returns; None: gradients of ones
    profile: bool | None = None,  # time the GPU's kernels too; None: on CUDA
) -> FormatSummary:
    """Run one training step of `model` on `inputs`, and tell what each operator does to the memory format.

    Model and inputs are taken as they are: `module_to_memory_format` and `to_memory_format` convert them. Call it
    inside `torch.autocast` to see mixed precision. Without `loss_func` each output gets a gradient of ones in the
    format of that output. Afterwards inputs, weights, buffers, gradients, mode and random states are as before.
    A compiled model runs as it was written: inside the compiler's code there are no operators to watch.

    Where the model calls `.view` on channels last activations the summary says so in `error`. Any other exception is
    the model's own. Raises `TypeError` without inputs, and `ValueError` for a model with lazy parameters or on the
    device 'meta'.
    """
    if isinstance(model, Learner):
        raise TypeError("model is a Learner: call `learn.format_summary()`, or pass `learn.model` and its inputs")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r} is a {type(model).__name__}: pass a Module")
    if not inputs:
        raise TypeError("format_summary(model) without inputs: pass what to call the model with, as a batch of images")
    tensors = tensors_in(inputs)
    observer = Observer(choose_profile(profile, device_of(model, tensors)))
    modules = [model, loss_func] if isinstance(loss_func, nn.Module) else [model]
    with (
        unchanged_modules(*modules),
        unchanged_tensors(tensors),
        torch.inference_mode(False),
        torch.compiler.set_stance("force_eager"),
        observer.during_step,
    ):
        try:
            for _ in range(observer.n_steps):
                observer.begin(model, inputs)
                _backward(observer, model(*inputs), loss_func)
                observer.end()
        except RuntimeError as error:
            if not observer.stopped_by(error):
                raise
    return observer.summary()


def _backward(observer: Observer, output: Any, loss_func: Callable[[Any], Tensor] | None) -> None:
    if loss_func is not None:
        loss = loss_func(output)
        observer.claim_loss(loss)
        loss.backward()
        return
    outputs = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
    torch.autograd.backward(outputs, [torch.ones_like(tensor) for tensor in outputs])
