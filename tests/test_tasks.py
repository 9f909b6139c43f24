"Whatever fastai trains, and however its model is built, trains in channels last as it does in contiguous format."

import copy
import random

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import Batches, formats_of, new_dls
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.data.core import DataLoaders
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.tabular.all import Categorify, Normalize, TabularDataLoaders, tabular_learner
from fastai.text.all import AWD_LSTM, TextDataLoaders, language_model_learner, text_classifier_learner
from fastai.text.models.awdlstm import awd_lstm_clas_config, awd_lstm_lm_config
from fastai.vision.gan import GANLearner, basic_critic, basic_generator
from fastcore.foundation import L
from torch import nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

# The networks


def conv(n_in, n_out, **kwargs):
    return nn.Conv2d(n_in, n_out, 3, padding=1, **kwargs)


def head(n_in=8, n_out=3):
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, n_out)]


def small_net(first=None, second=None):
    return nn.Sequential(
        first or conv(3, 8), nn.BatchNorm2d(8), nn.SiLU(), second or conv(8, 8), nn.BatchNorm2d(8), nn.SiLU(), *head()
    )


class CRNN(nn.Module):
    "Convolutions, and a recurrent network over the columns of the image."

    def __init__(self, cls):
        super().__init__()
        self.convs = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d((2, 1)))
        self.rnn = cls(8 * 4, 16, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        columns = self.convs(x).flatten(1, 2).transpose(1, 2)
        return self.head(self.rnn(columns)[0].mean(1))


class Siamese(nn.Module):
    "One body for two images."

    def __init__(self):
        super().__init__()
        self.body = small_net()[:-1]
        self.head = nn.Linear(16, 2)

    def forward(self, left, right):
        return self.head(torch.cat([self.body(left), self.body(right)], dim=1))


class Checkpointed(nn.Module):
    "A body whose activations are computed again in the backward pass."

    def __init__(self, use_reentrant):
        super().__init__()
        self.stem, self.body, self.head = conv(3, 8), small_net(conv(8, 8))[:-3], nn.Sequential(*head())
        self.use_reentrant = use_reentrant

    def forward(self, x):
        return self.head(checkpoint(self.body, self.stem(x), use_reentrant=self.use_reentrant))


class Tied(nn.Module):
    "An autoencoder whose decoder has the weight of its encoder, and one layer that is used twice."

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = conv(3, 8), nn.ConvTranspose2d(8, 3, 3, padding=1)
        self.decoder.weight = self.encoder.weight
        self.inner = self.again = conv(8, 8)

    def forward(self, x):
        return self.decoder(F.silu(self.again(F.silu(self.inner(F.silu(self.encoder(x)))))))


class Unit(nn.Module):
    "A weight scaled to norm 1 for each filter."

    def forward(self, weight):
        return weight / weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.ndim - 1))


def parametrized():
    model = small_net()
    parametrize.register_parametrization(model[0], "weight", Unit())
    return model


def quantization_aware():
    from torch.ao import quantization  # deprecated, and in use

    model = nn.Sequential(quantization.QuantStub(), small_net(), quantization.DeQuantStub())
    quantization.fuse_modules_qat(model[1].train(), [["0", "1"], ["3", "4"]], inplace=True)
    model.qconfig = quantization.get_default_qat_qconfig("x86")
    return quantization.prepare_qat(model.train())


# The tasks


def images(model, n_inputs=1, n_out=3, loss_func=None, **kwargs):
    dls = new_dls(3, 8, 8, n_out=n_out)
    if n_inputs == 2:
        batches = Batches((x, x.flip(0), y) for x, y in dls.train)
        dls = DataLoaders(batches, batches)
    return Learner(dls, model, loss_func=loss_func or CrossEntropyLossFlat(), **kwargs)


def autoencoder():
    batches = Batches((x, x) for x, _ in new_dls(3, 8, 8).train)
    return Learner(DataLoaders(batches, batches), Tied(), loss_func=nn.MSELoss())


def frozen():
    learn = images(small_net(), splitter=lambda model: [list(model[:3].parameters()), list(model[3:].parameters())])
    learn.freeze()
    return learn


def texts():
    words = np.array(["one", "two", "three", "four", "five", "six", "seven"])
    rng = np.random.default_rng(0)
    sentences = [" ".join(rng.choice(words, 12)) for _ in range(40)]
    return pd.DataFrame({"text": sentences, "label": ["even" if i % 2 else "odd" for i in range(40)]})


def text_dls(**kwargs):
    return TextDataLoaders.from_df(
        texts(), text_col="text", label_col="label", valid_pct=0.25, seed=0, bs=8, seq_len=8, n_workers=1, **kwargs
    )


AWD = {"emb_sz": 8, "n_hid": 12, "n_layers": 2}


def language_model():
    config = {**awd_lstm_lm_config, **AWD}
    return language_model_learner(text_dls(is_lm=True), AWD_LSTM, config=config, pretrained=False)


def text_classifier():
    config = {**awd_lstm_clas_config, **AWD}
    return text_classifier_learner(text_dls(), AWD_LSTM, config=config, pretrained=False)


def table():
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {"color": rng.choice(list("rgb"), 40), "size": rng.normal(size=40), "label": rng.choice(["yes", "no"], 40)}
    )


def tabular():
    dls = TabularDataLoaders.from_df(
        table(), cat_names=["color"], cont_names=["size"], y_names="label", procs=[Categorify, Normalize], bs=8
    )
    return tabular_learner(dls, layers=[8])


def collab(use_nn):
    rng = np.random.default_rng(0)
    ratings = pd.DataFrame({"user": rng.integers(0, 9, 64), "item": rng.integers(0, 9, 64), "rating": rng.random(64)})
    dls = CollabDataLoaders.from_df(ratings, bs=8, seed=0)
    return collab_learner(dls, n_factors=4, use_nn=use_nn, layers=[8], y_range=(0, 1))


def gan():
    noise = Batches((torch.randn(4, 10), x) for x in torch.randn(6, 4, 3, 16, 16))
    generator = basic_generator(16, 3, in_sz=10, n_features=8)
    return GANLearner.wgan(DataLoaders(noise, noise[:1]), generator, basic_critic(16, 3, n_features=8))


TASKS = {
    "CRNN of GRU": lambda: images(CRNN(nn.GRU)),
    "CRNN of LSTM": lambda: images(CRNN(nn.LSTM)),
    "CRNN of RNN": lambda: images(CRNN(nn.RNN)),
    "language model": language_model,
    "text classifier": text_classifier,
    "tabular": tabular,
    "collaborative filtering": lambda: collab(False),
    "collaborative filtering, a network": lambda: collab(True),
    "Siamese": lambda: images(Siamese(), n_inputs=2, n_out=2),
    "GAN": gan,
    "checkpoint": lambda: images(Checkpointed(False)),
    "reentrant checkpoint": lambda: images(Checkpointed(True)),
    "spectral norm": lambda: images(small_net(parametrizations.spectral_norm(conv(3, 8)))),
    "spectral norm by hooks": lambda: images(small_net(spectral_norm(conv(3, 8)))),
    "weight norm": lambda: images(small_net(parametrizations.weight_norm(conv(3, 8)))),
    "weight norm by hooks": lambda: images(small_net(weight_norm(conv(3, 8)))),
    "orthogonal": lambda: images(small_net(parametrizations.orthogonal(conv(3, 8)))),
    "parametrized": lambda: images(parametrized()),
    "quantization-aware": lambda: images(quantization_aware()),
    "tied weights": autoencoder,
    "frozen body": frozen,
}


def each_task(but=()):
    "Parametrize by task, `but` some."
    return pytest.mark.parametrize("task", [task for task in TASKS if task not in but])


CRNNS = ("CRNN of GRU", "CRNN of LSTM", "CRNN of RNN")
TEXTS = ("language model", "text classifier")
# PyTorch pickles no parametrized module, and fastai no GAN, whose critic it has frozen
NO_EXPORT = ("spectral norm", "weight norm", "orthogonal", "parametrized", "GAN")


# What holds of each


class Record(Callback):
    "The loss of every batch."

    order = 100  # after the callbacks that add to it

    def __init__(self):
        self.losses = []

    def after_loss(self):
        self.losses.append(self.loss.item())


def seed_all(seed):
    for seed_one in (random.seed, np.random.seed, torch.manual_seed):
        seed_one(seed)


@pytest.fixture
def new_task(tmp_path):
    "A function that makes the Learner of a task, always the same."

    def make(task):
        seed_all(0)
        learn = TASKS[task]()
        learn.remove_cb(ProgressCallback)
        learn.logger = lambda *args: None
        learn.path = tmp_path
        return learn

    return make


def fit(learn):
    record = Record()
    seed_all(1)
    learn.fit(2, 1e-2, cbs=record)
    return torch.tensor(record.losses)


def assert_same_state(model, state):
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@each_task()
def test_fits_as_contiguous(task, new_task):
    contiguous, learn = new_task(task), new_task(task).to_channelslast(use_amp=False)
    is_image_model = bool(formats_of(learn.model))
    expected, losses = fit(contiguous), fit(learn)
    assert len(losses) >= 6 and losses.isfinite().all() and len(losses.unique()) > 2
    # A rounding error of 1e-7, enlarged by the steps: 2e-5 at most here, 2e-4 where fake quantization rounds it up
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-6)
    assert formats_of(learn.model) == ({True} if is_image_model else set())

    # The twin takes what the other has learned, and both go on alike
    learn.save("model")
    with torch.serialization.safe_globals([L]):  # where hyperparameters are, and fastai 2.8.1 does not say so for texts
        contiguous.load("model")
    assert_same_state(learn.model, contiguous.model.state_dict())
    assert learn.to_contiguous() is learn
    assert formats_of(learn.model) == ({False} if is_image_model else set())
    torch.testing.assert_close(fit(learn), fit(contiguous), rtol=1e-6, atol=1e-7)

    # And back
    learn.to_channelslast(use_amp=False)
    torch.testing.assert_close(fit(learn), fit(contiguous), rtol=1e-3, atol=1e-6)


@each_task()
def test_summary_leaves_it_as_it_was(task, new_task):
    learn, twin = (new_task(task).to_channelslast(use_amp=False) for _ in range(2))
    fit(learn), fit(twin)
    state = copy.deepcopy(learn.model.state_dict())
    summary = learn.format_summary()
    assert summary.error is None and str(summary)
    assert_same_state(learn.model, state)
    assert torch.equal(fit(learn), fit(twin))


@each_task(but=NO_EXPORT)
def test_exports(task, new_task):
    learn = new_task(task).to_channelslast(use_amp=False)
    fit(learn)
    if isinstance(learn.dls.train, Batches):
        learn.dls.new_empty = lambda: DataLoaders(Batches(), Batches())
    learn.export()
    loaded = load_learner(learn.path / "export.pkl")
    assert_same_state(loaded.model, learn.model.state_dict())
    assert True not in formats_of(loaded.model)
