"The tensors in nested values, and the format that one is in."

import pytest
import torch
from tracing import Outputs

from channelslast.nested import tensors_in
from channelslast.summary import LayerFormat
from channelslast.tensors import format_of, images_in


def test_tensors_in_what_modules_take_and_return():
    a, b = torch.ones(1), torch.ones(2)
    assert [id(tensor) for tensor in tensors_in([a, {"b": (b, 3)}, Outputs(b, a), LayerFormat, "c", None])] == [
        id(tensor) for tensor in (a, b, b, a)
    ]


def test_tensors_in_what_holds_itself():
    inner = torch.ones(1)
    pair = [inner, inner]
    pair.append(pair)
    assert len(tensors_in(pair)) == 2
    assert len(tensors_in([pair, pair])) == 4


def last(*shape):
    return torch.randn(shape).to(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)])


FORMATS = {
    "4D": ("channels last", lambda: last(2, 3, 4, 5)),
    "5D": ("channels last", lambda: last(2, 3, 4, 5, 6)),
    "part of an image": ("channels last", lambda: last(2, 6, 4, 5)[:, 1:3, :2]),
    "one image of a batch": ("channels last", lambda: last(2, 3, 4, 5)[1][None]),
    "contiguous": ("contiguous", lambda: torch.randn(2, 3, 4, 5)),
    "contiguous in 5D": ("contiguous", lambda: torch.randn(2, 3, 4, 5, 6)),
    "in neither": ("contiguous", lambda: torch.randn(2, 3, 4, 5).permute(0, 1, 3, 2)),
    "tokens": (None, lambda: torch.randn(2, 3, 4)),
    "one channel": (None, lambda: last(2, 1, 4, 5)),
    "one pixel": (None, lambda: last(2, 3, 1, 1)),
    "empty": (None, lambda: last(0, 3, 4, 5)),
    "expanded": (None, lambda: torch.randn(2, 3, 1, 1).expand(2, 3, 4, 5)),
    "sparse": (None, lambda: torch.randn(2, 3, 4, 5).to_sparse()),
    "nested": (None, lambda: torch.nested.as_nested_tensor([torch.randn(3, 4, 5), torch.randn(3, 2, 5)])),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FORMATS)
def test_format_of(name):
    expected, make = FORMATS[name]
    assert format_of(make()) == expected


def test_format_inside_vmap_cannot_be_told():
    seen = []

    def look(x):
        seen.append(format_of(x))
        return x

    torch.vmap(look)(torch.randn(2, 3, 4, 5, 6))
    assert seen == [None]


def test_images_in_what_modules_take_and_return():
    image, clip, tokens = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4, 5), torch.ones(1, 2, 3)
    nested = torch.nested.as_nested_tensor([image[0], image[0, :1]], layout=torch.jagged)
    assert [tensor.ndim for tensor in images_in([tokens, {"clip": clip}, nested, image])] == [5, 4]
