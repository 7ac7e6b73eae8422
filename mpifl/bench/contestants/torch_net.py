"""The workloads' nets and a client's training as one writes them in plain torch."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from protocol import Workload
from torch import Tensor, nn


class Conv(nn.Module):
    """Two convolutions, max-pool, two linear layers, with dropout; x (B, C, H, W), or (B, H, W)."""

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.shape = shape
        self.conv1, self.conv2 = nn.Conv2d(channels, 32, 3), nn.Conv2d(32, 64, 3)
        self.fc1 = nn.Linear(64 * ((height - 4) // 2) * ((width - 4) // 2), 128)
        self.fc2 = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores, (B, classes)."""
        x = F.relu(self.conv2(F.relu(self.conv1(x.view(-1, *self.shape)))))
        x = F.dropout(F.max_pool2d(x, 2).flatten(1), 0.25, self.training)
        return self.fc2(F.dropout(F.relu(self.fc1(x)), 0.5, self.training))


class Lstm(nn.Module):
    """Embedding 8, two LSTM layers of 256, linear; x (B, L) int64."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, 8)
        self.lstm = nn.LSTM(8, 256, 2, batch_first=True)
        self.out = nn.Linear(256, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores, (B, L, classes)."""
        return self.out(self.lstm(self.embedding(x))[0])


def make_net(workload: Workload) -> nn.Module:
    """Return the net, its parameters in the order of `workload.start`."""
    return _net(workload, workload.clients[0][0].shape[1:]).to(workload.device)


def _net(workload: Workload, shape: tuple[int, ...]) -> nn.Module:
    if workload.net == "char_lstm":
        return Lstm(workload.classes)
    if workload.net != "mlp":
        return Conv((1, *shape)[-3:], workload.classes)
    widths = [math.prod(shape), *workload.hidden]
    layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(widths[-1], workload.classes))


def mean_loss(scores: Tensor, y: Tensor) -> Tensor:
    """Cross entropy, mean over examples and tokens, ()."""
    return F.cross_entropy(scores.flatten(0, -2), y.flatten())


def as_tensors(workload: Workload) -> list[tuple[Tensor, Tensor]]:
    """Return x and y of each client, on the workload's device."""
    on = workload.device
    return [(torch.from_numpy(x).to(on), torch.from_numpy(y).to(on)) for x, y in workload.clients]


def wait_for(device: str) -> None:
    """Wait until a GPU has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def train_client(net: nn.Module, theta: Tensor, x: Tensor, y: Tensor, batch: int, lr: float) -> Tensor:
    """Return what an epoch of SGD makes of `theta`, (P,)."""
    local, parameters = theta.clone(), list(net.parameters())
    nn.utils.vector_to_parameters(local, parameters)  # views: what updates them updates `local`
    for first in range(0, len(y), batch):
        loss = mean_loss(net(x[first : first + batch]), y[first : first + batch])
        grads = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            torch._foreach_sub_(parameters, grads, alpha=lr)
    return local
