"Train fastai models in PyTorch's channels last memory format, on every device."

import sys
from importlib.metadata import PackageNotFoundError, version

from channelslast import callback, devices, find, formats, graphs, memory_format, optimizer, precision, summary, swaps
from channelslast import learner as _learner  # noqa: F401, the methods of Learner
from channelslast import subclasses as _subclasses  # noqa: F401, what lets PyTorch compile them
from channelslast import unet as _unet  # noqa: F401, its form
from channelslast.callback import *
from channelslast.devices import *
from channelslast.find import *
from channelslast.formats import *
from channelslast.graphs import *
from channelslast.memory_format import *
from channelslast.optimizer import *
from channelslast.precision import *
from channelslast.summary import *
from channelslast.swaps import *

_ROOMS = (callback, formats, find, summary, precision, devices, graphs, optimizer, memory_format, swaps)
__all__ = [name for room in _ROOMS for name in room.__all__]

try:
    __version__ = version("channelslast")
except PackageNotFoundError:  # imported from a checkout that was never installed
    __version__ = "0+unknown"


def _take_the_place_of(theirs: type, ours: type) -> None:
    """Put `ours` behind the name of fastai's class `theirs`, in fastai's modules and wherever it was imported.

    Whoever imports that name later gets `ours` too, so the order of imports does not matter.
    """
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", {})
        if names.get(theirs.__name__) is theirs:
            names[theirs.__name__] = ours
    # Objects of `theirs` may be on Learners already. `pickle` looks their class up by module and name: from now on
    # the name under which our module imports it, as `channelslast.callback.FastaiChannelsLast`.
    theirs.__module__, theirs.__qualname__ = ours.__module__, f"Fastai{ours.__name__}"


_take_the_place_of(callback.FastaiChannelsLast, ChannelsLast)
_take_the_place_of(precision.FastaiMixedPrecision, MixedPrecision)
