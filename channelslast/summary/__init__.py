"Show where a model loses channels last, forward and backward, and what it costs."

from channelslast.summary import learner  # noqa: F401, the method of Learner
from channelslast.summary.gpu import GpuShares
from channelslast.summary.records import FormatEvent, LayerFormat
from channelslast.summary.result import FormatSummary
from channelslast.summary.run import format_summary
from channelslast.summary.tracer import FormatTracer

__all__ = ["FormatSummary", "GpuShares", "format_summary", "FormatEvent", "LayerFormat", "FormatTracer"]
