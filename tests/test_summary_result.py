"What a summary says, its hints, and how it shows them."

import re
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from torch import nn
from tracing import Views, flat, small_clean_model, thrashing_model

from channelslast.memory_format import module_to_memory_format
from channelslast.summary import format_summary
from channelslast.summary.hints import HINTS
from channelslast.swaps import keep_channels_last


@pytest.fixture
def images():
    return torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)


@pytest.fixture
def thrashing(images):
    return format_summary(module_to_memory_format(thrashing_model()), images)


# What it says


def test_verdict_names_the_layers_that_lose_the_format_and_their_phases(thrashing):
    assert 0 < thrashing.channels_last_share < 1
    assert f"{thrashing.channels_last_share:.1%} of activations and gradients" in thrashing.verdict
    assert "2 of 7 layers with images lose it" in thrashing.verdict
    assert "`1` InstanceNorm2d (forward)" in thrashing.verdict and "`4` GLU (backward)" in thrashing.verdict
    assert [layer.module for layer in thrashing.losers] == ["1", "4"]  # the heaviest first


def test_verdict_on_a_small_clean_model(images):
    summary = format_summary(module_to_memory_format(small_clean_model()), images)
    assert summary.channels_last_share == 1.0 and summary.events == []
    assert (
        summary.verdict
        == "100% of activations and gradients stay channels last; none of 4 layers with images loses it."
    )


def test_share_is_never_rounded_up_to_all():
    x = torch.randn(8, 3, 64, 64).to(memory_format=torch.channels_last)
    layers = [nn.Conv2d(3, 32, 3), *[nn.ReLU() for _ in range(40)], nn.Conv2d(32, 2, 3), nn.Softmax(1)]
    summary = format_summary(module_to_memory_format(nn.Sequential(*layers)), x)
    assert 0.9995 > summary.channels_last_share > 0.99 and summary.verdict.startswith("99.")


def test_verdict_on_a_contiguous_model():
    summary = format_summary(small_clean_model(), torch.randn(2, 3, 8, 8))
    assert summary.channels_last_share == 0.0 and summary.events == []
    assert summary.verdict.startswith("Contiguous throughout")


@pytest.mark.parametrize(
    "model, shape", [(nn.Linear(4, 2), (3, 4)), (nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), (2, 3, 8, 8))]
)
def test_verdict_on_a_model_without_images(model, shape):
    x = torch.randn(shape)
    summary = format_summary(model, x.to(memory_format=torch.channels_last) if x.ndim == 4 else x)
    assert np.isnan(summary.channels_last_share) and summary.layers == []
    assert "No 4D or 5D activations" in summary.verdict


def test_verdict_on_a_contiguous_model_whose_first_layer_loses_a_channels_last_input(images):
    summary = format_summary(nn.Sequential(nn.Softmax(1), nn.ReLU(), nn.AvgPool2d(2)), images)
    assert summary.channels_last_share == 0.0
    assert "0.0% of activations" in summary.verdict and "`0` Softmax (forward)" in summary.verdict


def test_verdict_names_the_convolution_that_re_lays_its_input():
    summary = format_summary(module_to_memory_format(small_clean_model()), torch.randn(2, 3, 8, 8))
    assert "1 convolution gets an input, weight or gradient in the other format" in summary.verdict
    assert "forward pass of `0`" in summary.verdict and "to_memory_format(images)" in summary.hints[0]


def test_hint_for_contiguous_weights_under_channels_last_images(images):
    summary = format_summary(small_clean_model(), images)
    assert "module_to_memory_format(model)" in summary.hints[0]
    assert "2 convolutions get an input, weight or gradient" in summary.verdict


def test_verdict_names_the_layer_that_is_contiguous_inside(images):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.LocalResponseNorm(3), nn.Conv2d(8, 8, 1))
    verdict = format_summary(module_to_memory_format(model), images).verdict
    assert (
        "none of 3 layers with images loses it. Most of the rest is contiguous inside `1` LocalResponseNorm" in verdict
    )


def test_verdict_on_little_that_is_contiguous_names_no_layer(images):
    layers = [nn.Conv2d(3, 8, 1), *[nn.ReLU() for _ in range(20)], nn.AdaptiveAvgPool2d(1)]
    summary = format_summary(module_to_memory_format(nn.Sequential(*layers)), images)
    assert 0.9 < summary.channels_last_share < 1 and summary.verdict.endswith("none of 22 layers with images loses it.")


def test_verdict_on_one_layer(images):
    verdict = format_summary(module_to_memory_format(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten())), images).verdict
    assert "the one layer with images keeps it" in verdict


def test_many_losers_are_cut_short_in_the_verdict(images):
    layers = [layer for _ in range(8) for layer in (nn.Conv2d(3, 3, 1), nn.Softmax(1))]
    summary = format_summary(module_to_memory_format(nn.Sequential(*layers)), images)
    assert "8 of 16 layers with images lose it" in summary.verdict and summary.verdict.endswith("and 3 more.")


def test_5d_model():
    x = torch.randn(2, 2, 4, 4, 4).to(memory_format=torch.channels_last_3d)
    model = nn.Sequential(nn.BatchNorm3d(2), nn.AdaptiveAvgPool3d(2), nn.BatchNorm3d(2))
    summary = format_summary(module_to_memory_format(model), x)
    assert {layer.module: layer.loses_in for layer in summary.losers} == {"1": ("forward",)}


def test_channels_to_be_padded_are_named_on_cuda_alone(images):
    with torch.autocast("cpu", torch.bfloat16):
        summary = format_summary(module_to_memory_format(small_clean_model()), images)
    assert "multiple of 8" not in flat(summary)
    summary.device = "cuda:0"
    assert "Channels not a multiple of 8, which cuDNN pads" in flat(summary) and ": `2` (8 to 3)." in flat(summary)


# Hints: each replacement keeps the format where the hint says so


def hints(model, x):
    return format_summary(module_to_memory_format(model), x).hints


def test_hint_for_instance_norm_says_what_group_norm_costs_in_its_place(images):
    norm, replacement = nn.InstanceNorm2d(8, affine=True), nn.GroupNorm(8, 8)
    x = torch.randn(2, 8, 8, 8)
    torch.testing.assert_close(norm(x), replacement(x))
    (hint,) = hints(nn.Sequential(nn.Conv2d(3, 8, 3), norm), images)
    assert "GroupNorm" in hint and "no way out" in hint


def test_hint_for_a_copy_in_the_code_of_a_layer_and_that_its_replacement_is_clean(images):
    class Copies(nn.Module):
        def __init__(self, memory_format):
            super().__init__()
            self.memory_format = memory_format

        def forward(self, x):
            return x.contiguous(memory_format=self.memory_format)

    (hint,) = hints(nn.Sequential(nn.Conv2d(3, 8, 3), Copies(torch.contiguous_format)), images)
    assert "`.contiguous()`" in hint
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Copies(torch.channels_last))
    assert format_summary(module_to_memory_format(model), images).events == []
    assert hints(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()), images) == []  # nobody can avoid that one


def resize(mode):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Upsample(scale_factor=2, mode=mode), nn.Conv2d(8, 8, 3))


def test_hint_for_bicubic_and_that_bilinear_is_clean(images):
    (hint,) = hints(resize("bicubic"), images)
    assert "bilinear" in hint
    assert hints(resize("bilinear"), images) == []
    assert format_summary(module_to_memory_format(resize("bilinear")), images).events == []


def test_hint_for_a_global_average_which_is_due_no_more_inside_keep_channels_last(images):
    model = module_to_memory_format(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)))
    (hint,) = hints(model, images)
    assert "`2`" in hint and "`nn.AdaptiveAvgPool2d(1)`" in hint and "`keep_channels_last(model)`" in hint
    assert hints(nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1)), images) == [hint.replace("`2`", "`1`")]
    with keep_channels_last(model):
        summary = format_summary(model, images)
    assert summary.events == summary.hints == []


def test_hints_of_a_device_and_version_are_given_there_alone(thrashing, monkeypatch):
    event = thrashing.events[0]
    for hint in HINTS:
        examples = {
            "(reflection|replication)_pad2d": "reflection_pad2d",
            "(pixel|channel)_(un)?shuffle": "pixel_shuffle",
        }
        op = examples.get(hint.ops, hint.ops.split("|")[0])
        fake = SimpleNamespace(
            **{**vars(event), "op": f"aten.{op}", "kind": "lost", "cls": hint.cls if hint.cls.isalpha() else "X"}
        )
        thrashing.events, thrashing.device = [fake], "cuda:0"
        thrashing.layers = [SimpleNamespace(module=event.module, loses_in=("forward", "backward"))]
        monkeypatch.setattr("channelslast.summary.hints.ismin_torch", lambda version: False)
        assert hint.text in thrashing.hints
        monkeypatch.setattr("channelslast.summary.hints.ismin_torch", lambda version: True)
        assert (hint.text in thrashing.hints) == (not hint.fixed_in)
        thrashing.device = "cpu"
        assert (hint.text in thrashing.hints) == (not hint.device)


# How it shows it


def test_table_has_a_row_for_each_event_grouped_by_module(thrashing):
    text = str(thrashing)
    assert text.startswith("Sequential (input shape: 2 x 3 x 8 x 8), fp32 on cpu\n")
    rows = [line for line in text.splitlines() if " x " in line and line.split()[-2].isdigit()]
    assert len(rows) == len(thrashing.events)
    assert sum(row.startswith("1 InstanceNorm2d") for row in rows) == 1
    assert "converted: a copy changed the format" in flat(thrashing)
    assert thrashing.verdict in flat(thrashing) and "Hint: InstanceNorm" in text
    frame = thrashing.to_frame()
    heaviest = frame.groupby("module").nbytes.sum().idxmax()
    assert rows[0].startswith(f"{heaviest} ")


def test_long_table_says_what_it_leaves_out(thrashing):
    thrashing.events *= 10
    text = str(thrashing)
    assert f"{len(thrashing.events) - 40} lighter rows left out" in text


def test_frame_has_the_events_and_their_columns(thrashing):
    frame = thrashing.to_frame()
    assert list(frame.columns) == ["module", "cls", "phase", "op", "kind", "shape", "dtype", "count", "nbytes"]
    assert len(frame) == len(thrashing.events)
    assert frame.nbytes.sum() == sum(event.nbytes for event in thrashing.events)
    assert set(frame.kind) <= {"lost", "converted", "hidden", "mixed"} and set(frame.phase) == {"forward", "backward"}


def test_frame_of_a_clean_model_has_columns_and_no_rows(images):
    frame = format_summary(module_to_memory_format(small_clean_model()), images).to_frame()
    assert isinstance(frame, pd.DataFrame) and len(frame) == 0 and "nbytes" in frame.columns


def test_notebooks_and_terminals_show_the_table(thrashing):
    assert repr(thrashing) == str(thrashing)
    page = thrashing._repr_html_()
    start, end = page.index("<table"), page.index("</table>") + len("</table>")
    head, *rows = [[cell.text for cell in row] for row in ElementTree.fromstring(page[start:end]).iter("tr")]
    assert head == ["Layer (type)", "Phase", "Operator", "Kind", "Shape", "n", "MB"]
    assert len(rows) == len(thrashing.events)
    assert rows[0][:4] == ["3 Conv2d", "backward", "convolution_backward", "hidden"]
    words = re.sub("<.*?>", "", page[end:])
    assert thrashing.verdict.replace("`", "") in words and "Hint: InstanceNorm" in words


def test_picture_has_a_bar_for_each_layer_and_phase_and_a_mark_for_each_loss(thrashing):
    ax = thrashing.plot()
    colors = [bar.get_facecolor() for bar in ax.patches]
    forward, backward = colors[:7], colors[7:]
    assert len(colors) == 14
    assert forward[0] == forward[3] != forward[1]  # channels last, and contiguous after InstanceNorm
    assert forward[1] == forward[2] == backward[2]
    marks = [line for line in ax.lines if len(line.get_xdata()) and line.get_marker() in "v^"]
    assert sorted((int(line.get_xdata()[0]), line.get_marker()) for line in marks) == [(1, "v"), (4, "^")]
    assert {text.get_text() for text in ax.texts} == {"1", "4"}
    plt.close(ax.figure)


def test_picture_of_a_step_that_stopped_says_so(images):
    summary = format_summary(module_to_memory_format(nn.Sequential(nn.Conv2d(3, 8, 3), Views())), images)
    ax = summary.plot()
    assert "stopped" in ax.get_title(loc="left")
    plt.close(ax.figure)


def test_picture_is_drawn_where_told(thrashing):
    _, ax = plt.subplots()
    assert thrashing.plot(ax) is ax
    plt.close(ax.figure)
