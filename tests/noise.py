"""A converter of noise in many pieces, run by the real main program: `python -c "import noise; noise.run()" --out ...`.

While the file NOISE_HOLD exists, the pieces from number NOISE_FROM on wait in their middle, each saying so in a file
of its own beside it.
"""

import os
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np

from data_prep import __main__ as program
from data_prep.conversion import Conversion, Split
from mpifl.data.format import Feature

PIECES, CLIENTS, SIDE = 6, 4, 500
FEATURES = {"x": Feature("uint8", (SIDE, SIDE)), "y": Feature("uint8", (), classes=10)}


def add_arguments(parser):
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fail", type=int, default=-1)


def prepare(options):
    read = partial(clients, options.seed, options.fail)
    train = Split("train", range(PIECES), read, clients=PIECES * CLIENTS)
    test = Split("test", [PIECES], read, central=True)
    return Conversion(FEATURES, (train, test), {"source": "noise"}, standardize="x")


def clients(seed, fail, piece):
    random = np.random.RandomState(1000 * seed + piece)
    held = "NOISE_HOLD" in os.environ and int(os.environ["NOISE_FROM"]) <= piece < PIECES
    for number in range(CLIENTS):
        if held and number == CLIENTS - 1:
            wait(Path(os.environ["NOISE_HOLD"]), piece)
        # With shards of 1 MiB each piece has two; one label is out of range if so asked.
        y = np.array([random.randint(10), 10 if (piece, number) == (fail, 2) else 0], "u1")
        yield f"client-{piece}-{number}", {"x": random.randint(0, 256, (2, SIDE, SIDE)).astype("u1"), "y": y}


def wait(hold, piece):
    if hold.exists():
        Path(f"{hold}.{piece}").write_text(str(os.getpid()))
    while hold.exists():
        time.sleep(0.01)


def run():
    sys.modules["matplotlib"] = None  # no picture: it takes a second
    program.CONVERTERS["noise"] = "noise"
    sys.modules["data_prep.noise"] = sys.modules["noise"]
    sys.exit(program.main(["noise", *sys.argv[1:]]))
