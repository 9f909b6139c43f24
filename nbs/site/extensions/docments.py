"Puts the comments beside parameters (fastcore's docments) into the reference, as its parameters."

import inspect
import re
from typing import Any

from fastcore.docments import docments
from sphinx.application import Sphinx

import channelslast  # noqa: F401, the methods of Learner

_CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)")  # Markdown's, which reStructuredText takes for something else


def add_parameters(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    "Turn the docstring's code into reStructuredText, and end it with a line for each parameter."
    lines[:] = [_CODE.sub(r"``\1``", line).replace("**kwargs", r"\*\*kwargs") for line in lines]
    if what not in ("function", "method", "class") or not callable(obj):
        return
    lines += ["", *parameter_lines(obj), ""]


def parameter_lines(obj: Any) -> list[str]:
    "Return the fields of the documented parameters of `obj`, each with its type."
    try:
        documented = docments(obj, full=True, returns=False)
    except (TypeError, ValueError, OSError):  # no Python source
        return []
    lines = []
    for name, facts in documented.items():
        if not isinstance(facts, dict) or not facts.get("docment"):
            continue
        text = _CODE.sub(r"``\1``", " ".join(str(facts["docment"]).split()))
        lines.append(f":param {name}: {text}")
        if facts.get("anno") not in (None, inspect.Parameter.empty):
            lines.append(f":type {name}: {type_in_words(facts['anno'])}")
    return lines


def type_in_words(annotation: Any) -> str:
    words = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    words = re.sub(r"\b(?:\w+\.)+(?=\w)", "", words)  # without modules
    return f"``{words}``"


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", add_parameters)
    return {"parallel_read_safe": True}
