"""Trees: nested dicts of tensors, the only container. Their names are the wire, log and checkpoint format."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

Tree = dict[str, Any]
"""dict[str, Tensor | Tree]; written with Any because recursive aliases help no reader."""

ALIGNMENT = 64
"""Bytes. The same values computed from another alignment may differ in their last bit."""


def leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield (dotted name, tensor) of each leaf, sorted by name at each level."""
    for name in sorted(tree):
        value = tree[name]
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def tree_map(function: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """Apply `function` to corresponding leaves of trees of one structure; returns a tree of the results."""
    return {
        name: tree_map(function, value, *(other[name] for other in others))
        if isinstance(value, dict)
        else function(value, *(other[name] for other in others))
        for name, value in tree.items()
    }


def one_row(rows: Tree) -> Tree:
    """A zero tree like one row of a tree whose leaves have a leading axis (n, ...)."""
    return tree_map(lambda leaf: leaf.new_zeros(leaf.shape[1:]), rows)


def unflatten(named: dict[str, Any]) -> Tree:
    """Build the tree whose leaves have these dotted names."""
    tree: Tree = {}
    for name, value in named.items():
        *folders, last = name.split(".")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = value
    return tree


def _refuse_unnameable(tree: Tree, path: str = "") -> None:
    for name, value in tree.items():
        if not isinstance(name, str) or "." in name:
            raise ValueError(f"a tree's names are strings without dots, not {name!r}{path}; nest dicts instead")
        if isinstance(value, dict):
            if not value:
                raise ValueError(f"branch '{name}'{path} of a tree is empty; leave it out")
            _refuse_unnameable(value, f" in '{name}'{path}")


def aligned(tensor: Tensor) -> Tensor:
    """Return `tensor` if it is contiguous and starts on a 64-byte line, else a copy that does."""
    if tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def digest(tree: Tree) -> str:
    """Return the sha256 (hex) of sorted names, dtypes, shapes and raw bytes of all leaves."""
    sha = hashlib.sha256()
    for name, leaf in leaves(tree):
        sha.update(f"{name} {leaf.dtype} {tuple(leaf.shape)}\n".encode())
        sha.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


@dataclass(frozen=True)
class Leaf:
    """Where one leaf lies in a packed buffer: dotted name, dtype, shape and first byte."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        """Number of bytes."""
        return self.size * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """How a tree lies in one flat byte buffer: leaves sorted by name, each on a 64-byte line."""

    leaves: tuple[Leaf, ...]

    @staticmethod
    def of(tree: Tree) -> Layout:
        """Return the layout of `tree`; ValueError for names and branches that would not survive the wire."""
        _refuse_unnameable(tree)
        return Layout.place((name, leaf.dtype, tuple(leaf.shape)) for name, leaf in leaves(tree))

    @staticmethod
    def place(specs: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> Layout:
        """Lay out leaves given as (name, dtype, shape), in this order."""
        placed, start = [], 0
        for name, dtype, shape in specs:
            leaf = Leaf(name, dtype, tuple(shape), start)
            placed.append(leaf)
            start += -(-leaf.bytes // ALIGNMENT) * ALIGNMENT
        return Layout(tuple(placed))

    @cached_property
    def bytes(self) -> int:
        """Size of the packed buffer."""
        if not self.leaves:
            return 0
        last = self.leaves[-1]
        return last.start + -(-last.bytes // ALIGNMENT) * ALIGNMENT

    def empty(self) -> Tensor:
        """Return a zeroed buffer, (bytes,) uint8, for one tree of this layout."""
        return torch.zeros(self.bytes, dtype=torch.uint8)

    def views(self, buffer: Tensor) -> Tree:
        """Return the tree whose leaves are views into `buffer`, (bytes,) uint8."""
        return unflatten({f.name: buffer[f.start : f.start + f.bytes].view(f.dtype).view(f.shape) for f in self.leaves})

    def pack(self, tree: Tree, buffer: Tensor) -> Tensor:
        """Copy the leaves of `tree` into `buffer`, (bytes,) uint8, and return it; ValueError if its layout differs."""
        for leaf, (name, source) in zip(self.leaves, leaves(tree), strict=True):
            found = (name, source.dtype, tuple(source.shape))
            if found != (leaf.name, leaf.dtype, leaf.shape):
                raise ValueError(f"a tree to pack holds {found}, expected {leaf.name} {leaf.dtype} {leaf.shape}")
        for (_, source), (_, target) in zip(leaves(tree), leaves(self.views(buffer)), strict=True):
            target.copy_(source)
        return buffer

    def to_json(self) -> bytes:
        """Return names, dtypes and shapes as JSON, for a rank that has not seen this layout yet."""
        rows = [(f.name, str(f.dtype).removeprefix("torch."), f.shape) for f in self.leaves]
        return json.dumps(rows, separators=(",", ":")).encode()

    @staticmethod
    def from_json(text: bytes) -> Layout:
        """Invert `to_json`."""
        return Layout.place((name, getattr(torch, dtype), shape) for name, dtype, shape in json.loads(text))
