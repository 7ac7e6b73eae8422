"""The command line of `python -m mpifl.train`: what can be answered without torch is answered without its import."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from pathlib import Path

from mpifl.comm import Alone, World
from mpifl.launch import Parser, agree, command

DEFAULT_JOB = Path(__file__).parent / "digits.toml"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 2 refused, 1 failed, 130 interrupted."""
    return command(_command, arguments)


def _command(comm: World | Alone, arguments: Sequence[str]) -> None:
    parser = Parser(
        prog="python -m mpifl.train",
        description="Train a federated job, alone or on all ranks of `mpirun -n 9 python -m mpifl.train`.",
        epilog="With no job, handwritten digits (embedded) are trained by FedAvg. Any key of a job file can be "
        "given as key.path=value, e.g. rounds=5 run.out=results algorithm.client_opt.lr=0.05.",
    )
    parser.add_argument("job", nargs="?", help="a job file, e.g. jobs/mnist_iid.toml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the job")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and train nothing")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    options = parser.read(comm, arguments)
    if options is None:
        return
    words = [word for word in (options.job, *options.overrides) if word]
    path = DEFAULT_JOB if not words or "=" in words[0] else words.pop(0)
    if path is DEFAULT_JOB:
        words = [f"name={Path(word[10:]).name}" for word in words if word.startswith("data.path=")] + words
    if options.dry_run:
        agree(comm, lambda: _plan(path, words, comm) if comm.rank == 0 else None)
    else:
        _import_torch()
        from mpifl import run

        run(path, words, comm, options.quiet)


def _plan(path: str | Path, words: Sequence[str], comm: World | Alone) -> None:
    _import_torch()
    from mpifl.dry_run import dry_run

    dry_run(path, words, comm)


def _import_torch() -> None:
    """Import torch with the garbage collector off: it makes a million objects that stay, and visits them again."""
    if "torch" not in sys.modules:
        gc.disable()
        import torch  # noqa: F401

        gc.freeze()
        gc.enable()
