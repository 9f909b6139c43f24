"What a Learner raises while it is timed: in one line, and without the tensors in its traceback."

import re
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
    text = f"{type(error).__name__}: {error}"
    hints = [hint for note in getattr(error, "__notes__", ()) if (hint := view_hint(note))]
    return shorten(text, 300) if not hints else f"{shorten(text, 200)} channelslast: {hints[0]}"


def view_hint(
    text: str | None,  # an error or its note
) -> str | None:
    "Return what the callback has noted of a `.view` in the model, in short; None where it has not."
    found = re.search(r"channelslast: (.* calls `\.view`)", text or "")
    return f"{found[1]}, write `.reshape` there" if found else None


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
