"The architectures of three libraries, data for them, and what the options of scripts mean."

import os
from pathlib import Path

import pytest
import torch
import torchvision

from channelslast import callback, precision
from channelslast.zoo import (
    IllegalValue,
    arch_names,
    check_arch,
    check_positive,
    choose_amp_mode,
    compile_caches,
    default_size,
    find_device,
    image_folder,
    new_learner,
    new_model,
    similar_names,
    synthetic_inputs,
    to_fastai_channelslast,
)
from channelslast.zoo.architectures import torchvision_kind


def test_default_size_is_that_of_the_architecture():
    sizes = {arch: default_size(arch, torch.nn.Identity()) for arch in ("r3d_18", "resnet18")}
    assert sizes == {"r3d_18": 112, "resnet18": 224}
    timm_model = new_model("tf_efficientnet_b1")
    assert default_size("tf_efficientnet_b1", timm_model) == timm_model.pretrained_cfg["input_size"][-1] == 240


def test_images_have_the_channels_that_timm_tells():
    model = torch.nn.Identity()
    model.pretrained_cfg = {"input_size": (1, 28, 28)}
    (images,) = synthetic_inputs("small", model, 2, 28, torch.device("cpu"))
    assert images.shape == (2, 1, 28, 28)


def test_classification_models_alone_for_the_training_script():
    names = arch_names("classification")
    assert "resnet18" in names["torchvision"] and "deeplabv3_resnet50" not in names["torchvision"]
    assert "DynamicUnet" not in names["fastai"]
    with pytest.raises(IllegalValue, match="no such classification model"):
        new_model("DynamicUnet", 3, kind="classification")


@pytest.mark.parametrize("arch", ["xresnet18", "squeezenet1_1", "resnet10t", "DynamicUnet", "googlenet"])
def test_model_has_the_classes_asked_for(arch):
    model = new_model(arch, 3, size=64)
    assert model(torch.randn(2, 3, 64, 64)).shape[:2] == (2, 3)


def test_every_architecture_of_torchvision_is_known_by_its_kind():
    kinds = {torchvision_kind(name) for name in torchvision.models.list_models()}
    assert kinds == {"models", "segmentation", "detection", "video", "optical_flow", "quantization"}
    assert torchvision_kind("convnext_nano") == ""


def test_names_that_are_close_are_named_whatever_their_case():
    names = sorted({name for group in arch_names().values() for name in group})
    assert similar_names("unet", names)[0] == "DynamicUnet"
    assert similar_names("ResNet50", names)[0] == "resnet50" and "xresnet50" in similar_names("ResNet50", names)
    assert similar_names("DYNAMICUNE", names)[0] == "DynamicUnet"
    assert similar_names("?", names) == similar_names("", names) == []


def test_a_wrong_value_is_an_error_that_names_it_and_what_is_legal():
    with pytest.raises(IllegalValue, match=r"^arch='unet': no such model in .*; did you mean DynamicUnet") as raised:
        check_arch("unet")
    assert isinstance(raised.value, ValueError) and (raised.value.name, raised.value.value) == ("arch", "unet")
    with pytest.raises(ValueError, match=r"^path='/no/such': there is no such folder"):
        image_folder("/no/such")
    with pytest.raises(ValueError, match=r"^device='abacus': "):
        find_device("abacus")
    with pytest.raises(ValueError, match=r"^bs=0: pass a number above 0"):
        check_positive(size=None, bs=0)
    for amp_mode in ("none", "fp8"):
        with pytest.raises(ValueError, match=rf"^amp_mode='{amp_mode}': pass one of auto, fp16, bf16, fp32"):
            choose_amp_mode(amp_mode, torch.device("cpu"))


def test_auto_is_what_the_device_is_fastest_at(monkeypatch):
    for dtypes, mode in (((torch.bfloat16,), "bf16"), ((torch.float16, torch.bfloat16), "fp16"), ((), None)):
        monkeypatch.setattr("channelslast.zoo.options.accelerated_dtypes", lambda device, dtypes=dtypes: dtypes)
        assert choose_amp_mode("auto", torch.device("cpu")) == mode
    assert choose_amp_mode("fp32", torch.device("cpu")) is None


def test_what_we_compare_with_is_fastais_own():
    learn = new_learner("resnet10t", 2, 32, torch.device("cpu"))
    assert to_fastai_channelslast(learn) is learn
    added = learn.cbs[-2:]
    assert [cb.name for cb in added] == ["channels_last", "mixed_precision"]
    assert not any(isinstance(cb, (callback.ChannelsLast, precision.MixedPrecision)) for cb in added)


def test_compiled_code_is_kept_in_the_folder_named_or_in_one_that_goes(tmp_path, monkeypatch):
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    monkeypatch.setenv(names[0], "users")
    monkeypatch.delenv(names[1], raising=False)
    with compile_caches(tmp_path):
        assert [os.environ[name] for name in names] == [str(tmp_path), f"{tmp_path}/triton"]
    with compile_caches():
        empty = Path(os.environ[names[0]])
        assert empty != tmp_path and not list(empty.iterdir()) and Path(os.environ[names[1]]).parent == empty
    assert not empty.exists() and tmp_path.exists()
    assert os.environ[names[0]] == "users" and names[1] not in os.environ
