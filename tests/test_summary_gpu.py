"What the kernels of a GPU tell."

from types import SimpleNamespace

import pytest
import torch
from fastai.learner import Learner
from torch import nn
from torch.autograd import DeviceType
from tracing import flat, thrashing_model

from channelslast.memory_format import module_to_memory_format
from channelslast.summary import format_summary
from channelslast.summary.gpu import gpu_shares

# The GPU


def kernel(name, start, end, device_type=DeviceType.CUDA):
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), device_type=device_type)


def test_gpu_shares_of_kernels_that_overlap():
    events = [
        kernel("conv", 0, 50),
        kernel("nchwToNhwcKernel", 40, 60),  # on another stream
        kernel("conv", 80, 110),
        kernel("cudaLaunchKernel", 0, 1000, DeviceType.CPU),
    ]
    shares = gpu_shares(events, seconds=180e-6)
    assert shares.layout == pytest.approx(20 / 100) and shares.busy == pytest.approx(90 / 180)


@pytest.mark.parametrize(
    "name, is_layout",
    [
        ("void cudnn::engines_precompiled::nchwToNhwcKernel<__half, __half, float, false, true>(...)", True),
        ("void cudnn::engines_precompiled::nhwcToNchwKernel<__half, __half, float, true, false>(...)", True),
        ("void nhwcAddPaddingKernel<__half, __half, float, true, (cudnnKernelDataType_t)0>(...)", True),
        (
            "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<direct_copy_kernel_cuda",
            True,
        ),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(...)", False),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::float16_copy_kernel_cuda(...)", False),
        ("void at::native::elementwise_kernel<128, 4, at::native::CUDAFunctor_add<c10::Half>>", False),
        ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_cudnn", False),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<OpaqueType<2u>, unsigned int, 4>", False),
    ],
)
def test_layout_kernels_are_known_by_name(name, is_layout):
    assert gpu_shares([kernel(name, 0, 1)], seconds=1).layout == is_layout


@pytest.mark.cuda
def test_gpu_shares_of_a_learner(new_learner):
    learn = new_learner(thrashing_model, device="cuda").to_channelslast()
    before = torch.cuda.get_rng_state()
    summary = learn.format_summary()
    assert summary.dtype == "fp16" and summary.device.startswith("cuda")
    assert 0 < summary.gpu.layout < 1 and 0 < summary.gpu.busy <= 1
    assert "in layout kernels" in flat(summary)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert learn.format_summary(profile=False).gpu is None


@pytest.mark.cuda
def test_contiguous_model_spends_more_on_layout_than_a_channels_last_one():
    x = torch.randn(32, 64, 56, 56, device="cuda")
    shares = []
    for channels_last in (False, True):
        model = nn.Sequential(*[nn.Conv2d(64, 64, 3, padding=1) for _ in range(4)]).cuda()
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        with torch.autocast("cuda", torch.float16):
            summary = format_summary(module_to_memory_format(model, channels_last), x.to(memory_format=memory_format))
        shares.append(summary.gpu.layout)
    assert shares[0] > 0.1 > shares[1]


@pytest.mark.cuda
def test_group_norm_on_cuda_keeps_the_format_from_the_version_that_the_hint_tells():
    model = module_to_memory_format(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)).cuda())
    x = torch.randn(2, 3, 8, 8, device="cuda").to(memory_format=torch.channels_last)
    summary = format_summary(model, x, profile=False)
    assert bool(summary.hints) == bool(summary.losers) == (torch.__version__ < "2.15")


def test_patched_method_and_function_are_two(learn):
    assert Learner.format_summary is not format_summary
