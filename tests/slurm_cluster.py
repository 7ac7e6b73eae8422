"""Slurm with three virtual nodes for tests (slurm/virtual_cluster.sh), and a metric with which a test holds a job."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "slurm" / "virtual_cluster.sh"


class CannotRun(Exception):
    """This machine cannot run Slurm; says why."""


class Cluster:
    """Three nodes of 64 CPUs and 4 GPUs, which share this machine's cores, and a folder like a clone's with a .venv."""

    def __init__(self, folder: Path, home: Path, settings: dict[str, str | None]):
        """settings: environment variables beside those of this process; None removes one."""
        self.folder, self.home, self.jobs = folder, home, 0
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PMI"))}
        own = {"VIRTUAL_CLUSTER": str(folder), "SLURM_CONF": f"{folder}/slurm.conf"}
        self.settings = {name: value for name, value in (inherited | settings | own).items() if value is not None}
        # Stops it when this process ends, however it ends: then the pipe closes.
        keeper = ["bash", "-c", 'cat; exec "$0" stop', str(SCRIPT)]
        self.keeper = subprocess.Popen(keeper, stdin=subprocess.PIPE, env=self.settings, start_new_session=True)
        started = self.start()
        if started.returncode:
            self.stop()
            assert started.returncode == 2, started.stderr
            raise CannotRun(started.stderr.strip())
        activate = home / ".venv" / "bin" / "activate"
        activate.parent.mkdir(parents=True)
        activate.write_text(f"PATH={Path(sys.executable).parent}:$PATH\n")

    def start(self) -> subprocess.CompletedProcess:
        """Start what does not run yet."""
        return subprocess.run([SCRIPT, "start"], capture_output=True, text=True, env=self.settings, timeout=30)

    def stop(self):
        """Stop it; nothing may be left."""
        self.keeper.stdin.close()
        assert self.keeper.wait(30) == 0
        end = time.monotonic() + 5
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.05)
        assert not left
        assert not self.folder.exists()
        assert str(self.folder) not in Path("/proc/self/mounts").read_text()

    def run(self, *words) -> subprocess.CompletedProcess:
        """Run a Slurm command."""
        settings = {"env": self.settings, "cwd": self.home, "timeout": 30}
        return subprocess.run([str(word) for word in words], capture_output=True, text=True, **settings)

    def say(self, *words) -> str:
        """What a Slurm command prints; it must succeed."""
        done = self.run(*words)
        assert done.returncode == 0, f"{done.args}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, file: Path, *words, options=()) -> "SlurmJob":
        """sbatch a file with these words; options are sbatch's, over the file's own."""
        self.jobs += 1
        name = f"{file.stem}-{self.jobs}"
        number = self.say("sbatch", "--parsable", f"--job-name={name}", *options, file, *words)
        return SlurmJob(self, number, name, self.home / "runs" / f"{name}-{number}")

    def daemons(self) -> dict[str, str]:
        """Their pids, by the names of the files that hold them."""
        return {path.name: path.read_text().strip() for path in self.folder.glob("*.pid")}

    def processes(self) -> dict[int, str]:
        """Daemons and jobs: what runs with this cluster's SLURM_CONF, by pid."""
        mark, found = f"SLURM_CONF={self.folder}/slurm.conf\0".encode(), {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (folder / "environ").read_bytes() + b"\0":
                    found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
            except OSError:  # ended meanwhile, or another user's
                pass
        return found


class SlurmJob:
    """A job that was submitted, or a task of an array."""

    def __init__(self, cluster: Cluster, number: str, name: str, out: Path):
        self.cluster, self.number, self.name, self.out = cluster, number, name, out

    def task(self, index: int) -> "SlurmJob":
        return SlurmJob(self.cluster, f"{self.number}_{index}", self.name, self.out / str(index))

    def shown(self, what: str) -> str:
        """A field of `scontrol show job`, such as JobState, ExitCode, Restarts."""
        text = self.cluster.say("scontrol", "show", "job", "-o", self.number)
        return re.search(rf"\b{what}=(\S*)", text)[1]

    def update(self, **fields):
        self.cluster.say("scontrol", "update", f"JobId={self.number}", *(f"{k}={v}" for k, v in fields.items()))

    def cancel(self):
        self.cluster.say("scancel", self.number)

    @property
    def log(self) -> str:
        files = sorted(self.cluster.home.glob(f"{self.name}-*.log"))
        return "".join(file.read_text(errors="replace").replace("\0", "") for file in files)

    def wait_until(self, done, what: str, seconds: float = 90):
        """Poll until `done()`; after so many seconds the test fails and shows the job's state and log."""
        end = time.monotonic() + seconds
        while not done():
            state = self.shown("JobState")
            assert time.monotonic() < end, f"job {self.number} ({state}) was not {what} in {seconds} s\n{self.log}"
            time.sleep(0.1)

    def wait_for_rounds(self, rounds: int):
        self.wait_until(lambda: len(self.rounds()) >= rounds, f"at round {rounds}")

    def wait_to_end(self, seconds: float = 120) -> str:
        """Its final state, such as COMPLETED; its log is shown if the test fails. Cuts the delay before a new start."""
        freed = [float("inf")]

        def ended():
            state, now = self.shown("JobState"), time.monotonic()
            freed[0] = float("inf") if self._daemons() else min(freed[0], now)
            # Not at once: a node counts in seconds and takes no job in the one in which it ended it.
            if state == "PENDING" and self.shown("Reason") == "BeginTime" and now - freed[0] > 2:
                self.cluster.run("scontrol", "update", f"JobId={self.number}", "StartTime=now")  # it may just start
            return freed[0] <= now and state not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")

        self.wait_until(ended, "done", seconds)
        print(self.log)
        return self.shown("JobState")

    def _daemons(self) -> list[str]:
        """Of its steps: when they end, they remove sockets that those of a new start would name alike."""
        return [words for words in self.cluster.processes().values() if f"slurmstepd: [{self.number}." in words]

    def ranks(self) -> list[int]:
        """Pids of its ranks, as they are outside the nodes."""
        found = self.cluster.processes().items()
        return sorted(pid for pid, words in found if f"/{self.name}-" in words and words.split()[0].endswith("python"))

    def rounds(self) -> list[int]:
        """Rounds that are in metrics.jsonl."""
        path = self.out / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line)["round"] for line in lines]

    def checkpoints(self) -> list[int]:
        """Rounds that have a complete checkpoint."""
        return sorted(int(path.parent.name.split("-")[1]) for path in self.out.glob("checkpoints/round-*/COMPLETE"))

    def summary(self) -> dict:
        return json.loads((self.out / "summary.json").read_text())


def held(scores, batch, until: str, seconds: float):
    """Accuracy, which takes so many seconds as long as there is no file `until`: a test lets the job go on by it."""
    from mpifl.measure import accuracy  # not where only GPUs are looked at: it imports torch

    end = time.monotonic() + seconds
    while len(scores) > 2 and time.monotonic() < end and not Path(until).exists():  # 2: a trial when the job is built
        time.sleep(0.02)
    return accuracy(scores, batch)


if __name__ == "__main__":  # which GPU a rank takes, without a GPU
    from mpifl.comm import connect
    from mpifl.engine.device import gpu_of

    comm, seen = connect(), os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    taken = seen[gpu_of(comm.seat, len(seen))[0]]
    print(f"rank {comm.rank} on {os.uname().nodename} takes {taken} of {seen}\n", end="", flush=True)  # in one piece
