"""Mutations of valid job files and datasets, drawn by hypothesis: what typing, editors, disks and copies do to them.

Numbers are small or huge, hardly ever between: a huge one must be refused or be harmless, one between only takes long.
"""

from __future__ import annotations

import copy
import datetime
import json
import math
from dataclasses import dataclass

from hypothesis import strategies as st

# ---- jobs: what a key may hold

SGD = {"name": "sgd", "lr": 0.1}
ADAM = {"name": "adam", "lr": 0.01, "beta1": 0.8}
COSINE = {"name": "cosine", "value": 0.1, "rounds": 4, "warmup": 1}
BASES = {
    "dense": {
        "rounds": 2,
        "data": {"path": "../data/dense"},
        "model": {"name": "mlp", "hidden": [3]},
        "algorithm": {"name": "fedavg", "batches": {"size": 2}, "client_opt": SGD, "server_opt": ADAM},
        "run": {"out": "out", "metrics": ["accuracy", {"name": "top_k", "k": 2}]},
    },
    "images": {
        "rounds": 1,
        "cohort": 2,
        "data": {"path": "../data/dense", "cache_mb": 0},
        "model": {"name": "logistic", "images": {"pad": 1, "crop": 6, "flip": True}},
        "algorithm": {"name": "scaffold", "client_lr": COSINE, "batches": {"size": 2, "drop_last": True}},
        "engine": {"check": True},
        "run": {"out": "out", "eval_rows": 2},
    },
    "tokens": {
        "rounds": 1,
        "data": {"path": "../data/tokens"},
        "model": {"name": "word_lstm", "embedding": 2, "hidden": 2},
        "algorithm": {"name": "hypcluster", "clusters": 2, "client_opt": SGD, "batches": {"steps": 2, "size": 1}},
        "faults": {"tolerate": 3, "dropout": 0.2},
        "run": {"out": "out"},
    },
    "batched": {
        "rounds": 2,
        "cohort": 3,
        "data": {"path": "../data/dense"},
        "model": {"name": "mlp", "hidden": []},
        "algorithm": {"name": "mime", "base_opt": {"name": "momentum", "lr": 0.1}, "server_lr": 0.5},
        "engine": {"name": "batched", "clients_at_once": 2},
        "run": {"out": "out", "eval_batch": 4},
    },
}

NUMBERS = [0.0, 0.001, 0.1, 1.0, 1, 2, 30.0]
SCHEDULES = [*NUMBERS, COSINE, {"name": "step", "value": 0.1, "every": 1, "factor": 0.5}, {"value": 0.2, "warmup": 2}]
OPTIMIZERS = [
    SGD,
    ADAM,
    {"name": "sgd", "lr": COSINE, "clip_norm": 1.0, "weight_decay": 0.01},
    {"name": "nesterov", "lr": 0.1, "momentum": 0.5},
    {"name": "adamw", "lr": 0.1},
    {"name": "yogi", "lr": 0.1, "eps": 0.1},
    {"name": "adagrad", "lr": 0.1},
    {"name": "fedavgm", "lr": 1.0, "beta": 0.0},
    {"name": "fedadam", "lr": 0.1, "bias_correction": True},
    {"name": "fedyogi", "lr": 0.1},
    {"name": "fedadagrad", "lr": 0.1, "tau": 0.1},
]
FITTING = {
    "rounds": [1, 2, 3],
    "cohort": [0, 1, 2, 3, 100],
    "seed": [0, 1, -1, 2**40],
    "seeds": [1, 2],
    "baselines": [True, False],
    "baseline_epochs": [1, 2],
    "name": ["a b", "Grüße", "100%", "[bold]"],
    "modules": ["", ".", "../data"],
    "data.path": ["../data/dense", "../data/tokens", "../data/./dense/"],
    "data.made_by": ["", "make data"],
    "data.cache_mb": [0, 1, 512],
    "data.stage": ["", "stage", "out"],
    "model.name": ["logistic", "mlp", "cifar_cnn", "resnet18", "emnist_conv", "char_lstm", "word_lstm", "transformer"],
    "model.inputs": ["x", "y", "z"],
    "model.loss": ["cross_entropy", "token_cross_entropy", {"name": "token_cross_entropy", "expected_length": 3.0}],
    "model.images": [{}, {"pad": 1}, {"crop": 4}, {"flip": True}, {"standardize": True}],
    "model.images.crop": [1, 5, 6, 7],
    "model.images.pad": [0, 1, 3],
    "model.hidden": [[], [1], [3, 2], 2],
    "model.embedding": [1, 8],
    "model.heads": [1, 2],
    "model.feedforward": [1, 2],
    "model.layers": [1, 2],
    "model.dropout": [0.0, 0.5],
    "model.tied": [True],
    "algorithm.name": ["fedavg", "scaffold", "mime", "hypcluster"],
    "algorithm.batches": [{}, {"size": 0}, {"size": 3, "epochs": 2}, {"size": 2, "max_examples": 3, "max_steps": 2}],
    "algorithm.batches.size": [0, 1, 2, 4, 5, 100],
    "algorithm.batches.epochs": [1, 2],
    "algorithm.batches.steps": [1, 3],
    "algorithm.batches.shuffle": [True, False],
    "algorithm.batches.drop_last": [True, False],
    "algorithm.batches.max_examples": [1, 3],
    "algorithm.batches.max_steps": [1, 3],
    "algorithm.batches.split": ["train", "test"],
    "algorithm.client_opt": OPTIMIZERS,
    "algorithm.server_opt": OPTIMIZERS,
    "algorithm.base_opt": OPTIMIZERS,
    "algorithm.client_lr": SCHEDULES,
    "algorithm.server_lr": SCHEDULES,
    "algorithm.client_opt.lr": SCHEDULES,
    "algorithm.client_opt.clip_norm": [0.1, 1.0],
    "algorithm.client_opt.weight_decay": [0.0, 0.1],
    "algorithm.mu": [0.0, 0.1],
    "algorithm.weighting": ["examples", "uniform"],
    "algorithm.clusters": [1, 2],
    "algorithm.loss_size": [0, 1],
    "algorithm.gradient_size": [0, 1],
    "engine.name": ["auto", "serial", "batched", "graph"],
    "engine.clients_at_once": [0, 1, 2, 100],
    "engine.dtype": ["float32", "tf32", "bf16"],
    "engine.check": [True, False],
    "comm.sum": ["exact", "float32"],
    "comm.reduce": ["auto", "flat", "node"],
    "run.out": ["", "out", "a/b/c", "Grüße", "."],
    "run.threads": [1, 2],
    "run.device": ["cpu", "cuda"],
    "run.eval_every": [1, 2, 5],
    "run.eval_rows": [0, 1, 3, 100],
    "run.eval_batch": [1, 4, 10_000],
    "run.scored_by": ["auto", "server", "hosts"],
    "run.server_gpu": ["share", "own"],
    "run.resume": ["auto", "never"],
    "run.save_every": [0, 1, 2],
    "run.keep": [1, 3],
    "run.time_limit": ["", "2h", "1.5d", 60, 1e-6],
    "run.requeue": ["auto", "never"],
    "run.stall_timeout": [0, 5.5, 600],
    "run.on_rank_failure": ["stop", "restart"],
    "run.warm_start": ["", "model.safetensors", "job.toml", "."],
    "faults.tolerate": [0, 1, 10],
    "faults.dropout": [0, 0.5, 1.0],
    "faults.over_selection": [0, 0.3, 2.0],
    "faults.deadline": [0, 0.5, 100],
    "faults.seconds_per_example": [0, 0.01],
    "faults.devices": [[], [{"slowdown": 2.0, "spread": 0.5}], [{"down_mbps": 1.0, "up_mbps": 0.1}, {"share": 3}]],
    "run.memory_mb": [0, 1],
    "run.profile": [True, False],
    "run.metrics": [
        [],
        ["accuracy"],
        ["confusion", "top_k"],
        [{"name": "top_k", "k": 3, "as": "top3"}, "accuracy"],
        [{"name": "per_domain", "metric": "accuracy", "domains": 2}],
        ["token_accuracy", "token_loss"],
        [{"name": "token_accuracy", "outside": [0, 1]}],
    ],
}
KEYS = list(FITTING)

HUGE = [2**31, 2**62, 2**63 - 1, 2**63, -(2**63), 10**18, 10**30]
TEXTS = ["", " ", ".", "..", "a/b", "/dev/null", "/proc/nothing", "~nobody/x", "$HOME", "$NOWHERE/x", "nan", "true"]
NAMES = [
    "a:b",
    "os:getcwd",
    "builtins:dict",
    "builtins:print",
    "torch:nn",
    "torch.nn:Linear",
    "json:loads",
    ":",
    "a.b:",
]
TEXTS += [
    *NAMES,
    "%s",
    "{x}",
    "[red]",
    "a\nb",
    "a\tb",
    "a\0b",
    "e\u0301",
    "\u202e",
    "🙂",
    "w" * 300,
    "w" * 5000,
    "digits",
]
FLOATS = [math.nan, math.inf, -math.inf, 1e308, 5e-324, -0.0, 0.5, -1.0, 1e30]
ODD = [True, False, [], {}, [[]], [1, "a"], [0.1, None], {"": 1}, {"name": 3}, {"name": "sgd"}, {"a": {"b": {"c": []}}}]
ODD += [
    datetime.date(1979, 5, 27),
    datetime.datetime(1979, 5, 27, 7, 32),
    datetime.time(7, 32),
    *OPTIMIZERS[:2],
    COSINE,
]

plain_text = st.text(st.characters(codec="utf-8", exclude_characters="/"), max_size=8)
strange_values = st.one_of(
    st.integers(-2, 3),
    st.sampled_from(HUGE),
    st.sampled_from(FLOATS),
    st.sampled_from(TEXTS),
    st.sampled_from(ODD),
    plain_text,
    st.lists(st.integers(-2, 3) | plain_text, max_size=3),
)


@dataclass(frozen=True)
class JobFile:
    """A job file, what follows it on the command line, and what is at run.out already (see test_fuzz.PLACES)."""

    text: bytes
    arguments: tuple[str, ...] = ()
    place: str = "nothing"


EDITS = ["fitting"] * 4 + ["strange"] * 4 + ["key"] * 2 + ["drop", "text", "override", "place", "word"]
PLACES = ("file", "folder", "empty folder", "link to nothing", "loop", "other run", "broken run")
WORDS = [
    "--dry-run",
    "--quiet",
    "--help",
    "--version",
    "--fast",
    "",
    "=",
    "=1",
    ".",
    "..=1",
    "rounds",
    "x.toml",
    "-",
    "--",
]


@st.composite
def jobs(draw):
    """A base job after one to three edits of its table, its text, the command line or what is around it."""
    table = copy.deepcopy(BASES[draw(st.sampled_from(["dense", *BASES]))])
    arguments, text_edits, place = [], [], "nothing"
    for kind in draw(st.lists(st.sampled_from(EDITS), min_size=1, max_size=3)):
        if kind == "text":
            text_edits.append(draw(byte_edits))
        elif kind == "override":
            arguments.append(draw(overrides()))
        elif kind == "word":
            arguments.append(draw(st.sampled_from(WORDS) | plain_text))
        elif kind == "place":
            place = draw(st.sampled_from(PLACES))
        else:
            table = TABLE_EDITS[kind](draw, table)
    text = toml_lines(table).encode()
    for edit in text_edits:
        text = edit(text)
    return JobFile(text, tuple(arguments), place)


def _fitting(draw, table):
    """A value that the key may have, in this job or another one."""
    key = draw(st.sampled_from(KEYS))
    return put(table, key.split("."), draw(st.sampled_from(FITTING[key])))


def _strange(draw, table):
    """Any value anywhere."""
    return put(table, draw(st.sampled_from(KEYS)).split("."), draw(strange_values))


def _key(draw, table):
    """A key that is misspelt, in the wrong section, or unheard of."""
    keys = draw(st.sampled_from(KEYS)).split(".")
    last = keys[-1]
    at = draw(st.integers(0, len(last) - 1))
    slips = [last[:at] + last[at + 1 :], last[:at] + "x" + last[at:], last.upper(), f"{last} "]
    keys[-1] = draw(st.sampled_from(slips) | plain_text)
    return put(table, keys[draw(st.sampled_from([0, 0, 0, -1])) :], draw(strange_values))


def _drop(draw, table):
    """A key that is not there."""
    section = draw(st.sampled_from([table, *(value for value in table.values() if isinstance(value, dict))]))
    if section:
        del section[draw(st.sampled_from(sorted(section)))]
    return table


TABLE_EDITS = {"fitting": _fitting, "strange": _strange, "key": _key, "drop": _drop}


def put(table, keys, value):
    """The table with `value` at the path of keys, and tables on the way there."""
    here = table
    for key in keys[:-1]:
        if not isinstance(here.get(key), dict):
            here[key] = {}
        here = here[key]
    here[keys[-1]] = copy.deepcopy(value)
    return table


@st.composite
def overrides(draw):
    """A word KEY=VALUE for the command line; it may be no UTF-8."""
    value = draw(strange_values | st.sampled_from(["\udcff", "[", "{", "'", '"""', "1_0", "0x10", "{a=1", "[" * 3000]))
    key = draw(st.sampled_from(KEYS) | st.sampled_from(["rounds.x", ".", "a..b", " rounds", "model", "run", "\udcff"]))
    word = f"{key}={value if isinstance(value, str) else toml(value)}"
    return word.replace("\0", "")  # no command line has it


INSERTED = [
    b"\xef\xbb\xbf",
    b"\r\n",
    b"\xff",
    b"\0",
    b"[run]\n",
    b"rounds = 1\n",
    b"\n[[",
    b'"',
    b"#",
    b"=",
    b"9" * 5000,
]
INSERTED += [b"\nx = " + b"[" * 5000 + b"\n", b"\nrun.out = 'out'\n", b"\n[model.images]\n", b"\n\xc3\xa9 = 1\n"]


@dataclass(frozen=True)
class BytesEdit:
    """Bytes are flipped, cut off, inserted, repeated, zeroed or left out, from a place that is a share of the whole."""

    kind: str
    at: float
    length: int
    bit: int
    inserted: bytes

    def __call__(self, data):
        place = int(self.at * len(data))
        before, chosen, rest = data[:place], data[place : place + self.length], data[place + self.length :]
        if self.kind == "flip":
            return before + bytes(byte ^ (1 << self.bit) for byte in chosen[:1]) + chosen[1:] + rest
        middle = {"cut": b"", "insert": self.inserted + chosen, "repeat": 2 * chosen, "zero": bytes(len(chosen))}
        return before + middle.get(self.kind, b"") + (b"" if self.kind == "cut" else rest)


byte_edits = st.builds(
    BytesEdit,
    st.sampled_from(["flip", "flip", "flip", "cut", "insert", "repeat", "zero", "leave out"]),
    st.floats(0, 1, exclude_max=True),
    st.integers(1, 40),
    st.integers(0, 7),
    st.sampled_from(INSERTED),
)


def toml_lines(table):
    """A table as TOML with a line per key and a heading per section."""
    lines = [f"{toml_key(key)} = {toml(value)}" for key, value in table.items() if not isinstance(value, dict)]
    for key, value in table.items():
        if isinstance(value, dict):
            lines += [f"[{toml_key(key)}]", *(f"{toml_key(k)} = {toml(v)}" for k, v in value.items())]
    return "\n".join(lines) + "\n"


def toml_key(key):
    return key if key.isascii() and key.replace("_", "").isalnum() else toml(key)


def toml(value):
    """A value in one line of TOML, which has no null: a list that holds one is broken."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml_key(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else repr(value)
