"What captured CUDA graphs rest on: they may be replayed for as long as none of it changes. PyTorch only."

from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["HOOKS", "MEMBERS", "Ground", "has_sync_norm", "module_in_words", "set_since"]

# Names of nn.Module's own dictionaries. One that a future PyTorch renames is not looked at: a test of each would fail.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
MEMBERS = ("_parameters", "_buffers", "_modules")
_SCALARS = (bool, int, float, str, type(None))
_MISSING = object()


class Ground:
    """A module's tensors with memory, strides and `requires_grad`, its submodules, its hooks and its plain attributes.

    Plain are numbers, texts, bools and None, as the mode (`training`) or a dropout's `p`. `holds` is asked before
    every step: it compares long lists by functions that are written in C.
    """

    def __init__(
        self,
        module: nn.Module,
    ):
        self.names = {id(vars(submodule)): name for name, submodule in module.named_modules()}
        modules = list(map(vars, module.modules()))
        members = [attributes[kind] for attributes in modules for kind in MEMBERS if kind in attributes]
        self.owners = [owner for owner in members for _ in owner]
        self.keys = [key for owner in members for key in owner]
        self.members = [member for owner in members for member in owner.values()]
        self.sizes = list(map(len, members))
        self.dicts = members
        self.tensors = [member for member in self.members if isinstance(member, Tensor)]
        self.images = [each for each in self.tensors if each.ndim > 3 and each.layout is torch.strided]
        self.memory = self._memory()
        self.hook_dicts = [attributes[kind] for attributes in modules for kind in HOOKS if kind in attributes]
        self.hooks = self._hooks()
        self.plain = []
        for attributes in modules:
            names = [name for name, value in attributes.items() if isinstance(value, _SCALARS)]
            get = itemgetter(*names)  # of a single name it gets the value, and no tuple
            self.plain.append((attributes, names, get, get(attributes)))

    def _memory(self) -> tuple[list[int], list[tuple[int, ...]], list[bool]]:
        addresses, strides = list(map(Tensor.data_ptr, self.tensors)), list(map(Tensor.stride, self.images))
        return addresses, strides, list(map(attrgetter("requires_grad"), self.tensors))

    def _hooks(self) -> list[tuple[int, ...]]:
        return list(map(tuple, filter(None, self.hook_dicts)))

    def holds(self) -> bool:
        "Whether all of it is as it was."
        try:
            return (
                self._hooks() == self.hooks
                and all(map(is_, map(dict.get, self.owners, self.keys), self.members))
                and list(map(len, self.dicts)) == self.sizes
                and self._memory() == self.memory
                and all(get(attributes) == values for attributes, _, get, values in self.plain)
            )
        except (KeyError, ValueError, RuntimeError):  # an attribute is gone, or an array or tensor now
            return False

    def change(self) -> str | None:
        "Return what is not as it was, in words; None if all of it is."
        if self.holds():
            return None
        for attributes, names, _, values in self.plain:
            for name, value in zip(names, values if len(names) > 1 else [values], strict=True):
                now = attributes.get(name, _MISSING)
                if not isinstance(now, _SCALARS) or now != value:
                    return f"`{name}` of {module_in_words(self.names[id(attributes)])}"
        return "its parameters, buffers or modules"


def set_since(
    before: list[tuple[str, dict[str, Any], dict[str, Any]]],  # name, attributes and a copy of them, of each module
) -> str | None:
    "Return an attribute that a forward pass has set, as a hidden state, in words; None if it has set none."
    for name, now, saved in before:
        # Hooks of PyTorch's, as `weight_norm`, set the weight that they name in each forward pass, and are captured
        computed = {getattr(hook, "name", None) for hook in now.get("_forward_pre_hooks", {}).values()}
        for key, value in now.items():
            if key not in computed and saved.get(key, _MISSING) is not value and not isinstance(value, _SCALARS):
                return f"`{key}` of {module_in_words(name)}"
        if added := now.keys() - saved.keys() - computed:
            return f"`{min(added)}` of {module_in_words(name)}"
    return None


def has_sync_norm(
    module: nn.Module,
) -> bool:
    "Whether processes exchange statistics within `module`: so they have to capture together."
    return any(isinstance(submodule, nn.SyncBatchNorm) for submodule in module.modules())


def module_in_words(
    name: str,  # dotted, '' for the model itself
) -> str:
    "Return what a message calls a module."
    return f"`{name}`" if name else "the model"
