"The pages of the site: what they say of messages and names is what the package has."

import ast
import csv
import importlib.util
import json
import re
from pathlib import Path

import pytest
from fastai.learner import Learner

import channelslast

ROOT = Path(__file__).parent.parent
SITE = ROOT / "nbs" / "site"
INTERNAL = {"NotImplementedError", "FitDone", "EndedElsewhere", "SystemExit", "Rejected"}
UNSEEN = {"it takes no notice of it"}  # caught in its own file
GENERIC = 15  # characters, up to which a text says nothing


def literals(node):
    "The constant parts of the strings in an expression."
    return [each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)]


def messages(file):
    "The longest constant part of each warning, error and note of a file."
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        call = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(call, ast.Call):
            continue
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        is_told = name in ("warn", "warn_once", "add_note") or isinstance(node, ast.Raise)
        if is_told and name not in INTERNAL and literals(call):
            found.append(max(literals(call), key=len))
    return found


MESSAGES = sorted({text for file in (ROOT / "channelslast").rglob("*.py") for text in messages(file)} - UNSEEN)
MESSAGES = [text for text in MESSAGES if len(text) > GENERIC]


def words(text):
    return " ".join(text.split())


@pytest.mark.parametrize("message", MESSAGES)
def test_each_message_is_explained(message):
    assert words(message) in words((SITE / "troubleshooting.md").read_text())


@pytest.mark.parametrize("name", channelslast.__all__)
def test_each_public_name_has_its_place_in_the_reference(name):
    assert f".{name}\n" in (SITE / "api.md").read_text()


def load(file):
    spec = importlib.util.spec_from_file_location(f"site_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_comments_beside_parameters_become_parameters_of_the_reference():
    pytest.importorskip("sphinx")
    docments = load(SITE / "extensions" / "docments.py")
    lines = docments.parameter_lines(Learner.to_contiguous)
    assert lines == [":param to_fp32: also remove mixed precision, of every kind", ":type to_fp32: ``bool``"]
    lines = ["Return `self`, with **kwargs."]
    docments.add_parameters(None, "method", "", Learner.to_fastest, None, lines)
    assert lines[0] == r"Return ``self``, with \*\*kwargs."
    assert ":param budget: " in "\n".join(lines)  # of `format_find`, whose options it takes


def test_a_table_of_the_atlas_leaves_out_columns_without_a_value_and_begins_with_the_largest_gain(tmp_path):
    pytest.importorskip("sphinx")
    atlas = load(SITE / "extensions" / "atlas.py")
    file = tmp_path / "benchmark.csv"
    names = [*atlas.COLUMNS, "device", "torch", "cuda", "cudnn", "fastai", "date"]
    values = {"model": "resnet<18>", "ms": "3.5", "device": "H200", "torch": "2.11"}
    file.write_text(",".join(names) + "\n" + ",".join(values.get(name, "") for name in names) + "\n")
    html = atlas.table(file)
    assert "resnet&lt;18&gt;" in html and "<td>3.5</td>" in html and html.count("<th>") == 2
    assert atlas.heading(file).startswith("H200, fastai's Adam; PyTorch 2.11")
    compiled = file.rename(file.with_stem("benchmark-fused_adamw-compile"))
    assert atlas.heading(compiled).startswith("H200, PyTorch's fused AdamW, compiled too; PyTorch 2.11")
    with compiled.open("a", newline="") as stream:
        rows = [{"model": "slow", "times_fastais_own": "2.5"}, {"model": "quick", "times_fastais_own": "10.1"}]
        csv.DictWriter(stream, names).writerows(rows)
    assert re.findall("quick|slow|resnet", atlas.table(compiled)) == ["quick", "slow", "resnet"]


@pytest.mark.parametrize("file", sorted(SITE.parent.glob("*.ipynb")), ids=lambda file: file.stem)
def test_outputs_of_notebooks_name_no_folder_of_a_machine(file):
    outputs = [output for cell in json.loads(file.read_text())["cells"] for output in cell.get("outputs", [])]
    assert not re.search(r"/(root|home|tmp|site-packages)/", json.dumps(outputs))
