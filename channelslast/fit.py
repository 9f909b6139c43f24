"What the callbacks share: which events they are called for, warnings, what ends a fit and what is left of a batch."

from typing import Any
from warnings import warn

from fastai.callback.core import Callback, CancelEpochException, CancelTrainException, CancelValidException
from fastai.learner import Learner

__all__ = ["FIT_GOES_ON", "FitDone", "LeanCallback", "drop_gradients", "without_batches"]

# What may leave a loop over batches while the fit goes on
FIT_GOES_ON = (CancelTrainException, CancelValidException, CancelEpochException)


class LeanCallback(Callback):
    """A callback that costs nothing at the events it has no method for.

    fastai asks every callback at each of the eight events of a step, and looks the method up in the Learner and the
    model too where the callback has none.
    """

    warned = frozenset()  # not made by `__init__`: a callback that fastai alone has pickled comes back as one of ours

    @property
    def training(self) -> bool:
        "Whether the Learner trains. fastai asks for it at each event, and would look for it in the callback first."
        return self.learn.training

    def __call__(
        self,
        event_name: str,
    ) -> Any:
        "Call the method of that name, if there is one."
        if hasattr(type(self), event_name) or event_name == "after_fit":  # after which fastai sets `run` again
            return super().__call__(event_name)

    def __setattr__(self, name: str, value: Any):
        "As fastai does, which looks in the Learner and the model for the name first; not for one that it has already."
        if name in vars(self) or hasattr(type(self), name):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def warn_once(
        self,
        message: str,
    ) -> None:
        "Warn, unless this callback has said so before."
        if message not in self.warned:
            self.warned |= {message}
            warn(message)


class FitDone(BaseException):
    """Ends a fit that only measures, without the events that follow a fit.

    No `Exception`, for fastai replaces one that a callback raises.
    """


def without_batches(
    dl: Any,  # fastai's DataLoader, or any other
) -> ValueError:
    "Return the error of a training DataLoader that yields no batch."
    n_items, bs = (getattr(dl, name, None) for name in ("n", "bs"))
    size = f" ({n_items} items, bs={bs})" if n_items and bs else ""
    return ValueError(f"learn.dls.train is empty{size}: pass a Learner with at least one batch to train on")


def drop_gradients(
    learn: Learner,
    error: BaseException,  # which has ended the loop over batches
) -> None:
    "Zero the gradients of a batch without a step, if `error` ends the fit: the next fit would add to them."
    if learn.training and learn.opt is not None and not isinstance(error, FIT_GOES_ON):
        learn.opt.zero_grad()
