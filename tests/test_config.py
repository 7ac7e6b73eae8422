"""Job files: every mistake is one line that says what is wrong and what is allowed; what is read can be written."""

import math
import tomllib
from pathlib import Path
from typing import Any, Literal

import pytest

from mpifl.config import UserError, choice, construct, convert, load, resolved, to_toml

ROOT = Path(__file__).parent.parent
JOB = {"rounds": 3, "model": {"name": "mlp"}, "algorithm": {"name": "fedavg"}}
SHIPPED = [ROOT / "mpifl" / "digits.toml", *sorted((ROOT / "jobs").glob("*.toml"))]


def refusal(function, *arguments, **keywords):
    """The one line that a mistake is answered with."""
    with pytest.raises(UserError) as raised:
        function(*arguments, **keywords)
    line = str(raised.value)
    assert line and "\n" not in line
    return line


def changed(override):
    return refusal(load, JOB, [override])


# --- keys and types --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("roundz=3", "there is no job key 'roundz'; did you mean 'rounds'? (allowed: algorithm, baseline_epochs, "),
        ("run.evl_every=3", "there is no run option 'evl_every'; did you mean 'eval_every'? (allowed: device, "),
        ("data.pth=x", "there is no data option 'pth'; did you mean 'path'? (allowed: cache_mb, made_by, path, stage)"),
        ("engine.nam=serial", "there is no engine option 'nam'; did you mean 'name'? (allowed: check, "),
        ("engine.name=serail", "there is no engine.name 'serail'; did you mean 'serial'? (allowed: auto, batched, "),
        ("comm.sum=exat", "there is no comm.sum 'exat'; did you mean 'exact'? (allowed: exact, float32)"),
        (
            "run.scored_by=host",
            "there is no run.scored_by 'host'; did you mean 'hosts'? (allowed: auto, hosts, server)",
        ),
        ("run.device=gpu", "there is no run.device 'gpu'; did you mean 'cpu'? (allowed: cpu, cuda)"),
    ],
)
def test_unknown_keys_and_choices_are_answered_with_what_is_allowed(override, line):
    assert changed(override).startswith(line)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("rounds='3'", "rounds is '3'; it must be an integer"),
        ("rounds=many", "rounds is 'many'; it must be an integer"),
        ("rounds=3.0", "rounds is 3.0; it must be an integer"),
        ("rounds=true", "rounds is True; it must be an integer"),
        ("rounds=[3]", "rounds is [3]; it must be an integer"),
        ("seed=2020-01-01", "seed is datetime.date(2020, 1, 1); it must be an integer"),
        ("baselines=1", "baselines is 1; it must be true or false"),
        ("baselines=yes", "baselines is 'yes'; it must be true or false"),
        ("name=3", "name is 3; it must be a string"),
        ("data=digits", "data is 'digits'; it must be a table"),
        ("data=[1]", "data is [1]; it must be a table"),
        ("model=mlp", "model is 'mlp'; it must be a table"),
        ("run.out=3", "run.out is 3; it must be a string"),
        ("run.metrics=accuracy", "run.metrics is 'accuracy'; it must be a list, each a name or a table"),
        ("run.metrics=[3]", "run.metrics is 3; it must be a string"),
        ("rounds=0", "rounds is 0; it must be at least 1"),
        ("rounds=-5", "rounds is -5; it must be at least 1"),
        ("cohort=-1", "cohort is -1; it must be at least 0"),
        ("seeds=0", "seeds is 0; it must be at least 1"),
        ("baseline_epochs=0", "baseline_epochs is 0; it must be at least 1"),
        ("run.threads=0", "run.threads is 0; it must be at least 1"),
        ("run.eval_every=0", "run.eval_every is 0; it must be at least 1"),
        ("run.eval_batch=0", "run.eval_batch is 0; it must be at least 1"),
        ("run.memory_mb=-1", "run.memory_mb is -1; it must be at least 0"),
        ("data.cache_mb=-1", "data.cache_mb is -1; it must be at least 0"),
        ("model.name=3", '[model] needs a name, e.g. name = "mlp"'),
        ("rounds=1000000001", "rounds is 1000000001; it must be at most 1000000000"),
        ("run.keep=9223372036854775807", "run.keep is 9223372036854775807; it must be at most 1000000000"),
        ("engine.clients_at_once=65537", "engine.clients_at_once is 65537; it must be at most 65536"),
        ("seed=9223372036854775808", "seed is 9223372036854775808; it must be an integer of 64 bits"),
        ("run.stall_timeout=nan", "run.stall_timeout is nan; it must be at least 0"),
        ("run.stall_timeout=inf", "run.stall_timeout is inf; it must be at most 1000000000"),
        ('comm.sum="a\\nb\\u2028"', "there is no comm.sum 'a\\nb\\u2028' (allowed: exact, float32)"),
    ],
)
def test_wrong_types_and_values_are_refused(override, line):
    assert changed(override) == line


def test_a_long_value_is_quoted_without_its_middle():
    line = changed(f"rounds={'w' * 10**6}")
    assert len(line) < 2000 and line.startswith("rounds is 'www") and line.endswith("www'; it must be an integer")


@pytest.mark.parametrize(
    "override",
    ["name=\udcff", 'model.hidden=["\udcff"]', "modules=\udcff", "model.one=1979-05-27", "model.one=[07:32:00]"],
)
def test_what_no_job_file_can_hold_is_refused(override):
    assert changed(override).startswith("a job holds strings, numbers, true or false, lists and tables; ")


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 5000], ids=["digits", "brackets"])
def test_a_job_file_that_python_cannot_read_is_no_valid_toml(tmp_path, value):
    (tmp_path / "job.toml").write_text(f"rounds = {value}\n")
    assert "job.toml is not valid TOML: " in refusal(load, tmp_path / "job.toml")
    assert changed(f"rounds={value}").startswith("rounds is '")


@pytest.mark.parametrize(
    ("missing", "line"),
    [
        ("rounds", "job needs rounds (options: rounds, model, algorithm, "),
        ("model", "job needs model (options: "),
        ("algorithm", "job needs algorithm (options: "),
    ],
)
def test_what_has_no_default_must_be_there(missing, line):
    assert refusal(load, {key: value for key, value in JOB.items() if key != missing}).startswith(line)


@pytest.mark.parametrize("section", ["model", "algorithm"])
def test_a_section_without_a_name_is_refused_with_an_example(section):
    assert refusal(load, JOB | {section: {}}).startswith(f'[{section}] needs a name, e.g. name = "')


def test_the_edges_of_what_is_allowed_are_allowed():
    job = load(JOB, ["rounds=1", "cohort=0", "seeds=1", "data.cache_mb=0", "run.memory_mb=0", "seed=-3"])
    assert (job.rounds, job.cohort, job.seeds, job.data.cache_mb, job.run.memory_mb, job.seed) == (1, 0, 1, 0, 0, -3)


# --- files -----------------------------------------------------------------------------------------------


def test_a_missing_file_is_answered_with_those_that_are_there(tmp_path):
    assert refusal(load, tmp_path / "a.toml") == f"no job file {tmp_path}/a.toml"
    for name in ("c.toml", "b.toml", "d.txt"):
        (tmp_path / name).touch()
    assert refusal(load, tmp_path / "a.toml").endswith(f"(there: {tmp_path}/b.toml, {tmp_path}/c.toml)")
    assert refusal(load, tmp_path / "nowhere" / "a.toml") == f"no job file {tmp_path}/nowhere/a.toml"


@pytest.mark.parametrize("content", [b"rounds =", b"rounds = 1\nrounds = 2", b"name = '\xe9'", b"[model\n"])
def test_a_file_that_is_not_toml_is_refused_by_name(tmp_path, content):
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    assert refusal(load, path).startswith(f"{path} is not valid TOML: ")


def test_a_folder_is_no_job_file(tmp_path):
    assert refusal(load, tmp_path) == f"job file {tmp_path} cannot be read: Is a directory"


def test_a_job_has_its_files_name_unless_it_says_another(tmp_path):
    path = tmp_path / "try.toml"
    path.write_text(to_toml(JOB))
    assert load(path).name == "try"
    assert load(path, ["name=other"]).name == "other"
    assert load(JOB).name == "job"


def test_a_table_is_not_written_to_and_holds_what_toml_can():
    table = JOB | {"data": {"path": "x"}}
    load(table, ["data.path=y", "algorithm.mu=1"])
    assert table == JOB | {"data": {"path": "x"}} and JOB["algorithm"] == {"name": "fedavg"}
    assert "Path is not JSON" in refusal(load, JOB | {"data": {"path": Path("x")}}).replace("PosixPath", "Path")
    assert load(JOB | {"run": {"metrics": ("accuracy",)}}).run.metrics == ("accuracy",)


# --- overrides -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("0.5", 0.5),
        ("1e-3", 1e-3),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ('{name = "sgd", lr = 0.1}', {"name": "sgd", "lr": 0.1}),
        ("'5'", "5"),
        ('"a b"', "a b"),
        ("uniform", "uniform"),
        ("data/my set", "data/my set"),
        ("package.module:function", "package.module:function"),
        ("a=b", "a=b"),
        ("", ""),
        ("  7 ", 7),
    ],
)
def test_overrides_are_toml_and_strings_need_no_quotes(text, value):
    assert load(JOB, [f"algorithm.option={text}"]).algorithm["option"] == value


def test_overrides_go_down_tables_make_missing_ones_and_the_last_wins():
    job = load(JOB, ["algorithm.client_opt.name=sgd", "algorithm.client_opt.lr=1", "algorithm.client_opt.lr=0.5"])
    assert job.algorithm == {"name": "fedavg", "client_opt": {"name": "sgd", "lr": 0.5}}
    assert load(JOB, ["run.out=here"]).run.out == "here"


@pytest.mark.parametrize("text", ["rounds", "=5", "run..out=5", ".rounds=5", "run.=5", "other.toml"])
def test_what_is_no_override_is_refused_with_how_to_write_one(text):
    assert changed(text) == f"'{text}' is not an override; write key.path=value, e.g. rounds=5 or algorithm.mu=0.1"


def test_an_override_through_something_that_is_no_table_is_refused():
    assert changed("rounds.x=1") == "override 'rounds.x=1': rounds is not a table, so it has no x"
    assert changed("model.name.x=1") == "override 'model.name.x=1': name is not a table, so it has no x"


# --- signatures are the schema ---------------------------------------------------------------------------


def build_thing(
    model,
    size: int,
    ratio: float = 0.5,
    kind: Literal["a", "b"] = "a",
    rows: tuple[int, ...] = (),
    most: int | None = None,
):
    return model, size, ratio, kind, rows, most


def test_options_are_checked_against_the_signature_and_numbers_become_floats():
    made = construct(build_thing, {"size": 3, "ratio": 1, "rows": [1, 2], "most": 4}, "thing", model="m", seed=9)
    assert made == ("m", 3, 1.0, "a", (1, 2), 4) and isinstance(made[2], float)


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ({}, "thing needs size (options: size, ratio, kind, rows, most)"),
        ({"size": 1, "sise": 2}, "there is no thing option 'sise'; did you mean 'size'? (allowed: kind, most, "),
        ({"size": 1, "model": 2}, "there is no thing option 'model'"),
        ({"size": 1.5}, "thing.size is 1.5; it must be an integer"),
        ({"size": True}, "thing.size is True; it must be an integer"),
        ({"size": 1, "ratio": "x"}, "thing.ratio is 'x'; it must be a number"),
        ({"size": 1, "ratio": True}, "thing.ratio is True; it must be a number"),
        ({"size": 1, "kind": "c"}, "there is no thing.kind 'c' (allowed: a, b)"),
        ({"size": 1, "kind": 5}, "there is no thing.kind '5' (allowed: a, b)"),
        ({"size": 1, "rows": 5}, "thing.rows is 5; it must be a list, each an integer"),
        ({"size": 1, "rows": ["x"]}, "thing.rows is 'x'; it must be an integer"),
        ({"size": 1, "most": 1.5}, "thing.most is 1.5; it must be an integer"),
    ],
)
def test_options_that_do_not_fit_the_signature_are_refused(table, line):
    assert refusal(construct, build_thing, table, "thing", model="m").startswith(line)


def test_a_function_that_takes_anything_gets_it():
    assert construct(lambda **options: options, {"a": 1}, "thing", model="m") == {"a": 1, "model": "m"}


def test_values_without_annotation_are_left_alone():
    assert convert([1, "x"], Any, "here") == [1, "x"]


def test_choice_says_none_when_nothing_is_allowed():
    assert refusal(choice, "x", [], "thing") == "there is no thing 'x' (allowed: none)"


# --- what is read can be written -------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_jobs_are_the_same_after_being_resolved_written_and_read(path, tmp_path):
    job = load(path)
    copy = tmp_path / "config.toml"
    copy.write_text(to_toml(resolved(job)))
    assert load(copy) == job and job.name == path.stem
    assert set(resolved(job)) >= {"rounds", "seed", "data", "model", "algorithm", "engine", "comm", "run"}


def test_awkward_values_are_the_same_after_being_written_and_read():
    table = {
        "text": 'quotes " and \\ and\nlines, tabs\t, ü, 手',
        "empty": "",
        "small": 1e-07,
        "large": 1e22,
        "endless": math.inf,
        "whole": -3,
        "no": False,
        "list": [1, [2, 3], "x", {"a": 1}],
        "section": {"inner": {"deep": {"x": 1.5}}, "items": [], "table": {}},
    }
    assert tomllib.loads(to_toml(table)) == table
    assert math.isnan(tomllib.loads(to_toml({"x": math.nan}))["x"])


def test_what_is_none_is_left_out():
    assert tomllib.loads(to_toml({"section": {"a": None, "b": {"c": None}}})) == {"section": {"b": {}}}
