"""Conversions as converters prepare them, read to the end, without writing anything."""

import pickle
from argparse import ArgumentParser, Namespace

import numpy as np
import pytest

from mpifl.config import UserError


def prepare(converter, source, *options):
    parser = ArgumentParser()
    converter.add_arguments(parser)
    return converter.prepare(parser.parse_args(["--source", str(source), *map(str, options)], Namespace(shard_mb=256)))


def clients(made, name="train"):
    """{client: columns} of a split, in the converter's order, each column as its feature says, after a pickle."""
    split = the(made, name)
    assert not split.central
    found = {client: columns for piece in split.pieces for client, columns in travelled(split.read)(travelled(piece))}
    assert len(found) == split.clients
    for columns in found.values():
        check(made, columns)
    return found


def central(made, name="test"):
    """All rows of a central split."""
    split = the(made, name)
    assert split.central
    blocks = [columns for piece in split.pieces for _, columns in split.read(piece)]
    for columns in blocks:
        check(made, columns)
    return {column: np.concatenate([block[column] for block in blocks]) for column in made.features}


def the(made, name):
    (split,) = [split for split in made.splits if split.name == name]
    return split


def travelled(what):
    return pickle.loads(pickle.dumps(what))


def check(made, columns):
    assert columns.keys() == made.features.keys()
    assert len({len(column) for column in columns.values()}) == 1
    for name, feature in made.features.items():
        assert (columns[name].dtype, columns[name].shape[1:]) == (feature.dtype, feature.shape)
        assert columns[name].flags.c_contiguous


def joined(found):
    """Columns of all clients, one after another."""
    return {name: np.concatenate([columns[name] for columns in found.values()]) for name in next(iter(found.values()))}


def pairs(columns):
    """Every (bytes of x, y), sorted: what was given, whoever has it."""
    return sorted((x.tobytes(), int(y)) for x, y in zip(columns["x"], columns["y"]))


def refused(converter, source, *options):
    """The one line that tells the user what is wrong, from preparing or from reading."""
    with pytest.raises(UserError) as caught:
        made = prepare(converter, source, *options)
        for split in made.splits:
            for piece in split.pieces:
                list(split.read(piece))
    assert "\n" not in str(caught.value)
    return str(caught.value)
