"The events of a batch without the callbacks that have nothing to do at them."

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastai.callback.core import Callback, event
from fastai.learner import Learner
from fastcore.basics import GetAttr

from channelslast.fit import LeanCallback

__all__ = ["LeanEvents", "lean_events"]

# But for `after_fit`, after which fastai sets `run` of each callback again
_NAMES = frozenset(name for name in vars(event) if not name.startswith("_")) - {"after_fit"}


@contextmanager
def lean_events(
    learn: Learner,
) -> Iterator[None]:
    "Inside, `learn` makes its events with `LeanEvents`, unless it makes them in a way of its own."
    events = LeanEvents(learn) if _as_fastai_makes_them(learn) else None
    try:
        if events is not None:
            learn._call_one = events
        yield
    finally:
        if events is not None and vars(learn).get("_call_one") is events:
            del learn._call_one


def _as_fastai_makes_them(learn: Learner) -> bool:
    "Whether no subclass, and nobody else, has a way of its own to make events or to look for attributes."
    cls = type(learn)
    own = (cls.__call__, cls._call_one, cls.__getattr__, cls.__getattribute__)
    fastais = (Learner.__call__, Learner._call_one, GetAttr.__getattr__, object.__getattribute__)
    if own != fastais or "_call_one" in vars(learn) or not _is_fastais(Learner._call_one):
        return False
    # fastai takes what the Learner or the model has under that name for the method of a callback that has none
    return not any(hasattr(learn, name) for name in _NAMES)


def _is_fastais(method: Any) -> bool:
    "Whether nobody has patched `method`."
    return getattr(method, "__module__", "").startswith("fastai.")


class LeanEvents:
    """Stands in for `Learner._call_one` of one Learner: calls the callbacks that have a method for the event.

    fastai calls all of them, and each looks for its method in the Learner and in the model too: a third of what Python
    does in a step. What is called, and in which order, is asked anew at each event.
    """

    def __init__(self, learn: Learner):
        self.learn = learn
        self.silent: dict[type[Callback], frozenset[str]] = {}  # events for which a class has no method

    def __call__(
        self,
        event_name: str,
    ) -> None:
        "Call the callbacks for the event of that name."
        learn, silent = self.learn, self.silent
        if event_name not in _NAMES or event_name in vars(learn):
            type(learn)._call_one(learn, event_name)
            return
        for cb in sorted(learn.cbs, key=_order):
            cls = type(cb)
            if cls not in silent:
                silent[cls] = _silent(cls)
            if event_name not in silent[cls] or _has_own(cb, event_name, learn):
                cb(event_name)

    def __reduce__(self) -> tuple:
        "In a file, and in a copy of the Learner, fastai's own method takes its place."
        return getattr, (self.learn, "_call_one")


def _order(cb: Callback) -> Any:
    return getattr(cb, "order", 0)  # as fastai sorts them


def _has_own(cb: Callback, event_name: str, learn: Learner) -> bool:
    "Whether more than the class of `cb` says what it does at the event."
    attributes = vars(cb)
    # a callback that was removed during the event has no Learner any more
    return event_name in attributes or "_default" in attributes or attributes.get("learn") is not learn


def _silent(cls: type[Callback]) -> frozenset[str]:
    "The events at which a callback of `cls` does nothing, unless something is set on the callback itself."
    is_plain = (
        cls.__call__ in (Callback.__call__, LeanCallback.__call__)
        and _is_fastais(Callback.__call__)
        and cls.__getattr__ is GetAttr.__getattr__
        and cls.__getattribute__ is object.__getattribute__
        and cls._default == Callback._default
    )
    return frozenset(name for name in _NAMES if not hasattr(cls, name)) if is_plain else frozenset()
