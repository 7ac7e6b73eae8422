"""A partition and its options on the command line: from what is asked for to the rows of every client."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.random import RandomState

from data_prep.partition import (
    by_column,
    classes,
    dirichlet,
    dirichlet_class,
    equal_labels,
    flag,
    iid,
    log_normal,
    power_law,
    shards,
)
from mpifl.config import UserError

CLIENTS = 100

PARTITIONS: dict[str, Callable[..., Any]] = {
    "iid": iid,
    "equal-labels": equal_labels,
    "dirichlet": dirichlet,
    "dirichlet-class": dirichlet_class,
    "shards": shards,
    "classes": classes,
    "log-normal": log_normal,
    "power-law": power_law,
    "by-column": by_column,
}
OPTIONS = {  # a partition takes those that its function names; what has no default there must be given
    "clients": (int, f"number of clients (default: {CLIENTS})"),
    "per_client": (int, "examples of each client, exactly (default: all are used)"),
    "per_label": (int, "examples of each label and client (default: as many as there are)"),
    "alpha": (
        float,
        "concentration: towards 0 a client has one label, towards infinity all alike (Hsu et al. state it times the "
        "number of labels)",
    ),
    "min_examples": (int, "examples that each client has at least (default: 0)"),
    "shards_per_client": (int, "shards of each client (default: 2)"),
    "classes_per_client": (int, "labels of each client (default: 2)"),
    "sigma": (float, "deviation of the logarithm of sizes"),
    "exponent": (float, "how fast the density of sizes falls, above 1"),
}


class Shares(NamedTuple):
    """Both splits: client id -> its row indices, ascending; `test` is empty without --hold-out."""

    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]


def add_client_column(parser: argparse.ArgumentParser) -> None:
    """Declare the column of client ids, for `by_client_column`."""
    what = "column of client ids: each becomes a client (--partition by-column)"
    parser.add_argument("--client-column", metavar="NAME", help=what)


def by_client_column(options: argparse.Namespace, otherwise: str = "") -> argparse.Namespace:
    """Settle the partition: --client-column alone means by-column; UserError for one without the other."""
    column, partition = options.client_column, options.partition
    if column is not None and partition not in (None, "by-column"):
        problem = f"--client-column {column} makes a client of each id, --partition {partition} shares rows out"
        raise UserError(f"{problem}; leave one of them out")
    partition = partition or ("by-column" if column is not None else otherwise)
    if column is None and partition in ("", "by-column"):
        raise UserError("give --client-column, the column of client ids, or another --partition, e.g. iid")
    return argparse.Namespace(**vars(options) | {"partition": partition})


def add_arguments(parser: argparse.ArgumentParser, default: str | None = "iid", means: str = "") -> None:
    """Declare --partition and everything it takes, --seed, and --hold-out.

    default: None leaves it open, and `means` says what that means.
    """
    lines = [f"  {name:17}{function.__doc__.splitlines()[0]}" for name, function in PARTITIONS.items()]
    group = parser.add_argument_group("partition", "how examples are shared out over clients:\n" + "\n".join(lines))
    group.add_argument(
        "--partition",
        choices=PARTITIONS,
        default=default,
        metavar="NAME",
        help=f"see above (default: {means or default})",
    )
    for option, (kind, what) in OPTIONS.items():
        takers = [name for name, function in PARTITIONS.items() if option in _parameters(function)]
        users = "all but by-column" if option == "clients" else ", ".join(takers)
        metavar = "N" if kind is int else "X"
        group.add_argument(flag(option), type=kind, metavar=metavar, help=f"{users}: {what}")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is random here (default: 0)")
    held = parser.add_argument_group("hold-out", "examples kept from training, as split test")
    held.add_argument("--hold-out", type=float, default=0.0, metavar="FRACTION", help="how much (default: 0, nothing)")
    held.add_argument(
        "--hold-out-by",
        choices=("examples", "clients"),
        help="that fraction of each client's examples, rounded (default), or of the clients, with all that is theirs",
    )


def shares(
    options: argparse.Namespace,
    labels: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    count: int | None = None,
) -> Shares:
    """Share examples out as `add_arguments`' options say.

    labels, groups: one value per row, (rows,); groups are what by-column goes by. count: rows of a corpus that has
    neither. Held out by examples, both splits have the same ids in the same order. Raises UserError naming the
    option to change.
    """
    partition, arguments = PARTITIONS[options.partition], _arguments(options)
    if count is None:
        count = len(groups if labels is None else labels)
    for name, value in {"labels": labels, "groups": groups, "count": count, "seed": options.seed}.items():
        if name in _parameters(partition):
            arguments[name] = value
            if value is None:
                what = "a column of client ids" if name == "groups" else "labels"
                raise UserError(f"--partition {options.partition} needs {what}, there is none here; choose another")
    if not count:
        raise UserError("there are no examples to share out; look at the source")
    found = partition(**arguments)
    clients = found if partition is by_column else dict(zip(_ids(len(found)), found))
    if not options.hold_out:
        return Shares(clients, {})
    # A stream of its own: what is held out does not change the partition.
    hold_out = _hold_out_clients if options.hold_out_by == "clients" else _hold_out_examples
    return hold_out(clients, options.hold_out, RandomState((options.seed, 1)))


def describe(options: argparse.Namespace) -> str:
    """Say for provenance how examples are shared out, e.g. "1,000 clients, iid, seed 0"."""
    arguments = _arguments(options)
    clients = f"{arguments.pop('clients'):,} clients, " if "clients" in arguments else ""
    own = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in arguments.items())
    whose = "of the clients" if options.hold_out_by == "clients" else "of each client's examples"
    held = f"; {options.hold_out} {whose} held out as split test" if options.hold_out else ""
    return f"{clients}{options.partition}{f' ({own})' if own else ''}, seed {options.seed}{held}"


def _hold_out_examples(clients: dict[str, np.ndarray], fraction: float, random: RandomState) -> Shares:
    train, test = {}, {}
    for name, rows in clients.items():
        held = random.permutation(len(rows)) < round(fraction * len(rows))
        train[name], test[name] = rows[~held], rows[held]
    if not any(map(len, test.values())):
        raise UserError(f"--hold-out {fraction} of each client's examples rounds to none; raise it, or lower --clients")
    return Shares(train, test)


def _hold_out_clients(clients: dict[str, np.ndarray], fraction: float, random: RandomState) -> Shares:
    count = round(fraction * len(clients))
    if not 0 < count < len(clients):
        raise UserError(f"--hold-out {fraction} of {len(clients)} clients is {count}; one must be held out, one stay")
    held = random.permutation(len(clients)) < count
    named = list(zip(held, clients.items()))
    return Shares(dict(item for out, item in named if not out), dict(item for out, item in named if out))


def _arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The chosen partition's own options, refusing what is missing, out of place or out of range."""
    parameters = _parameters(PARTITIONS[options.partition])
    arguments = {}
    for name in OPTIONS:
        value = getattr(options, name)
        if name not in parameters:
            if value is not None:
                raise UserError(f"--partition {options.partition} does not take {flag(name)}; leave it out")
        elif value is not None:
            arguments[name] = value
        elif name == "clients":
            arguments[name] = CLIENTS
        elif parameters[name].default is inspect.Parameter.empty:
            raise UserError(f"--partition {options.partition} needs {flag(name)}: {OPTIONS[name][1]}")
    if not 0 <= options.seed < 2**32:
        raise UserError(f"--seed {options.seed}: it must be 0 to {2**32 - 1}")
    if options.hold_out_by and not options.hold_out:
        raise UserError(f"--hold-out-by {options.hold_out_by} needs --hold-out and a fraction")
    if not 0 <= options.hold_out < 1:
        raise UserError(f"--hold-out {options.hold_out}: it must be at least 0 and below 1")
    return arguments


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def _ids(clients: int) -> list[str]:
    digits = max(3, len(str(clients - 1)))
    return [f"client-{number:0{digits}d}" for number in range(clients)]
