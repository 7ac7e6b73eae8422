"""One SGD step of a plain perceptron, written by hand: the update is made inside the matrix products.

Autograd writes the gradient of a layer, copies it into the flat vector and reads it again to subtract it. Here
W <- W - lr d^T h is one product that adds to W, which for EMNIST's dense net is a third of a step's time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

threshold_backward = torch.ops.aten.threshold_backward

Layers = list[tuple[Tensor, Tensor]]
"""Weights (out, in) and biases (out,) of linear maps with ReLU between them, views into theta."""


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a Sequential of [Flatten], Linear, ReLU, Linear, ..., and does nothing else.

    Its parameters are then weight and bias of each Linear in turn, all trained; it has no hooks and shares nothing.
    """
    parts = list(module) if type(module) is nn.Sequential else []
    if parts and type(parts[0]) is nn.Flatten and (parts[0].start_dim, parts[0].end_dim) == (1, -1):
        parts = parts[1:]
    maps, between = parts[::2], parts[1::2]
    return (
        len(maps) == len(between) + 1
        and all(type(part) is nn.Linear and part.bias is not None for part in maps)
        and all(type(part) is nn.ReLU for part in between)
        and len({id(part) for part in maps}) == len(maps)
        and len(list(module.parameters())) == 2 * len(maps)
        and all(p.requires_grad for p in module.parameters())
        and not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in module.modules())
    )


def descend(layers: Layers, x: Tensor, y: Tensor, mask: Tensor | None, lr: float) -> Tensor:
    """Layers <- layers - lr * gradient of the mean cross entropy, in place; returns that mean before the step, ().

    x: (B, ...). y: (B,) int64. mask: (B,) bool, the rows that count, None for all. No gradient is recorded: layers
    are detached views.
    """
    inputs = [x.flatten(1)]
    for weight, bias in layers[:-1]:
        inputs.append(torch.addmm(bias, inputs[-1], weight.t()).relu_())
    weight, bias = layers[-1]
    log_likelihood = torch.log_softmax(torch.addmm(bias, inputs[-1], weight.t()), dim=1)
    losses = F.nll_loss(log_likelihood, y, reduction="mean" if mask is None else "none")
    error = log_likelihood.exp_().scatter_(1, y.unsqueeze(1), -1.0, reduce="add")
    if mask is None:
        rate, loss = lr / len(y), losses
    else:
        rate = lr / max(1, int(mask.sum()))
        loss = losses.masked_fill_(~mask, 0.0).sum() * (rate / lr)
        error.masked_fill_(~mask.unsqueeze(1), 0.0)
    ones = error.new_ones(len(y))
    for (weight, bias), h in zip(reversed(layers), reversed(inputs)):
        error_below = None if h is inputs[0] else threshold_backward(error @ weight, h, 0)
        transposed = error.t()
        weight.addmm_(transposed, h, alpha=-rate)
        bias.addmv_(transposed, ones, alpha=-rate)
        error = error_below
    return loss
