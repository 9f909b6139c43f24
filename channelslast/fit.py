"What the callbacks share: which events they are asked for, what ends a fit, and what is left of a batch then."

from typing import Any

from fastai.callback.core import Callback, CancelEpochException, CancelTrainException, CancelValidException
from fastai.learner import Learner

__all__ = ["FIT_GOES_ON", "FitDone", "LeanCallback", "drop_gradients"]

# What may leave a loop over batches while the fit goes on
FIT_GOES_ON = (CancelTrainException, CancelValidException, CancelEpochException)


class LeanCallback(Callback):
    """A callback that costs nothing at the events it has no method for.

    fastai asks every callback at each of the eight events of a step, and looks the method up in the Learner and the
    model too where the callback has none.
    """

    def __call__(
        self,
        event_name: str,
    ) -> Any:
        "Call the method of that name, if there is one."
        if hasattr(type(self), event_name) or event_name == "after_fit":  # after which fastai sets `run` again
            return super().__call__(event_name)


class FitDone(BaseException):
    "Ends a fit without the events that follow one, for none was made. (fastai rewrites an `Exception` of a callback.)"


def drop_gradients(
    learn: Learner,
    error: BaseException,  # that has left the loop over batches
) -> None:
    "Zero the gradients of a batch that was never stepped, if `error` ends the fit: the next one would add to them."
    if learn.training and learn.opt is not None and not isinstance(error, FIT_GOES_ON):
        learn.opt.zero_grad()
