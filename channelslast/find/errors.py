"What a Learner raises while it is timed: in one line, and without the tensors in its traceback."

import textwrap
import traceback


def shorten(
    text: str,
    width: int = 100,  # characters
) -> str:
    "`text` on one line, its end left out where it is too long."
    return textwrap.shorten(text, width, placeholder=" ...")


def in_one_line(
    error: BaseException,
) -> str:
    return shorten(f"{type(error).__name__}: {error}", 300)


def drop_tensors(
    error: BaseException,
) -> None:
    "Empty the frames in the tracebacks of `error` and of those it came from, which hold tensors. The lines stay."
    todo, seen = [error], set()
    while todo:
        error = todo.pop()
        if error is not None and id(error) not in seen:
            seen.add(id(error))
            traceback.clear_frames(error.__traceback__)
            todo += [error.__cause__, error.__context__]
