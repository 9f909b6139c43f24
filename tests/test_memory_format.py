"Which memory format tensors are in, and the conversion of tensors, batches, modules and optimizer state."

import itertools
import subprocess
import sys
from array import array
from collections import OrderedDict, UserList, UserString, deque, namedtuple
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.torch_core import TensorImage
from fastcore.foundation import L
from torch import nn

from channelslast import memory_format
from channelslast.memory_format import (
    conv_ndims,
    get_memory_format,
    is_channels_last,
    match_strides,
    memory_formats_kept,
    module_ndims,
    module_to_memory_format,
    optimizer_to_memory_format,
    own_memory_kept,
    state_to_contiguous,
    supports_channels_last,
    to_memory_format,
)

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
SHAPES = [
    *itertools.product((1, 2), (1, 3), (1, 4), (1, 5)),
    *itertools.product((1, 2), (1, 3), (1, 2), (1, 4), (1, 5)),
]


def format_an_operator_reads(x):
    "What a kernel makes of `x`: nearest upsampling by 1 returns its input's format, spelled out in the strides."
    out = F.interpolate(x, scale_factor=1, mode="nearest")
    last = torch.empty(x.shape, memory_format=CHANNELS_LAST[x.ndim])
    return CHANNELS_LAST[x.ndim] if out.stride() == last.stride() else torch.contiguous_format


def layouts(shape):
    "Tensors of `shape` in all kinds of strides."
    x = torch.randn(shape)
    yield x
    yield x.to(memory_format=CHANNELS_LAST[x.ndim])
    yield x.transpose(-1, -2).contiguous().transpose(-1, -2)
    yield torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
    yield torch.randn(shape[0], shape[1] + 2, *shape[2:])[:, 1:-1]
    yield torch.randn(shape[0], shape[1] + 2, *shape[2:]).to(memory_format=CHANNELS_LAST[x.ndim])[:, 1:-1]
    yield torch.randn(1, *shape[1:]).expand(shape)
    yield torch.randn(shape[0], 1, *shape[2:]).expand(shape)
    yield x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_format_is_the_one_that_an_operator_reads(shape):
    for x in layouts(shape):
        if 1 in shape[1:2] and all(size == 1 for size in shape[1:]):
            continue  # N111 has one set of strides: nothing to see in the output
        assert get_memory_format(x) == format_an_operator_reads(x), (shape, x.stride())


def test_strides_decide_where_both_formats_hold_the_values_alike():
    weight = torch.randn(8, 4, 1, 1)
    image = torch.randn(2, 1, 5, 5)
    for x in (weight, image):
        last = x.to(memory_format=torch.channels_last)
        assert x.is_contiguous(memory_format=torch.channels_last) and last.is_contiguous()
        assert not is_channels_last(x)
        assert is_channels_last(last)


def test_tensor_of_one_element_an_item_is_contiguous():
    for shape in ((4, 1, 1, 1), (4, 1, 1, 1, 1)):
        x = torch.randn(shape)
        assert get_memory_format(x) == torch.contiguous_format
        assert to_memory_format(x) is x
        # which is how a convolution reads it
        weight = torch.randn(3, 1, *[1] * (len(shape) - 2))
        assert (F.conv2d if len(shape) == 4 else F.conv3d)(x, weight).stride() == torch.empty(4, 3, *shape[2:]).stride()


def test_tensor_in_neither_format_becomes_contiguous():
    x = torch.randn(2, 3, 4, 5).transpose(2, 3)
    assert to_memory_format(x, channels_last=False).is_contiguous()
    assert torch.equal(to_memory_format(x, channels_last=False), x)


def test_other_ranks_empty_and_sparse_tensors_are_contiguous():
    for x in (
        torch.tensor(1.0),
        torch.randn(3),
        torch.randn(3, 4, 5),
        torch.empty(0, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(2, 3, 4, 4).to_sparse(),
    ):
        assert get_memory_format(x) == torch.contiguous_format


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tensor_keeps_its_values_there_and_back(shape):
    for x in layouts(shape):
        last = to_memory_format(x)
        back = to_memory_format(last, channels_last=False)
        assert torch.equal(last, x) and torch.equal(back, x)
        assert is_channels_last(last) or all(size == 1 for size in shape[1:])
        assert back.stride() == torch.empty(shape).stride() or not is_channels_last(last)
        assert to_memory_format(last) is last
        assert to_memory_format(back, channels_last=False) is back


def test_gradients_flow_through_a_conversion():
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    to_memory_format(x).square().sum().backward()
    assert torch.allclose(x.grad, 2 * x)


Pair = namedtuple("Pair", "image label")


class MyList(list):
    pass


def test_nested_batch_keeps_its_structure():
    image, volume, label = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 2, 4, 4), torch.arange(2)
    batch = (Pair(image, label), MyList([volume, "text", None]), OrderedDict(a={"b": image}, c=3))
    converted = to_memory_format(batch)
    assert [type(part) for part in converted] == [Pair, MyList, OrderedDict]
    assert is_channels_last(converted[0].image) and converted[0].label is label
    assert is_channels_last(converted[1][0]) and converted[1][1:] == ["text", None]
    assert is_channels_last(converted[2]["a"]["b"]) and converted[2]["c"] == 3
    assert not is_channels_last(batch[0].image) and not is_channels_last(batch[2]["a"]["b"])


class UserMapping(Mapping):
    "A mapping that cannot be written to."

    def __init__(self, items):
        self.contents = dict(items)

    def __getitem__(self, key):
        return self.contents[key]

    def __iter__(self):
        return iter(self.contents)

    def __len__(self):
        return len(self.contents)


class Sized(list):
    "A list whose constructor takes more than its items."

    def __init__(self, items, size):
        super().__init__(items)
        self.size = size


def test_containers_of_all_kinds_keep_what_they_carry():
    image = torch.randn(2, 3, 4, 4)
    sized = to_memory_format(Sized([image], size=7))
    assert type(sized) is Sized and sized.size == 7 and is_channels_last(sized[0])
    queue = to_memory_format(deque([image], maxlen=5))
    assert queue.maxlen == 5 and is_channels_last(queue[0])
    fastai_list = L(image, 3)
    assert is_channels_last(to_memory_format(fastai_list)[0]) and not is_channels_last(fastai_list[0])
    assert to_memory_format(UserString("text")) == "text"
    nested = torch.nested.nested_tensor([torch.randn(3, 4, 4), torch.randn(3, 5, 5)])
    assert to_memory_format(nested) is nested


class Letters(Sequence):
    "Makes its items when they are asked for, each a text of its own kind, as a text does."

    def __init__(self, text):
        self.text = text

    def __len__(self):
        return len(self.text)

    def __getitem__(self, i):
        assert len(self.text) > 1, "looked into a text"
        return Letters(self.text[i])


class SizedTuple(tuple):
    "A tuple whose constructor takes more than its items."

    def __new__(cls, items, size):
        return super().__new__(cls, items)


class Endless(Sequence):
    "Something that nobody should look into."

    def __len__(self):
        return 10**12

    def __getitem__(self, i):
        raise AssertionError("looked into it")


@pytest.mark.parametrize(
    "sequence",
    [range(10**12), Letters("abc"), UserString("abc"), b"abc", bytearray(9), memoryview(bytearray(9)), Endless()],
    ids=lambda sequence: type(sequence).__name__,
)
def test_sequence_that_is_no_container_comes_back_as_it_is(sequence):
    image = torch.randn(2, 3, 4, 4)
    converted = to_memory_format((image, sequence, [sequence]))
    assert is_channels_last(converted[0]) and converted[1] is sequence and converted[2][0] is sequence


def test_sequence_of_numbers_comes_back_as_it_is():
    numbers = [1000, 2000.5]
    for sequence in (array("d", numbers), L(numbers), UserList(numbers), deque(numbers), np.array(numbers)):
        batch = (torch.randn(2, 3), sequence)
        assert to_memory_format(batch) is batch


def test_sequence_that_cannot_be_rebuilt_comes_back_as_it_is():
    image = torch.randn(2, 3, 4, 4)
    sized = SizedTuple([image], size=7)
    converted = to_memory_format((image, sized))
    assert is_channels_last(converted[0]) and converted[1] is sized
    assert not is_channels_last(sized[0])


def test_read_only_mapping_is_taken():
    converted = to_memory_format(UserMapping({"image": torch.randn(2, 3, 4, 4)}))
    assert type(converted) is UserMapping and is_channels_last(converted["image"])


def test_batch_with_nothing_to_convert_is_itself():
    batch = (torch.randn(2, 3), [torch.arange(3)], {"size": torch.Size([2, 3])}, "text", range(3))
    assert to_memory_format(batch) is batch


def test_only_the_ranks_asked_for_are_converted():
    image, clip = torch.randn(2, 3, 4, 4), torch.randn(2, 8, 3, 4, 4)
    converted = to_memory_format((image, clip), ndims={4})
    assert is_channels_last(converted[0]) and converted[1] is clip


class WithoutTorchFunction(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl


class PlainSubclass(torch.Tensor):
    pass


@pytest.mark.parametrize("cls", [TensorImage, PlainSubclass, WithoutTorchFunction])
def test_tensor_subclass_keeps_type_and_attributes(cls):
    x = torch.randn(2, 3, 4, 4).as_subclass(cls)
    x.note = "an attribute"
    for channels_last in (True, False):
        x = to_memory_format(x, channels_last)
        assert type(x) is cls and x.note == "an attribute"
        assert is_channels_last(x) is channels_last


class TwoRanks(nn.Module):
    "2D and 3D convolutions side by side, with a tied weight, a shared buffer and a frozen parameter."

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3)
        self.b = nn.Conv2d(3, 4, 3)
        self.b.weight = self.a.weight
        self.c = nn.ConvTranspose3d(2, 4, 3)
        self.one_by_one = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 2)
        self.frozen = nn.Parameter(torch.randn(1, 4, 5, 5), requires_grad=False)
        self.register_buffer("mean", torch.randn(2, 3, 4, 4))


def test_module_converts_4d_and_5d_side_by_side_and_back():
    model = TwoRanks()
    before = {
        name: (tensor, tensor.clone(), tensor.stride()) for name, tensor in model.state_dict(keep_vars=True).items()
    }
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    assert module_to_memory_format(model) is model
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is before[name][0] and torch.equal(tensor, before[name][1])
        assert is_channels_last(tensor) is (tensor.ndim in (4, 5)), name
    assert model.b.weight is model.a.weight
    assert all(param.grad.stride() == param.stride() for param in model.parameters() if param.grad is not None)
    module_to_memory_format(model, channels_last=False)
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor.stride() == before[name][2] and torch.equal(tensor, before[name][1])
    assert all(param.grad.stride() == param.stride() for param in model.parameters() if param.grad is not None)


def test_parameters_that_share_memory_still_do():
    model = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)])
    model[1].weight.data = model[0].weight.data
    module_to_memory_format(model)
    assert model[0].weight is not model[1].weight
    assert model[0].weight.data_ptr() == model[1].weight.data_ptr()


def one_memory(how):
    "Two convolutions of which the second's weight lies in the memory of the first's, in another way."
    model = nn.ModuleList([nn.Conv2d(6, 4, 3), nn.Conv2d(6, 4, 3)])
    model[1].weight = nn.Parameter(how(model[0].weight.data))
    return model


@pytest.mark.parametrize(
    "how",
    [
        lambda weight: weight[1:3],
        lambda weight: weight[:, 3:],
        lambda weight: weight.view(6, 4, 3, 3),
        lambda weight: weight.transpose(2, 3),
        lambda weight: weight.flatten(),
        lambda weight: weight[0],
    ],
    ids=["slice", "channels", "view", "transpose", "flat", "item"],
)
@pytest.mark.parametrize("channels_last", [True, False])
def test_parameter_and_a_part_of_it_go_on_sharing_memory(how, channels_last):
    model = one_memory(how)
    model.append(nn.Conv2d(3, 4, 3))  # which goes its way
    model.append(nn.Conv2d(6, 4, 3))
    model[3].weight = nn.Parameter(model[0].weight.data)
    whole, part = model[0].weight, model[1].weight
    module_to_memory_format(model, channels_last)
    with torch.no_grad():
        whole.fill_(7)
    assert (part == 7).all() and (model[3].weight == 7).all()
    assert model[0].weight is whole and model[1].weight is part
    assert is_channels_last(model[2].weight) is channels_last


def test_gradient_of_a_parameter_that_stays_follows_it():
    weight = one_memory(lambda weight: weight[1:3])[1].weight
    model = nn.ParameterList([weight, nn.Parameter(weight.data)])
    model[1].data = weight.data[:1]
    weight.grad = torch.ones(weight.shape).to(memory_format=torch.channels_last)
    module_to_memory_format(model)
    assert not is_channels_last(weight) and weight.grad.stride() == weight.stride()


def test_own_memory_is_kept_where_it_can_be():
    model = nn.ModuleList([nn.Conv2d(3, 4, 3) for _ in range(6)])
    model[1].weight = nn.Parameter(model[0].weight.data)  # tied
    model[2].weight.requires_grad_(False)  # on a CPU it may be a file
    model[3].weight = nn.Parameter(torch.randn(8, 3, 3, 3)[:4])  # a part of something
    with torch.inference_mode():
        model[5].register_buffer("image", torch.randn(2, 3, 4, 4))
    model[4].weight.grad = torch.randn_like(model[4].weight)
    optimizer = torch.optim.Adam(model[4].parameters())
    optimizer.step()
    state = optimizer.state[model[4].weight]["exp_avg"]
    tensors = [*model.parameters(), *model.buffers(), model[4].weight.grad, state]
    values, addresses = [each.detach().clone() for each in tensors], [each.data_ptr() for each in tensors]
    for channels_last in (True, False, True):
        with own_memory_kept():
            module_to_memory_format(model, channels_last)
            optimizer_to_memory_format(optimizer)
        assert all(map(torch.equal, tensors, values))
        assert all(is_channels_last(each) is channels_last for each in tensors if each.ndim == 4)
    assert model[0].weight.data_ptr() == model[1].weight.data_ptr()
    moved = [each for each, address in zip(tensors, addresses) if each.data_ptr() != address]
    assert {*map(id, moved)} == {*map(id, (model[2].weight, model[3].weight, model[5].image))}
    module_to_memory_format(model, False)
    assert model[0].weight.data_ptr() != addresses[0], "elsewhere what holds the old memory keeps its values"


def test_matrix_is_given_the_strides_of_another_in_its_own_memory():
    with own_memory_kept():
        matrix = torch.randn(3, 4).t()
        values = matrix.clone()
        match_strides(matrix, torch.empty(4, 3))
    assert torch.equal(matrix, values) and matrix.is_contiguous()


def test_formats_that_are_kept_come_back():
    model = nn.ModuleList([nn.Conv2d(3, 4, 3) for _ in range(4)])
    model[1].to(memory_format=torch.channels_last)
    model[2].weight.data = model[1].weight.data
    model[3].weight = nn.Parameter(model[0].weight.data[1:3])
    before = [conv.weight.detach().clone() for conv in model]
    put_back = memory_formats_kept(model)
    for channels_last in (True, False):
        module_to_memory_format(model, channels_last)
        model[1].weight.grad = torch.ones_like(model[1].weight)
        put_back()
        assert [is_channels_last(conv.weight) for conv in model] == [False, True, True, False]
        assert is_channels_last(model[1].weight.grad)
        assert model[1].weight.data_ptr() == model[2].weight.data_ptr()
        assert model[3].weight.data_ptr() == model[0].weight[1].data_ptr()
        assert all(torch.equal(conv.weight, values) for conv, values in zip(model, before))


def test_parameters_side_by_side_in_one_memory_are_converted():
    memory = torch.randn(2 * 108)
    model = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)])
    for i, conv in enumerate(model):
        conv.weight = nn.Parameter(memory[108 * i : 108 * (i + 1)].view(4, 3, 3, 3))
    module_to_memory_format(model)
    assert all(is_channels_last(conv.weight) for conv in model)


class Wrapper(torch.Tensor):
    "A tensor that holds another and has no memory of its own, as DTensor does."

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def unwrap(arg):
            return arg.inner if isinstance(arg, cls) else arg

        out = func(*map(unwrap, args), **(kwargs or {}))
        return cls(out) if isinstance(out, torch.Tensor) else out


def test_wrapped_tensors_are_not_taken_for_one_another():
    a, b = (Wrapper(torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)) for _ in range(2))
    state = state_to_contiguous({"a": a, "b": b})
    assert torch.equal(state["a"].inner, a.inner) and torch.equal(state["b"].inner, b.inner)
    assert not is_channels_last(state["a"].inner)


def test_model_converted_in_inference_mode_can_still_be_trained():
    model = nn.Conv2d(3, 4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    with torch.inference_mode():
        module_to_memory_format(model)
        optimizer_to_memory_format(optimizer)
    assert not optimizer.state[model.weight]["momentum_buffer"].is_inference()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()


def test_parameters_of_other_shapes_in_one_memory_are_not_mixed_up():
    memory = torch.randn(4 * 3 * 3 * 3)
    model = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(3, 2, 3)])
    model[0].weight.data = memory.view(4, 3, 3, 3)
    model[1].weight.data = memory[:54].view(2, 3, 3, 3)
    module_to_memory_format(model)
    assert torch.equal(model[0].weight, memory.view(4, 3, 3, 3))
    assert torch.equal(model[1].weight, memory[:54].view(2, 3, 3, 3))


def test_converting_twice_moves_nothing():
    model = module_to_memory_format(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(1, 4, 1), nn.Conv2d(4, 1, 1)))
    pointers = [param.data_ptr() for param in model.parameters()]
    module_to_memory_format(model)
    assert [param.data_ptr() for param in model.parameters()] == pointers


def test_meta_and_lazy_parameters_are_taken():
    meta = module_to_memory_format(nn.Conv2d(3, 4, 3, device="meta"))
    assert is_channels_last(meta.weight)
    lazy = module_to_memory_format(nn.Sequential(nn.LazyConv2d(4, 3)))
    assert conv_ndims(lazy) == {4} and module_ndims(lazy) == set()


def test_ranks_of_convolutions_that_have_no_shape_yet():
    for conv, ndim in (
        (nn.LazyConv2d, 4),
        (nn.LazyConvTranspose2d, 4),
        (nn.LazyConv3d, 5),
        (nn.LazyConvTranspose3d, 5),
    ):
        assert conv_ndims(nn.Sequential(conv(4, 3))) == {ndim}


def test_ranks_of_a_module():
    class Custom(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 3, 3, 3))

    class Position(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.randn(1, 3, 8, 8))

    assert conv_ndims(nn.Conv2d(3, 4, 3)) == {4} and conv_ndims(nn.ConvTranspose3d(3, 4, 3)) == {5}
    assert conv_ndims(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))) == {4}
    assert conv_ndims(Custom()) == {4}
    assert conv_ndims(nn.Sequential(nn.Conv1d(3, 4, 3), nn.Linear(3, 4), Position())) == set()
    assert module_ndims(Position()) == {4}
    assert module_ndims(nn.Sequential(nn.Conv1d(3, 4, 3), nn.Linear(3, 4))) == set()


@pytest.mark.parametrize(
    "new_optimizer",
    [
        lambda params: torch.optim.Adam(params, amsgrad=True),
        lambda params: torch.optim.SGD(params, momentum=0.9, lr=0.1),
        lambda params: torch.optim.RMSprop(params, momentum=0.9),
        lambda params: torch.optim.SGD(params, lr=0.1),
    ],
    ids=["Adam", "SGD with momentum", "RMSprop", "SGD"],
)
def test_optimizer_state_follows_the_parameters(new_optimizer):
    model = TwoRanks()
    optimizer = new_optimizer([param for param in model.parameters() if param.requires_grad])
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    values = [
        (param, value, value.clone())
        for param, state in optimizer.state.items()
        for value in state.values()
        if torch.is_tensor(value)
    ]
    for channels_last in (True, False):
        module_to_memory_format(model, channels_last)
        assert optimizer_to_memory_format(optimizer) is optimizer
        for param, value, copy in values:
            assert torch.equal(value, copy)
            assert value.shape != param.shape or value.stride() == param.stride()


def test_optimizer_state_keeps_its_dtype():
    param = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    optimizer = torch.optim.SGD([param], lr=0.1)
    optimizer.state[param] = {"momentum_buffer": torch.randn(2, 3, 4, 4, dtype=torch.float64), "step": 3}
    optimizer_to_memory_format(optimizer)
    state = optimizer.state[param]
    assert state["momentum_buffer"].dtype is torch.float64 and is_channels_last(state["momentum_buffer"])
    assert state["step"] == 3


def test_nested_optimizer_state_follows():
    param, flat = nn.Parameter(torch.randn(4, 3, 2, 2)), nn.Parameter(torch.randn(3))
    optimizer = torch.optim.SGD([param, flat], lr=0.1)
    history = [torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)]
    nested, pair = {"m": torch.randn(4, 3, 2, 2), "other": torch.randn(2, 3, 4, 4)}, (torch.randn(4, 3, 2, 2), 3)
    state = {"history": history, "nested": nested, "pair": pair, "seen": range(3), "step": 3}
    alone, elsewhere = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    optimizer.state[param] = state
    optimizer.state[flat] = {"history": [torch.randn(3)], "image": elsewhere}
    optimizer.state[True] = {"force_train": True, "image": elsewhere}
    optimizer.state["step"] = 7
    optimizer.state["all"] = [elsewhere]
    values = [(tensor, tensor.clone()) for tensor in (*history, *nested.values(), pair[0], alone, elsewhere)]
    for channels_last in (True, False):
        param.data = to_memory_format(param.data, channels_last)
        optimizer_to_memory_format(optimizer)
        assert [is_channels_last(tensor) for tensor in (*history, nested["m"], pair[0])] == [channels_last] * 4
        assert not is_channels_last(nested["other"]) and not is_channels_last(elsewhere)
    assert all(torch.equal(tensor, copy) for tensor, copy in values)
    assert state == {"history": history, "nested": nested, "pair": pair, "seen": range(3), "step": 3}


def test_optimizer_state_that_is_no_dict_follows():
    param = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    optimizer = torch.optim.SGD([param], lr=0.1)
    optimizer.state[param] = [torch.randn(4, 3, 2, 2)]
    optimizer_to_memory_format(optimizer)
    assert is_channels_last(optimizer.state[param][0])


@pytest.mark.parametrize(
    "call, match",
    [
        (
            lambda: to_memory_format(torch.randn(2, 3, 4, 4), torch.contiguous_format),
            "channels_last=torch.contiguous_format.*pass True or False",
        ),
        (lambda: module_to_memory_format(nn.Conv2d(3, 4, 3), torch.channels_last), "channels_last=torch.channels_last"),
        (lambda: module_to_memory_format(torch.randn(3)), "module=tensor.*pass a Module"),
        (lambda: optimizer_to_memory_format(nn.Conv2d(3, 4, 3)), "optimizer.state=None.*pass a Mapping"),
        (lambda: get_memory_format("image"), "tensor='image' is a str: pass a Tensor"),
    ],
)
def test_wrong_argument_is_a_type_error_that_names_it(call, match):
    with pytest.raises(TypeError, match=match):
        call()


def test_devices_on_which_channels_last_is_right():
    assert supports_channels_last("cpu") and supports_channels_last(torch.device("cuda", 1))
    assert not supports_channels_last("mps")


def test_core_needs_pytorch_alone():
    "The files, for importing the package imports fastai: its classes have to be ours whatever is imported first."
    folder = str(Path(memory_format.__file__).parent)
    code = f"""
import sys, types
for name in ("fastai", "fastcore", "numpy"):
    sys.modules[name] = None
package = sys.modules["channelslast"] = types.ModuleType("channelslast")
package.__path__ = [{folder!r}]
import channelslast.memory_format as names
assert hasattr(names, "to_memory_format")
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
