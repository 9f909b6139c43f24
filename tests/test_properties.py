"What converting keeps, for tensors, batches, modules and optimizer state that Hypothesis makes up."

import os
from collections import OrderedDict, namedtuple
from itertools import combinations
from types import SimpleNamespace

import torch
from fastai.torch_core import TensorImage
from hypothesis import HealthCheck, assume, example, given, note, settings
from hypothesis import strategies as st
from test_memory_format import CHANNELS_LAST, PlainSubclass, WithoutTorchFunction, format_an_operator_reads
from torch import nn

from channelslast.memory_format import (
    get_memory_format,
    is_channels_last,
    module_to_memory_format,
    optimizer_to_memory_format,
    state_to_contiguous,
    to_memory_format,
)

# `EXAMPLES=5000 pytest tests/test_properties.py` looks further, elsewhere each time
properties = settings(
    max_examples=int(os.environ.get("EXAMPLES", 150)),
    derandomize="EXAMPLES" not in os.environ,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
COMPLEX = [torch.complex64, torch.complex128]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
DIFFERENTIABLE = [*FLOATS, *COMPLEX]
DTYPES = [*DIFFERENTIABLE, *INTEGERS, torch.bool]


# What Hypothesis makes up

shapes = st.integers(0, 6).flatmap(lambda rank: st.tuples(*[st.sampled_from((2, 1, 3, 0))] * rank))
shapes_with_a_format = st.sampled_from((4, 5)).flatmap(lambda rank: st.tuples(*[st.sampled_from((2, 1, 3))] * rank))


def innermost_last(rank):
    "Orders of the dimensions in memory: contiguous, channels last, any."
    dims = range(rank)
    last = (0, *dims[2:], 1) if rank > 1 else tuple(dims)
    return st.just(tuple(dims)) | st.just(last) | st.permutations(dims)


@st.composite
def strided(draw, shape, dtype, views=("plain", "sliced", "expanded")):
    "A tensor of random bits: permuted, sliced, expanded, with gaps and a storage offset, or none of it."
    rank = len(shape)
    order = draw(innermost_last(rank))
    views = [draw(st.sampled_from(views)) for _ in shape] if draw(st.booleans()) else ["plain"] * rank
    sizes = [{"plain": size, "sliced": 1 + 2 * size, "expanded": 1}[view] for size, view in zip(shape, views)]
    offset = draw(st.sampled_from((0, 0, 1, 3)))
    memory = random_bits(torch.Size(sizes).numel() + offset, dtype, draw(st.integers(0, 9)))
    x = memory[offset:].view([sizes[dim] for dim in order]).permute([order.index(dim) for dim in range(rank)])
    x = x[tuple(slice(1, None, 2) if view == "sliced" else slice(None) for view in views)].expand(shape)
    if 1 in shape and draw(st.booleans()):  # no element lies by the stride of a dimension of size 1
        strides = [draw(st.integers(0, 9)) if size == 1 else x.stride(dim) for dim, size in enumerate(shape)]
        x = x.as_strided(shape, strides)
    note(f"{dtype} {tuple(shape)} in strides {x.stride()}")  # which the tensor's representation does not show
    return x


def random_bits(n, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, (n,), generator=generator).bool()
    return torch.randint(0, 256, (n * dtype.itemsize,), dtype=torch.uint8, generator=generator).view(dtype)


@st.composite
def tensors(draw, shapes=shapes, dtypes=DTYPES):
    dtype = draw(st.sampled_from(dtypes))
    x = draw(strided(draw(shapes), dtype))
    if dtype in DIFFERENTIABLE and draw(st.booleans()):
        x.requires_grad_()
    cls = draw(st.sampled_from((torch.Tensor, torch.Tensor, TensorImage, PlainSubclass, WithoutTorchFunction)))
    if cls is not torch.Tensor:
        x = x.detach().as_subclass(cls).requires_grad_(x.requires_grad)
        x.note = ["an attribute"]
    return x


Pair = namedtuple("Pair", "image label")


class MyList(list):
    pass


def containers(items):
    keys = st.sampled_from(("a", "b", 3))
    return st.one_of(
        st.tuples(items, items),
        st.lists(items, max_size=3),
        st.lists(items, max_size=3).map(MyList),
        st.builds(Pair, items, items),
        st.dictionaries(keys, items, max_size=3),
        st.lists(st.tuples(keys, items), max_size=3).map(OrderedDict),
    )


some_tensors = tensors(shapes | shapes_with_a_format)
no_tensors = st.sampled_from((None, 3, "text", b"bytes", 1.5, torch.Size((2, 3, 4, 4)), range(3), torch.float32))
batches = containers(st.recursive(some_tensors | no_tensors, containers, max_leaves=5))


@st.composite
def states(draw):
    "Nested tensors, some of them more than once."
    pool = draw(st.lists(some_tensors, min_size=1, max_size=3))
    return draw(containers(st.recursive(st.sampled_from(pool) | no_tensors, containers, max_leaves=6)))


in_the_same_memory = st.sampled_from(
    [
        lambda x: x.detach(),
        lambda x: x.detach().conj(),
        lambda x: x.detach().as_subclass(torch.Tensor),
        lambda x: x.detach().as_subclass(PlainSubclass),
    ]
)


@st.composite
def parameters(draw, shapes=shapes_with_a_format | shapes, views=("plain",)):
    dtype = draw(st.sampled_from(DIFFERENTIABLE))
    shape = draw(shapes)
    param = nn.Parameter(draw(strided(shape, dtype, views)), requires_grad=draw(st.booleans()))
    if draw(st.booleans()):
        param.grad = draw(strided(shape, dtype))
    return param


def sliced_parameter():
    "The first channels of a channels last weight, as a pruned convolution has them."
    param = nn.Parameter(torch.ones(4, 6, 3, 3).to(memory_format=torch.channels_last)[:, :3])
    param.grad = torch.ones(4, 3, 3, 3)
    return param


@st.composite
def modules(draw):
    "A module of any parameters and buffers, some of them tied and some sharing their memory, in one shape or two."
    params = draw(st.lists(parameters(), min_size=1, max_size=3))
    module = nn.ModuleList([nn.ParameterList(params)])
    if draw(st.booleans()):
        module.append(nn.ParameterList(params[:1]))
    if draw(st.booleans()):
        module.append(nn.ParameterList([nn.Parameter(params[0].data)]))
    if params[0].ndim and draw(st.booleans()):
        module.append(nn.ParameterList([nn.Parameter(params[0].data.transpose(0, -1))]))
    module.register_buffer("buffer", draw(strided(draw(shapes_with_a_format), draw(st.sampled_from(DTYPES)))))
    return module


# What has to hold


def bits(x):
    x = x.detach().as_subclass(torch.Tensor).resolve_conj()
    return x.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def canonical_strides(shape):
    return torch.empty(shape, device="meta").stride()


def one_element_an_item(shape):
    "Whether both formats have the same strides, read as contiguous; others may be read as either."
    return all(size == 1 for size in shape[1:])


def assert_converted(new, old, channels_last):
    assert torch.equal(bits(new), bits(old))
    assert type(new) is type(old) and vars(new) == vars(old)
    for name in ("shape", "dtype", "device", "layout", "requires_grad"):
        assert getattr(new, name) == getattr(old, name), name
    assert (new.data_ptr() == old.data_ptr()) is (new.stride() == old.stride()) or old.numel() == 0
    if old.ndim not in CHANNELS_LAST:
        assert new.stride() == old.stride()
    elif not channels_last:
        assert new.is_contiguous() and not is_channels_last(new)
    elif not one_element_an_item(old.shape):
        assert is_channels_last(new) is (old.numel() > 0)


def leaves(batch):
    "Everything in `batch` that is no container, in order, and the types of the containers."
    if isinstance(batch, dict):
        return [type(batch), *(leaf for item in batch.items() for leaf in leaves(item))]
    if isinstance(batch, (tuple, list)) and not isinstance(batch, torch.Size):
        return [type(batch), *(leaf for item in batch for leaf in leaves(item))]
    return [batch]


def assert_same_structure(new, old):
    new, old = leaves(new), leaves(old)
    assert len(new) == len(old)
    assert all(isinstance(a, torch.Tensor) if isinstance(b, torch.Tensor) else a is b for a, b in zip(new, old))


def assert_changed_alone(new, old):
    "What kept its strides is the object that it was."
    assert (new is old) is (new.stride() == old.stride())


def tensors_in(batch):
    return [leaf for leaf in leaves(batch) if isinstance(leaf, torch.Tensor)]


@properties
@given(tensors(shapes | shapes_with_a_format), st.booleans())
def test_tensor_keeps_everything_but_its_strides(x, channels_last):
    before, strides = bits(x), x.stride()
    new = to_memory_format(x, channels_last)
    assert_converted(new, x, channels_last)
    assert_changed_alone(new, x)
    assert to_memory_format(new, channels_last) is new
    assert torch.equal(bits(x), before) and x.stride() == strides


@properties
@given(tensors(shapes_with_a_format), st.booleans())
@example(torch.ones(2, 3, 4, 4), True)
def test_plain_tensor_keeps_its_attributes(x, channels_last):
    x = x.detach().as_subclass(torch.Tensor)
    x.note = "an attribute"
    assert to_memory_format(x, channels_last).note == "an attribute"


@properties
@given(tensors(shapes_with_a_format))
def test_round_trip_of_a_tensor_ends_in_contiguous_strides(x):
    last = to_memory_format(x)
    back = to_memory_format(last, channels_last=False)
    assert_converted(back, last, channels_last=False)
    if back is not x:
        assert back.stride() == canonical_strides(x.shape)


@properties
@given(tensors(st.permutations((0, 1, 2, 3)).map(tuple)))
@example(torch.empty(2, 3, 4, 0))
def test_round_trip_of_a_tensor_without_elements_ends_in_contiguous_strides(x):
    back = to_memory_format(to_memory_format(x), channels_last=False)
    assert back.stride() in (x.stride(), canonical_strides(x.shape))


@properties
@given(tensors(shapes_with_a_format, FLOATS[2:]))
def test_format_is_the_one_that_an_operator_reads(x):
    assume(not one_element_an_item(x.shape))  # nothing to see in the output
    assert get_memory_format(x) == format_an_operator_reads(x.detach().as_subclass(torch.Tensor))


@properties
@given(batches, st.booleans(), st.sampled_from(((4, 5), {4}, [5], ())))
def test_batch_keeps_its_structure(batch, channels_last, ndims):
    before = leaves(batch)
    new = to_memory_format(batch, channels_last, ndims)
    assert_same_structure(new, batch)
    for new_x, x in zip(tensors_in(new), tensors_in(batch)):
        if x.ndim in ndims:
            assert_converted(new_x, x, channels_last)
            assert_changed_alone(new_x, x)
        else:
            assert new_x is x
    unchanged = all(new_x is x for new_x, x in zip(tensors_in(new), tensors_in(batch)))
    assert (new is batch) is unchanged
    assert to_memory_format(new, channels_last, ndims) is new
    assert all(now is then for now, then in zip(leaves(batch), before, strict=True))


@properties
@given(states())
def test_state_becomes_contiguous_and_shares_what_it_shared(state):
    new = state_to_contiguous(state)
    assert_same_structure(new, state)
    olds, news = tensors_in(state), tensors_in(new)
    for x, new_x in zip(olds, news):
        assert_converted(new_x, x, channels_last=False)
        assert_changed_alone(new_x, x)
    for x, new_x in zip(olds, news):
        for other, new_other in zip(olds, news):
            assert other is not x or new_other is new_x
    assert state_to_contiguous(new) is new


@properties
@given(tensors(shapes_with_a_format), in_the_same_memory)
@example(torch.complex(torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4)), lambda x: x.conj())
def test_tensors_of_one_memory_in_a_state_are_not_mixed_up(x, other):
    x = [x, other(x)]
    for old_x in x:
        vars(old_x).clear()
    for new_x, old_x in zip(state_to_contiguous(x), x):
        assert_converted(new_x, old_x, channels_last=False)
        assert_changed_alone(new_x, old_x)


def snapshot(module):
    params = list(module.named_parameters(remove_duplicate=False))
    tensors = [*params, *module.named_buffers()]
    grads = [(name, param.grad) for name, param in params if param.grad is not None]
    return {name: (x, bits(x)) for name, x in tensors}, {name: (grad, bits(grad)) for name, grad in grads}


def assert_kept(module, before):
    "Parameters, buffers and gradients of `module` are the same objects with the same values."
    now = snapshot(module)
    for tensors, tensors_before in zip(now, before):
        assert tensors.keys() == tensors_before.keys()
        for name, (x, x_bits) in tensors.items():
            assert x is tensors_before[name][0] and torch.equal(x_bits, tensors_before[name][1]), name


def overlap(x, y):
    "Whether two tensors lie in the same memory in two ways, as a parameter and its transpose do."
    return x.numel() > 0 and x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr() and not x.is_set_to(y)


@properties
@given(modules(), st.booleans())
def test_module_keeps_everything_but_its_strides(module, channels_last):
    before = snapshot(module)
    state = {name: x.detach() for name, (x, _) in before[0].items()}
    grads = {name: grad.detach() for name, (grad, _) in before[1].items()}
    assert module_to_memory_format(module, channels_last) is module
    assert_kept(module, before)
    stay = {name for pair in combinations(before[0], 2) if overlap(*(state[name] for name in pair)) for name in pair}
    for name, (x, _) in before[0].items():
        if name in stay:
            assert x.is_set_to(state[name])
        else:
            assert_converted(x.detach(), state[name], channels_last)
    for one, other in combinations(before[0], 2):
        if state[one].numel() > 0 and state[one].is_set_to(state[other]):
            assert before[0][one][0].is_set_to(before[0][other][0]), "no longer the same memory"
    for name, (grad, _) in before[1].items():
        param = before[0][name][0]
        assert grad.stride() == (param if param.ndim in CHANNELS_LAST else grads[name]).stride(), name


@properties
@given(modules(), st.booleans())
def test_module_converted_twice_moves_nothing(module, channels_last):
    module_to_memory_format(module, channels_last)
    tensors = [*module.parameters(), *module.buffers()]
    tensors += [x.grad for x in tensors if x.grad is not None]
    before = [(x.data_ptr(), x.stride()) for x in tensors]
    module_to_memory_format(module, channels_last)
    assert [(x.data_ptr(), x.stride()) for x in tensors] == before


@properties
@given(parameters(shapes_with_a_format, views=("sliced", "plain")), st.booleans())
@example(sliced_parameter(), True)
def test_parameter_with_gaps_gets_strides_that_its_gradient_can_have(param, channels_last):
    module_to_memory_format(nn.ParameterList([param]), channels_last)
    assert param.grad is None or param.grad.stride() == param.stride()


@properties
@given(st.data())
def test_optimizer_state_follows(data):
    params = data.draw(st.lists(parameters(), min_size=1, max_size=3))
    optimizer = SimpleNamespace(state={})
    for param in params:
        names = data.draw(st.sets(st.sampled_from(("a", "b", "c"))))
        state = {name: data.draw(strided(param.shape, data.draw(st.sampled_from(FLOATS)))) for name in names}
        optimizer.state[param] = {**state, "step": 3, "other": data.draw(tensors())}
    before = {param: dict(state) for param, state in optimizer.state.items()}
    values = [
        (param, x, bits(x), x.dtype, x.stride(), x.data_ptr())
        for param, state in optimizer.state.items()
        for x in state.values()
        if isinstance(x, torch.Tensor)
    ]
    assert optimizer_to_memory_format(optimizer) is optimizer
    for param, state in optimizer.state.items():
        assert all(state[name] is before[param][name] for name in before[param])
    for param, x, x_bits, dtype, strides, pointer in values:
        assert torch.equal(bits(x), x_bits) and x.dtype == dtype
        if param.ndim in CHANNELS_LAST and x.shape == param.shape:
            assert x.stride() == param.stride()
        else:
            assert (x.stride(), x.data_ptr()) == (strides, pointer)
    pointers = [x.data_ptr() for _, x, *_ in values]
    optimizer_to_memory_format(optimizer)
    assert [x.data_ptr() for _, x, *_ in values] == pointers
