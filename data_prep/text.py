"""Text as ids: PAD 0, BOS 1, EOS 2, then the symbols of a vocabulary, then OOV, one id for all that it lacks.

Columns of language data are `x` and `y`, (n, L) each: y is the token that follows x at every position, and PAD
where there is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import numpy as np

PAD, BOS, EOS, FIRST = 0, 1, 2, 3

# The 86 characters of TensorFlow Federated's text generation tutorial, in its order, as FedJAX numbers them.
CHARACTERS = "dhlptx@DHLPTX $(,048cgkoswCGKOSW[_#'/37;?bfjnrvzBFJNRVZ\"&*.26:\naeimquyAEIMQUY]!%)-159\r"


def symbols(vocabulary: Iterable[str]) -> tuple[str, ...]:
    """Name every id of a vocabulary: the three reserved ones, its symbols, and the one of all others."""
    return ("<pad>", "<bos>", "<eos>", *vocabulary, "<oov>")


def char_ids(text: str) -> np.ndarray:
    """Ids of a text's characters, (characters,) uint8, 3 to 89; one not in CHARACTERS is 89 (OOV)."""
    utf8 = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
    starts_character = utf8 & 0xC0 != 0x80
    return _CHAR_OF_BYTE[utf8[starts_character]]


def most_frequent(counts: Mapping[str, int], size: int) -> tuple[str, ...]:
    """The `size` most frequent words, the most frequent first; those of one count in the order of `counts`."""
    return tuple(sorted(counts, key=counts.__getitem__, reverse=True)[:size])


def word_ids(words: Iterable[str], ids: Mapping[str, int]) -> list[int]:
    """Ids of words by a table from `id_table`; OOV, the id after its last, for those not in it."""
    oov = FIRST + len(ids)
    return [ids.get(word, oov) for word in words]


def id_table(vocabulary: Iterable[str]) -> dict[str, int]:
    """Number the words of a vocabulary from 3 on."""
    return {word: FIRST + position for position, word in enumerate(vocabulary)}


def windows(sequences: Iterable[Sequence[int]], length: int, dtype: str = "uint8") -> tuple[np.ndarray, np.ndarray]:
    """Wrap each sequence in BOS ... EOS, join them all, and cut the stream into (x, y), (n, length) each.

    Every transition of the stream is in exactly one place of y, those across the borders of windows too: a
    stream of T tokens gives T - 1 targets (FedJAX, datasets/shakespeare.py). Only the last window is padded.
    """
    bos, eos = np.array([BOS], dtype), np.array([EOS], dtype)
    parts = chain.from_iterable((bos, np.asarray(ids, dtype), eos) for ids in sequences)
    stream = np.concatenate([np.empty(0, dtype), *parts])
    transitions = max(0, len(stream) - 1)
    x = np.full((-(-transitions // length), length), PAD, dtype)
    y = x.copy()
    x.flat[:transitions], y.flat[:transitions] = stream[:-1], stream[1:]
    return x, y


def sentences(sequences: Iterable[Sequence[int]], length: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Make one row of each sequence: the first length + 1 tokens of BOS ... EOS, as (x, y), (n, length) each.

    A sequence of `length` tokens or more thus has no EOS (FedJAX and TFF, stackoverflow).
    """
    rows = [[BOS, *ids, EOS][: length + 1] for ids in sequences]
    tokens = np.full((len(rows), length + 1), PAD, dtype)
    sizes = np.fromiter(map(len, rows), int, len(rows))
    tokens[np.arange(length + 1) < sizes[:, None]] = np.fromiter(chain.from_iterable(rows), dtype, sizes.sum())
    # EOS is a target, never an input.
    x = np.where(tokens[:, 1:] == PAD, PAD, tokens[:, :-1]).astype(dtype)
    return x, tokens[:, 1:].copy()


_CHAR_OF_BYTE = np.full(256, FIRST + len(CHARACTERS), np.uint8)
_CHAR_OF_BYTE[np.frombuffer(CHARACTERS.encode(), np.uint8)] = np.arange(FIRST, FIRST + len(CHARACTERS))
