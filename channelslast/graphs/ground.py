"What captured CUDA graphs rest on: they may be replayed for as long as none of it changes. PyTorch only."

from operator import attrgetter, is_, itemgetter

from torch import Tensor, nn

__all__ = ["HOOKS", "MEMBERS", "Ground", "name_of"]

# Names of nn.Module's own dictionaries. One that a future PyTorch renames is not looked at; a test of each notices.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
MEMBERS = ("_parameters", "_buffers", "_modules")
_SCALARS = (bool, int, float, str, type(None))


class Ground:
    """A module's tensors with their memory and `requires_grad`, its submodules and hooks, and what its attributes say.

    Attributes of plain types, that is, as the mode (`training`) or a dropout's `p`. `holds` is asked before every
    step: it compares long lists by functions that are written in C.
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
        self.memory = self._memory()
        self.hook_dicts = [attributes[kind] for attributes in modules for kind in HOOKS if kind in attributes]
        self.hooks = self._hooks()
        self.plain = []
        for attributes in modules:
            names = [name for name, value in attributes.items() if isinstance(value, _SCALARS)]
            get = itemgetter(*names)
            self.plain.append((attributes, names, get, get(attributes)))

    def _memory(self) -> tuple[list[int], list[bool]]:
        return list(map(Tensor.data_ptr, self.tensors)), list(map(attrgetter("requires_grad"), self.tensors))

    def _hooks(self) -> list[tuple[int, ...]]:
        return list(map(tuple, filter(None, self.hook_dicts)))

    def holds(self) -> bool:
        "Whether all is as it was."
        try:
            return (
                self._hooks() == self.hooks
                and all(map(is_, map(dict.get, self.owners, self.keys), self.members))
                and list(map(len, self.dicts)) == self.sizes
                and self._memory() == self.memory
                and all(get(attributes) == values for attributes, _, get, values in self.plain)
            )
        except KeyError:  # an attribute is gone
            return False

    def change(self) -> str | None:
        "What is not as it was, in words; None where all is."
        if self.holds():
            return None
        for attributes, names, _, values in self.plain:
            for name, value in zip(names, values if len(names) > 1 else [values], strict=True):
                if name not in attributes or attributes[name] != value:
                    return f"`{name}` of {name_of(self.names[id(attributes)])}"
        return "its parameters, buffers or modules"


def name_of(
    name: str,  # dotted, '' for the model itself
) -> str:
    "A module in words."
    return f"`{name}`" if name else "the model"
