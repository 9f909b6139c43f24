"Networks with recurrent layers, of whose parameters fastai's optimizers keep more than tensors."

import pytest
import torch
from conftest import Batches, wrapped_adamw
from fastai.callback.core import Callback
from fastai.callback.rnn import rnn_cbs
from fastai.data.core import DataLoaders
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD, Adam, ranger
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config
from fastai.text.models.core import get_text_classifier
from torch import nn

from channelslast.formats import TrainFormat
from channelslast.memory_format import is_channels_last

RECURRENT = [nn.GRU, nn.LSTM, nn.RNN]


class CRNN(nn.Module):
    "Reads an image column by column, as text recognition does."

    def __init__(self, recurrent=nn.GRU):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.recurrent = recurrent(8 * 6, 16, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        columns = self.body(x).permute(0, 3, 1, 2).flatten(2)
        return self.head(self.recurrent(columns)[0][:, -1])


def crnn(recurrent):
    return lambda: CRNN(recurrent)


class Losses(Callback):
    "The training losses of all fits."

    def __init__(self):
        self.seen = []

    def after_loss(self):
        if self.training:
            self.seen.append(self.loss.detach().clone())


def has_a_key_that_is_no_parameter(opt):
    return any(not isinstance(param, torch.Tensor) for param in opt.state)


def assert_same(ours, twin, losses, twin_losses, rtol):
    assert len(losses.seen) == len(twin_losses.seen) > 0
    assert torch.allclose(torch.stack(losses.seen), torch.stack(twin_losses.seen), rtol=rtol)
    for (name, a), b in zip(ours.model.state_dict().items(), twin.model.state_dict().values()):
        assert torch.allclose(a, b, rtol=rtol, atol=rtol), name


@pytest.mark.parametrize("recurrent", RECURRENT, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("amp_mode, rtol", [(None, 1e-4), ("bf16", 0.05)])
def test_crnn_trains_as_its_contiguous_twin_and_goes_back(new_learner, bf16_cpu, recurrent, amp_mode, rtol):
    losses, twin_losses = Losses(), Losses()
    ours = new_learner(crnn(recurrent), opt_func=SGD, cbs=losses).to_format(TrainFormat(True, amp_mode))
    twin = new_learner(crnn(recurrent), opt_func=SGD, cbs=twin_losses).to_format(TrainFormat(False, amp_mode))
    for _ in range(2):
        ours.fit(1)
        twin.fit(1)
        assert has_a_key_that_is_no_parameter(ours.opt)
        assert is_channels_last(ours.model.body[0].weight)
    assert_same(ours, twin, losses, twin_losses, rtol)
    ours.to_contiguous()
    assert not is_channels_last(ours.model.body[0].weight)
    ours.fit(1)
    twin.fit(1)
    assert_same(ours, twin, losses, twin_losses, rtol)
    ours.to_channelslast(amp_mode="bf16").fit(1)
    ours.to_contiguous(to_fp32=True).fit(1)
    assert ours.train_format == TrainFormat() and not is_channels_last(ours.model.body[0].weight)


@pytest.mark.parametrize("opt_func", [Adam, ranger, wrapped_adamw])
def test_crnn_trains_with_every_kind_of_optimizer(new_learner, opt_func, tmp_path):
    learn = new_learner(crnn(nn.LSTM), opt_func=opt_func, path=tmp_path).to_channelslast(use_amp=False)
    learn.fit(1)
    learn.save("crnn")
    learn.load("crnn")
    learn.fit(1)
    learn.to_contiguous().fit(1)


def text_dls():
    "Texts of numbers below 20 in two classes, of which one has the larger ones."
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 2, (16,), generator=generator)
    x = torch.randint(0, 10, (16, 12), generator=generator) + 10 * y[:, None]
    batches = Batches((x[i : i + 8], y[i : i + 8]) for i in (0, 8))
    return DataLoaders(batches, Batches(batches), device="cpu")


def text_classifier():
    config = {**awd_lstm_clas_config, "emb_sz": 8, "n_hid": 12, "n_layers": 2}
    return get_text_classifier(AWD_LSTM, 20, 2, seq_len=12, config=config, drop_mult=0.1, pad_idx=19)


@pytest.mark.filterwarnings("ignore:The model has no 4D or 5D weights")
@pytest.mark.parametrize("amp_mode", [None, "bf16"])
def test_text_model_trains_as_ever_and_goes_back(new_learner, bf16_cpu, amp_mode):
    def learner(channels_last, losses):
        cbs = [*rnn_cbs(alpha=0, beta=0), losses]
        learn = new_learner(text_classifier, text_dls(), loss_func=CrossEntropyLossFlat(), cbs=cbs)
        return learn.to_format(TrainFormat(channels_last, amp_mode))

    losses, twin_losses = Losses(), Losses()
    ours, twin = learner(True, losses), learner(False, twin_losses)
    for go_back in (lambda: None, ours.to_contiguous, lambda: ours.to_format(TrainFormat(True, amp_mode))):
        go_back()
        for learn in (ours, twin):
            torch.manual_seed(0)
            learn.fit(1)
    assert_same(ours, twin, losses, twin_losses, rtol=0)
    assert has_a_key_that_is_no_parameter(ours.opt)
    ours.to_contiguous(to_fp32=True).fit(1)
    assert ours.train_format == TrainFormat()
