"""The flat buffer's round trip: float32 parameters down, float64 sums up, by ranks, parameters and comm.reduce.

Each number of ranks is an mpirun of its own on this machine, where the ways to exchange take turns; times are of the
server, medians over --repeats, by the clock. "times copy" compares with copying the same bytes in memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

from mpifl.bench.cases import Case, count
from mpifl.bench.training import mpirun, on_ranks
from mpifl.config import UserError

WAYS = ["flat", "node", "sharded"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options: numbers of ranks and of parameters, ways to exchange."""
    parser.add_argument("--ranks", type=count, nargs="+", default=[2, 3, 5, 9], help="(default 2 3 5 9)")
    sizes = [10_000, 206_922, 1_206_590, 10_000_000]
    parser.add_argument("--parameters", type=count, nargs="+", default=sizes, help=f"(default {sizes})")
    parser.add_argument("--reduce", choices=WAYS, nargs="+", default=WAYS, help="comm.reduce (default: all)")


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Yield a case for each number of ranks, of parameters, and way to exchange."""
    if not mpirun():
        raise UserError('family comm needs mpirun, found neither beside python nor on PATH: pip install -e ".[mpich]"')
    for ranks in options.ranks:
        for parameters in options.parameters:
            words = (str(parameters), str(options.repeats), *options.reduce)
            said = json.loads(on_ranks(ranks, "mpifl.bench.exchange", *words))
            for way, ms in said.items():
                trip = ms["down"] + ms["up"]
                yield {
                    "case": f"{ranks} ranks, {parameters:,} parameters, {way}",
                    "ms_down": ms["down"],
                    "ms_up": ms["up"],
                    "ms_round_trip": trip,
                    "ms_copy": ms["copy"],
                    "times_copy": trip / ms["copy"],
                }
