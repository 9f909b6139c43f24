"The training script: the main job on a few real images, and what bad input gets."

import importlib.util
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "nbs" / "examples" / "train.py"


@pytest.fixture(scope="module")
def train():
    spec = importlib.util.spec_from_file_location("train", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def arguments(digits_folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    return dict(path=str(digits_folder), size=16, bs=16, epochs=1, device="cpu")


def test_trains_an_image_folder_and_says_how_well_and_how_fast(train, arguments, capsys):
    train.main(**arguments | {"epochs": 3})
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("format: channels last") and line.endswith("on cpu") for line in lines)
    (accuracy,) = [float(line.split()[1]) for line in lines if line.startswith("accuracy:")]
    (speed,) = [float(line.split()[2].replace(",", "")) for line in lines if line.startswith("training steps:")]
    assert accuracy > 0.8 and speed > 0


@pytest.mark.parametrize(
    "options, said",
    [
        ({"contiguous": True, "amp_mode": "fp32"}, "format: contiguous fp32"),
        ({"amp_mode": "fp32"}, "format: channels last fp32"),
        ({"amp_mode": "bf16"}, "format: channels last bf16"),
    ],
)
def test_says_the_format_and_precision_in_use(train, arguments, capsys, options, said, bf16_cpu):
    train.main(**arguments | options)
    assert said in capsys.readouterr().out


def test_digits_are_written_once(train, tmp_path, monkeypatch):
    monkeypatch.setattr("channelslast.zoo.data.fastai_path", lambda name: tmp_path / name)
    folder = train.digits_folder()
    files = list(folder.glob("*/*.png"))
    assert len(files) == 1797 and {file.parent.name for file in files} == set("0123456789")
    assert list(folder.parent.iterdir()) == [folder]
    written = files[0].stat().st_mtime_ns
    assert train.digits_folder() == folder and files[0].stat().st_mtime_ns == written


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"path": "/no/such/folder"}, "--path /no/such/folder: there is no such folder"),
        (
            {"arch": "xresnt18"},
            "--arch xresnt18: no such classification model in fastai, torchvision or timm; did you mean xresnet18",
        ),
        ({"arch": "?"}, "--arch ?: no such classification model in fastai, torchvision or timm; try"),
        ({"amp_mode": "fp8"}, "--amp_mode fp8: pass one of auto, fp16, bf16, fp32"),
        ({"device": "gpu"}, "--device gpu: "),
        ({"bs": 0}, "--bs 0: pass a number above 0"),
        ({"size": -1}, "--size -1: pass a number above 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(train, arguments, capsys, wrong, message):
    with pytest.raises(SystemExit) as stopped:
        train.main(**arguments | wrong)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"train.py: error: {message}") and error.count("\n") == 1


def test_folder_without_images(train, arguments, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        train.main(**arguments | {"path": str(tmp_path)})
    assert stopped.value.code == 2 and "no images" in capsys.readouterr().err


def test_too_few_images(train, arguments, capsys, digits_folder):
    with pytest.raises(SystemExit) as stopped:
        train.main(**arguments | {"bs": 1000})
    assert stopped.value.code == 2 and "--bs 1000: there are 80 images to train on" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        train.main(**arguments | {"path": str(digits_folder / "0")})
    assert stopped.value.code == 2 and "all images are of one class" in capsys.readouterr().err
    train.main(**arguments | {"bs": 64})
    assert "training steps: too few to time" in capsys.readouterr().out


def test_runs_as_a_script(digits_folder):
    command = [
        sys.executable,
        SCRIPT,
        "--path",
        digits_folder,
        "--amp_mode",
        "fp32",
        "--size",
        "16",
        "--epochs",
        "1",
        "--device",
        "cpu",
    ]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "format: channels last fp32 on cpu" in printed and "accuracy:" in printed


def test_script_ends_with_an_error_code(digits_folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--path", str(digits_folder), "--arch", "nothing"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stopped.value.code == 2


def test_fastest_searches_first_and_says_what_it_chose(train, arguments, capsys, quick_search):
    train.main(**arguments | {"fastest": True, "amp_mode": "fp32"})
    lines = capsys.readouterr().out.splitlines()
    (code,) = [line.removeprefix("fastest: ") for line in lines if line.startswith("fastest: ")]
    assert code.startswith('learn.to_format("') and "fp32" in code
    assert any(line.startswith("format: ") and "fp32" in line for line in lines)
