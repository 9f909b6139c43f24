"How results look in a notebook: a table of HTML and a picture, in the cell that asked."

import base64
import io
import multiprocessing
from collections.abc import Callable
from typing import Any

from fastcore.imports import in_notebook
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["image_html", "show", "cell"]


def image_html(
    draw: Callable[[Axes], Any],  # draws on the axes that it is given
    size: tuple[float, float],  # inches
) -> str:
    "Return a picture as HTML, without a figure of pyplot, which a notebook would show a second time."
    figure = Figure(size, layout="constrained")
    draw(figure.subplots())
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=100)
    return f'<img src="data:image/png;base64,{base64.b64encode(image.getvalue()).decode()}">'


def show(
    html: str,
) -> int:
    "Show `html` in the notebook's cell that runs now, and return the number of that cell."
    from IPython.display import HTML, display

    display(HTML(html))
    return cell()


def cell() -> int | None:
    """Return the number of the notebook's cell that runs now.

    None outside of one, as in IPython's terminal, and in a process that a notebook has started, which cannot show.
    """
    if not in_notebook() or multiprocessing.parent_process() is not None:
        return None
    from IPython import get_ipython

    shell = get_ipython()
    return shell.execution_count if getattr(shell, "kernel", None) is not None else None
