"Small models, and what the tests ask of a trace or a summary of them."

from dataclasses import dataclass

import torch
from torch import nn

from channelslast.memory_format import module_to_memory_format
from channelslast.summary import FormatTracer

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


class Op(nn.Module):
    "A function as a module; with children, so that its code is that of a module around others."

    def __init__(self, function, **children):
        super().__init__()
        self.function = function
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, *args):
        return self.function(*args)


class Scale(nn.Module):
    "Keeps any format, and needs a gradient."

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return x * self.scale


def images(*shape, device="cpu"):
    return torch.randn(*shape, device=device).to(memory_format=FORMATS[len(shape)])


def trace(model, *inputs, channels_last=True):
    "Trace a step whose loss has a gradient in channels last (or contiguous) format."
    module_to_memory_format(model, channels_last)
    with FormatTracer(model) as tracer:
        output = model(*inputs)
        memory_format = FORMATS.get(output.ndim) if channels_last else None
        gradient = torch.randn_like(output, memory_format=memory_format or torch.contiguous_format)
        loss = (output * gradient).sum()
        tracer.claim_loss(loss)
        loss.backward()
    return tracer


def events(tracer, **wanted):
    return [event for event in tracer.events if all(getattr(event, name) == value for name, value in wanted.items())]


def losers(tracer):
    return {layer.module: layer.loses_in for layer in tracer.layers.values() if layer.loses_in}


def trace_forward(model, *inputs):
    module_to_memory_format(model)
    with FormatTracer(model) as tracer, torch.no_grad():
        model(*inputs)
    return tracer


def clean_model():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.GELU(),
        nn.ConvTranspose2d(8, 16, 2, stride=2),
        nn.Dropout(0.1),
        nn.Conv2d(16, 4, 1),
    )


def small_clean_model():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3), nn.AvgPool2d(4), nn.Flatten())


def thrashing_model():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.InstanceNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.GLU(1),
        nn.Conv2d(4, 3, 3, padding=1),
        nn.AvgPool2d(8),
        nn.Flatten(),
    )


class Views(nn.Module):
    def forward(self, x):
        return x.view(len(x), -1)


@dataclass(slots=True)
class Outputs:
    out: torch.Tensor
    aux: torch.Tensor


def flat(summary):
    "What is printed, without its line breaks."
    return " ".join(str(summary).split())
