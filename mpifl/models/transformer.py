"""A small causal transformer: scores of the next token at every position of (B, L) token ids."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpifl.config import UserError
from mpifl.models.lstm import check_sizes, vocabulary_of
from mpifl.rand import dropout


class Transformer(nn.Module):
    """Decoder-only transformer as in Vaswani et al. 2017 (norms after each sum, sinusoidal positions, ReLU).

    Embedding = hidden, tied to the output, which has no bias. 1,962,912 parameters at vocabulary 10,004: the
    StackOverflow transformer of Wang et al. 2021, A Field Guide to Federated Optimization. Dropout on embeddings and
    on what is added to them. length: the longest sequence. forward: x (B, L) int64 -> (B, L, vocabulary).
    """

    def __init__(
        self,
        vocabulary: int,
        length: int,
        embedding: int = 96,
        heads: int = 8,
        feedforward: int = 1536,
        layers: int = 3,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.rate, self.scale = dropout, math.sqrt(embedding)
        self.embedding = nn.Embedding(vocabulary, embedding)
        nn.init.uniform_(self.embedding.weight, -0.05, 0.05)
        self.blocks = nn.ModuleList(_Block(embedding, heads, feedforward, dropout) for _ in range(layers))
        self.register_buffer("positions", sinusoids(length, embedding), persistent=False)

    def forward(self, x: Tensor, key: Tensor | None = None) -> Tensor:
        """Scores of the next token, (B, L, vocabulary); key, () int64, of the step in training, None in evaluation."""
        hidden = self.embedding(x) * self.scale + self.positions[: x.shape[1]]
        hidden = dropout(hidden, self.rate, key)
        for number, block in enumerate(self.blocks):
            hidden = block(hidden, key, salt=1 + 2 * number)
        return F.linear(hidden, self.embedding.weight)


class _Block(nn.Module):
    """Causal self-attention, then a feed-forward net, each added to its input and normed."""

    def __init__(self, width: int, heads: int, feedforward: int, rate: float) -> None:
        super().__init__()
        self.heads, self.rate = heads, rate
        self.queries_keys_values, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, feedforward), nn.Linear(feedforward, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, key: Tensor | None, salt: int) -> Tensor:
        x = self.norm1(x + dropout(self.attend(x), self.rate, key, salt))
        return self.norm2(x + dropout(self.down(F.relu(self.up(x))), self.rate, key, salt + 1))

    def attend(self, x: Tensor) -> Tensor:
        """What each position, (B, L, width), takes from itself and those before."""
        rows, length, width = x.shape
        parts = self.queries_keys_values(x).view(rows, length, 3, self.heads, width // self.heads)
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)
        scores = queries @ keys.transpose(-1, -2) / math.sqrt(width // self.heads)
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        shares = scores.masked_fill(later, -math.inf).softmax(dim=-1)
        return self.out((shares @ values).transpose(1, 2).reshape(rows, length, width))


def sinusoids(length: int, width: int) -> Tensor:
    """Positional encodings, (length, width): sine in even columns, cosine in odd ones (Vaswani et al. 2017, 3.5)."""
    column = torch.arange(width)
    angles = torch.arange(length).unsqueeze(1) / 10_000 ** (2 * (column // 2) / width)
    return torch.where(column % 2 == 0, angles.sin(), angles.cos())


def transformer(
    features: dict[str, Any],
    embedding: int = 96,
    heads: int = 8,
    feedforward: int = 1536,
    layers: int = 3,
    dropout: float = 0.1,
) -> nn.Module:
    """Transformer for the dataset's vocabulary and length of sequences."""
    check_sizes("transformer", embedding=embedding, heads=heads, feedforward=feedforward, layers=layers)
    if embedding % heads:
        raise UserError(f"transformer embedding is {embedding}; it must be a multiple of its {heads} heads")
    if not 0 <= dropout < 1:
        raise UserError(f"transformer dropout is {dropout}; it must be at least 0 and below 1")
    vocabulary, (length,) = vocabulary_of(features, "transformer"), features["x"].shape
    return Transformer(vocabulary, length, embedding, heads, feedforward, layers, dropout)
