"""Kill ranks, fill the disk, damage checkpoints and shards, many times over: `python tests/soak.py --faults 200`.

A job, not a test: 200 faults take about half an hour on two cores. Each experiment is a SCAFFOLD run on 2 to 5 ranks
that saves after every round; a fault hits it, and the same command is given again, on another number of ranks, until
it says that it is finished. What must hold: a run that ends has exit status 0 and the digest of an undisturbed one, or
a clear error (no traceback) and checkpoints that are whole. Half of the kills come at a random moment from outside;
the others at the entry to a given phase of a given rank, as phases of microseconds would never be hit otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from itertools import count
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROUNDS, CLIENTS = 6, 24
PHASES = ("start", "sample", "server", "send", "wait", "receive", "load", "train", "sum", "reduce", "write")
KINDS = {"moment": 35, "phase": 45, "disk": 7, "checkpoint": 8, "shard": 5}
"""Faults, and how often they come relative to each other."""


# --- within the ranks: named by the job as "soak:net" ------------------------------------------------------------


def net(features):
    """A small net; where SOAK_KILL says "rank:phase:times", that rank dies when it enters the phase so often."""
    from torch import nn

    if target := os.environ.get("SOAK_KILL"):
        _die_at(*target.split(":"))
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))


def _die_at(rank: str, phase: str, times: str) -> None:
    from mpifl.engine.clock import Clock

    enter, left = Clock.enter, [int(times)]

    def counted(clock, entered):
        found = enter(clock, entered)
        if clock.rank == int(rank) and phase in (entered, clock.account) and clock._map is not None:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return found

    Clock.enter = counted


# --- from outside ------------------------------------------------------------------------------------------------


class Soak:
    """Experiments in a folder of their own, and what came of them."""

    def __init__(self, folder: Path, seed: int, kinds: Sequence[str]) -> None:
        self.folder, self.random, self.kinds = folder, random.Random(seed), kinds
        self.data = folder / "data"
        shutil.copytree(TESTS.parent / "mpifl" / "data" / "digits", self.data)
        self.kills: Counter[tuple[str, int]] = Counter()
        self.faults: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.hits = 0
        self.wrong: list[str] = []
        self.digest = ""

    def run(self, out: Path, ranks: int, kill: str = "", during=lambda process: None) -> subprocess.CompletedProcess:
        """Give the command once; `during` is called with the process while it runs."""
        words = [
            *(f"data.path={self.data}", f"run.out={out}", "run.save_every=1", f"rounds={ROUNDS}", f"cohort={CLIENTS}"),
            *("baselines=false", "model={name='soak:net'}", "algorithm={name='scaffold',client_lr=0.1}"),
        ]
        launcher = Path(sys.executable).with_name("mpirun")
        environment = os.environ | {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}", "SOAK_KILL": kill}
        command = [str(launcher), "-n", str(ranks), sys.executable, "-m", "mpifl.train", *words]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        during(process)
        try:
            stdout, stderr = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            self.wrong.append(f"{out.name}: no end within 120 s")
            stdout, stderr = process.communicate()
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)

    def undisturbed(self) -> None:
        """The digests that all others must have."""
        done = self.run(self.folder / "undisturbed", 3)
        assert done.returncode == 0, done.stderr
        self.digest = digests(self.folder / "undisturbed")

    def experiment(self, number: int) -> None:
        """One run, one fault, and starts until it is finished."""
        out = self.folder / f"run-{number:04d}"
        kind, before = self.random.choices(self.kinds, [KINDS[kind] for kind in self.kinds])[0], self.hits
        getattr(self, f"_{kind}")(out)
        self.faults[kind] += self.hits - before
        for _ in range(4):
            done = self.run(out, self.random.randint(2, 5))
            if done.returncode == 0:
                break
            self._look(out, done)
        if (out / "summary.json").exists() and digests(out) == self.digest:
            self.outcomes["finished with the undisturbed digest"] += 1
        else:
            self.wrong.append(f"{out.name} ({kind}): status {done.returncode}: {done.stderr[-500:]}")
        shutil.rmtree(out, ignore_errors=True)

    def _look(self, out: Path, done: subprocess.CompletedProcess) -> None:
        """What a start that did not finish must leave: no traceback, and checkpoints that are whole."""
        if "Traceback" in done.stderr:
            self.wrong.append(f"{out.name}: a traceback:\n{done.stderr[-1500:]}")
        for path in (out / "checkpoints").glob("round-*/COMPLETE"):
            for name, (size, _) in json.loads(path.read_text()).items():
                if not (path.parent / name).exists() or (path.parent / name).stat().st_size != size:
                    self.wrong.append(f"{path.parent} lacks {name}")

    def _died(self, out: Path, done: subprocess.CompletedProcess, phase: str, rank: int) -> None:
        if done.returncode == 0:
            self.outcomes["was over before it was hit"] += 1
            return
        self.hits += 1
        self.kills[phase.partition("/")[0], rank] += 1
        self._look(out, done)

    def _phase(self, out: Path) -> None:
        """Kill a rank as it enters a phase."""
        ranks = self.random.randint(3, 5)
        counts = {phase: sum(n for (p, _), n in self.kills.items() if p == phase) for phase in ALL_PHASES}
        phase = min(ALL_PHASES, key=lambda phase: (counts[phase], self.random.random()))
        of_server = phase in ("sample", "server", "send", "evaluate", "write", "checkpoint", "finish")
        rank = 0 if of_server else self.random.randrange(1, ranks)
        times = self.random.randint(1, 2 if phase in ("start", "finish") else ROUNDS - 1)
        times = 1 if phase in ("start", "finish") else times
        self._died(out, self.run(out, ranks, f"{rank}:{phase}:{times}"), phase, rank)

    def _moment(self, out: Path) -> None:
        """Kill a rank at any moment once it has a status."""
        hit: list[tuple[str, int]] = []

        def kill(process: subprocess.Popen) -> None:
            sys.path[:0] = [str(TESTS.parent)]
            from mpifl.engine.clock import Whereabouts

            while process.poll() is None and not (found := Whereabouts.of_run(out)):
                time.sleep(0.02)
            time.sleep(self.random.uniform(0, 1.0))
            found = Whereabouts.of_run(out)
            if process.poll() is None and found:
                chosen = self.random.choice(found)
                hit.append((chosen.phase, chosen.rank))
                try:
                    os.kill(chosen.pid, signal.SIGKILL)
                except ProcessLookupError:
                    hit.clear()

        done = self.run(out, self.random.randint(2, 5), during=kill)
        if hit:
            self._died(out, done, *hit[0])
        else:
            self.outcomes["was over before it was hit"] += 1

    def _disk(self, out: Path) -> None:
        """Let the disk be full from some moment on."""
        size = self.random.choice((150, 250, 400, 700))
        self.hits += 1
        out.mkdir()
        if os.system(f"mount -t tmpfs -o size={size}k tmpfs {out}"):
            sys.exit("the soak mounts small disks: run it as root")
        try:
            done = self.run(out, self.random.randint(2, 5))
            self._look(out, done)
            said = "cannot be written" in done.stderr or "could not be written" in done.stdout + done.stderr
            if done.returncode and not said and "No space left" not in done.stderr:
                self.wrong.append(f"{out.name}: the full disk is not named: {done.stderr[-500:]}")
            shutil.copytree(out, self.folder / "rescued")
        finally:
            os.system(f"umount -l {out}")
        out.rmdir()
        (self.folder / "rescued").rename(out)

    def _checkpoint(self, out: Path) -> None:
        """Damage a file of the newest checkpoint of a run that was killed."""
        self._died(out, self.run(out, 3, "1:train:40"), "train", 1)
        found = sorted((out / "checkpoints").glob("round-*/COMPLETE"))
        if not found:
            return
        files = [path for path in found[-1].parent.iterdir() if path.stat().st_size]
        self._flip(self.random.choice(files))
        self.hits += 1

    def _shard(self, out: Path) -> None:
        """Damage a shard, see it named, and mend it."""
        files = sorted(self.data.glob("train-*.h5"))
        file = self.random.choice(files)
        self.hits += 1
        whole = file.read_bytes()
        self._flip(file)
        done = self.run(out, 3)
        self._look(out, done)
        if done.returncode and file.name not in done.stderr:
            self.wrong.append(f"{out.name}: the damaged shard is not named: {done.stderr[-500:]}")
        if done.returncode == 0:  # in what nobody reads
            self.outcomes["a flipped byte that nobody reads"] += 1
        file.write_bytes(whole)

    def _flip(self, file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
        file.write_bytes(data)

    def report(self) -> None:
        """Print what came of it."""
        print(f"\nfaults: {dict(self.faults)}\noutcomes: {dict(self.outcomes)}\n\nkills by phase and rank")
        ranks = sorted({rank for _, rank in self.kills})
        print("phase       " + "".join(f"{rank:>6}" for rank in ranks) + "   all")
        for phase in sorted({phase for phase, _ in self.kills}):
            row = [self.kills[phase, rank] for rank in ranks]
            print(f"{phase:<12}" + "".join(f"{n:>6}" for n in row) + f"{sum(row):>6}")
        print("\n" + ("nothing went wrong" if not self.wrong else "WRONG:\n" + "\n".join(self.wrong)))


ALL_PHASES = (*PHASES, "evaluate", "checkpoint", "finish")


def digests(out: Path) -> str:
    """Of the state and of client memory."""
    summary = json.loads((out / "summary.json").read_text())
    return summary["digest"] + summary["memory_digest"]


def main() -> int:
    """Run experiments; returns 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=[*KINDS])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mpifl-soak-") as folder:
        soak = Soak(Path(folder), options.seed, options.only)
        soak.undisturbed()
        for number in count():
            soak.experiment(number)
            print(f"{soak.hits:>4} of {options.faults}: {len(soak.wrong)} wrong", flush=True)
            if soak.hits >= options.faults:
                break
        soak.report()
        return bool(soak.wrong)


if __name__ == "__main__":
    sys.exit(main())
