"""Recurrent language models: scores of the next token at every position of (B, L) token ids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mpifl.config import UserError, require_count
from mpifl.model import traced
from mpifl.models.linear import input_shape


class Lstm(nn.LSTM):
    """nn.LSTM, batch first, from a state of zeros; under vmap each product and each function is one for all clients.

    vmap has no rule for nn.LSTM, which is three times as fast for a client on a CPU. forward: (B, L, I) -> (B, L, H).
    """

    def __init__(self, inputs: int, hidden: int, layers: int = 1) -> None:
        super().__init__(inputs, hidden, layers, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the last layer, (B, L, H)."""
        if not traced():
            return super().forward(x)[0]
        x = x.transpose(0, 1)
        for layer in range(self.num_layers):
            from_input, from_state, *biases = (getattr(self, f"{name}_l{layer}") for name in _WEIGHTS)
            gates = torch.addmm(sum(biases), x.flatten(0, 1), from_input.t()).unflatten(0, x.shape[:2])
            x = _Recurrence.apply(gates, from_state.to(gates.dtype))[0]
        return x.transpose(0, 1)


_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class _Recurrence(torch.autograd.Function):
    """A layer's steps: what inputs give its gates, (L, B, 4H), and weights (4H, H) -> outputs (L, B, H).

    Autograd by itself would add up L gradients of the weights; here they are one product. Gates are in torch's order:
    i, f, g, o. Also returned, for the way back: the sigmoids of all gates, (L, B, 4H), tanh of g, and cells, (L, B, H).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(inputs: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        outputs, sigmoids, news, cells = [], [], [], []
        for gates in inputs.unbind(0):
            if outputs:
                gates = gates + outputs[-1] @ weight.t()
            sigmoids.append(gates.sigmoid())
            news.append(gates.chunk(4, dim=-1)[2].tanh())
            i, f, _, o = sigmoids[-1].chunk(4, dim=-1)
            new = i * news[-1]
            cells.append(torch.addcmul(new, f, cells[-1]) if cells else new)
            outputs.append(o * cells[-1].tanh())
        return tuple(map(torch.stack, (outputs, sigmoids, news, cells)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(inputs[1], *output)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, wanted: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        weight, outputs, sigmoids, g, cells = ctx.saved_tensors
        i, f, _, o = sigmoids.chunk(4, dim=-1)
        tanh = cells.tanh()
        before = torch.cat([torch.zeros_like(cells[:1]), cells[:-1]])
        # What a change of each gate, before its nonlinearity, does to the cell, and of o to the output.
        to_cell = torch.stack([g * i * (1 - i), before * f * (1 - f), i * (1 - g * g)], dim=-2)
        to_output, through = tanh * o * (1 - o), o * (1 - tanh * tanh)
        found: list[Tensor] = []
        later = torch.zeros_like(cells[0])
        for step in reversed(range(len(wanted))):
            output = wanted[step] + found[-1] @ weight if found else wanted[step]
            cell = torch.addcmul(later, output, through[step])
            found.append(
                torch.cat([(cell.unsqueeze(-2) * to_cell[step]).flatten(-2), output * to_output[step]], dim=-1)
            )
            later = cell * f[step]
        gates = torch.stack(found[::-1])
        return gates, gates[1:].flatten(0, 1).t() @ outputs[:-1].flatten(0, 1)


class CharLstm(nn.Module):
    """Embedding 8, two LSTM layers of 256, linear: the Shakespeare net of McMahan et al. 2017 and Reddi et al. 2020.

    822,570 parameters at vocabulary 90, with torch's two biases per gate (FedJAX has one, and a tanh after each
    layer, which the papers have not). forward: x (B, L) int64 -> (B, L, vocabulary).
    """

    def __init__(self, vocabulary: int, embedding: int = 8, hidden: int = 256, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.lstm = Lstm(embedding, hidden, layers)
        self.out = nn.Linear(hidden, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the next token, (B, L, vocabulary)."""
        return self.out(self.lstm(self.embedding(x)))


def char_lstm(features: dict[str, Any], embedding: int = 8, hidden: int = 256, layers: int = 2) -> nn.Module:
    """CharLstm for the dataset's vocabulary."""
    check_sizes("char_lstm", embedding=embedding, hidden=hidden, layers=layers)
    return CharLstm(vocabulary_of(features, "char_lstm"), embedding, hidden, layers)


class WordLstm(nn.Module):
    """Embedding 96, LSTM of 670, projection 96, linear: the StackOverflow net of Reddi et al. 2020.

    4,053,428 parameters at vocabulary 10,004, and 3,093,044 if `tied` (the embedding is the last layer's weight), with
    torch's two biases per gate. Embeddings start in +-0.05, as in TFF. forward: x (B, L) int64 -> (B, L, vocabulary).
    """

    def __init__(self, vocabulary: int, embedding: int = 96, hidden: int = 670, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.lstm = Lstm(embedding, hidden)
        self.projection = nn.Linear(hidden, embedding)
        self.out = nn.Linear(embedding, vocabulary)
        if tied:
            self.out.weight = self.embedding.weight
        nn.init.uniform_(self.embedding.weight, -0.05, 0.05)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the next token, (B, L, vocabulary)."""
        return self.out(self.projection(self.lstm(self.embedding(x))))


def word_lstm(features: dict[str, Any], embedding: int = 96, hidden: int = 670, tied: bool = False) -> nn.Module:
    """WordLstm for the dataset's vocabulary."""
    check_sizes("word_lstm", embedding=embedding, hidden=hidden)
    return WordLstm(vocabulary_of(features, "word_lstm"), embedding, hidden, tied)


def vocabulary_of(features: dict[str, Any], model: str) -> int:
    """Number of token ids that column "x", (L,), holds; UserError for a column that is no text."""
    shape, vocabulary = input_shape(features), features["x"].classes
    if len(shape) != 1 or not vocabulary:
        raise UserError(
            f"model {model} reads token ids: column 'x' must be (L,) and record its vocabulary as classes; "
            f"here it is {features['x'].dtype} {shape}, classes {vocabulary}"
        )
    return vocabulary


def check_sizes(model: str, **sizes: int) -> None:
    """Raise UserError for a size below 1, or of more than a million."""
    for name, size in sizes.items():
        require_count(f"{model} {name}", size, least=1, most=10**6)
