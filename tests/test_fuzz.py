"""Thousands of broken job files and datasets: each either works or is refused in one line.

A job that is refused ends with status 2 and leaves everything as it was; a run that works wrote a summary of rounds
that really ran. Nothing hangs, and nothing that was there before is changed.

MPIFL_FUZZ=N draws N examples per test at random, instead of the same ones each time.
"""

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tomllib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import mutations
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from mutations import JobFile, byte_edits, jobs, toml_lines
from shard_files import FEATURES, plant

import mpifl

ROOT, HERE = Path(mpifl.__file__).parent.parent, Path(__file__).parent
SECONDS = 12
"""A mutation that takes longer hangs; the slowest takes half a second on an idle core."""
EXPLORED = int(os.environ.get("MPIFL_FUZZ", 0))


def examples(number):
    """So many examples, the same ones each time, or as many at random as the environment says."""
    return settings(
        max_examples=EXPLORED or number,
        derandomize=not EXPLORED,
        print_blob=bool(EXPLORED),
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


# ---- running


@dataclass(frozen=True)
class Outcome:
    """How a command ended: status, or minus the signal; what it printed; its folder before and after."""

    status: int
    out: str
    err: str
    before: dict
    after: dict

    @property
    def new(self):
        return self.after.keys() - self.before.keys()


class Server:
    """tests/command_server.py, started again after each command that killed it."""

    def __init__(self, folder):
        self.folder, self.numbers, self.process, self.files = folder, count(), None, None

    def start(self):
        own = {name: value for name, value in os.environ.items() if not name.startswith(("PMI", "OMPI", "MPI", "HYDRA"))}
        settings = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        with open(self.folder / "server", "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, HERE / "command_server.py"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=own | settings,
                cwd=self.folder,
                text=True,
                start_new_session=True,
            )
        assert self.answer(60) == "ready\n", (self.folder / "server").read_text()
        self.run(["job.toml"], fill(JobFile(toml_lines(mutations.BASES["batched"]).encode())))  # imports the rest

    def answer(self, seconds):
        """The next line, "" if the process ended; None if neither comes in time."""
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return self.process.stdout.readline() if ready else None

    def stop(self):
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
        self.process = None

    def run(self, arguments, fill=lambda folder: None, fork=False):
        """Run a command in a new folder, once `fill` has put into it what is to be there."""
        if self.process is None:
            self.start()
        folder = self.folder / f"job{next(self.numbers)}"
        folder.mkdir()
        fill(folder)
        before = contents(folder)
        request = {"folder": str(folder), "arguments": list(arguments), "fork": fork}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.answer(SECONDS)
        if answer is None:
            os.kill(self.process.pid, signal.SIGABRT)
            self.process.wait()
        out, err = (Path(f"{folder}.{name}").read_text(errors="replace") for name in ("stdout", "stderr"))
        if not answer:
            told = "it hung" if answer is None else "it died"
            self.stop()
            pytest.fail(f"{told}: {arguments}\n{out}\n{err}")
        status, threads, files = json.loads(answer)
        outcome = Outcome(status, out, err, before, contents(folder))
        shutil.rmtree(folder)
        assert threads == 1, f"{threads - 1} threads were left behind"
        assert files <= (self.files or files), f"{files} files are open, {self.files} at first"
        self.files = self.files or files
        return outcome


def contents(folder):
    """What is in a folder: bytes of files, targets of links, None for folders."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kept = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = kept
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    make_data(folder / "data")
    server = Server(folder)
    yield server
    server.stop()


def make_data(folder):
    folder.mkdir()
    dense = {
        "x": {"dtype": "uint8", "mean": 0.0, "shape": [1, 6, 6], "std": 16.0},
        "y": {"classes": 3, "dtype": "int32", "shape": []},
    }
    plant(folder / "dense", splits(dense), dense)
    tokens = {name: {"classes": 9, "dtype": "uint8", "shape": [4]} for name in "xy"} | {"t": FEATURES["t"]}
    plant(folder / "tokens", splits(tokens), tokens)


def splits(features):
    held = [(f"c{i}", columns(features, rows, i)) for i, rows in enumerate((2, 0, 3, 1))]
    test = [("block-00000-000000", columns(features, 5, 9))]
    return {"train": (held, (0, 2, 4), False), "test": (test, (0, 1), True)}


def columns(features, rows, seed):
    import numpy as np

    random = np.random.RandomState(seed)
    return {
        name: random.randint(0, spec.get("classes", 200), (rows, *spec["shape"])).astype(spec["dtype"])
        for name, spec in features.items()
    }


# ---- what must hold


class Tally:
    """What mutations came to: how many there were, how many worked, and the kinds of messages of the others."""

    def __init__(self):
        self.ended, self.kinds = Counter(), Counter()

    def judge(self, outcome):
        """Check what holds of every outcome, and count it."""
        worked = outcome.status in (0, 75)
        assert "Traceback" not in outcome.err + outcome.out and "Warning" not in outcome.err, outcome.err
        assert outcome.status in (0, 1, 2, 75), outcome
        changed = [name for name, kept in outcome.before.items() if outcome.after.get(name, "gone") != kept]
        assert not changed, f"changed: {changed}"
        if worked:
            self.ended["worked"] += 1
            return
        assert outcome.err.startswith("mpifl: ") and outcome.err.endswith("\n"), outcome
        assert outcome.err.count("\n") == 1, f"more than one line: {outcome.err}"
        if outcome.status == 2:
            assert not outcome.out and not outcome.new, f"refused, but made or said {outcome.new} {outcome.out}"
        self.ended["refused" if outcome.status == 2 else "failed"] += 1
        self.kinds[kind_of(outcome.err)] += 1

    def show(self, what):
        worked, refused, failed = (self.ended[name] for name in ("worked", "refused", "failed"))
        print(f"{what}: {self.ended.total()} mutations, {worked} worked, {refused} refused, {failed} failed in training;")
        print(f"{len(self.kinds)} distinct messages, {sum(self.kinds.values())} in all")


def kind_of(message):
    """A message without the values, names and paths that it quotes."""
    return re.sub(r"""'[^']*'|"[^"]*"|\([^)]*\)|\S*/\S*|-?\d[\w.]*|\[.*\]|\{.*\}""", "_", message)[:60]


def assert_trained(outcome):
    """A run ended well: rounds ran, each wrote its line, and the summary says so."""
    summaries = [json.loads(kept) for name, kept in outcome.after.items() if Path(name).name == "summary.json"]
    runs = [summary for summary in summaries if "rounds" in summary]
    assert runs
    for summary in runs:
        (folder,) = {Path(name).parent for name in outcome.after if name.endswith("summary.json")} if len(runs) == 1 else {None}
        if folder is not None:
            lines = outcome.after[str(folder / "metrics.jsonl")].splitlines()
            assert len(lines) == summary["rounds"] >= 1 and summary["steps"] >= 0


def fill(job):
    """A function that fills a folder with a job's file, and with what is to be at `out`."""

    def fill(folder):
        (folder / "job.toml").write_bytes(job.text)
        PLACES[job.place](folder / "out")

    return fill


def _holding(name, text):
    def make(out):
        out.mkdir()
        (out / name).write_text(text)

    return make


PLACES = {
    "nothing": lambda out: None,
    "file": lambda out: out.write_text("precious"),
    "folder": _holding("notes.txt", "precious"),
    "empty folder": lambda out: out.mkdir(),
    "link to nothing": lambda out: out.symlink_to("nowhere"),
    "loop": lambda out: out.symlink_to("out"),
    "other run": _holding("config.toml", toml_lines(mutations.BASES["dense"] | {"seed": 5})),
    "broken run": _holding("config.toml", "rounds = "),
}


def leaves_the_folder(job):
    """Whether the job may write outside its folder, as root anywhere: it is not run then."""
    words = [word.partition("=")[2].strip().strip("'\"") for word in job.arguments]
    with suppress(ValueError, RecursionError):
        table = tomllib.loads(job.text.decode())
        words += [table.get("name"), *(table[k].get(v) for k, v in OUT if isinstance(table.get(k), dict))]
    return any(isinstance(word, str) and word.startswith(("/", "~")) and word not in mutations.TEXTS for word in words)


OUT = (("run", "out"), ("data", "stage"))
