"""What README says is so: its commands, keys, options, files and links exist, and its example runs as it stands."""

import importlib
import importlib.util
import inspect
import json
import re
import shlex
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from data_prep.__main__ import CONVERTERS, TOOLS
from mpifl import build
from mpifl.config import Job, UserError, load
from mpifl.models.images import Images
from mpifl.train import DEFAULT_JOB
from mpifl.work import Batching

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SLURM_README, SBATCH = ROOT / "slurm" / "README.md", sorted((ROOT / "slurm").glob("*.sbatch"))


def blocks_and_spans(text):
    """Fenced blocks as (language, body), and what stands between backticks elsewhere."""
    fence = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)
    return fence.findall(text), re.findall(r"`([^`\n]+)`", fence.sub("", text))


BLOCKS, SPANS = blocks_and_spans(README)
COMMANDS = [
    'python3 -m venv .venv && . .venv/bin/activate && pip install -e ".[mpich]" && mpirun -n 9 python -m mpifl.train',
    '. .venv/bin/activate && pip install -e ".[mpich,test]" && python -m pytest',
]
MADE_BY_FOLLOWING_IT = ("runs", "profile", "data", "mine.py", "mine.toml", "job.toml", ".venv", ".venv-openmpi")


def section(title):
    """The text under a heading, up to the next."""
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.M | re.S)[1]


def table(title):
    """Rows of the first table under a heading, without its head, as lists of cells."""
    rows = [line.strip("| ").split(" | ") for line in section(title).splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows[1:]]


def shell_lines():
    """Every line that README and slurm/ give to a shell, and all that stands between backticks there."""
    slurm_blocks, slurm_spans = blocks_and_spans(SLURM_README.read_text(encoding="utf-8"))
    scripts = [body for language, body in BLOCKS + slurm_blocks if language == "sh"]
    scripts += [file.read_text(encoding="utf-8") for file in SBATCH]
    return [line for script in scripts for line in script.replace("\\\n", " ").splitlines()] + SPANS + slurm_spans


def test_two_commands_come_first():
    assert BLOCKS[:2] == [("sh", f"{command}\n") for command in COMMANDS]
    assert README.index(COMMANDS[0]) < README.index("\n## ")


def test_modules_that_commands_name_exist_and_have_these_flags(capsys):
    flags = {}  # words of the program -> flags
    for line in shell_lines():
        for module, rest in re.findall(r"\bpython3? -m ([\w.]+)((?:(?! srun | mpirun )[^&])*)", line):
            assert importlib.util.find_spec(module), f"{line}: no module {module}"
            part = re.match(r" ([a-z][\w-]*)", rest) if module in ("data_prep", "mpifl.bench") else None
            program = (module, part[1]) if part else (module,)
            flags.setdefault(program, set()).update(re.findall(r"(?<=\s)--[a-z-]+", rest))
    of_conversions = set(re.findall(r"`(--[a-z-]+)`", section("Datasets")))
    flags[("data_prep", "table")] |= of_conversions
    flags[("mpifl.train",)].update(span for span in SPANS if span[:2] == "--" and span not in of_conversions)
    assert flags[("mpifl.train",)] and flags[("data_prep", "mnist")]
    asked = {program: wanted for program, wanted in flags.items() if wanted or program[0] == "mpifl.evaluate"}
    for (module, *words), wanted in asked.items():
        package = importlib.util.find_spec(module).submodule_search_locations
        program = importlib.import_module(f"{module}.__main__" if package else module)
        assert program.main([*words, "--help"]) == 0
        help_text = capsys.readouterr().out
        missing = {flag for flag in wanted if not re.search(rf"{flag}\b", help_text)}
        assert not missing, f"{module} {' '.join(words)} has no {missing}"


def test_table_of_job_keys_is_that_of_the_dataclasses():
    documented = {key.strip("`"): default for key, default, _ in table("Jobs")}
    assert documented.pop("model.inputs") == '`"x"`'
    assert documented.pop("model.loss") == "by the data"
    assert documented.pop("model.images") == "none"
    assert documented == dict(_job_keys())


def _job_keys():
    kinds = get_type_hints(Job)
    for field in fields(Job):
        if is_dataclass(kinds[field.name]):
            yield from ((f"{field.name}.{inner.name}", _default(inner)) for inner in fields(kinds[field.name]))
        elif field.name in ("model", "algorithm"):
            yield f"{field.name}.name", "needed"
        else:
            yield field.name, "the file's" if field.name == "name" else _default(field)


def _default(field):
    if field.default in (MISSING, None):
        return "needed" if field.default is MISSING else "by the data"
    return f"`{json.dumps(field.default)}`"


def test_model_inputs_and_loss_are_keys_with_these_defaults():
    plain = build.build(load(DEFAULT_JOB)).model
    given = build.build(load(DEFAULT_JOB, ["model.inputs=x", "model.loss=cross_entropy"])).model
    assert (given.inputs, given.loss) == (plain.inputs, plain.loss)
    with pytest.raises(UserError, match="inputs is 'nowhere'"):
        build.build(load(DEFAULT_JOB, ["model.inputs=nowhere"]))


def test_options_are_the_arguments_of_the_functions():
    [block] = [body for kind, body in BLOCKS if body.startswith("algorithm ")]
    documented, kind = {}, None
    for line in block.splitlines():
        kind = line.split()[0] if line[0] != " " else kind
        documented.setdefault(kind, {}).update(re.findall(r"(\w+)\(([^)]*)\)", line))
    shared = "lr", "weight_decay", "clip_norm"
    assert f"and each {', '.join(shared)}" in block
    assert documented["algorithm"] == _options(build.ALGORITHMS, "model", "seed")
    assert documented["model"] == _options(build.MODELS, "features")
    assert documented["loss"] == _options(build.LOSSES, "scores", "batch")
    assert documented["metric"] == _options(build.METRICS, "scores", "batch")
    assert documented["optimizer"] == _options(build.OPTIMIZERS, *shared)
    assert documented["schedule"] == _options(build.SCHEDULES)
    assert all(set(shared) <= inspect.signature(make).parameters.keys() for make in build.OPTIMIZERS.values())
    images = re.findall(r"\w+", re.search(r"^images +(.*)$", block, re.M)[1])
    assert images == [field.name for field in fields(Images)]
    batches = set(re.findall(r"\w+", re.search(r"^batches +(.*)$", block, re.M)[1])) - {"or"}
    assert batches == {field.name for field in fields(Batching)} - {"split", "of"}


def _options(known, *given):
    parameters = {name: inspect.signature(make).parameters for name, make in known.items()}
    return {name: ", ".join(p for p in options if p not in given) for name, options in parameters.items()}


def test_overrides_that_are_named_can_be_loaded():
    arguments = [line.partition("mpifl.train")[2] for line in shell_lines()]
    words = [word for text in arguments for word in shlex.split(text) if "=" in word]
    words += [shlex.split(span)[0] for span in SPANS if re.fullmatch(r"'?[a-z][a-z_.]*=\S+", span)]
    words += [span.replace(" = ", "=", 1) for span in SPANS if re.match(r"[a-z_]+\.[a-z_]+ = ", span)]
    words = {word for word in words if not word.startswith("key.path=")}
    assert len(words) > 6
    for word in words:
        build.build(load(DEFAULT_JOB, [word, *(["data.path=digits"] if word.startswith("data.path") else [])]))


def test_files_and_folders_that_are_named_exist():
    words = [word for line in shell_lines() for word in line.split()]
    in_a_run = {name.strip("`/") for name, _ in table("What you will see")}
    paths = {word for word in words if re.fullmatch(r"[\w.-]+(/[\w.-]*)+|[\w-]+\.(py|toml|md|json|sbatch)", word)}
    made = {*in_a_run, *MADE_BY_FOLLOWING_IT}
    paths = {path for path in paths if path.split("/")[0] not in made}
    assert len(paths) > 8
    places = (ROOT, ROOT / "mpifl", ROOT / "slurm")
    assert not {path for path in paths if not any((place / path).exists() for place in places)}


def test_links_lead_somewhere():
    titles = re.findall(r"^## (.*)$", README, re.M)
    headings = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    for page in (ROOT / "README.md", SLURM_README):
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            known = target[1:] in headings if target.startswith("#") else (page.parent / target).exists()
            assert known, f"{page.name}: {target}"


def test_layout_names_every_module_once():
    named = [name for _, names in table("Layout and architecture") for name in re.findall(r"`([\w/]+)`", names)]
    files = {path.stem for path in (ROOT / "mpifl").glob("*.py")} - {"__init__"}
    folders = {f"{path.parent.name}/" for path in (ROOT / "mpifl").glob("*/__init__.py")}
    assert sorted(named) == sorted(files | folders)


def test_every_converter_and_tool_is_named():
    named = set(re.findall(r"`([a-z][\w-]*)`", section("Datasets")))
    assert {*CONVERTERS, *TOOLS} <= named


def test_mnist_figures_are_those_of_the_job():
    comment = (ROOT / "jobs" / "mnist_iid.toml").read_text(encoding="utf-8")
    reported, ours = re.findall(r"^\| (?:the tutorial|this job).*", section("MNIST and other jobs"), re.MULTILINE)
    for line in (reported, ours):
        figures = re.findall(r"0\.\d{4}", line)
        assert len(figures) >= 4 and all(figure in comment for figure in figures)


@pytest.fixture
def example(tmp_path):
    """A folder with the files that README shows, mine.py and mine.toml."""
    title = "Your own algorithm, model, metric and data"
    [(_, source), (_, job)] = re.findall(r"^```(python|toml)\n(.*?)^```", section(title), re.M | re.S)
    home = tmp_path / "home"
    home.mkdir()
    (home / "mine.py").write_text(source, encoding="utf-8")
    (home / "mine.toml").write_text(job, encoding="utf-8")
    return home


@pytest.mark.launches
def test_complete_example_runs_from_elsewhere_on_any_ranks_and_from_shards(launch, tmp_path, example):
    env, elsewhere = {"PYTHONPATH": str(ROOT)}, tmp_path / "elsewhere"
    elsewhere.mkdir()

    def train(ranks, out, *more):
        argv = ["-m", "mpifl.train", example / "mine.toml", f"run.out={out}", "--quiet", *more]
        done = launch(ranks, *argv, env=env, cwd=elsewhere)
        assert (done.returncode, done.stderr) == (0, "")
        return json.loads((elsewhere / out / "summary.json").read_text())

    on_ranks = train(3, "ranks", "engine.check=true", "run.save_every=99")
    assert on_ranks["ranks"] == 3
    assert on_ranks["accuracy"] > float(re.search(r"test accuracy above (0\.\d+)", README)[1])
    assert 0.5 < on_ranks["scores"]["confidence"] < 1
    assert train(None, "alone")["digest"] == on_ranks["digest"]
    assert launch(None, example / "mine.py", env=env, cwd=elsewhere).returncode == 0
    assert train(None, "shards", "data.path=data/rings")["digest"] == on_ranks["digest"]

    documented = {name.strip("`/") for name, _ in table("What you will see")}
    assert {path.name for path in (elsewhere / "ranks").iterdir()} == documented
