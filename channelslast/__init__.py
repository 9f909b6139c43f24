"Train fastai models in PyTorch's channels last memory format, on every device."

import sys
from importlib.metadata import PackageNotFoundError, version

from channelslast import callback, find, memory_format, precision, summary
from channelslast.callback import *
from channelslast.find import *
from channelslast.memory_format import *
from channelslast.precision import *
from channelslast.summary import *

__all__ = [*callback.__all__, *find.__all__, *summary.__all__, *precision.__all__, *memory_format.__all__]

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
    # Objects of `theirs` may be on Learners already. `pickle` finds a class by name: that under which we import it.
    theirs.__module__, theirs.__qualname__ = ours.__module__, f"Fastai{ours.__name__}"


_take_the_place_of(callback.FastaiChannelsLast, ChannelsLast)
_take_the_place_of(precision.FastaiMixedPrecision, MixedPrecision)
