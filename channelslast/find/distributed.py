"The processes of distributed training: let them decide alike, and end together where one of them fails alone."

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from fastai.learner import Learner

from channelslast.find.errors import in_one_line

PATIENCE = 50.0  # seconds until a process that does not answer counts as lost
_SILENT = "another does not answer, it waits for this one or has ended"


class EndedElsewhere(BaseException):
    "Ends a fit that has ended in another process. (fastai rewrites an `Exception` that passes a callback.)"


@dataclass
class _Message:
    "What one process tells all others."

    value: Any = None
    failure: str | None = None  # why its fit ended
    place: Any = None  # how far it got in its fit


class Processes:
    """The processes that train a model together; without `group`, this one alone.

    A process that fails alone leaves the others waiting for its gradients, for ever. So what they agree on goes over
    connections of its own, `group`, where one that does not answer for `PATIENCE` seconds counts as lost.
    """

    def __init__(
        self,
        group: "dist.ProcessGroup | None" = None,  # in quotes: some builds of PyTorch have none
    ):
        self.group = group

    def decide_together(
        self,
        choose: Callable[[list[Any]], Any],  # makes one value of those of all processes
        value: Any,
        place: Any = None,  # see `report_failure`
    ) -> Any:
        "Wait for the other processes, and return what `choose` makes of the values of all, the same in each."
        if self.group is None:
            return choose([value])
        try:
            messages = _exchange(_Message(value, place=place), self.group)
        except RuntimeError as silence:
            raise self._error(None, _SILENT) from silence
        if any(message.failure for message in messages):
            raise EndedElsewhere(messages)
        return choose([message.value for message in messages])

    def report_failure(
        self,
        failure: BaseException | str | None,  # of this process; `EndedElsewhere` if it has heard of another's
        place: Any = None,  # how far it got in its fit; beyond that of another it waits for gradients that never come
        is_patient: bool = False,  # wait for as long as training would
    ) -> str | None:
        """Wait for the other processes, and return why the first that failed did; None if none has.

        Each calls it at the end of what may fail in one of them alone. Where they cannot go on together each raises:
        its own failure, with a note, or a `RuntimeError`.
        """
        if self.group is None:
            return _words(failure)
        if isinstance(failure, EndedElsewhere):
            (messages,) = failure.args
        else:
            message = _Message(None, _words(failure), place)
            try:
                messages = _exchange(message, None if is_patient else self.group)
            except RuntimeError:
                messages = []
        if not messages:
            raise self._error(failure, _SILENT)
        failed = [rank for rank, message in enumerate(messages) if message.failure]
        if not failed:
            return None
        words = messages[failed[0]].failure
        if len(failed) < len(messages):
            words += f" (in process {failed[0]} of {len(messages)})"
        if any(message.place != place for message in messages):
            raise self._error(failure, f"not all failed at the same place; {words}")
        return words

    def _error(self, failure: Any, why: str) -> Exception:
        words = f"process {self.group.rank()} of {self.group.size()} cannot go on: {why}"
        if isinstance(failure, Exception):
            failure.add_note(f"channelslast: {words}")
            return failure
        return RuntimeError(f"{failure}; {words}" if isinstance(failure, str) else words)


def _exchange(message: _Message, group: "dist.ProcessGroup | None") -> list[_Message]:
    messages = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message, group)
    return messages


def _words(failure: BaseException | str | None) -> str | None:
    return in_one_line(failure) if isinstance(failure, BaseException) else failure


@contextmanager
def training_processes(
    learn: Learner,
) -> Iterator[Processes]:
    "The processes that train `learn` together."
    # by its name: without Accelerate, fastai's module of it cannot be imported
    if not any(cb.name == "distributed_trainer" for cb in learn.cbs):
        yield Processes()
        return
    _exchange(_Message(), None)  # one may have come here long before another
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=PATIENCE))
    try:
        yield Processes(group)
    finally:
        # Gloo's thread takes Python's lock to let go of what it sent last; PyTorch 2.6 waits for that thread with the
        # lock held, for ever, where the group goes before that
        time.sleep(0.1)
        dist.destroy_process_group(group)
