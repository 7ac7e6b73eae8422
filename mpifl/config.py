"""Job files: TOML in, checked tables out; every mistake becomes one line that says how to mend it."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import json
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Table = dict[str, Any]
MOST = 10**9
"""What a job counts is at most so many: more is a slip, and the product of two is still an integer of 64 bits."""
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
Duration = str | float
"""Seconds, or e.g. "90m"."""


class UserError(ValueError):
    """A mistake a user can mend: printed as one line without a traceback, exit status 2 (1 once training began).

    lines: more than one only where there is a list to be shown. What a line quotes stays in it: characters that would
    not are escaped, and of a very long line the middle is left out.
    """

    in_training = False

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(map(_printable, lines)))


def _printable(line: str) -> str:
    line = _UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], str(line))
    return line if len(line) <= 2000 else f"{line[:1200]} [...] {line[-600:]}"


def is_of_memory(error: BaseException | None) -> bool:
    """Whether Python, NumPy or torch says that there is not enough memory."""
    words = ("out of memory", "not enough memory", "allocate memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in words))


def choice(name: str, allowed: Iterable[str], what: str) -> str:
    """Return `name` if it is one of `allowed`; otherwise raise UserError with a did-you-mean.

    `what` says in words what was asked for, e.g. "algorithm" or "scaffold option".
    """
    allowed = sorted(allowed)
    if name in allowed:
        return name
    near = difflib.get_close_matches(str(name), allowed, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise UserError(f"there is no {what} '{name}'{hint} (allowed: {', '.join(allowed) or 'none'})")


@dataclass(frozen=True)
class Data:
    """[data] path: a folder, "digits" (embedded), or "package.module:function". made_by: the command that makes it.

    cache_mb: MiB per rank for clients' data: what fits stays in memory once read, otherwise it bounds what is fetched
    ahead. stage: a folder on each node's own disk, to which the shards are copied first.
    """

    path: str = "digits"
    made_by: str = ""
    cache_mb: int = 512
    stage: str = ""


@dataclass(frozen=True)
class Engine:
    """[engine] name: "serial" trains one client after the other; "batched" several in one launch, "graph" as CUDA
    graphs; "auto" is serial on the CPU and on a GPU the last of them in which the work runs.

    clients_at_once: in one launch (0: as memory allows). dtype: what matrix products in training are computed in;
    theta stays float32. check: verify that client works write only to what is theirs.
    """

    name: Literal["auto", "serial", "batched", "graph"] = "auto"
    clients_at_once: int = 0
    dtype: Literal["float32", "tf32", "bf16"] = "float32"
    check: bool = False

    def __post_init__(self) -> None:
        if self.check and self.name in ("batched", "graph"):
            raise UserError(
                f'engine.check watches clients one by one; with it engine.name is "serial", not "{self.name}"'
            )


@dataclass(frozen=True)
class Comm:
    """[comm] sum: "exact" gives the same bits on any number of ranks; "float32" halves the uplink of huge models.

    reduce: how ranks exchange: by MPI's collectives ("flat"), or through memory that a node's ranks share ("node");
    "auto": the latter where a node has several ranks. "sharded": every rank is the server of a part of the model.
    """

    sum: Literal["exact", "float32"] = "exact"
    reduce: Literal["auto", "flat", "node", "sharded"] = "auto"


@dataclass(frozen=True)
class Run:
    """[run] out: results folder (default runs/NAME-TIME). threads: torch's, part of the job as they change bits.

    device: "cpu", or "cuda": a GPU per rank. server_gpu: rank 0 shares the GPU with the fewest hosts, or has one to
    itself ("own"). eval_every: rounds between evaluations. eval_rows: about how many rows of the test split they score,
    the same ones each time (0: all). eval_batch: rows that are scored at once. scored_by: the hosts together, or the
    server while hosts train on ("auto": where it has a core of its own). metrics: each "accuracy",
    "package.module:function" or a table of name, options and, where two have one name, `as`; None: accuracy, of tokens
    where targets are sequences. memory_mb: MiB of client memory per rank before it spills to mapped files. profile:
    trace every rank, and say at the end where time went.

    resume: go on with the run that `out` holds, or refuse ("never"). save_every: rounds between checkpoints (0: only
    when stopped early). keep: so many checkpoints. warm_start: a safetensors file of the plain module to begin with.
    time_limit: seconds, or "90m", "2h": stop in time, with a checkpoint ("": under Slurm the job's own). requeue: have
    Slurm start the job again after that ("auto": a batch job with an `out`). stall_timeout: seconds without a sign of
    life from a rank that end the job (0: none). on_rank_failure: what happens when a rank dies: the job stops,
    `python -m mpifl.supervise` starts it again from its last checkpoint, or the others go on from there ("shrink").
    writers: where rounds are written beside metrics.jsonl.
    """

    out: str = ""
    threads: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    server_gpu: Literal["share", "own"] = "share"
    eval_every: int = 1
    eval_rows: int = 0
    eval_batch: int = 512
    scored_by: Literal["auto", "server", "hosts"] = "auto"
    metrics: tuple[str | Table, ...] | None = None
    memory_mb: int = 4096
    profile: bool = False
    resume: Literal["auto", "never"] = "auto"
    save_every: int = 0
    keep: int = 2
    warm_start: str = ""
    time_limit: Duration = ""
    requeue: Literal["auto", "never"] = "auto"
    stall_timeout: float = 0.0
    on_rank_failure: Literal["stop", "restart", "shrink"] = "stop"
    writers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()


@dataclass(frozen=True)
class Device:
    """One of faults.devices. share: how many clients have it, relative to the others. slowdown: factor on
    seconds_per_example; spread: standard deviation of its logarithm among them. down_mbps, up_mbps: megabits per
    second (0: no limit).
    """

    share: float = 1.0
    slowdown: float = 1.0
    spread: float = 0.0
    down_mbps: float = 0.0
    up_mbps: float = 0.0

    def __post_init__(self) -> None:
        for key, least, most in (("share", 1e-6, 1e6), ("slowdown", 1e-6, 1e6), ("spread", 0, 5)):
            _require_between(f"faults.devices.{key}", getattr(self, key), least, most)
        for key in ("down_mbps", "up_mbps"):
            _require_between(f"faults.devices.{key}", getattr(self, key), 0, 1e6)


@dataclass(frozen=True)
class Faults:
    """[faults] What goes wrong with clients: simulated, or tolerated.

    dropout: probability that a client returns nothing. over_selection: so many more clients are asked, as a share of
    the cohort, of whom the first to report count. deadline: virtual seconds after which a round is closed (0: none).
    seconds_per_example: virtual ones that training takes with slowdown 1. devices: what clients have ((): all the same,
    and links without limit). tolerate: so many clients of a round may fail, by an exception or with NaN or infinity,
    and are left out; one more ends the job.
    """

    dropout: float = 0.0
    over_selection: float = 0.0
    deadline: float = 0.0
    seconds_per_example: float = 0.0
    devices: tuple[Device, ...] = ()
    tolerate: int = 0

    def __post_init__(self) -> None:
        for key, most in (("dropout", 1), ("over_selection", 100), ("deadline", 1e9), ("seconds_per_example", 1e6)):
            _require_between(f"faults.{key}", getattr(self, key), 0, most)
        if self.deadline and not self.seconds_per_example and not any(d.down_mbps or d.up_mbps for d in self.devices):
            raise UserError(
                f"faults.deadline is {self.deadline}, but all visits take 0 virtual seconds; set "
                f"faults.seconds_per_example, or down_mbps and up_mbps of faults.devices"
            )

    @property
    def simulated(self) -> bool:
        """Whether anything is, beside what is tolerated."""
        return dataclasses.replace(self, tolerate=0) != Faults()


def require_count(what: str, value: float, least: int, most: int = MOST) -> None:
    """Raise UserError unless `value` is from `least` to `most`."""
    if not value >= least:
        raise UserError(f"{what} is {value}; it must be at least {least}")
    if value > most:
        raise UserError(f"{what} is {value}; it must be at most {most}")


def _require_between(key: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise UserError(f"{key} is {value}; it must be between {least:g} and {most:g}")


@dataclass(frozen=True)
class Job:
    """A whole job. cohort: clients per round (0: all of them). seeds: how many seeds to run, from `seed` on.

    baselines: also train a centralized model and each client alone, for baseline_epochs. name: the job file's.
    modules: the folder where "package.module:function" is looked for, beside the working directory (default: the
    job file's).
    """

    rounds: int
    model: Table
    algorithm: Table
    seed: int = 0
    cohort: int = 0
    seeds: int = 1
    baselines: bool = False
    baseline_epochs: int = 10
    data: Data = field(default_factory=Data)
    engine: Engine = field(default_factory=Engine)
    comm: Comm = field(default_factory=Comm)
    faults: Faults = field(default_factory=Faults)
    run: Run = field(default_factory=Run)
    name: str = "job"
    modules: str = ""

    def __post_init__(self) -> None:
        for key, value, least in (
            ("rounds", self.rounds, 1),
            ("cohort", self.cohort, 0),
            ("seeds", self.seeds, 1),
            ("baseline_epochs", self.baseline_epochs, 1),
            ("faults.tolerate", self.faults.tolerate, 0),
            ("run.eval_every", self.run.eval_every, 1),
            ("run.eval_rows", self.run.eval_rows, 0),
            ("run.eval_batch", self.run.eval_batch, 1),
            ("data.cache_mb", self.data.cache_mb, 0),
            ("run.memory_mb", self.run.memory_mb, 0),
            ("run.save_every", self.run.save_every, 0),
            ("run.keep", self.run.keep, 1),
            ("run.stall_timeout", self.run.stall_timeout, 0),
        ):
            require_count(key, value, least)
        require_count("run.threads", self.run.threads, 1, most=1024)
        require_count("engine.clients_at_once", self.engine.clients_at_once, 0, most=1 << 16)
        if self.faults.over_selection and not self.cohort:
            raise UserError(
                f"faults.over_selection is {self.faults.over_selection}, but cohort is 0: all clients are asked "
                f"already; set a cohort"
            )
        if self.run.on_rank_failure == "shrink" and self.comm.reduce == "node":
            raise UserError(
                'comm.reduce is "node", but run.on_rank_failure is "shrink": a rank that waits in memory which ranks '
                "share does not learn of a death; use comm.reduce=auto"
            )
        for section in ("model", "algorithm"):
            if not isinstance(getattr(self, section).get("name"), str):
                raise UserError(f'[{section}] needs a name, e.g. name = "{_EXAMPLES[section]}"')


_EXAMPLES = {"model": "mlp", "algorithm": "fedavg"}


def load(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Job:
    """Read a job from a TOML file or a table, apply "key.path=value" overrides, and check every key and type."""
    if isinstance(source, Mapping):
        table, found = _plain(source), {}
    else:
        path = Path(source)
        table, found = _read(path), {"name": path.stem, "modules": str(path.resolve().parent)}
    for override in overrides:
        _override(table, override)
    job = construct(Job, found | table, "job")
    _plain(dataclasses.asdict(job))  # tables may hold dates still, and names of files what is no text
    return job


def _plain(table: Mapping[str, Any]) -> Table:
    """A copy of its own, of what a TOML file can hold too."""
    try:
        return json.loads(json.dumps(table, ensure_ascii=False).encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"a job holds strings, numbers, true or false, lists and tables; {error}") from None


def _read(path: Path) -> Table:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = [str(p) for p in sorted(path.parent.glob("*.toml"))] if path.parent.is_dir() else []
        hint = f" (there: {', '.join(near)})" if near else ""
        raise UserError(f"no job file {path}{hint}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
    except OSError as error:
        raise UserError(f"job file {path} cannot be read: {error.strerror}") from None


def _override(table: Table, text: str) -> None:
    keys, equals, value = text.partition("=")
    if not equals or not all(keys.split(".")):
        raise UserError(f"'{text}' is not an override; write key.path=value, e.g. rounds=5 or algorithm.mu=0.1")
    *sections, last = keys.strip().split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise UserError(f"override '{text}': {section} is not a table, so it has no {last}")
    table[last] = _value(value.strip())


def _value(text: str) -> Any:
    """Read a TOML value; anything that is not one is a string, so that quotes may be left out."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


_hints = functools.cache(typing.get_type_hints)  # which compiles each annotation anew


def construct(function: Callable[..., Any], table: Mapping[str, Any], what: str, **given: Any) -> Any:
    """Call `function` with the options in `table`, checked against its signature, and `given` where it takes them.

    The signature is the schema: names, types and defaults. Raises UserError for an unknown, missing or
    wrong-typed option, naming `what` and the options there are.
    """
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return function(**{**given, **table})
    options = {name: p for name, p in parameters.items() if name not in given}
    annotated = function.__init__ if inspect.isclass(function) else function
    hints = (_hints if inspect.isfunction(annotated) else typing.get_type_hints)(annotated)
    arguments = {name: value for name, value in given.items() if name in parameters}
    for name, value in table.items():
        choice(name, options, f"{what} option" if what != "job" else "job key")
        arguments[name] = convert(value, hints.get(name, Any), name if what == "job" else f"{what}.{name}")
    missing = [name for name, p in options.items() if p.default is p.empty and name not in arguments]
    if missing:
        raise UserError(f"{what} needs {', '.join(missing)} (options: {', '.join(options)})")
    return function(**arguments)


def seconds_of(duration: Duration, where: str = "duration") -> float:
    """Read seconds, or a number with s, m, h or d behind it; 0 for "". Raises UserError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?)([smhd]?)", str(duration))
    if duration != "" and (not found or float(found[1]) <= 0):
        raise UserError(f'{where} is {duration!r}; it must be seconds above 0, or e.g. "90m", "2h" or "1.5d"')
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]] if found else 0.0


def _duration(value: Any, where: str) -> Duration:
    seconds_of(value, where)
    return value


CONVERTERS: dict[Any, Callable[[Any, str], Any]] = {Duration: _duration}
"""Annotation -> (value, where) -> object, for what a table or a number may stand for; filled by build.py."""


def convert(value: Any, kind: Any, where: str) -> Any:
    """Return `value` as annotation `kind` wants it, or raise UserError saying what is allowed at `where`."""
    if kind in CONVERTERS:
        return CONVERTERS[kind](value, where)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any or kind is inspect.Parameter.empty:
        return value
    if origin is Literal:
        return choice(value, inner, f"{where}")
    if origin in (typing.Union, types.UnionType):
        first, *_, last = [k for k in inner if k is not type(None)] * 2
        return None if value is None else convert(value, last if isinstance(value, Mapping) else first, where)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(convert(item, inner[0], where) for item in value)
    if origin is dict or kind is dict:
        if isinstance(value, Mapping):
            return dict(value)
    elif dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return construct(kind, value, where)
    elif kind in (int, float) and isinstance(value, int) and not isinstance(value, bool):
        if not -(2**63) <= value < 2**63:
            raise UserError(f"{where} is {value}; it must be an integer of 64 bits")
        return kind(value)
    elif isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise UserError(f"{where} is {value!r}; it must be {_spoken(kind)}")


def _spoken(kind: Any) -> str:
    words = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    words[str | Table] = "a name or a table"
    if typing.get_origin(kind) is tuple:
        return f"a list, each {_spoken(typing.get_args(kind)[0]).removeprefix('a list, ')}"
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(kind)))
    return words.get(kind, "a table")


def resolved(job: Job) -> Table:
    """Return the job as a plain table with every default filled in."""
    return json.loads(json.dumps(dataclasses.asdict(job)))


HARMLESS = {
    *("rounds", "seeds", "name", "modules", "baselines", "baseline_epochs"),
    *("data.path", "data.made_by", "data.cache_mb", "data.stage", "comm.reduce", "engine.check"),
    "faults.tolerate",
    *(f"run.{name}" for name in Run.__dataclass_fields__ if name not in ("threads", "warm_start")),
}
"""Keys that may change when a run goes on: its rounds give the same bits, on the dataset that its checkpoint names."""


def differences(there: Table, now: Table) -> list[tuple[str, Any, Any]]:
    """Keys, but harmless ones, that resolved jobs differ in, and both values."""
    old, new = (dict(_flat(table)) for table in (there, now))
    keys = sorted((old.keys() | new.keys()) - HARMLESS)
    return [(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


def _flat(table: Table, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield prefix + key, value


def to_toml(table: Table) -> str:
    """Write a table of strings, numbers, booleans, lists and tables as TOML that `load` reads back."""
    lines = [f"{key} = {_toml(value)}" for key, value in table.items() if not isinstance(value, dict)]
    for key, value in table.items():
        if isinstance(value, dict):
            lines += ["", f"[{key}]"] + [f"{k} = {_toml(v)}" for k, v in value.items() if v is not None]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
