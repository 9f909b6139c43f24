"The segmentation script: it learns the shapes that it draws, and what bad input gets."

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parent.parent / "nbs" / "examples" / "segment.py"


@pytest.fixture(scope="module")
def segment():
    spec = importlib.util.spec_from_file_location("segment", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def arguments():
    return dict(n=20, size=32, bs=8, epochs=1, amp_mode="fp32", device="cpu")


def test_each_image_has_its_shapes_and_a_mask_of_them(segment):
    (image, mask), (other, _) = segment.draw(0, 64), segment.draw(1, 64)
    assert image.shape == (64, 64, 3) and mask.shape == (64, 64)
    assert set(np.unique(mask)) <= set(range(len(segment.CODES))) and mask.max() > 0
    assert not np.array_equal(image, other) and np.array_equal(image, segment.draw(0, 64)[0])
    assert image[mask > 0].mean() > image[mask == 0].mean()


def test_trains_in_the_fastest_format_and_says_which(segment, arguments, capsys, quick_search):
    segment.main(**arguments, fastest=True)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("fastest: ") for line in lines)
    assert any(line.startswith("format: ") and "fp32" in line and line.endswith("on cpu") for line in lines)
    (accuracy,) = [float(line.split()[-1]) for line in lines if line.startswith("accuracy")]
    assert 0 <= accuracy <= 1


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"arch": "vit"}, "--arch vit: pass one of resnet18"),
        ({"bs": 100}, "--bs 100: there are 16 images to train on"),
        ({"size": 0}, "--size 0: pass a number above 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(segment, arguments, capsys, wrong, message):
    with pytest.raises(SystemExit) as stopped:
        segment.main(**arguments | wrong)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"segment.py: error: {message}") and error.count("\n") == 1


def test_options_are_those_of_main(segment, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["segment.py", "--fastest", "--amp-mode", "bf16"])
    options = segment.parse_options()
    assert options["fastest"] and options["amp_mode"] == "bf16"
    assert set(options) == set(segment.main.__code__.co_varnames[: segment.main.__code__.co_argcount])
