"What `get_preds`, `predict` and `tta` of a channels last Learner return: contiguous tensors."

import numpy as np
import pytest
import torch
from conftest import Batches
from fastai.callback.core import Callback
from fastai.data.block import DataBlock
from fastai.data.core import DataLoaders
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from fastai.vision.core import PILImage, PILMask
from fastai.vision.data import ImageBlock, MaskBlock
from torch import nn

from channelslast.memory_format import is_channels_last


def random_image(i):
    return PILImage.create(np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8))


def random_mask(i):
    return PILMask.create(np.random.default_rng(i).integers(0, 2, (8, 8), dtype=np.uint8))


def segmentation_net(n_out=2):
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, n_out, 3, padding=1))


@pytest.fixture
def masks():
    blocks = DataBlock((ImageBlock, MaskBlock(codes=["a", "b"])), get_x=random_image, get_y=random_mask)
    return blocks.dataloaders(range(12), bs=4, num_workers=0, device=torch.device("cpu"))


@pytest.fixture
def learn(new_learner, masks):
    "Its loss has no activation: fastai's makes softmax of the predictions, which loses channels last on some devices."
    learn = new_learner(segmentation_net, masks, loss_func=nn.CrossEntropyLoss(), metrics=[])
    return learn.to_channelslast(use_amp=False)


def tensors_in(nested):
    if torch.is_tensor(nested):
        return [nested]
    return [tensor for item in nested or () for tensor in tensors_in(item)] if isinstance(nested, (tuple, list)) else []


def assert_contiguous(nested, n):
    tensors = tensors_in(nested)
    assert len(tensors) == n
    for tensor in tensors:
        assert tensor.is_contiguous() and not is_channels_last(tensor), (tensor.shape, tensor.stride())
        tensor.view(-1)


def output_format(learn):
    "Whether the model hands channels last on, seen before any callback changes it."
    seen = []
    hook = learn.model.register_forward_hook(lambda module, args, output: seen.append(is_channels_last(output)))
    return seen, hook


@pytest.mark.parametrize("loss", [CrossEntropyLossFlat(axis=1), nn.CrossEntropyLoss()], ids=["fastai's", "PyTorch's"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_get_preds_returns_contiguous_tensors(learn, loss, shuffled):
    learn.loss_func = loss
    seen, _ = output_format(learn)
    results = learn.get_preds(ds_idx=0 if shuffled else 1, with_input=True, with_loss=True, with_decoded=shuffled)
    assert set(seen) == {True}
    assert_contiguous(results, 5 if shuffled else 4)


@pytest.mark.parametrize("loss", [nn.MSELoss(), MSELossFlat(), nn.L1Loss(), BCEWithLogitsLossFlat()], ids=repr)
def test_loss_of_each_item_of_an_image_to_image_model(new_learner, loss):
    def preds(channels_last):
        learn = new_learner(lambda: segmentation_net(3), DataLoaders(dl, dl, device="cpu"), loss_func=loss, metrics=[])
        if channels_last:
            learn.to_channelslast(use_amp=False)
        return learn.get_preds(dl=dl, with_loss=True, with_input=True)

    x = torch.rand(8, 3, 8, 8)
    dl = Batches([(x[:4], x[4:]), (x[4:], x[:4])])
    ours, expected = preds(True), preds(False)
    assert_contiguous(ours, 4)
    for a, b in zip(ours, expected):
        assert torch.allclose(a, b, atol=1e-5)


def test_saved_predictions_are_contiguous(learn, tmp_path):
    learn.get_preds(save_preds=tmp_path)
    files = list(tmp_path.iterdir())
    assert files
    for file in files:
        assert_contiguous(torch.load(file), 1)


def test_predict_returns_contiguous_tensors(learn):
    with learn.no_mbar():
        image, decoded, index, probabilities = learn.predict(random_image(0), with_input=True)
    assert_contiguous([decoded, index, probabilities], 3)
    assert probabilities.shape == (2, 8, 8) and image.shape == (3, 8, 8)


@pytest.mark.parametrize("options", [dict(), dict(use_max=True), dict(beta=None)], ids=str)
def test_tta_returns_contiguous_tensors(learn, options):
    with learn.no_mbar():
        assert_contiguous(learn.tta(n=2, **options), 3 if options == {"beta": None} else 2)


class Several(nn.Module):
    "Images, positions in an image, volumes, masks of one class, and classes, in tuples and a list."

    def __init__(self):
        super().__init__()
        self.body = segmentation_net(4)

    def forward(self, x):
        x = self.body(x)
        mask = torch.empty(len(x), 1, 8, 8).to(memory_format=torch.channels_last)
        return x, (x.flatten(2), x[:, :2].unsqueeze(2), mask), [x.mean((2, 3))]


def test_every_output_of_a_model_is_contiguous(new_learner):
    def loss(pred, target):
        return pred[2][0].mean()

    x = torch.rand(4, 3, 8, 8)
    dl = Batches([(x, torch.zeros(4))])
    seen = []
    learn = new_learner(Several, DataLoaders(dl, dl, device="cpu"), loss_func=loss, metrics=[])
    learn.to_channelslast(use_amp=False)
    learn.validate(cbs=Callback(after_loss=lambda cb: seen.append(cb.pred)))
    assert_contiguous(seen, 5)
    assert [type(part) for part in seen[0]] == [torch.Tensor, tuple, list]


def test_training_keeps_the_format_of_the_predictions(learn):
    seen = {True: [], False: []}
    learn.fit(1, cbs=Callback(after_loss=lambda cb: seen[cb.training].append(is_channels_last(cb.pred))))
    assert set(seen[True]) == {True} and set(seen[False]) == {False}


def test_contiguous_learner_keeps_what_its_model_returns(new_learner):
    class Transposes(nn.Linear):
        def forward(self, x):
            return super().forward(x).transpose(1, 2)

    x = torch.rand(4, 5, 6)
    dl = Batches([(x, torch.zeros(4))])
    seen = []
    dls = DataLoaders(dl, dl, device="cpu")
    learn = new_learner(lambda: Transposes(6, 3), dls, loss_func=lambda pred, y: pred.mean(), metrics=[])
    learn.validate(cbs=Callback(after_loss=lambda cb: seen.append(cb.pred)))
    assert not seen[0].is_contiguous()
