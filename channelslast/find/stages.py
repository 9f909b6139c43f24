"The stages of a search: which formats each tries, by what those before it have found."

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from fastai.learner import Learner

from channelslast.devices import accelerated_dtypes, amp_mode_of, training_device
from channelslast.find.candidates import Candidate
from channelslast.formats import TrainFormat
from channelslast.memory_format import conv_ndims, module_ndims, supports_channels_last
from channelslast.optimizer import fused_form

HOPELESS = 1.5  # times the best step: such a format is not timed further
PAYS = 0.9  # of the step without compiling: another precision is compiled too
MOST_COMPILE_S = 30.0  # seconds that one may have taken for that


class Stage(NamedTuple):
    "Formats that are tried together."

    name: str
    propose: Callable[[list[Candidate]], list[TrainFormat]]  # takes what was tried before
    is_first: bool = False  # its formats are new to the device, which may look for algorithms
    compiles: bool = False
    share: float = 0.0  # of the budget, kept for it by those before it


def fixed_stage(
    name: str,
    formats: list[TrainFormat],
) -> Stage:
    "Return a first stage, of formats that are known beforehand."
    return Stage(name, lambda seen: formats, True, any(fmt.compile is not None for fmt in formats))


def new_stages(
    learn: Learner,
    formats: Iterable[TrainFormat] | None = None,  # None: whatever may pay; else these, and that of the Learner
    compile: bool = False,
    keep_precision: bool = False,
) -> list[Stage]:
    """Return the stages of `Learner.format_find`.

    Eager formats, then with fused steps the better ones of these, then with a CUDA graph; last the best one compiled,
    and that with a CUDA graph.
    """
    device, start = training_device(learn), learn.train_format
    if formats is not None:
        named = list(formats)
        named = named if start in named else [start, *named]
        stages = [fixed_stage("formats", named)]
    else:
        stages = [fixed_stage("eager", eager_formats(learn, keep_precision))]
        if fused_form(learn, device):
            stages.append(Stage("fused steps", fused, share=0.1))
        if device.type == "cuda":
            stages.append(Stage("CUDA graph", graphs, share=0.1))
    if compile or (formats is None and start.compile is not None):
        stages.append(Stage("compile", compiled, compiles=True))
        if device.type == "cuda":
            stages.append(Stage("compile and CUDA graph", compiled_graph, compiles=True))
        if not keep_precision and formats is None:
            others = partial(other_precision, amp_modes=accelerated_modes(learn))
            stages.append(Stage("compile", others, compiles=True))
    return stages


def accelerated_modes(learn: Learner) -> list[str | None]:
    return [amp_mode_of(dtype) for dtype in accelerated_dtypes(training_device(learn))]


def eager_formats(
    learn: Learner,
    keep_precision: bool,
) -> list[TrainFormat]:
    "Return the eager formats, the most promising first, and that of the Learner, with which all are compared."
    start = learn.train_format
    has_images = bool(module_ndims(learn.model) or conv_ndims(learn.model))
    can_last = has_images and supports_channels_last(training_device(learn))
    fast = [start.amp_mode] if keep_precision else accelerated_modes(learn)
    eager = replace(start, compile=None, cuda_graph=False)
    last = [replace(eager, channels_last=True, amp_mode=mode) for mode in fast if can_last]
    rest = [replace(eager, channels_last=False, amp_mode=mode) for mode in fast]
    if not keep_precision:
        both = (True, False) if can_last else (False,)
        rest += [replace(eager, channels_last=channels_last, amp_mode=None) for channels_last in both]
    return list(dict.fromkeys([*last, start, *rest]))


def able(
    seen: list[Candidate],
) -> list[Candidate]:
    "Return those that train, and may be chosen."
    return [candidate for candidate in seen if candidate.is_choice and candidate.step_s and not candidate.row.error]


def fastest(
    seen: list[Candidate],
) -> Candidate | None:
    return min(able(seen), key=lambda candidate: candidate.step_s, default=None)


def hopeful(
    candidates: list[Candidate],
) -> list[Candidate]:
    "Return those that take the GPU not much longer than the best; where that is not known, those that are fast."

    def seconds(candidate: Candidate) -> float:
        return candidate.busy_s or candidate.step_s

    candidates = sorted(candidates, key=seconds)
    return [candidate for candidate in candidates if seconds(candidate) <= HOPELESS * seconds(candidates[0])]


def fused(
    seen: list[Candidate],
) -> list[TrainFormat]:
    """Return two formats with fused steps.

    The fastest; and the one that keeps the GPU least busy, for Python hides that, or where this is the same, or not
    known, the next one: a fit that others on the machine held up may be the fastest.
    """
    best = _base(seen)
    bases = dict.fromkeys(each.row.format for each in [best, *hopeful(_eager(seen))] if each is not None)
    return [replace(fmt, fused_optimizer=True) for fmt in bases][:2]


def graphs(
    seen: list[Candidate],
) -> list[TrainFormat]:
    """Return the two formats that keep the GPU least busy with a CUDA graph.

    And with fused steps, where these train, or there was no time to try any.
    """
    with_fused = [candidate for candidate in seen if candidate.row.format.fused_optimizer]
    reached = [candidate for candidate in with_fused if candidate.is_reached]
    is_fused = bool(able(reached) if reached else with_fused)
    bases = {}
    for candidate in hopeful(_eager(seen)):
        bases[replace(candidate.row.format, fused_optimizer=is_fused, cuda_graph=True)] = None
    return list(bases)[:2]


def compiled(
    seen: list[Candidate],
) -> list[TrainFormat]:
    "Return the fastest format, compiled."
    best = _base(seen)
    return [replace(best.row.format, compile="default", cuda_graph=False)] if best else []


def compiled_graph(
    seen: list[Candidate],
) -> list[TrainFormat]:
    "Return what was compiled, with a CUDA graph."
    modes = [candidate.row.format for candidate in able(seen) if candidate.row.format.compile == "default"]
    return [replace(fmt, cuda_graph=True) for fmt in modes]


def other_precision(
    seen: list[Candidate],
    amp_modes: list[str | None],  # that the device accelerates
) -> list[TrainFormat]:
    "Return the best compiled format in the other precisions, if compiling pays and did not take long."
    ready = able(seen)
    best = fastest([candidate for candidate in ready if candidate.is_compiled])
    without = fastest([candidate for candidate in ready if not candidate.is_compiled])
    if best is None or without is None or best.step_s > PAYS * without.step_s:
        return []
    if max(candidate.first_steps_s for candidate in ready if candidate.is_compiled) > MOST_COMPILE_S:
        return []
    return [replace(best.row.format, amp_mode=mode) for mode in amp_modes]


def _base(seen: list[Candidate]) -> Candidate | None:
    "The fastest, of those that are not compiled if there are any."
    return fastest([candidate for candidate in seen if not candidate.is_compiled]) or fastest(seen)


def _eager(seen: list[Candidate]) -> list[Candidate]:
    return [candidate for candidate in able(seen) if candidate.is_eager]
