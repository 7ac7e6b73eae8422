"""Job files: TOML in, checked tables out; every mistake becomes one line that says how to mend it."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Table = dict[str, Any]


class UserError(ValueError):
    """A mistake a user can mend: printed as one line without a traceback, exit status 2 (1 once training began)."""

    in_training = False


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
        if self.clients_at_once < 0:
            raise UserError(f"engine.clients_at_once is {self.clients_at_once}; it must be at least 0")
        if self.check and self.name in ("batched", "graph"):
            raise UserError(
                f'engine.check watches clients one by one; with it engine.name is "serial", not "{self.name}"'
            )


@dataclass(frozen=True)
class Comm:
    """[comm] sum: "exact" gives the same bits on any number of ranks; "float32" halves the uplink of huge models.

    reduce: how ranks exchange: by MPI's collectives ("flat"), or through memory that a node's ranks share ("node");
    "auto": the latter where a node has several ranks.
    """

    sum: Literal["exact", "float32"] = "exact"
    reduce: Literal["auto", "flat", "node"] = "auto"


@dataclass(frozen=True)
class Run:
    """[run] out: results folder (default runs/NAME-TIME). threads: torch's, part of the job as they change bits.

    device: "cpu", or "cuda": a GPU per rank. eval_every: rounds between evaluations. eval_rows: about how many
    rows of the test split they score, the same ones each time (0: all). eval_batch: rows that are scored at once.
    scored_by: the hosts together, or the server while hosts train on ("auto": where it has a core of its own).
    metrics: each "accuracy", "package.module:function" or a table of name, options and, where two have one name, `as`;
    None: accuracy, of tokens where targets are sequences. nonfinite: what a NaN or infinite update does. memory_mb:
    MiB of client memory per rank before it spills to mapped files. profile: trace every rank, and say at the end where
    time went.
    """

    out: str = ""
    threads: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    eval_every: int = 1
    eval_rows: int = 0
    eval_batch: int = 512
    scored_by: Literal["auto", "server", "hosts"] = "auto"
    metrics: tuple[str | Table, ...] | None = None
    nonfinite: Literal["stop", "exclude"] = "stop"
    memory_mb: int = 4096
    profile: bool = False


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
    run: Run = field(default_factory=Run)
    name: str = "job"
    modules: str = ""

    def __post_init__(self) -> None:
        for key, least in (("rounds", 1), ("cohort", 0), ("seeds", 1), ("baseline_epochs", 1)):
            if getattr(self, key) < least:
                raise UserError(f"{key} is {getattr(self, key)}; it must be at least {least}")
        for key, value, least in (
            ("run.threads", self.run.threads, 1),
            ("run.eval_every", self.run.eval_every, 1),
            ("run.eval_rows", self.run.eval_rows, 0),
            ("run.eval_batch", self.run.eval_batch, 1),
            ("data.cache_mb", self.data.cache_mb, 0),
            ("run.memory_mb", self.run.memory_mb, 0),
        ):
            if value < least:
                raise UserError(f"{key} is {value}; it must be at least {least}")
        if self.run.threads > 1024:
            raise UserError(f"run.threads is {self.run.threads}; it must be at most 1024")
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
    return construct(Job, found | table, "job")


def _plain(table: Mapping[str, Any]) -> Table:
    """A copy of its own, of what a TOML file can hold too."""
    try:
        return json.loads(json.dumps(table))
    except (TypeError, ValueError) as error:
        raise UserError(f"a job holds strings, numbers, true or false, lists and tables; {error}") from None


def _read(path: Path) -> Table:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = [str(p) for p in sorted(path.parent.glob("*.toml"))] if path.parent.is_dir() else []
        hint = f" (there: {', '.join(near)})" if near else ""
        raise UserError(f"no job file {path}{hint}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
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
    except tomllib.TOMLDecodeError:
        return text


def construct(function: Callable[..., Any], table: Mapping[str, Any], what: str, **given: Any) -> Any:
    """Call `function` with the options in `table`, checked against its signature, and `given` where it takes them.

    The signature is the schema: names, types and defaults. Raises UserError for an unknown, missing or
    wrong-typed option, naming `what` and the options there are.
    """
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return function(**{**given, **table})
    options = {name: p for name, p in parameters.items() if name not in given}
    hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    arguments = {name: value for name, value in given.items() if name in parameters}
    for name, value in table.items():
        choice(name, options, f"{what} option" if what != "job" else "job key")
        arguments[name] = convert(value, hints.get(name, Any), name if what == "job" else f"{what}.{name}")
    missing = [name for name, p in options.items() if p.default is p.empty and name not in arguments]
    if missing:
        raise UserError(f"{what} needs {', '.join(missing)} (options: {', '.join(options)})")
    return function(**arguments)


CONVERTERS: dict[Any, Callable[[Any, str], Any]] = {}
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
    elif kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise UserError(f"{where} is {value!r}; it must be {_spoken(kind)}")


def _spoken(kind: Any) -> str:
    words = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    words[str | Table] = "a name or a table"
    if typing.get_origin(kind) is tuple:
        return f"a list, each {words.get(typing.get_args(kind)[0], 'a value')}"
    return words.get(kind, "a table")


def resolved(job: Job) -> Table:
    """Return the job as a plain table with every default filled in."""
    return json.loads(json.dumps(dataclasses.asdict(job)))


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
