"`Learner.format_find`: measure a Learner's own training step in each format, and choose the fastest."

from channelslast.find import run  # noqa: F401, the method of Learner
from channelslast.find.result import FormatTimings
from channelslast.find.timing import FormatTiming

__all__ = ["FormatTiming", "FormatTimings"]
