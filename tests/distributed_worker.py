"What each process of tests/test_distributed.py does; the first prints the results of all as JSON."

import json
import os
import runpy
import sys
import traceback
import warnings
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from conftest import ReadsLoss, TinyNet
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.distributed import DistributedDL  # and `Learner.distrib_ctx`
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD, Adam
from fastai.torch_core import rank_distrib
from torch import nn
from torch._dynamo.utils import counters

from channelslast.callback import ChannelsLast
from channelslast.find import distributed, plan
from channelslast.formats import TrainFormat
from channelslast.graphs import CudaGraph, GraphedModule, callback
from channelslast.graphs.replicas import Replicas
from channelslast.memory_format import is_channels_last


def broadcast(self, values, rank):
    "fastai's `DistributedDL._broadcast` sends over CUDA alone."
    tensor = torch.tensor(values)
    dist.broadcast(tensor, rank)
    return tensor.tolist()


def new_model():
    "Also with a 1x1 convolution of 1x1 images, whose gradient CUDA's kernels make in contiguous strides."
    *body, flatten, head = TinyNet()
    return nn.Sequential(*body, nn.Conv2d(16, 16, 1), flatten, head)


def new_learner(device, path):
    generator = torch.Generator().manual_seed(0)
    items = list(zip(torch.randn(50, 3, 8, 8, generator=generator), torch.randint(0, 3, (50,), generator=generator)))
    dls = DataLoaders(*[DataLoader(items, bs=8, num_workers=0) for _ in range(2)], device=device)
    torch.manual_seed(rank_distrib())  # each process with weights of its own: DistributedDataParallel sends the first's
    learn = Learner(dls, new_model(), CrossEntropyLossFlat(), opt_func=Adam, lr=1e-2, path=path)
    learn.remove_cbs([cb for cb in learn.cbs if cb.name == "progress"])
    learn.logger = lambda *args: None
    return learn


class Fails(Callback):
    def before_batch(self):
        if self.learn.train_format == TrainFormat(True):
            raise RuntimeError(f"in process {rank_distrib()}")


class FailsAlone(Callback):
    "Fail at an event in the last process alone, in channels last."

    order = 100  # after the Recorder has gathered the losses

    def __init__(self, event):
        self.event = event

    def __call__(self, event_name):
        is_last = rank_distrib() == dist.get_world_size() - 1
        if is_last and event_name == self.event and self.learn.train_format == TrainFormat(True):
            raise KeyError(f"alone at {event_name}")


class BrokenData:
    "Cannot be read in the last process."

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        if rank_distrib() == dist.get_world_size() - 1:
            raise OSError("no such file")
        return iter(self.loader)


class ConvertsTooLate(ChannelsLast):
    order = 100  # after `DistributedTrainer` has wrapped the model


def search(learn):
    plan.N_ROUNDS, plan.FEW_STEPS, plan.ENOUGH_STEPS, plan.ENOUGH_S = 3, 1, 1, 0
    model, loaders, fails = learn.model, list(learn.dls.loaders), Fails()
    params = list(model.parameters())
    failing = learn.add_cb(fails).format_find([TrainFormat(True)], show_plot=False)
    timings = learn.remove_cb(fails).format_find([TrainFormat(True)], show_plot=False)
    learn.add_cb(FailsAlone("after_batch"))  # after all gradients of the step are there
    going_on = learn.format_find([TrainFormat(True)], show_plot=False)[1].error
    learn.remove_cb(FailsAlone)
    return {
        "error_alone": going_on,
        "is_unchanged": learn.model is model and learn.dls.loaders == loaders,
        "n_hooks": sum(len(param._backward_hooks or ()) for param in params),
        "error": failing[1].error,
        "samples": [row.samples for row in timings],
        "best": str(timings.best),
        "data_items_per_s": timings.data_items_per_s,
    }


def search_broken_data(learn):
    learn.dls.loaders[0] = BrokenData(learn.dls.train)
    try:
        learn.format_find(show_plot=False)
    except Exception as error:
        return repr(error)


def fail_alone(learn, event):
    "Search where one process fails and the others wait for its gradients; it must not wait for them."
    distributed.PATIENCE = 1
    learn.add_cb(FailsAlone(event))
    try:
        learn.format_find([TrainFormat(True)], show_plot=False)
    except Exception as error:
        traceback.print_exc()
        print("ALONE", json.dumps([rank_distrib(), type(error).__name__, *error.__notes__]), flush=True)


def observe(learn):
    before = {name: value.clone() for name, value in learn.model.state_dict().items()}
    summary = learn.format_summary()
    after = learn.model.state_dict()
    is_unchanged = all(torch.equal(value, after[name]) for name, value in before.items())
    is_unchanged &= not any(param._backward_hooks for param in learn.model.parameters())
    return {
        "is_unchanged": is_unchanged,
        "modules": sorted({layer.module for layer in summary.layers}),
        "share": summary.channels_last_share,
        "shapes": summary.shapes,
    }


def train(learn, path):
    learn.fit(2)
    params = list(learn.model.parameters())
    total = torch.stack([param.double().sum() for param in params]).sum()
    totals = [torch.zeros_like(total) for _ in range(dist.get_world_size())]
    dist.all_gather(totals, total)
    learn.save("model")
    dist.barrier()
    saved = torch.load(path / "models" / "model.pth", weights_only=False)["model"]
    learn.load("model")
    learn.fit(1)
    return {
        "is_channels_last": all(is_channels_last(param) for param in params if param.ndim == 4),
        "is_same_everywhere": all(torch.equal(total, other) for other in totals),
        "is_file_contiguous": not any(is_channels_last(value) for value in saved.values()),
        "has_names_of_model": sorted(saved) == sorted(new_model().state_dict()),
    }


def shares(device):
    "Whether `Replicas` give buffers and gradients the values that `DistributedDataParallel` does."
    torch.manual_seed(rank_distrib())
    wrapper = nn.parallel.DistributedDataParallel(new_model().to(device), device_ids=None)
    replicas, images = Replicas(wrapper), torch.randn(4, 3, 8, 8, device=device)
    buffers = [buffer for buffer in wrapper.module.buffers() if buffer.is_floating_point()]
    results = []
    for ours in (False, True):
        wrapper.zero_grad()
        for i, buffer in enumerate(buffers):
            nn.init.constant_(buffer, 1 + i + rank_distrib())
        if ours:
            replicas.send_buffers()
        seen = [buffer.clone() for buffer in buffers] if ours else None
        (wrapper.module if ours else wrapper)(images).square().sum().backward()
        if ours:
            replicas.average_gradients()
        results.append(([param.grad.clone() for param in wrapper.parameters()], [buffer.clone() for buffer in buffers]))
    (grads, theirs), (own_grads, own) = results
    return {
        "gradients": all(map(torch.equal, grads, own_grads)),
        "buffers": bool(buffers) and all(map(torch.equal, theirs, own)),
        "sent": all(bool((buffer == 1 + i).all()) for i, buffer in enumerate(seen)),
        "reason": replicas.agree("alone" if rank_distrib() else None),
        "no_reason": replicas.agree(replicas.reason),
    }


class Counts(Callback):
    "How often graphs were replayed."

    order = 2000

    def after_batch(self):
        if self.training and self.learn.cuda_graph.graphed is not None:
            self.learn.n_replays = self.learn.cuda_graph.graphed.n_replays


class WaitsInOne(nn.Module):
    "Cannot be captured in the last process."

    def forward(self, x):
        if rank_distrib() == dist.get_world_size() - 1:
            x.sum().item()
        return x


class HooksInOne(Callback):
    "Puts a hook on the model in the last process."

    def before_train(self):
        if rank_distrib() == dist.get_world_size() - 1:
            self.handle = self.model.module[0].register_forward_hook(lambda *args: None)

    def after_train(self):
        if rank_distrib() == dist.get_world_size() - 1:
            self.handle.remove()


def train_graphs(device, path, amp_mode, compile=None, sync_bn=False, model=None, cbs=()):
    "Train twins, eager and replayed, maybe compiled, and tell what differs."
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    seen = []
    n_compiled = counters["stats"]["unique_graphs"]
    for has_graph in (False, True):
        learn = new_learner(device, path)
        torch.manual_seed(rank_distrib())
        learn.model = model() if model else new_model()
        learn.opt_func, learn.n_replays = partial(SGD, mom=0.9), 0  # Adam makes whole steps of what is next to nothing
        learn.to_format(TrainFormat(True, amp_mode, compile, True, True) if has_graph else TrainFormat(True, amp_mode))
        with learn.distrib_ctx(sync_bn=sync_bn), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            learn.fit(2, cbs=[*[cb() for cb in cbs], *[Counts()] * has_graph])
        losses = torch.stack([torch.as_tensor(loss).cpu() for loss in learn.recorder.losses])
        weights = torch.cat([param.detach().flatten() for param in learn.model.parameters()])
        seen.append((losses, weights, [*learn.recorder.values[-1]]))
    (losses, weights, values), (own_losses, own_weights, own_values) = seen
    everywhere = [torch.zeros_like(own_weights) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, own_weights)
    return {
        "n_replays": learn.n_replays,
        "n_compiled": counters["stats"]["unique_graphs"] - n_compiled,
        "reason": learn.cuda_graph.reason,
        "warned": [str(each.message) for each in caught if "CUDA graph" in str(each.message)],
        "stride_warnings": sum("Grad strides" in str(each.message) for each in caught),
        "losses": float((losses - own_losses).abs().max()),
        "weights": float((weights - own_weights).abs().max()),
        "values": max(abs(a - b) for a, b in zip(values, own_values)),
        "is_same_everywhere": all(torch.equal(own_weights, other) for other in everywhere),
        "n_hooks": sum(len(param._backward_hooks or ()) for param in learn.model.parameters()),
    }


class Eager(GraphedModule):
    "Runs the module as it is, and parts the wrapper from the parameters, as a capture does."

    fails = False
    is_parted = False

    def why_not(self, inputs):
        return None

    def __call__(self, *inputs):
        if not self.is_parted and self.module.training:
            self.is_parted = True
            for param in self.module.parameters():
                data = param.data
                param.data = torch.empty(0, dtype=torch.float64)
                param.data = data
            if self.fails and rank_distrib() == dist.get_world_size() - 1:
                self.reason = "it fails"
        return self.module(*inputs)


class OwnBackward(Callback):
    "A `_backward` that the user has set on the Learner."

    def before_fit(self):
        own = type(self.learn)._backward
        self.n_calls = 0

        def backward():
            self.n_calls += 1
            own(self.learn)

        self.learn._backward = backward


def train_stub(path, fails=False, cbs=()):
    "Train twins, one of them with the callback of graphs around a module that runs as it is, and tell what differs."
    callback.GraphedModule, Eager.fails = Eager, fails
    seen = []
    for cb in ([], [CudaGraph()]):
        learn = new_learner(torch.device("cpu"), path).to_channelslast(use_amp=False)
        learn.opt_func = partial(SGD, mom=0.9)
        others = [each() for each in cbs]
        with learn.distrib_ctx(sync_bn=False), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            learn.fit(3, cbs=[*others, *cb])
        tensors = [*learn.model.parameters(), *[each for each in learn.model.buffers() if each.is_floating_point()]]
        seen.append((torch.cat([each.detach().flatten() for each in tensors]), learn.recorder.values, others))
    (values, recorded, _), (own_values, own_recorded, others) = seen
    everywhere = [torch.zeros_like(own_values) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, own_values)
    return {
        "values": float((values - own_values).abs().max()),
        "recorded": max(abs(a - b) for x, y in zip(recorded, own_recorded) for a, b in zip(x, y)),
        "n_hooks": sum(len(param._backward_hooks or ()) for param in learn.model.parameters()),
        "warned": [str(each.message) for each in caught if "CUDA graph" in str(each.message)],
        "reason": cb[0].reason,
        "calls": [other.n_calls for other in others],
        "has_backward": "_backward" in vars(learn),
    }


def early_loss(path):
    "Losses as fastai records them, and gathered early."
    losses = []
    for cbs in ([], [ReadsLoss()]):
        learn = new_learner(torch.device("cpu"), path)
        torch.manual_seed(rank_distrib())
        learn.model = new_model()
        with learn.distrib_ctx(sync_bn=False):
            learn.fit(2, cbs=cbs)
        losses.append([[float(loss) for loss in learn.recorder.losses], *learn.recorder.values])
    left = "accumulate" in vars(learn.recorder.smooth_loss)
    return {"is_same": [list(each) for each in losses[0]] == [list(each) for each in losses[1]], "left": left}


class CallsTwice(Callback):
    def after_step(self):
        self.learn.model(*self.xb)


def refuses_second_call(path):
    callback.GraphedModule, Eager.fails = Eager, False
    learn = new_learner(torch.device("cpu"), path)
    try:
        with learn.distrib_ctx(sync_bn=False):
            learn.fit(1, cbs=[CudaGraph(), CallsTwice()])
    except RuntimeError as error:
        return str(error)


def all_graphs(device, path):
    waits = lambda: nn.Sequential(WaitsInOne(), *new_model())  # noqa: E731
    return {
        "fp32": train_graphs(device, path, None),
        "fp16": train_graphs(device, path, "fp16"),
        "SyncBatchNorm": train_graphs(device, path, None, sync_bn=True),
        "compiled": train_graphs(device, path, None, compile="default"),
        "hooks in one": train_graphs(device, path, None, cbs=[HooksInOne]),
        "waits in one": train_graphs(device, path, None, model=waits),
    }


def main(device, path):
    path, accelerator = Path(path), Accelerator()  # which gives each process its GPU
    if device == "cpu":
        DistributedDL._broadcast = broadcast
    device = torch.device(device) if device == "cpu" else accelerator.device
    learn = new_learner(device, path).to_channelslast(use_amp=False)
    with learn.distrib_ctx(sync_bn=device.type == "cuda"):
        result = {"training": train(learn, path), "summary": observe(learn)}
    result["is_unwrapped"] = not isinstance(learn.model, nn.parallel.DistributedDataParallel)
    print("LATE", file=sys.stderr, flush=True)  # PyTorch warns once in a process
    late = new_learner(device, path).add_cb(ConvertsTooLate())
    with late.distrib_ctx(sync_bn=False):
        late.fit(1)
    learn = new_learner(device, path)
    with learn.distrib_ctx(sync_bn=device.type == "cuda"):
        result["search"] = search(learn)
        result["error_of_data"] = search_broken_data(learn)
    learn = new_learner(device, path)
    with learn.distrib_ctx(sync_bn=device.type == "cuda"):
        result["fastest"] = str(learn.to_fastest(show_plot=False, budget=5).train_format)
        learn.fit(1)
    result["shares"] = shares(device)
    if device.type == "cuda":
        result["graphs"] = all_graphs(device, path)
    else:
        result["stub"] = {"plain": train_stub(path), "fails": train_stub(path, fails=True)}
        result["stub"]["own backward"] = train_stub(path, cbs=[OwnBackward])
        result["twice"] = refuses_second_call(path)
        result["early_loss"] = early_loss(path)
    results = [None] * dist.get_world_size()
    dist.all_gather_object(results, result)
    if not rank_distrib():
        print("RESULT", json.dumps(results), flush=True)
    if device.type == "cpu":
        learn = new_learner(device, path)
        with learn.distrib_ctx(sync_bn=False):
            fail_alone(learn, "after_loss")
    sys.stderr.flush()


if __name__ == "__main__":
    if sys.argv[1] == "train.py":
        DistributedDL._broadcast = broadcast
        sys.argv = sys.argv[1:]
        runpy.run_path(str(Path(__file__).parent.parent / "nbs/examples/train.py"), run_name="__main__")
    else:
        main(*sys.argv[1:])
        os._exit(0)  # gloo's threads may abort a process that goes the long way
