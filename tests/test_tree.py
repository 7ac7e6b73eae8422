"""Trees and their flat layouts: nothing lost on the way, every leaf on a 64-byte line, digests of everything."""

import hashlib

import pytest
import torch

from mpifl.tree import ALIGNMENT, Layout, aligned, digest, leaves, tree_map, unflatten

TREE = {
    "theta": torch.arange(5.0),
    "opt": {"m": torch.randn(2, 3, dtype=torch.float64), "lr": torch.tensor(0.5)},
    "flags": torch.tensor([True, False, True]),
    "count": torch.tensor([1, -(2**62)]),
    "half": torch.tensor([1.5, -2.0, 3.0], dtype=torch.bfloat16),
    "bytes": torch.tensor([7], dtype=torch.uint8),
    "none": torch.zeros(0, 4),
}


def same(a, b):
    pairs = list(zip(leaves(a), leaves(b), strict=True))
    return all(n == m and x.dtype == y.dtype and torch.equal(x, y) for (n, x), (m, y) in pairs)


def test_leaves_come_sorted_by_name_however_the_tree_was_made():
    backwards = dict(reversed(TREE.items()))
    names = [name for name, _ in leaves(TREE)]
    assert names == [name for name, _ in leaves(backwards)]
    assert names == ["bytes", "count", "flags", "half", "none", "opt.lr", "opt.m", "theta"]


def test_unflatten_inverts_leaves():
    assert same(unflatten(dict(leaves(TREE))), TREE)


def test_tree_map_goes_through_trees_of_one_structure_together():
    a, b = {"x": 1, "y": {"z": 2}}, {"y": {"z": 20}, "x": 10}
    assert tree_map(lambda i, j: i + j, a, b) == {"x": 11, "y": {"z": 22}}


def test_unpacking_gives_back_what_was_packed():
    layout = Layout.of(TREE)
    buffer = layout.pack(TREE, layout.empty())
    assert buffer.dtype == torch.uint8 and len(buffer) == layout.bytes == layout.empty().nbytes
    assert same(layout.views(buffer), TREE)


def test_views_write_through_to_the_buffer():
    layout = Layout.of(TREE)
    buffer = layout.pack(TREE, layout.empty())
    layout.views(buffer)["opt"]["m"].fill_(9.0)
    assert float(layout.views(buffer)["opt"]["m"].sum()) == 54.0
    assert torch.equal(layout.views(buffer)["theta"], TREE["theta"])


def test_every_leaf_starts_on_a_line_of_its_own():
    layout = Layout.of(TREE)
    buffer = layout.empty()
    assert buffer.data_ptr() % ALIGNMENT == 0 and layout.bytes % ALIGNMENT == 0
    ends = 0
    for leaf in layout.leaves:
        assert leaf.start % ALIGNMENT == 0 and leaf.start >= ends
        ends = leaf.start + leaf.bytes
    assert ends <= layout.bytes


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 1000])
def test_a_layout_of_one_leaf_is_its_bytes_rounded_up_to_lines(size):
    layout = Layout.of({"x": torch.zeros(size)})
    assert layout.bytes == -(-4 * size // 64) * 64


def test_the_empty_tree_takes_no_byte():
    layout = Layout.of({})
    assert layout.bytes == 0 and layout.views(layout.pack({}, layout.empty())) == {}


def test_a_layout_survives_json():
    layout = Layout.of(TREE)
    assert Layout.from_json(layout.to_json()) == layout
    assert hash(Layout.from_json(layout.to_json())) == hash(layout)


@pytest.mark.parametrize(
    "other",
    [
        {"theta": torch.zeros(3), "more": torch.zeros(1)},
        {"thetas": torch.zeros(3)},
        {"theta": torch.zeros(())},
        {"theta": torch.zeros(1)},
        {"theta": torch.zeros(3, dtype=torch.float64)},
        {"theta": torch.zeros(4)},
    ],
    ids=["one more", "name", "scalar", "broadcast", "dtype", "shape"],
)
def test_packing_a_tree_of_another_layout_is_refused(other):
    layout = Layout.of({"theta": torch.zeros(3)})
    with pytest.raises((ValueError, RuntimeError)):
        layout.pack(other, layout.empty())


def test_digest_is_sha256_of_names_dtypes_shapes_and_bytes():
    expected = hashlib.sha256()
    expected.update(b"a.b torch.float32 (2,)\n" + torch.tensor([1.0, -2.0]).numpy().tobytes())
    expected.update(b"c torch.int64 ()\n" + (5).to_bytes(8, "little"))
    assert digest({"c": torch.tensor(5), "a": {"b": torch.tensor([1.0, -2.0])}}) == expected.hexdigest()


def test_digest_sees_name_dtype_shape_and_every_bit():
    zeros = torch.zeros(2, 3)
    trees = [
        {"a": zeros},
        {"b": zeros},
        {"a": zeros.view(3, 2)},
        {"a": zeros.to(torch.int32)},
        {"a": -zeros},  # minus zero
        {"a": torch.full((2, 3), 1e-45)},
        {"a": {"a": zeros}},
        {"a": zeros, "b": torch.zeros(0)},
        {},
    ]
    assert len({digest(tree) for tree in trees}) == len(trees)


def test_digest_is_of_values_not_of_strides_or_history():
    x = torch.arange(6.0).view(2, 3)
    assert digest({"x": x.T}) == digest({"x": x.T.contiguous()})
    assert digest({"x": x.requires_grad_()}) == digest({"x": x.detach()})
    assert all(len(digest({"x": leaf})) == 64 for _, leaf in leaves(TREE))


def test_aligned_copies_only_what_is_off_a_line_or_not_contiguous():
    base = torch.arange(64.0)
    assert aligned(base) is base
    for part in (base[1:], base[16:][::2], base.view(8, 8).T):
        copy = aligned(part)
        assert torch.equal(copy, part) and copy.data_ptr() % ALIGNMENT == 0 and copy.is_contiguous()
    on_a_line = base[16:]
    assert aligned(on_a_line) is on_a_line
