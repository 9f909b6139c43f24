"In which module of a model an error was raised. PyTorch only."

from torch import nn

__all__ = ["raised_in"]


def raised_in(
    error: BaseException,
    model: nn.Module,
) -> str | None:
    "Return the dotted name of the innermost module of `model` whose code `error` came through; None if of none."
    names = {id(module): name for name, module in model.named_modules()}
    found, traceback = None, error.__traceback__
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        found = names.get(id(owner), found)
        traceback = traceback.tb_next
    return found
