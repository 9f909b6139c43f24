"The atlas: what it measures, that it goes on where it ended, and that what fails says why."

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from matplotlib import pyplot as plt

from channelslast.find.result import FormatTimings
from channelslast.find.timing import FormatTiming
from channelslast.formats import to_train_format
from channelslast.zoo import arch_names

SCRIPT = Path(__file__).parent.parent / "nbs" / "benchmarks" / "atlas.py"


@pytest.fixture(scope="module")
def atlas():
    spec = importlib.util.spec_from_file_location("atlas", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(atlas, tmp_path, monkeypatch):
    "Run the script with options, on the CPU and in a folder of its own; return the rows of its file."

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["atlas.py", "--device", "cpu", "--folder", str(tmp_path), *options])
        atlas.main()
        (file,) = tmp_path.glob("*.csv")
        assert not list(tmp_path.glob("*.running"))
        return list(atlas.rows_of(file).values())

    return run


@pytest.fixture
def measured(atlas, monkeypatch):
    "The architectures that were measured, with figures of no worth; one of the name vgg16_bn fails."
    names = []

    def measure(arch, bs, args, device):
        names.append(arch)
        if arch == "vgg16_bn":
            raise RuntimeError("out of memory")
        return {"pick": "contiguous fp32", "ms": 1.0}

    monkeypatch.setattr(atlas, "measure", measure)
    return names


def test_parts_measure_everything_once(run, measured):
    archs = ["--archs", "resnet18", "resnet34", "resnet50"]
    assert len(run(*archs, "--part", "1/2")) == 2 and measured == ["resnet18", "resnet50"]
    assert len(run(*archs, "--part", "2/2")) == 3 and measured[2:] == ["resnet34"]
    with pytest.raises(SystemExit):
        run("--part", "3/2")


def test_two_processes_begin_a_file(atlas, tmp_path, monkeypatch):
    file, link = tmp_path / "rows.csv", os.link

    def late(source, target):
        link(source, target)  # the other process
        atlas.append(file, {"model": "resnet18"})
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    atlas.append(file, {"model": "resnet34"})
    assert [row["model"] for row in atlas.rows_of(file).values()] == ["resnet18", "resnet34"]
    assert list(tmp_path.iterdir()) == [file]


def test_it_lists_enough_architectures_that_exist(atlas):
    every = {name for names in arch_names().values() for name in names}
    assert len(atlas.TYPICAL_BS) >= 60 and set(atlas.TYPICAL_BS) <= every
    assert len(set(atlas.COMPILED.split())) == 20 and set(atlas.COMPILED.split()) <= set(atlas.TYPICAL_BS)
    assert {atlas.library_of(arch) for arch in atlas.TYPICAL_BS} == {"fastai", "torchvision", "timm"}
    assert {atlas.task_of(arch) for arch in atlas.TYPICAL_BS} == {"classification", "segmentation", "video"}


def test_a_row_has_the_pick_beside_fastais_own(run):
    (row,) = run("--archs", "squeezenet1_1", "--bs", "2", "--size", "32", "--each", "2")
    assert row["model"] == "squeezenet1_1" and row["img_size"] == "32" and float(row["ms"]) > 0
    assert row["times_fastais_own"] or row["error"].startswith("fastai's own: ")
    assert row["torch"] == torch.__version__ and row["command"].startswith(
        "python nbs/benchmarks/atlas.py --device cpu"
    )


def test_it_goes_on_where_it_ended(run, measured):
    run("--archs", "resnet18", "vgg16_bn")
    rows = run("--archs", "resnet18", "vgg16_bn", "resnet34")
    assert measured == ["resnet18", "vgg16_bn", "resnet34"]
    assert [row["error"] for row in rows] == ["", "RuntimeError: out of memory", ""]
    rows = run("--archs", "vgg16_bn", "--retry")
    assert measured[-1] == "vgg16_bn" and len(rows) == 3


@pytest.mark.parametrize(
    "changed, is_retried",
    [
        ({}, False),
        ({"error": "fastai's own: RuntimeError: required rank 4 tensor"}, False),
        ({"ms": "", "error": "out of memory"}, True),
        ({"error": "fastai's own: 3 steps, no time for rounds"}, True),
    ],
)
def test_what_failed_or_lacked_time_is_measured_again(run, measured, atlas, tmp_path, changed, is_retried):
    run("--archs", "resnet18")
    (file,) = tmp_path.glob("*.csv")
    (row,) = atlas.rows_of(file).values()
    atlas.append(file, row | changed)
    (row,) = run("--archs", "resnet18")
    assert len(measured) == 1 and row["error"] == changed.get("error", "")  # the last one counts
    (row,) = run("--archs", "resnet18", "--retry")
    assert len(measured) == 1 + is_retried
    assert row["error"] == "" or not is_retried


def test_a_search_that_is_too_short_says_so(run, atlas):
    (row,) = run("--archs", "squeezenet1_1", "--bs", "2", "--size", "32", "--each", "0.01")
    assert atlas.lacked_time(row["error"])


def test_a_row_says_why_nothing_was_replayed_or_compiled(atlas):
    def row(fmt, error=None):
        return FormatTiming(to_train_format(fmt), samples=[] if error else [1.0], error=error)

    start = row("contiguous fp32")
    graphs = [row("channels last fp16 graph", "no CUDA graph: it waits"), row("contiguous fp16 graph", "out of memory")]
    slow, late = row("channels last bf16 graph"), row("contiguous bf16 graph")
    slow.note, late.note = "4 steps: 2.0 times the fastest", "3 steps, no time for rounds"
    compiled = [row("channels last fp16 compiled", "BackendCompilerFailed"), row("channels last fp16 compiled graph")]

    def why_not(*rows):
        return atlas.why_not(FormatTimings(rows=[start, *rows], start=start.format))

    assert why_not() == [] == why_not(compiled[1])
    assert why_not(*graphs) == ["no CUDA graph: it waits"]
    assert why_not(*graphs[1:], compiled[0]) == ["CUDA graph: out of memory", "compiled: BackendCompilerFailed"]
    assert why_not(*graphs, *compiled) == [] == why_not(*graphs, slow)
    assert why_not(row("channels last bf16", "the loss is nan"), slow) == ["half precision: the loss is nan"]
    missed = row("channels last fp16 fused", "not reached")
    assert why_not(missed, slow) == ["half precision: not reached", "fused steps: not reached"]
    assert why_not(late, *graphs) == ["CUDA graph: 3 steps, no time for rounds"]


def test_no_search_begins_after_the_budget(run, measured):
    run("--archs", "resnet18")
    assert len(run("--archs", "resnet18", "resnet34", "--budget", "0")) == 1 and measured == ["resnet18"]


def test_a_run_that_measures_nothing_leaves_no_file(atlas, measured, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["atlas.py", "--device", "cpu", "--folder", str(tmp_path), "--budget", "0"])
    atlas.main()
    assert not list(tmp_path.iterdir()) and not measured  # a page of the site has no table without a row


def test_what_ended_the_process_is_told_by_the_next_run(run, measured, tmp_path):
    run("--archs", "resnet18")
    (file,) = tmp_path.glob("*.csv")
    file.with_suffix(".1.running").write_text(json.dumps({"model": "resnet34", "batch_size": 64}))
    rows = run("--archs", "resnet34")
    assert rows[-1]["error"] == "the process ended while it was measured" and measured == ["resnet18"]


@pytest.mark.parametrize(
    "options, end",
    [
        ([], "threads.csv"),
        (["--compile"], "-compile.csv"),
        (["--bs", "128", "--opt", "fused"], "-fused_adamw-b128.csv"),
    ],
)
def test_the_file_is_named_for_the_device_and_the_setting(run, measured, tmp_path, options, end):
    run("--archs", "resnet18", *options)
    (file,) = tmp_path.glob("*.csv")
    assert file.name.startswith("benchmark-train-") and "-nhwc-pt" in file.name and file.name.endswith(end)


def test_picture_names_each_kind_of_bar_once(tmp_path):
    spec = importlib.util.spec_from_file_location("atlas_picture", SCRIPT.with_name("atlas_picture.py"))
    picture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(picture)
    row = {"batch_size": "32", "device": "H200", "torch": "2.11.0+cu130"}

    def measured(own_ms, ms):
        return row | {"fastais_own_ms": own_ms, "ms": ms}

    eager = {"slow": measured("30", "20"), "quick": measured("40", "10")}
    compiled = {"slow": measured("60", "12"), "other": measured("30", "10")}
    figure = picture.draw(eager, compiled)
    (ax,) = figure.axes
    texts = [text.get_text() for text in ax.texts]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["quick, 32", "slow, 32"]
    assert texts == [
        "4.00  to_fastest()",
        "1.50",
        "2.50  to_fastest(compile=True)",  # against the same time of fastai's own
        "1  fastai's own to_channelslast()",
    ]
    assert ax.get_legend() is None and "2.4 times as fast" in ax.get_title("left")
    plt.close(figure)
