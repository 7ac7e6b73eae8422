"""Stateless randomness: every random number is a function of (seed, round, client, purpose), of no machine.

Two mixers: `fold` on Python integers makes 64-bit keys; `uniform` on tensors hashes a counter with a key, so
that it also runs under vmap and on a GPU. No generator, no state, nothing to checkpoint.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(x: int) -> int:
    """Finalizer of splitmix64 (Steele et al. 2014): a bijection of 64-bit integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


@lru_cache
def _word(purpose: str) -> int:
    return int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")


def fold(key: int, *words: int | str) -> int:
    """Return a 64-bit key that depends on `key` and on each word, in order; a str names a purpose."""
    for word in words:
        value = _word(word) if isinstance(word, str) else word & _MASK
        key = _mix((_mix(key & _MASK) + _GOLDEN * (value + 1)) & _MASK)
    return key


def folds(key: int, count: int) -> np.ndarray:
    """Return `fold(key, n)` for n = 0 .. count - 1, (count,) uint64."""
    return _hash_counters(_mix(key & _MASK), np.arange(count, dtype=np.uint64))


def uniforms(key: int, words: np.ndarray) -> np.ndarray:
    """Return numbers uniform in [0, 1), (n,) float64: the i-th is a function of the key and of words[i] alone."""
    return (_hash_counters(_mix(key & _MASK), words.astype(np.uint64)) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def as_tensor(key: int) -> Tensor:
    """Return a 64-bit key as the () int64 tensor that ClientWorks see."""
    return torch.tensor(key - (1 << 64) if key >> 63 else key, dtype=torch.int64)


def _hash_counters(key: int, counters: np.ndarray) -> np.ndarray:
    """Hash uint64 counters with a key: splitmix64 of (key + golden * counter)."""
    with np.errstate(over="ignore"):
        x = np.uint64(key) + np.uint64(_GOLDEN) * (counters + np.uint64(1))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def permutation(key: int, n: int) -> np.ndarray:
    """Return a permutation of 0..n-1, (n,) int64."""
    return np.argsort(_hash_counters(key, np.arange(n, dtype=np.uint64)), kind="stable")


def sample(key: int, population: int, count: int) -> np.ndarray:
    """Return `count` distinct indices below `population`, uniform, ascending, (count,) int64.

    Costs O(count) when the population is large, so that a cohort of ten million clients is instant.
    """
    if count >= population:
        return np.arange(population, dtype=np.int64)
    if 2 * count > population:
        return np.sort(permutation(key, population)[:count])
    # Independent draws; the first `count` distinct ones are a uniform sample without replacement.
    drawn = 2 * count + 16
    while True:
        hashed = _hash_counters(key, np.arange(drawn, dtype=np.uint64))
        draws = ((hashed >> np.uint64(11)).astype(np.float64) * 2.0**-53 * population).astype(np.int64)
        _, first = np.unique(draws, return_index=True)
        if len(first) >= count:
            return np.sort(draws[np.sort(first)[:count]])
        drawn *= 2


def _mix32(x: Tensor) -> Tensor:
    """A 32-bit finalizer (xor-shift-multiply) in wrapping int32, in place."""
    for shift, factor in ((16, 0x7FEB352D), (15, -0x7B935975)):
        x ^= (x >> shift) & ((1 << (32 - shift)) - 1)
        x *= factor
    x ^= (x >> 16) & 0xFFFF
    return x


def _hash32(key: Tensor, counters: Tensor, salt: int) -> Tensor:
    """Hash int32 counters with a () int64 key; int32 numbers uniform over all 2^32 values."""
    low = (key & 0xFFFFFFFF).to(torch.int64)
    low = torch.where(low > 0x7FFFFFFF, low - (1 << 32), low).to(torch.int32)
    high = (key >> 32).to(torch.int32)
    x = _mix32(counters * -0x61C88647 + (low ^ (salt * 0x3C6EF372 & 0x7FFFFFFF)))
    return _mix32(x + high)


def uniform_int32(key: Tensor, shape: tuple[int, ...], salt: int = 0) -> Tensor:
    """Return int32 numbers uniform over all 2^32 values, of `shape`, from a () int64 key; runs under vmap.

    `salt` separates several draws with one key (e.g. two dropout layers of one step).
    """
    count = torch.Size(shape).numel()
    return _hash32(key, torch.arange(count, dtype=torch.int32, device=key.device), salt).view(shape)


def integers_at(key: Tensor, index: Tensor, below: tuple[int, ...], salt: int = 0) -> tuple[Tensor, ...]:
    """For each n of `below` return numbers uniform in 0 .. n - 1, one per example, (B,) int64; runs under vmap.

    key: () int64. index: (B,) int64, which example of its client each row is. A row's numbers are a function of the
    key, its own index and `salt` alone, whatever else is in the batch. Each n is at most 2^31.
    """
    draws = torch.arange(len(below), device=index.device)
    counters = (index.unsqueeze(-1) * len(below) + draws).to(torch.int32)
    words = _hash32(key, counters, salt).to(torch.int64) & 0xFFFFFFFF
    return tuple((word * n) >> 32 for word, n in zip(words.unbind(-1), below))


def dropout(x: Tensor, rate: float, key: Tensor | None, salt: int = 0) -> Tensor:
    """Return `x` with elements zeroed at `rate` and the rest scaled by 1/(1-rate); `key` None means evaluation.

    x: any shape, floating; key: () int64. The mask is a function of the key, the position and `salt` alone.
    """
    if key is None or rate == 0.0:
        return x
    threshold = int(rate * 2.0**32) - (1 << 31)
    keep = uniform_int32(key, tuple(x.shape), salt) >= threshold
    return x * keep * (1.0 / (1.0 - rate))
