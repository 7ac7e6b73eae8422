"""Thousands of mutated job files, datasets and runs: each one works or is refused in one line.

What is refused before it starts ends with status 2 and leaves everything as it was; what turns out to be damaged once
training began, with status 1. Nothing hangs, prints a traceback or a warning, or changes what was there before. What
works trained, and on files whose checksums still fit it gives the bits of an undamaged run.

MPIFL_FUZZ=N draws N mutations per test at random; without it they are the same ones each time.
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from damage import Fitting, FittingMarks, damage, of_dataset, of_run
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mutations import BASES, TEXTS, JobFile, jobs, toml_lines
from shard_files import FEATURES, plant

import mpifl

ROOT, HERE = Path(mpifl.__file__).parent.parent, Path(__file__).parent
EXPLORED = int(os.environ.get("MPIFL_FUZZ", 0))
SECONDS = 60 if EXPLORED else 20
"""What takes longer hangs; the slowest mutation takes a third of a second on an idle core."""
AT_ONCE = 2
"""Commands that run side by side."""


def examples(number):
    """So many mutations, the same ones each time, or as many at random as the environment says."""
    return settings(
        max_examples=EXPLORED or number,
        derandomize=not EXPLORED,
        print_blob=bool(EXPLORED),
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


# ---- commands


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its status, what it printed, and what was in its folder before and after."""

    status: int
    out: str
    err: str
    before: dict
    after: dict

    @property
    def new(self):
        return self.after.keys() - self.before.keys()


class Server:
    """A process of tests/command_server.py, which is started again when a command line killed it."""

    def __init__(self, folder):
        self.folder, self.process, self.files = folder, None, None

    def start(self):
        own = {
            name: value for name, value in os.environ.items() if not name.startswith(("PMI", "OMPI", "MPI", "HYDRA"))
        }
        self.process = subprocess.Popen(
            [sys.executable, HERE / "command_server.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=own | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
            cwd=self.folder,
            text=True,
            start_new_session=True,
        )
        assert self.answer(60) == "ready\n"

    def answer(self, seconds):
        """Its next line: "" when it is dead, None when it hangs."""
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

    def run(self, folder, arguments, fill, fork=False):
        """Run a command in a new folder, once `fill` has put into it what is to be there."""
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
            self.stop()
            pytest.fail(f"{'hung' if answer is None else 'died'}: {arguments}\n{out[-2000:]}\n{err[:4000]}")
        status, threads, files = json.loads(answer)
        outcome = Outcome(status, out, err, before, contents(folder))
        shutil.rmtree(folder)
        assert threads == 1, f"{threads - 1} threads were left behind"
        assert files <= (self.files or files), f"{files} files are open, {self.files} at first"
        self.files = self.files or files
        return outcome


class Commands:
    """Runs command lines, each in a new folder, on as many servers as there are threads that ask."""

    def __init__(self, folder):
        self.folder, self.numbers, self.idle = folder, count(), []

    def run(self, arguments, fill, fork=False):
        server = self.idle.pop() if self.idle else Server(self.folder)
        try:
            if server.process is None:
                server.start()
                first = filled(JobFile(toml_lines(BASES["batched"]).encode()))  # imports the rest
                server.run(self.folder / f"job{next(self.numbers)}", ["job.toml"], first)
            return server.run(self.folder / f"job{next(self.numbers)}", arguments, fill, fork)
        finally:
            self.idle.append(server)

    def stop(self):
        for server in self.idle:
            server.stop()


def contents(folder):
    """What is in a folder: bytes of files, targets of links, None for folders."""
    found = {}
    for where, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(where, name)
            link, file = os.path.islink(path), os.path.isfile(path)
            found[os.path.relpath(path, folder)] = (
                os.readlink(path) if link else Path(path).read_bytes() if file else None
            )
    return found


# ---- what there is to be mutated


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    make_data(folder / "data")
    commands = Commands(folder)
    yield commands
    commands.stop()


def make_data(folder):
    folder.mkdir()
    dense = {
        "t": FEATURES["t"],
        "x": {"dtype": "uint8", "mean": 0.0, "shape": [1, 6, 6], "std": 16.0},
        "y": {"classes": 3, "dtype": "int32", "shape": []},
    }
    tokens = {name: {"classes": 9, "dtype": "uint8", "shape": [4]} for name in "xy"}
    plant(folder / "dense", splits(dense), dense)
    plant(folder / "packed", splits(dense), dense, chunks=True, compression="gzip")
    plant(folder / "tokens", splits(tokens), tokens)


def splits(features):
    held = [(f"c{i}", columns(features, rows, i)) for i, rows in enumerate((2, 0, 3, 1))]
    test = [("block-00000-000000", columns(features, 5, 9))]
    return {"train": (held, (0, 2, 4), False), "test": (test, (0, 1), True)}


def columns(features, rows, seed):
    random = np.random.RandomState(seed)
    return {
        name: random.randint(0, spec.get("classes", 200), (rows, *spec["shape"])).astype(spec["dtype"])
        for name, spec in features.items()
    }


def filled(job):
    """A function that fills a folder with a job's file, and with what is to be at `out`."""

    def fill(folder):
        (folder / "job.toml").write_bytes(job.text)
        PLACES[job.place](folder / "out")

    return fill


def holding(name, text):
    def make(out):
        out.mkdir()
        (out / name).write_text(text)

    return make


PLACES = {
    "nothing": lambda out: None,
    "file": lambda out: out.write_text("precious"),
    "folder": holding("notes.txt", "precious"),
    "empty folder": lambda out: out.mkdir(),
    "link to nothing": lambda out: out.symlink_to("nowhere"),
    "loop": lambda out: out.symlink_to("out"),
    "other run": holding("config.toml", toml_lines(BASES["dense"] | {"seed": 5})),
    "broken run": holding("config.toml", "rounds = "),
}


def not_for_here(job):
    """Whether the job may write outside its folder, as root anywhere, or has reason to take long."""
    if (b"baselines = true" in job.text or "baselines=true" in job.arguments) and b"../data/" not in job.text:
        return True  # on a larger dataset
    words = [word.partition("=")[2].strip().strip("'\"") for word in job.arguments]
    with suppress(ValueError, RecursionError):
        table = tomllib.loads(job.text.decode())
        words += [table.get("name"), *(table[k].get(v) for k, v in OUT if isinstance(table.get(k), dict))]
    return any(isinstance(word, str) and word.startswith(("/", "~")) and word not in TEXTS for word in words)


OUT = (("run", "out"), ("data", "stage"))
harmless_jobs = jobs().filter(lambda job: not not_for_here(job))

# ---- what must hold


class Tally:
    """What mutations came to: how many there were, how many worked, and the messages of the others by kind."""

    def __init__(self):
        self.ended, self.kinds = Counter(), Counter()

    def judge(self, outcome, own="nothing"):
        """Check what holds of every outcome, count it, and say whether it worked. own: what a run may change."""
        assert "Traceback" not in outcome.err + outcome.out and "Warning" not in outcome.err, outcome.err
        assert outcome.status in ENDS, f"status {outcome.status}: {outcome.err}"
        changed = [name for name, kept in outcome.before.items() if outcome.after.get(name, "gone") != kept]
        may = re.compile(MAY_CHANGE.pattern if outcome.status == 2 else f"{MAY_CHANGE.pattern}|^{own}/")
        assert all(map(may.search, changed)), f"changed: {changed}"
        self.ended[ENDS[outcome.status]] += 1
        if ENDS[outcome.status] == "worked":
            return True
        lines = [line for line in outcome.err.splitlines() if " is damaged: " not in line]  # one checkpoint of several
        assert len(lines) == 1 and lines[0].startswith("mpifl: "), f"not one line: {outcome.err}"
        if outcome.status == 2:
            new = [name for name in outcome.new if not MAY_CHANGE.search(name)]
            assert not outcome.out and not new, f"refused, but made {new} and said {outcome.out}: {outcome.err}"
        self.kinds[kind_of(outcome.err)] += 1
        return False

    def show(self, what):
        """Print it, as figures for people."""
        ends = ", ".join(f"{number} {end}" for end, number in sorted(self.ended.items()))
        print(f"\n{what}: {self.ended.total()} mutations: {ends}; {len(self.kinds)} distinct messages")


ENDS = {0: "worked", 75: "worked", 2: "refused", 1: "failed in training"}
MAY_CHANGE = re.compile(r"(^|/)(lock|status|stage)(/|$)")
"""What says who is at work in a run folder, and the copy that data.stage asks for, which later jobs find."""


def kind_of(message):
    """A message without the values, names and paths that it quotes."""
    return re.sub(r"""'[^']*'|"[^"]*"|\([^)]*\)|\S*/\S*|-?\d[\w.]*|\[.*\]|\{.*\}""", "_", message)[:60]


def summaries(outcome):
    """Summaries of runs that were written."""
    found = [json.loads(kept) for name, kept in outcome.after.items() if name.endswith("summary.json")]
    return [summary for summary in found if "digest" in summary]


def assert_trained(outcome):
    """Every run of a command that worked took all of its rounds, or stopped early with a checkpoint."""
    if outcome.status == 75:
        assert any(name.endswith("COMPLETE") for name in outcome.new)
        return
    runs = {name for name in outcome.after if name.endswith("metrics.jsonl")}
    found = summaries(outcome)
    assert len(found) == len(runs) >= 1
    assert sum(outcome.after[name].count(b"\n") for name in runs) == sum(summary["rounds"] for summary in found)


LEAST = {
    "jobs": (1100, 240, 100),
    "dense shards": (380, 20, 15),
    "packed shards": (380, 20, 15),
    "runs to go on with": (150, 40, 5),
    "processes": (30, 0, 1),
}
"""How many mutations each test draws, how many of them must work, and how many distinct messages the others give."""


def test_all_of_them_are_thousands_of_which_hundreds_work():
    mutations, working, messages = zip(*LEAST.values())
    assert sum(mutations) >= 2000 and sum(working) >= 300 and max(messages) >= 40 and LEAST["processes"][0] >= 30


@contextmanager
def named(mutation):
    """Within the block a failure tells of what mutation it is."""
    try:
        yield
    except BaseException as failure:
        failure.add_note(f"mutation: {mutation!r}")
        raise


def tally_of(mutations, run, judge, what):
    """Run mutations and judge their outcomes; print what they came to, which must be enough."""
    tally, (number, working, messages), drawn = Tally(), LEAST[what], []

    @examples(number)
    @given(mutations)
    def check(mutation):
        if EXPLORED:  # one by one, so that hypothesis may look for a smaller one
            judge(tally, mutation, run(mutation))
        else:
            drawn.append(mutation)

    def run_named(mutation):
        with named(mutation):
            return run(mutation)

    check()
    with ThreadPoolExecutor(AT_ONCE) as threads:
        for mutation, outcome in zip(drawn, threads.map(run_named, drawn)):
            with named(mutation):
                judge(tally, mutation, outcome)
    tally.show(what)
    assert tally.ended.total() >= (EXPLORED or number)
    assert EXPLORED or (tally.ended["worked"] >= working and len(tally.kinds) >= messages)


# ---- the tests


def test_mutated_jobs_train_or_are_refused(commands):
    def run(job):
        return commands.run(["job.toml", *job.arguments], filled(job))

    def judge(tally, job, outcome):
        if tally.judge(outcome) and not {"--help", "--version", "--dry-run"} & set(job.arguments):
            assert_trained(outcome)

    tally_of(harmless_jobs, run, judge, "jobs")


def with_data(name, steps=()):
    """A function that fills a folder with a job that visits every client of a dataset, which is damaged."""

    def fill(folder):
        table = BASES["dense"] | {"rounds": 1, "data": {"path": "data"}, "model": {"name": "logistic"}}
        (folder / "job.toml").write_text(toml_lines(table))
        shutil.copytree(folder.parent / "data" / name, folder / "data")
        damage(folder / "data", steps)

    return fill


@pytest.fixture(scope="module")
def undamaged(commands):
    (summary,) = summaries(commands.run(["job.toml"], with_data("dense")))
    return summary["digest"]


@pytest.mark.parametrize("storage", ["dense", "packed"])
def test_damaged_datasets_train_to_the_same_bits_or_are_refused(commands, undamaged, storage):
    def run(steps):
        return commands.run(["job.toml", "--quiet"], with_data(storage, steps))

    def judge(tally, steps, outcome):
        if tally.judge(outcome):
            assert_trained(outcome)
            (summary,) = summaries(outcome)
            assert summary["digest"] == undamaged or Fitting(True) in steps

    tally_of(of_dataset, run, judge, f"{storage} shards")


ROUNDS, MORE = 2, 3


def with_run(files, steps=()):
    """A function that fills a folder with a job, and with what a run of it left, which is damaged."""

    def fill(folder):
        (folder / "job.toml").write_text(toml_lines(BASES["images"] | {"run": {"out": "out", "save_every": 1}}))
        for name, kept in sorted(files.items()):
            if kept is None:
                (folder / name).mkdir(parents=True)
            else:
                (folder / name).write_bytes(kept)
        damage(folder / "out", steps)
        for file in folder.glob("out/lock/*"):
            os.utime(file, (0, 0))  # it was given back

    return fill


@pytest.fixture(scope="module")
def run_before(commands):
    """The files of a run of ROUNDS rounds, and the digest of one of MORE rounds."""
    ran, longer = (commands.run(["job.toml", f"rounds={n}"], with_run({})) for n in (ROUNDS, MORE))
    return {name: ran.after[name] for name in ran.new}, summaries(longer)[0]["digest"]


def test_damaged_runs_go_on_to_the_same_bits_or_are_refused(commands, run_before):
    def run(steps):
        return commands.run(["job.toml", f"rounds={MORE}", "--quiet"], with_run(run_before[0], steps))

    def judge(tally, steps, outcome):
        if tally.judge(outcome, own="out"):
            (summary,) = summaries(outcome)
            assert summary["rounds"] == MORE
            assert summary["digest"] == run_before[1] or FittingMarks() in steps

    tally_of(of_run, run, judge, "runs to go on with")


def test_thirty_of_them_end_in_the_same_way_as_processes_of_their_own(commands, run_before):
    """Exit status, stderr and files are those of a process that ends by itself, with torch imported before it began."""
    ways = {
        "job": lambda job: (["job.toml", *job.arguments], filled(job)),
        "data": lambda steps: (["job.toml", "--quiet"], with_data("dense", steps)),
        "run": lambda steps: (["job.toml", f"rounds={MORE}", "--quiet"], with_run(run_before[0], steps)),
    }
    one_thread = harmless_jobs.filter(lambda job: "threads" not in repr(job))  # OpenMP's do not outlive a fork
    kinds = zip(ways, (one_thread, of_dataset, of_run))
    mutations = st.one_of(*(st.tuples(st.just(way), of) for way, of in kinds))

    def run(mutation):
        way, what = mutation
        return [commands.run(*ways[way](what), fork=fork) for fork in (False, True)]

    def judge(tally, mutation, outcomes):
        here, there = outcomes
        tally.judge(there, own="out")
        assert there.status == here.status
        assert re.sub(r"job\d+", "job", there.err) == re.sub(r"job\d+", "job", here.err)

    tally_of(mutations, run, judge, "processes")
