"Operators on images (B, 8, 8, 8) and clips (B, 8, 4, 8, 8), of which each version keeps other ones in channels last."

import torch
import torch.nn.functional as F
from torch import nn


def attention(x):
    query = x.flatten(2).transpose(1, 2)
    weights = (query @ query.transpose(1, 2)).softmax(-1)
    return (query.transpose(1, 2) @ weights.transpose(1, 2)).reshape(x.shape)


def grid_of(x):
    return F.affine_grid(torch.eye(2, 3, device=x.device).expand(len(x), 2, 3), x.shape, align_corners=False)


def weight_of(x, n_out, n_in, *kernel):
    weight = torch.ones(n_out, n_in, *kernel, device=x.device)
    return weight.to(memory_format=torch.channels_last if len(kernel) == 2 else torch.channels_last_3d)


def sum_with_itself_inplace(x):
    y = x * 2
    y.add_(x)
    return y


def max_unpool(x):
    values, indices = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(values, indices, 2)


OPERATORS = {
    # convolutions
    "conv2d": lambda x: F.conv2d(x, weight_of(x, 8, 8, 3, 3), padding=1),
    "conv2d 1x1": lambda x: F.conv2d(x, weight_of(x, 16, 8, 1, 1)),
    "conv2d strided": lambda x: F.conv2d(x, weight_of(x, 8, 8, 3, 3), stride=2),
    "conv2d dilated": lambda x: F.conv2d(x, weight_of(x, 8, 8, 3, 3), dilation=2),
    "conv2d grouped": lambda x: F.conv2d(x, weight_of(x, 8, 4, 3, 3), groups=2),
    "conv2d depthwise": lambda x: F.conv2d(x, weight_of(x, 8, 1, 3, 3), groups=8),
    "conv_transpose2d": lambda x: F.conv_transpose2d(x, weight_of(x, 8, 8, 2, 2), stride=2),
    # normalization
    "batch_norm": nn.BatchNorm2d(8),
    "batch_norm in eval": nn.BatchNorm2d(8).eval(),
    "group_norm": nn.GroupNorm(2, 8),
    "group_norm as instance_norm": nn.GroupNorm(8, 8),
    "instance_norm": nn.InstanceNorm2d(8),
    "local_response_norm": lambda x: F.local_response_norm(x, 3),
    "normalize": F.normalize,
    "layer_norm over channels": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2),
    # activations
    "relu": F.relu,
    "relu in place": lambda x: F.relu_(x * 1),
    "leaky_relu": F.leaky_relu,
    "rrelu": lambda x: F.rrelu(x, training=True),
    "prelu": nn.PReLU(8),
    "elu": F.elu,
    "selu": F.selu,
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "glu": lambda x: F.glu(x, 1),
    "softmax over channels": lambda x: x.softmax(1),
    "log_softmax over channels": lambda x: x.log_softmax(1),
    "clamp": lambda x: x.clamp(-1, 1),
    # pooling
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 4),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 4),
    "lp_pool2d": lambda x: F.lp_pool2d(x, 2, 2),
    "fractional_max_pool2d": lambda x: F.fractional_max_pool2d(x, 2, output_ratio=(0.5, 0.5)),
    "max_unpool2d": max_unpool,
    "global average": lambda x: x.mean((2, 3), keepdim=True),
    # resizing and moving
    "nearest": lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "bicubic": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
    "area": lambda x: F.interpolate(x, size=4, mode="area"),
    "grid_sample": lambda x: F.grid_sample(x, grid_of(x), align_corners=False),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "channel_shuffle": nn.ChannelShuffle(2),
    "pad with zeros": lambda x: F.pad(x, (1, 1, 1, 1)),
    "pad reflect": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "pad replicate": lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"),
    "pad circular": lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"),
    "roll": lambda x: x.roll((1, 1), (2, 3)),
    "rot90": lambda x: x.rot90(1, (2, 3)),
    "flip": lambda x: x.flip(3),
    "fold and unfold": lambda x: F.fold(F.unfold(x, 2, stride=2), (8, 8), 2, stride=2),
    # selecting
    "slice": lambda x: x[:, :, 1:5, 1:5],
    "slice of channels": lambda x: x[:, 2:6],
    "chunk": lambda x: torch.cat([part * 2 for part in x.chunk(2, 1)], 1),
    "batch indexing": lambda x: x[torch.tensor([1, 0], device=x.device)],
    "where": lambda x: torch.where(x > 0, x, x * 2),
    "masked_fill": lambda x: x.masked_fill(x > 0, 1.0),
    "topk": lambda x: x.topk(4, 1).values,
    "sort": lambda x: x.sort(1).values,
    "cumsum": lambda x: x.cumsum(1),
    # combining
    "add": lambda x: x + x * 2,
    "add in place": sum_with_itself_inplace,
    "channel scale": lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
    "cat": lambda x: torch.cat([x, x * 2], 1),
    "stack and sum": lambda x: torch.stack([x, x * 2]).sum(0),
    "attention by matmul": attention,
    "einsum over channels": lambda x: torch.einsum("bchw,dc->bdhw", x, torch.ones(4, 8, device=x.device)),
    # dropping and casting
    "dropout": lambda x: F.dropout(x, 0.5),
    "dropout2d": lambda x: F.dropout2d(x, 0.5),
    "cast": lambda x: x.to(torch.bfloat16).float(),
    "detach and add": lambda x: x + x.detach(),
}

OPERATORS_3D = {
    "conv3d": lambda x: F.conv3d(x, weight_of(x, 8, 8, 3, 3, 3), padding=1),
    "conv_transpose3d": lambda x: F.conv_transpose3d(x, weight_of(x, 8, 8, 2, 2, 2), stride=2),
    "batch_norm": nn.BatchNorm3d(8),
    "group_norm": nn.GroupNorm(2, 8),
    "instance_norm": nn.InstanceNorm3d(8),
    "relu": F.relu,
    "max_pool3d": lambda x: F.max_pool3d(x, 2),
    "avg_pool3d": lambda x: F.avg_pool3d(x, 2),
    "adaptive_avg_pool3d": lambda x: F.adaptive_avg_pool3d(x, 2),
    "nearest": lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
    "trilinear": lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"),
    "add": lambda x: x + x * 2,
    "cat": lambda x: torch.cat([x, x * 2], 1),
}
