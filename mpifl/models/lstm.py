"""Recurrent language models: scores of the next token at every position of (B, L) token ids."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mpifl.config import UserError, require_count
from mpifl.models.linear import input_shape


class CharLstm(nn.Module):
    """Embedding 8, two LSTM layers of 256, linear: the Shakespeare net of McMahan et al. 2017 and Reddi et al. 2020.

    822,570 parameters at vocabulary 90, with torch's two biases per gate (FedJAX has one, and a tanh after each
    layer, which the papers have not). forward: x (B, L) int64 -> (B, L, vocabulary).
    """

    def __init__(self, vocabulary: int, embedding: int = 8, hidden: int = 256, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True)
        self.out = nn.Linear(hidden, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the next token, (B, L, vocabulary)."""
        return self.out(self.lstm(self.embedding(x))[0])


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
        self.lstm = nn.LSTM(embedding, hidden, batch_first=True)
        self.projection = nn.Linear(hidden, embedding)
        self.out = nn.Linear(embedding, vocabulary)
        if tied:
            self.out.weight = self.embedding.weight
        nn.init.uniform_(self.embedding.weight, -0.05, 0.05)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the next token, (B, L, vocabulary)."""
        return self.out(self.projection(self.lstm(self.embedding(x))[0]))


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
