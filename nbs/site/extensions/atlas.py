"The directive `atlas`: the CSVs of benchmarks/atlas.py as tables, which static/tables.js sorts and filters."

import csv
from html import escape
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

COLUMNS = {
    "model": "architecture",
    "task": "task",
    "batch_size": "images",
    "img_size": "pixels",
    "times_fastais_own": "times fastai's own",
    "pick": "pick",
    "ms": "ms",
    "iqr": "IQR",
    "items_per_s": "items/s",
    "fastais_own_ms": "fastai's own ms",
    "fastais_own_iqr": "fastai's own IQR",
    "contiguous_fp32_ms": "plain Learner ms",
    "search_s": "search s",
    "peak_gb": "peak GB",
    "reserved_gb": "held GB",
    "gpu_busy": "GPU busy",
    "layout_share": "layout kernels",
    "error": "note",
}


def table(file: Path) -> str:
    """Return a CSV as a table of HTML: the last row of each architecture, the largest gain first.

    Columns that have no value are left out.
    """
    with file.open(newline="") as stream:
        rows = {row["model"]: row for row in csv.DictReader(stream)}.values()
    rows = sorted(rows, key=lambda row: float(row["times_fastais_own"] or 0), reverse=True)
    columns = {name: title for name, title in COLUMNS.items() if any(row[name] for row in rows)}
    head = "".join(f"<th>{escape(title)}</th>" for title in columns.values())
    body = "".join("<tr>" + "".join(f"<td>{escape(row[name])}</td>" for name in columns) + "</tr>" for row in rows)
    return f'<table class="atlas"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def heading(file: Path) -> str:
    with file.open(newline="") as stream:
        last = list(csv.DictReader(stream))[-1]
    cuda = f", CUDA {last['cuda']}, cuDNN {last['cudnn']}" if last["cuda"] else ""
    optimizer = "PyTorch's fused AdamW" if "-fused_adamw" in file.stem else "fastai's Adam"
    compiled = ", compiled too" if "-compile" in file.stem else ""
    setting = f"{optimizer}{compiled}; PyTorch {last['torch']}{cuda}, fastai {last['fastai']}, {last['date']}"
    return f"{last['device']}, {setting}"


class Atlas(SphinxDirective):
    "All CSVs in the folder that is named, relative to the source folder."

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        found = []
        files = (Path(self.env.srcdir) / self.arguments[0]).glob("*.csv")
        for file in sorted(files, key=lambda file: ("-cpu" in file.stem, file.stem)):  # GPUs first
            self.env.note_dependency(str(file))
            found.append(nodes.paragraph("", "", nodes.strong("", heading(file)), nodes.Text(f" ({file.name})")))
            found.append(nodes.raw("", table(file), format="html"))
        return found or [nodes.paragraph("", "Nothing is recorded yet.")]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("atlas", Atlas)
    return {"parallel_read_safe": True}
