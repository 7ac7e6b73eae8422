"""From names to objects: the one place that turns a job's strings into models, algorithms, optimizers and data."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch

from mpifl import optim, schedule
from mpifl.algorithms.fedavg import fedavg
from mpifl.algorithms.hypcluster import hypcluster
from mpifl.algorithms.mime import mime
from mpifl.algorithms.scaffold import scaffold
from mpifl.config import CONVERTERS, Job, UserError, choice, construct, convert
from mpifl.data.batches import blank_columns, to_inputs
from mpifl.data.memory import MemoryDataset
from mpifl.data.shard import Dataset, embedded
from mpifl.data.staging import stage
from mpifl.measure import Counts, Metric, Ratio, accuracy, confusion, per_domain, token_accuracy, token_loss, top_k
from mpifl.model import Model, cross_entropy, from_module, refuse_changing_buffers, token_cross_entropy
from mpifl.models.cnn import cifar_cnn, emnist_conv
from mpifl.models.hf import text_classifier
from mpifl.models.images import Images
from mpifl.models.linear import logistic, mlp
from mpifl.models.lstm import char_lstm, word_lstm
from mpifl.models.resnet import resnet18
from mpifl.models.transformer import transformer
from mpifl.optim import Optimizer
from mpifl.rand import as_tensor
from mpifl.schedule import Schedule
from mpifl.tree import Tree
from mpifl.work import Algorithm, Batching

ALGORITHMS = {"fedavg": fedavg, "scaffold": scaffold, "mime": mime, "hypcluster": hypcluster}
MODELS = {
    "logistic": logistic,
    "mlp": mlp,
    "emnist_conv": emnist_conv,
    "cifar_cnn": cifar_cnn,
    "resnet18": resnet18,
    "char_lstm": char_lstm,
    "word_lstm": word_lstm,
    "transformer": transformer,
    "text_classifier": text_classifier,
}
METRICS = {
    "accuracy": accuracy,
    "top_k": top_k,
    "confusion": confusion,
    "per_domain": per_domain,
    "token_accuracy": token_accuracy,
    "token_loss": token_loss,
}
RESERVED_SCORES = ("loss", "test_loss", "examples", "weight")
LOSSES = {"cross_entropy": cross_entropy, "token_cross_entropy": token_cross_entropy}
SCHEDULES = {"constant": schedule.constant, "step": schedule.step, "cosine": schedule.cosine}
OPTIMIZERS = {
    name: getattr(optim, name)
    for name in [
        "sgd",
        "momentum",
        "nesterov",
        "adam",
        "adamw",
        "adagrad",
        "yogi",
        "fedavgm",
        "fedadam",
        "fedyogi",
        "fedadagrad",
    ]
}


@dataclass(frozen=True)
class Parts:
    """What a job names, built."""

    dataset: Any
    model: Model
    algorithm: Algorithm
    metrics: dict[str, Metric]


def build(job: Job) -> Parts:
    """Build everything a job names; raises UserError for whatever cannot be."""
    _look_for_modules(job)
    dataset = _dataset(job)
    model = _model(job, dataset.features)
    table = dict(job.algorithm)
    function = named(table.pop("name"), ALGORITHMS, "algorithm")
    algorithm = _from_table(function, table, "algorithm", job.algorithm["name"], model=model, seed=job.seed)
    if not isinstance(algorithm, Algorithm):
        raise UserError(f"{job.algorithm['name']} returned {type(algorithm).__name__}, not an mpifl Algorithm")
    metrics = _metrics(job, dataset.features)
    _refuse_wrong_shapes(model, metrics, dataset.features)
    return Parts(_staged(job, dataset), model, algorithm, metrics)


def solo_training(job: Job) -> tuple[Batching, Optimizer]:
    """Return batches and client optimizer of a job's algorithm, for training without federation."""
    table = job.algorithm
    batches = convert(table.get("batches", {"size": 20}), Batching, "algorithm batches")
    for key in ("client_opt", "base_opt"):
        if key in table:
            return batches, convert(table[key], Optimizer, f"algorithm {key}")
    return batches, optim.sgd(convert(table.get("client_lr", 0.1), Schedule, "algorithm client_lr"))


def named(name: str, known: Mapping[str, Any], what: str) -> Any:
    """Return what `name` stands for: one of `known`, or "package.module:function" of the user's own."""
    module_name, colon, attribute = str(name).partition(":")
    if not colon:
        return known[choice(name, known, f"{what} (or package.module:function)")]
    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise UserError(f"{what} is '{name}'; write package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):  # a module that the user's module imports
            raise
        raise UserError(
            f"{what} '{name}': no module '{module_name}' here ({Path.cwd()}) or beside the job file"
        ) from None
    if not hasattr(module, attribute):
        own = [n for n, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        public = [n for n in own if not n.startswith("_")]
        choice(attribute, public, f"{what} in module {module_name}")
    found = getattr(module, attribute)
    if not callable(found):
        raise UserError(f"{what} '{name}' is {type(found).__name__}; it must be a function or a class")
    return found


def find_job(path: str) -> Path:
    """Return the job file: as given, or from the jobs that come with the package ("jobs/NAME.toml")."""
    asked, here = Path(path), Path(__file__).parent
    places = [asked]
    if asked.parts[:1] == ("jobs",):
        places += [here / "jobs" / asked.name, here.parent / "jobs" / asked.name]
    found = [place for place in places if os.path.exists(place)]
    found = found or [place for place in places if os.path.isdir(place.parent)]
    return found[0] if found else asked


def _look_for_modules(job: Job) -> None:
    """Let "package.module:function" be found in the job's folder of modules and in the working directory."""
    for folder in (job.modules, str(Path.cwd())):
        if folder and folder not in sys.path:
            sys.path.append(folder)


def _dataset(job: Job) -> Any:
    path = job.data.path
    if ":" in path:
        dataset = named(path, {}, "dataset")()
        if hasattr(dataset, "features"):
            return dataset
        if not isinstance(dataset, list | tuple) or not all(isinstance(client, Mapping) for client in dataset):
            what = "it must be a dataset, or a list with a dict of arrays per client"
            raise UserError(f"{path} returned {type(dataset).__name__}; {what}")
        return MemoryDataset(dataset)
    if path == "digits":
        return Dataset(embedded("digits"))
    if not os.path.isdir(path):
        how = job.data.made_by or "python -m data_prep NAME (--help lists them)"
        raise UserError(f"data.path is '{path}', and there is no such folder; make it with: {how}")
    return Dataset(path)


def _staged(job: Job, dataset: Any) -> Any:
    """The dataset on the node's own disk, where it is copied only when nothing of the job is refused."""
    if not job.data.stage or not isinstance(dataset, Dataset):
        return dataset
    dataset.close()
    return Dataset(stage(dataset.path, job.data.stage))


def _model(job: Job, features: dict[str, Any]) -> Model:
    table = dict(job.model)
    name, inputs = table.pop("name"), convert(table.pop("inputs", "x"), str, "model inputs")
    usual = "token_cross_entropy" if _of_tokens(features) else "cross_entropy"
    loss = _chosen(table.pop("loss", usual), "model.loss", LOSSES, "loss")
    function, images, seen = named(name, MODELS, "model"), None, features
    if "images" in table:
        images = convert(table.pop("images"), Images, "model.images")
        seen = features | {inputs: images.seen(_column(features, inputs))}

    def factory() -> Any:
        return _from_table(function, table, "model", name, features=seen)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # frozen weights are the same on every rank
        made = factory()
    if isinstance(made, Model):
        if images is not None:
            raise UserError(f"model.images is for modules; {name} is a Model, which treats its own inputs")
        return made
    shape = (2, *_column(seen, inputs).shape)
    model = from_module(factory, loss, inputs, made, images)
    try:
        refuse_changing_buffers(factory, _trial(seen) | {"key": as_tensor(0)}, inputs)
    except UserError:
        raise
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"model {name} cannot be run on column '{inputs}', a batch of {shape}: {reason}") from error
    return model


def _trial(features: dict[str, Any]) -> Tree:
    """Two rows of model inputs: zeros, and the highest id that each column may hold."""
    columns = blank_columns(features)
    for name, feature in features.items():
        if feature.classes:
            columns[name][1] = feature.classes - 1
    return to_inputs(columns, features) | {"index": torch.arange(2)}


def _column(features: dict[str, Any], inputs: str) -> Any:
    if inputs not in features:
        raise UserError(f"model.inputs is '{inputs}'; the dataset has columns {', '.join(features)}")
    return features[inputs]


def _of_tokens(features: dict[str, Any]) -> bool:
    """Targets that are sequences are tokens."""
    return "y" in features and len(features["y"].shape) == 1


def _from_table(function: Any, table: Mapping[str, Any], section: str, name: str, **given: Any) -> Any:
    """Construct what a table of the job names; if an option is of another name's, say how to be rid of it."""
    try:
        return construct(function, table, name, **given)
    except UserError as error:
        if not str(error).startswith(f"there is no {name} option") or "did you mean" in str(error):
            raise
        raise UserError(f"{error}; '{section}={{name=\"{name}\"}}' leaves out what the job has") from None


def _chosen(value: Any, where: str, known: Mapping[str, Any], what: str) -> Any:
    """A loss or a metric by its name, or by a table of name and options: a function of (scores, batch)."""
    options = dict(value) if isinstance(value, Mapping) else {"name": value}
    if "name" not in options:
        example = f'{{name = "{next(iter(known))}"}}'
        raise UserError(f"{where} has {options!r}; write a name, or a table such as {example}")
    name = options.pop("name")
    function = named(name, known, what)
    scores_and_batch = dict.fromkeys(list(inspect.signature(function).parameters)[:2])
    checked = construct(wraps(function)(lambda **arguments: arguments), options, f"{what} {name}", **scores_and_batch)
    return partial(function, **{option: checked[option] for option in options}) if options else function


def _refuse_wrong_shapes(model: Model, metrics: dict[str, Metric], features: dict[str, Any]) -> None:
    """A loss must give a number per example, metrics values per example or sums of what counts: try them."""
    batch = _trial(features)
    scores = model.scores(torch.zeros(model.size), batch)
    _refuse_fewer_scores(model, scores, features)
    losses = model.loss(scores, batch)
    if not isinstance(losses, torch.Tensor) or losses.shape != (2,):
        raise UserError(f"loss gives {_found(losses)} for a batch of 2; it must give one number per example, (2,)")
    for name, metric in metrics.items():
        what, values = f"metric {name} gives", metric(scores, batch)
        if isinstance(values, Ratio | Counts):
            if len({part.shape for part in values}) > 1:
                shapes = " to ".join(map(_found, values))
                raise UserError(f"{what} a Ratio of {shapes}; values and weights must have one shape")
            if any(part.any() for part in metric(scores, batch | {"mask": torch.zeros(2, dtype=torch.bool)})):
                raise UserError(f'{what} sums over rows that batch["mask"] leaves out; use mpifl.measure.example_sums')
        elif not isinstance(values, torch.Tensor) or values.shape[:1] != (2,):
            allowed = "it must give (2, ...), or a Ratio or Counts of mpifl.measure"
            raise UserError(f"{what} {_found(values)} for a batch of 2; {allowed}")


def _refuse_fewer_scores(model: Model, scores: torch.Tensor, features: dict[str, Any]) -> None:
    """Losses of our own index the scores by class; what else a model may give is its loss's affair."""
    known = getattr(model.loss, "func", model.loss) in LOSSES.values()
    if not known or "y" not in features or scores.dim() != len(features["y"].shape) + 2:
        return
    given, classes = scores.shape[-1], features["y"].classes or 0
    if given < classes:
        raise UserError(
            f"the model gives {given} scores, and column 'y' has {classes} classes; it must give one for each"
        )


def _found(values: Any) -> str:
    return str(tuple(values.shape)) if isinstance(values, torch.Tensor) else type(values).__name__


def _metrics(job: Job, features: dict[str, Any]) -> dict[str, Metric]:
    metrics: dict[str, Metric] = {}
    usual = "token_accuracy" if _of_tokens(features) else "accuracy"
    for entry in [usual] if job.run.metrics is None else job.run.metrics:
        options = dict(entry) if isinstance(entry, Mapping) else {"name": entry}
        label = str(options.pop("as", str(options.get("name")).rpartition(":")[2]))
        if label in metrics or label in RESERVED_SCORES:
            always = ", ".join(RESERVED_SCORES)
            raise UserError(f"run.metrics has a second '{label}' ({always} are always there); add as = \"...\" to it")
        if not label or set(label) & {".", "/"}:
            raise UserError(f"run.metrics has as = '{label}'; write a name without . and /")
        metrics[label] = _chosen(options, "run.metrics", METRICS, "metric")
    return metrics


def _batching(value: Any, where: str) -> Batching:
    if not isinstance(value, Mapping):
        raise UserError(f"{where} is {value!r}; write a table such as {{size = 20, epochs = 1}}")
    batching = construct(Batching, value, where)
    if batching.of != "client":
        raise UserError(f'{where}.of is "{batching.of}"; clients train on what is theirs: leave it out')
    return batching


def _optimizer(value: Any, where: str) -> Optimizer:
    if not isinstance(value, Mapping) or "name" not in value:
        raise UserError(f'{where} is {value!r}; write a table such as {{name = "sgd", lr = 0.1}}')
    table = dict(value)
    name = choice(table.pop("name"), OPTIMIZERS, f"optimizer for {where}")
    return construct(OPTIMIZERS[name], table, f"{where} {name}")


def _schedule(value: Any, where: str) -> Schedule:
    if isinstance(value, Mapping):
        table = dict(value)
        name = choice(table.pop("name", "constant"), SCHEDULES, f"schedule for {where}")
        return construct(SCHEDULES[name], table, f"{where} {name}")
    return schedule.constant(convert(value, float, where))


CONVERTERS[Batching] = _batching
CONVERTERS[Metric] = partial(_chosen, known=METRICS, what="metric")
CONVERTERS[Optimizer] = _optimizer
CONVERTERS[Schedule] = _schedule
