"""Torchvision's architectures, and one of each module of timm, train in channels last as they do in contiguous format.

A sample of them, unless `ARCHITECTURES=all pytest tests/test_architectures.py` asks for all (half an hour), or
`ARCHITECTURES='resnet50 vgg11'` for some by name.
"""

import copy
import os

import pytest
import timm
import torch
from conftest import formats_of
from fastai.callback.core import Callback, CancelValidException
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from fastai.optimizer import SGD
from torch import nn
from torchvision.models import list_models

from channelslast.zoo import new_model, synthetic_dls, synthetic_loss

# Classification, residual and depthwise; a GroupNorm and attention; segmentation, detection, video, quantization
SAMPLE = """
resnet18 mobilenet_v3_small shufflenet_v2_x0_5 edgenext_xx_small lraspp_mobilenet_v3_large
fasterrcnn_mobilenet_v3_large_320_fpn swin3d_t quantized_mobilenet_v2
"""

# More than 100 million parameters, where a smaller one of torchvision has the same code
GIANTS = """
convnext_large efficientnet_v2_l regnet_x_32gf regnet_y_32gf regnet_y_128gf vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn
vit_h_14 vit_l_16 vit_l_32 wide_resnet101_2
"""

# The smallest of each module of timm, but for deepseek_vit, where that has 412 million parameters
TIMM = """
beit_base_patch16_224 cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 convnext_zepto_rms cpubone_nano
crossvit_tiny_240 cs3darknet_focus_s csatv2 cspnext_tiny davit_tiny deit_tiny_patch16_224 densenet121 dla46x_c dpn48b
edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientvim_m1 efficientvit_b0 efficientvit_m0
ese_vovnet19b_slim_dw fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m ghostnet_050
gmlp_ti16_224 halonet_h1 hardcorenas_b hgnetv2_b0 hiera_tiny_224 hrnet_w18_small iformer_t inception_next_atto
inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small legacy_seresnet18 legacy_xception levit_128s lowformer_b0
mambaout_femto maxvit_pico_rw_256 mobilenetv2_035 mobilenetv3_small_050 mobilenetv5_base mobileone_s1 mobilevit_xxs
mvitv2_tiny naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny nextvit_small nf_regnet_b0 pit_ti_224
pnasnet5large poolformerv2_s12 pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050 repvit_m1 res2next50
resnest14d resnet10t resnetv2_18 rexnet_100 sam2_hiera_tiny samvit_base_patch16_224 selecsls42 sequencer2d_s shvit_s1
skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window8_256
tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny vit_srelpos_small_patch16_224
vit_tiny_patch16_224 vit_tiny_patch16_dinov3_qkvb vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224 xception41p
xcit_nano_12_p8_224
"""

# The smallest size that runs and leaves batch norm enough pixels, if that is not 64; 32 for clips of 16 frames
SIZES = {
    32: """
        mc3_18 r2plus1d_18 r3d_18 swin3d_b swin3d_s swin3d_t
    """,
    128: """
        efficientvim_m1 inception_resnet_v2 inception_v3 inception_v4 raft_large raft_small
    """,
    224: """
        beit_base_patch16_224 cait_xxs24_224 coat_tiny convit_tiny deit_tiny_patch16_224 efficientformer_l1
        efficientformerv2_s0 efficientvit_m0 gcvit_xxtiny gmlp_ti16_224 hiera_tiny_224 levit_128s maxvit_t mvit_v1_b
        mvit_v2_s mvitv2_tiny nest_tiny pit_ti_224 s3d samvit_base_patch16_224 sequencer2d_s swiftformer_xs
        swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 tnt_s_legacy_patch16_224 twins_svt_small visformer_tiny
        vit_b_16 vit_b_32 vit_l_16 vit_l_32 vit_srelpos_small_patch16_224 vit_tiny_patch16_224 vit_tiny_r_s16_p8_224
        vitamin_small_224 volo_d1_224 xcit_nano_12_p8_224
    """,
    240: """
        crossvit_tiny_240
    """,
    256: """
        halonet_h1 maxvit_pico_rw_256 swinv2_tiny_window8_256 vit_tiny_patch16_dinov3_qkvb
    """,
    299: """
        quantized_inception_v3
    """,
}


# They call `.view` on channels last activations: plain PyTorch raises there too
VIEWS = "keypointrcnn_resnet50_fpn"


def each_architecture():
    "Parametrize by the names of the architectures to try."
    return pytest.mark.parametrize("arch", asked_for())


def asked_for():
    names = os.environ.get("ARCHITECTURES", SAMPLE)
    if names != "all":
        return names.split()
    torchvisions = [name for name in list_models() if name not in GIANTS.split()]
    return torchvisions + [f"timm.{name}" for name in TIMM.split()]  # a name may be in both libraries


def size_of(arch):
    "The pixels of the images on which `arch` is tried."
    return next((size for size, names in SIZES.items() if arch.removeprefix("timm.") in names.split()), 64)


def new_learner(arch):
    "Always the same Learner of `arch`, with two batches of two images."
    torch.manual_seed(0)
    size = size_of(arch)
    if arch.startswith("timm."):
        model = timm.create_model(arch.removeprefix("timm."), num_classes=10)
    else:
        model = new_model(arch, n_out=None if arch.startswith("raft") else 10, size=size)
    for module in model.modules():
        if getattr(module, "track_running_stats", False):
            module.momentum = 0.9  # two batches make no statistics to validate with at the usual 0.1
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # the random numbers come in the order of memory, and drop other pixels in another format
    if hasattr(model, "transform"):  # a detection model resizes the images by itself
        model.transform.min_size, model.transform.max_size = (size,), size
    dls = synthetic_dls(arch, model, 2, size, torch.device("cpu"), n=2)
    learn = Learner(dls, model, loss, opt_func=SGD, lr=1e-3, moms=(0.9, 0.9, 0.9))
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *args: None
    return learn


def loss(output, target):
    return synthetic_loss(output, target).float()  # fastai's Recorder takes no float64


class Record(Callback):
    "The loss of every batch."

    def __init__(self):
        self.losses = []

    def before_validate(self):
        if not isinstance(self.pred, torch.Tensor):
            raise CancelValidException()  # `synthetic_loss` has no meaning for boxes

    def after_loss(self):
        self.losses.append(self.loss.item())


def fit(learn):
    record = Record()
    torch.manual_seed(1)
    learn.fit(1, cbs=record)
    losses = torch.tensor(record.losses)
    assert len(losses) >= 2 and losses.isfinite().all()
    return losses


def same_state(model, state):
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def close(losses, expected, rtol):
    return torch.allclose(losses, expected, rtol=rtol, atol=rtol / 100)


@pytest.fixture
def in_float64():
    "A function that calls one where new tensors are float64."

    def call(function):
        torch.set_default_dtype(torch.float64)
        try:
            return function()
        finally:
            torch.set_default_dtype(torch.float32)

    return call


@each_architecture()
def test_trains_as_contiguous(arch, tmp_path, in_float64):
    contiguous, learn = new_learner(arch), new_learner(arch).to_channelslast(use_amp=False)
    if arch in VIEWS.split():
        with pytest.raises(RuntimeError, match="view size is not compatible") as caught:
            fit(learn)
        assert any("learn.to_contiguous()" in note for note in caught.value.__notes__)
        assert ".view" in learn.format_summary().error
        assert close(fit(learn.to_contiguous()), fit(contiguous), rtol=1e-6)
        return
    has_images = bool(formats_of(learn.model))
    expected, losses = fit(contiguous), fit(learn)
    assert formats_of(learn.model) == ({True} if has_images else set())

    # With equal weights rounding changes a loss by 1e-4 at most here. A step of a deep network with fresh weights and
    # batch norm over a few pixels may enlarge that by any factor, which only float64 tells from a wrong gradient.
    assert close(losses[:1], expected[:1], rtol=1e-3)
    if not close(losses, expected, rtol=1e-3):
        expected = in_float64(lambda: fit(new_learner(arch)))
        losses = in_float64(lambda: fit(new_learner(arch).to_channelslast(use_amp=False)))
        assert close(losses, expected, rtol=1e-3)

    state = copy.deepcopy(learn.model.state_dict())
    summary = learn.format_summary()
    assert summary.error is None and summary.model in str(summary)
    assert same_state(learn.model, state)

    learn.path = contiguous.path = tmp_path
    learn.save("model")
    contiguous.load("model")
    assert same_state(contiguous.model, state)

    assert learn.to_contiguous() is learn
    assert formats_of(learn.model) == ({False} if has_images else set())
    assert close(fit(learn), fit(contiguous), rtol=1e-6)


@pytest.mark.skipif(os.environ.get("ARCHITECTURES") != "all", reason="only where all are tried")
def test_all_modules_of_timm_are_tried():
    tried = {timm.models.model_entrypoint(name).__module__.rpartition(".")[-1] for name in TIMM.split()}
    assert tried == set(timm.list_modules()) - {"deepseek_vit"}
