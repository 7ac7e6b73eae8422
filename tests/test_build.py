"""From names to objects: every name, option and part of the user's own that cannot be used is refused in one line."""

import sys
from pathlib import Path

import pytest
import torch

from mpifl.build import ALGORITHMS, METRICS, MODELS, OPTIMIZERS, build, find_job, named, solo_training
from mpifl.config import UserError, load
from mpifl.data.memory import MemoryDataset
from mpifl.rand import fold

JOB = {"rounds": 1, "model": {"name": "logistic"}, "algorithm": {"name": "fedavg"}}


def refusal(*overrides, job=JOB):
    """The one line that a job with these changes is answered with."""
    with pytest.raises(UserError) as raised:
        build(load(job, overrides))
    line = str(raised.value)
    assert line and "\n" not in line
    return line


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Write a module that jobs can name: own(source) -> its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    made = []

    def write(source, name="own_parts"):
        Path(tmp_path / f"{name}.py").write_text("import torch\nfrom torch import nn\n" + source)
        made.append(name)
        return name

    yield write
    for name in made:
        sys.modules.pop(name, None)


# --- names that there are --------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_is_built_from_its_name_alone(algorithm):
    parts = build(load(JOB, [f"algorithm.name={algorithm}"]))
    assert parts.algorithm.works and set(parts.metrics) == {"accuracy"} and parts.dataset.clients == 100


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_is_built_from_a_table_on_both_sides(optimizer):
    table = f'{{name = "{optimizer}", lr = 0.1}}'
    build(load(JOB, [f"algorithm.client_opt={table}", f"algorithm.server_opt={table}"]))


@pytest.mark.parametrize(
    "schedule",
    [
        "0.1",
        "1",
        "{value = 0.1, warmup = 2}",
        '{name = "constant", value = 0.1}',
        '{name = "step", value = 0.1, every = 5, factor = 0.5}',
        '{name = "cosine", value = 0.1, rounds = 10, final = 0.01, warmup = 3}',
    ],
)
def test_a_learning_rate_is_a_number_or_a_schedule(schedule):
    build(load(JOB, ["algorithm.client_opt.name=sgd", f"algorithm.client_opt.lr={schedule}"]))


def test_one_factory_gives_the_same_model_at_the_same_seed_and_leaves_the_generator_alone():
    before = torch.random.get_rng_state()
    models = [build(load(JOB)).model for _ in range(2)]
    seeds = [fold(0, "init"), fold(1, "init")]
    assert torch.equal(models[0].init(seeds[0]), models[1].init(seeds[0]))
    assert not torch.equal(models[0].init(seeds[0]), models[0].init(seeds[1]))
    assert torch.equal(before, torch.random.get_rng_state())


# --- names that there are not ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "algorithm.name=fedavgg",
            "there is no algorithm (or package.module:function) 'fedavgg'; did you mean 'fedavg'?",
        ),
        ("model.name=mlpp", "there is no model (or package.module:function) 'mlpp'; did you mean 'mlp'?"),
        ("model.loss=crossentropy", "there is no loss (or package.module:function) 'crossentropy'; did you mean"),
        ("model.loss=3", "there is no loss (or package.module:function) '3' (allowed: cross_entropy, token_"),
        (
            'run.metrics=["acuracy"]',
            "there is no metric (or package.module:function) 'acuracy'; did you mean 'accuracy'?",
        ),
        (
            "algorithm.client_opt={name='sgdd', lr=1}",
            "there is no optimizer for fedavg.client_opt 'sgdd'; did you mean",
        ),
        ("algorithm.client_opt={name=3, lr=1}", "there is no optimizer for fedavg.client_opt '3' (allowed: adagrad, "),
        (
            "algorithm.client_opt={name='sgd', lr={name='cosin', value=1}}",
            "there is no schedule for fedavg.client_opt sgd.lr 'cosin'; did you mean 'cosine'? (allowed: constant, ",
        ),
        ("algorithm.weighting=size", "there is no fedavg.weighting 'size' (allowed: examples, uniform)"),
        ("model.inputs=z", "model.inputs is 'z'; the dataset has columns x, y"),
    ],
)
def test_unknown_names_are_answered_with_a_did_you_mean(override, line):
    assert refusal(override).startswith(line)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("algorithm.muu=1", "there is no fedavg option 'muu'; did you mean 'mu'? (allowed: batches, client_opt, mu, "),
        ("algorithm.seed=3", "there is no fedavg option 'seed' (allowed: batches, "),
        ("model.hiden=[5]", "there is no logistic option 'hiden' (allowed: none)"),
        ("model.features=3", "there is no logistic option 'features' (allowed: none)"),
        (
            "algorithm.client_opt={name='adam', lr=1, beta=0.9}",
            "there is no fedavg.client_opt adam option 'beta'; did you",
        ),
        (
            "algorithm.client_opt={name='sgd', lr={value=1, every=2}}",
            "there is no fedavg.client_opt sgd.lr constant option",
        ),
        ("algorithm.batches={sise=5}", "there is no fedavg.batches option 'sise'; did you mean 'size'? (allowed: "),
    ],
)
def test_unknown_options_are_answered_with_those_there_are(override, line):
    assert refusal(override).startswith(line)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("algorithm.mu=strong", "fedavg.mu is 'strong'; it must be a number"),
        ("algorithm.mu=-1", "fedavg's mu is -1.0; it must be 0 (FedAvg) or positive (FedProx)"),
        ("algorithm.mu=nan", "fedavg's mu is nan; it must be 0 (FedAvg) or positive (FedProx)"),
        ("algorithm.client_opt=sgd", "fedavg.client_opt is 'sgd'; write a table such as {name = \"sgd\", lr = 0.1}"),
        (
            "algorithm.client_opt={lr=1}",
            "fedavg.client_opt is {'lr': 1}; write a table such as {name = \"sgd\", lr = 0.1}",
        ),
        ("algorithm.client_opt={name='sgd'}", "fedavg.client_opt sgd needs lr (options: lr, weight_decay, clip_norm)"),
        ("algorithm.client_opt={name='sgd', lr='fast'}", "fedavg.client_opt sgd.lr is 'fast'; it must be a number"),
        ("algorithm.client_opt={name='sgd', lr=true}", "fedavg.client_opt sgd.lr is True; it must be a number"),
        ("algorithm.client_opt={name='sgd', lr=0}", "lr = 0.0 is not allowed: give a number above 0"),
        ("algorithm.client_opt={name='momentum', lr=1, momentum=1}", "momentum = 1.0 is not allowed: give a number in"),
        (
            "algorithm.client_opt={name='sgd', lr={name='cosine', value=1}}",
            "fedavg.client_opt sgd.lr cosine needs rounds",
        ),
        ("algorithm.batches=5", "fedavg.batches is 5; write a table such as {size = 20, epochs = 1}"),
        ("algorithm.batches={of='all'}", 'fedavg.batches.of is "all"; clients train on what is theirs'),
        ("run.metrics=['accuracy', 'accuracy']", "run.metrics has a second 'accuracy'"),
        ("algorithm.batches={size=2.5}", "fedavg.batches.size is 2.5; it must be an integer"),
        ("algorithm.batches={size=-1}", "batches size is -1; it must be at least 0"),
        ("algorithm.batches={epochs=0}", "batches epochs is 0; it must be at least 1"),
        ("algorithm.batches={steps=0}", "batches steps is 0; it must be at least 1"),
        ("algorithm={name='hypcluster', clusters=0}", "hypcluster's clusters is 0; it must be at least 1"),
        ("model={name='mlp', hidden=5}", "mlp.hidden is 5; it must be a list, each an integer"),
        ("model={name='mlp', hidden=[5, 0]}", "mlp hidden is [5, 0]; every layer must have at least 1 unit"),
        ("model={name='mlp', hidden=[-5]}", "mlp hidden is [-5]; every layer must have at least 1 unit"),
        ("model.inputs=[1]", "model inputs is [1]; it must be a string"),
        ("model.name=emnist_conv", "model emnist_conv needs images of 28x28, this dataset has "),
    ],
)
def test_options_that_do_not_fit_are_refused(override, line):
    assert refusal(override).startswith(line)


# --- data ------------------------------------------------------------------------------------------------


def test_options_of_another_name_are_answered_with_how_to_be_rid_of_them():
    assert refusal("model.hidden=[3]") == (
        "there is no logistic option 'hidden' (allowed: none); 'model={name=\"logistic\"}' leaves out what the job has"
    )
    assert build(load(JOB, ["model.hidden=[3]", 'model={name="logistic"}'])).model
    assert refusal("model.name=mlp", "model.hiden=[3]").endswith("did you mean 'hidden'? (allowed: hidden)")


def test_a_missing_dataset_is_answered_with_the_command_that_makes_it():
    made_by = "python -m data_prep mnist --source FOLDER --out data/mnist"
    line = refusal("data.path=data/nowhere", f"data.made_by={made_by}")
    assert line == f"data.path is 'data/nowhere', and there is no such folder; make it with: {made_by}"
    assert "python -m data_prep NAME (--help lists them)" in refusal("data.path=data/nowhere")


def test_a_folder_that_is_no_dataset_is_refused(tmp_path):
    assert refusal(f"data.path={tmp_path}").startswith(f"{tmp_path} is not a dataset: the folder has no index.h5")


COLUMNS = "{'x': np.zeros((3, 4), np.float32), 'y': np.zeros(3, np.int64)}"


def test_a_dataset_of_the_users_own_is_a_dataset_or_a_list_of_clients(own):
    own(f"import numpy as np\ndef clients(): return [{COLUMNS}, {COLUMNS}]\n")
    own("def net(features): return nn.Linear(4, 2)\n", "own_net")
    parts = build(load(JOB, ["data.path=own_parts:clients", "model.name=own_net:net"]))
    assert isinstance(parts.dataset, MemoryDataset) and parts.dataset.clients == 2


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("def data(): return 5", "own_parts:data returned int; it must be a dataset, or a list with a dict of arrays"),
        ("def data(): return [[1], [2]]", "own_parts:data returned list; it must be a dataset, or a list with a dict"),
        ("def data(): return []", "a dataset needs at least one client"),
        ("data = 5", "dataset 'own_parts:data' is int; it must be a function or a class"),
        (
            "def date(): pass",
            "there is no dataset in module own_parts 'data'; did you mean 'date'? (allowed: date)",
        ),
    ],
)
def test_what_is_no_dataset_is_refused(own, source, line):
    own(source)
    assert refusal("data.path=own_parts:data").startswith(line)


def test_a_model_that_needs_what_the_dataset_lacks_is_refused(own):
    own("import numpy as np\ndef data(): return [{'t': np.zeros((3, 4), np.float32)}]\n")
    assert refusal("data.path=own_parts:data") == (
        "this model reads column 'x'; the dataset has t: name a model of your own"
    )


# --- modules of the user's own ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "what", ["algorithm.name=%s", "model.name=%s", "model.loss=%s", 'run.metrics=["%s"]', "data.path=%s"]
)
def test_a_missing_module_or_attribute_is_refused_whatever_it_was_for(own, what, tmp_path):
    kind = {"path": "dataset", "metrics": "metric"}.get(name := what.split("=")[0].split(".")[1], what.split(".")[0])
    kind = "loss" if name == "loss" else kind
    expected = f"{kind} 'no_such.thing:f': no module 'no_such.thing' here ({Path.cwd()}) or beside the job file"
    assert refusal(what % "no_such.thing:f") == expected
    own("def function(): pass\n_hidden = 1\n")
    expected = f"there is no {kind} in module own_parts 'funktion'; did you mean 'function'? (allowed: function)"
    assert refusal(what % "own_parts:funktion") == expected


@pytest.mark.parametrize("name", [":f", "own_parts:", ".own_parts:f", "own-parts:f", "a..b:f", "a:b:c", "a b:f"])
def test_what_cannot_be_a_dotted_path_is_refused(name):
    with pytest.raises(UserError, match=r"; write package\.module:function$"):
        named(name, MODELS, "model")


def test_a_module_that_lacks_something_itself_raises_its_own_error(own):
    own("import own_parts_needs_this\n")  # begins with the same name
    with pytest.raises(ModuleNotFoundError, match="own_parts_needs_this"):
        named("own_parts:f", MODELS, "model")
    own("import own\n", "own_more")  # is the beginning of the name
    with pytest.raises(ModuleNotFoundError, match="'own'"):
        named("own_more:f", MODELS, "model")


NETS = """
def norm(features): return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))

class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = nn.Module()
        self.part.register_buffer("seen", torch.zeros(()))
        self.out = nn.Linear(64, 10)
    def forward(self, x):
        self.part.seen += self.training
        return self.out(x.flatten(1))

def counting(features): return Counting()
def frozen(features): return nn.Linear(64, 10).requires_grad_(False)
def mixed(features): return nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 10).double())
def five(features): return 5
def width(features, units): return nn.Linear(64, units)
a_number = 5
"""


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("norm", "model Sequential holds BatchNorm1d at '2', whose running statistics change in training"),
        ("counting", "model Counting holds Module at 'part', whose running statistics change in training"),
        ("frozen", "model Linear has no trainable parameter"),
        ("mixed", "model Sequential trains parameters of torch.float32, torch.float64"),
        ("five", "a model factory must return an nn.Module, got int"),
        ("width", "own_parts:width needs units (options: units)"),
        ("a_number", "model 'own_parts:a_number' is int; it must be a function or a class"),
    ],
)
def test_models_that_cannot_be_trained_are_refused(own, name, line):
    own(NETS)
    assert refusal(f"model.name=own_parts:{name}").startswith(line)
    if name in ("norm", "counting"):
        assert "use GroupNorm or LayerNorm" in refusal(f"model.name=own_parts:{name}")


def test_an_algorithm_must_be_one(own):
    own("def five(model): return 5\n")
    assert refusal("algorithm.name=own_parts:five") == "own_parts:five returned int, not an mpifl Algorithm"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f(scores, batch): return scores.sum()", "()"),
        ("def f(scores, batch): return scores.T", "(10, 2)"),
        ("def f(scores, batch): return 0.5", "float"),
    ],
)
def test_losses_must_give_a_number_per_example_and_metrics_a_row(own, source, found):
    own(source)
    line = f"gives {found} for a batch of 2; it must give"
    assert refusal("model.loss=own_parts:f") == f"loss {line} one number per example, (2,)"
    metric = f"metric f {line} (2, ...), or a Ratio or Counts of mpifl.measure"
    assert refusal('run.metrics=["accuracy", "own_parts:f"]') == metric


TEXT = """
import numpy as np
from mpifl import Feature, MemoryDataset

def text():
    ids = Feature("uint8", (6,), classes=9, pad=0)
    rows = np.array([[1, 3, 4, 5, 0, 0], [1, 8, 7, 6, 5, 4]], dtype="uint8")
    return MemoryDataset([{"x": rows, "y": np.roll(rows, -1, axis=1)}], features={"x": ids, "y": ids})

def pulled(scores, batch, strength: float, base: float = 1.0):
    return strength * scores.flatten(1).sum(dim=1) + base
"""
OF_TEXT = JOB | {"model": {"name": "char_lstm", "hidden": 4}, "run": {"metrics": []}}


def test_models_of_tokens_are_scored_token_by_token_unless_the_job_says_otherwise(own):
    own(TEXT)
    losses = {}
    for loss in ("", 'model.loss="token_cross_entropy"', 'model.loss={name="token_cross_entropy", expected_length=3}'):
        parts = build(load(OF_TEXT, ["data.path=own_parts:text", *([loss] if loss else [])]))
        rows = {name: torch.from_numpy(c).long() for name, c in parts.dataset.client("train", 0).items()}
        losses[loss] = parts.model.losses(parts.model.init(0), rows)
    usual, named_, scaled = losses.values()
    assert torch.equal(usual, named_)
    torch.testing.assert_close(scaled, usual * torch.tensor([4.0, 6.0]) / 3)  # the tokens of y that are not 0


def test_a_loss_of_the_users_own_takes_options_from_its_table(own):
    own(TEXT)
    scores = torch.full((2, 10), 0.5)
    loss = build(load(JOB, ['model.loss={name="own_parts:pulled", strength=2}'])).model.loss
    assert loss(scores, {}).tolist() == [11.0, 11.0]


TARGETS = """
import numpy as np
from mpifl import Feature, MemoryDataset

X = np.zeros((4, 3), np.float32)
def numbers(): return MemoryDataset([{"x": X, "y": np.zeros(4, np.float32)}])
def column(): return MemoryDataset([{"x": X, "y": np.zeros((4, 1), np.int64)}])
def none(): return MemoryDataset([{"x": X}])
def net(features): return nn.Linear(3, 2)
"""


@pytest.mark.parametrize(
    ("data", "loss", "line"),
    [
        (
            "column",
            "cross_entropy",
            "takes scores (B, classes) and y (B,), here a batch has scores (2, 2) and y (2, 1); f",
        ),
        (
            "column",
            "token_cross_entropy",
            "takes scores (B, L, ids) and y (B, L), here a batch has scores (2, 2) and y",
        ),
        (
            "numbers",
            "cross_entropy",
            "takes class numbers, column 'y' holds torch.float32; for them name a function of",
        ),
        ("none", "cross_entropy", "needs a column 'y'; the dataset has x"),
    ],
)
def test_targets_that_a_loss_cannot_take_are_refused(own, data, loss, line):
    own(TARGETS)
    found = refusal(f"data.path=own_parts:{data}", "model.name=own_parts:net", f"model.loss={loss}")
    assert found.startswith(f"loss {loss} {line}")


def test_sequences_are_no_single_labels_and_the_other_way_round(own):
    own(TEXT)
    line = refusal("data.path=own_parts:text", "model.loss=cross_entropy", job=OF_TEXT)
    assert line.endswith("scores (2, 6, 9) and y (2, 6); for sequences there is token_cross_entropy")
    line = refusal("model.loss=token_cross_entropy")
    assert line.endswith("scores (2, 10) and y (2,); for single labels there is cross_entropy")


NARROW = """
def few_scores(features): return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

class Fails(nn.Linear):
    def forward(self, x): raise self.error

def silent(features):
    net = Fails(64, 10)
    net.error = TypeError()
    return net

def talkative(features):
    net = Fails(64, 10)
    net.error = ValueError("no such shape\\nand more")
    return net

def few_ids(features): return nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 9))
"""


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("few_scores", "the model gives 3 scores, and column 'y' has 10 classes; it must give one for each"),
        ("silent", "model own_nets:silent cannot be run on column 'x', a batch of (2, 8, 8): TypeError"),
        ("talkative", "model own_nets:talkative cannot be run on column 'x', a batch of (2, 8, 8): no such shape"),
        (
            "few_ids",
            "model own_nets:few_ids cannot be run on column 'x', a batch of (2, 6): index out of range in self",
        ),
    ],
)
def test_a_net_that_does_not_fit_the_data_is_refused_before_training(own, name, line):
    own(TEXT)
    own(NARROW, "own_nets")
    data = "own_parts:text" if name == "few_ids" else "digits"
    assert refusal(f"data.path={data}", f"model.name=own_nets:{name}", "run.metrics=[]") == line


def test_fewer_scores_than_classes_are_for_losses_of_the_users_own(own):
    own(NARROW, "own_nets")
    own("def first(scores, batch): return scores[:, 0]")
    build(load(JOB, ["model.name=own_nets:few_scores", "model.loss=own_parts:first", "run.metrics=[]"]))


@pytest.mark.parametrize(
    ("loss", "line"),
    [
        (
            "{name='token_cross_entropy', length=3}",
            "there is no loss token_cross_entropy option 'length' (allowed: expected_length)",
        ),
        ("{name='token_cross_entropy', batch=3}", "there is no loss token_cross_entropy option 'batch' (allowed: exp"),
        (
            "{name='token_cross_entropy', expected_length='x'}",
            "loss token_cross_entropy.expected_length is 'x'; it must be a",
        ),
        ("{name='token_cross_entropy', expected_length=0}", "token_cross_entropy's expected_length is 0.0; it must be"),
        ("{expected_length=3}", "model.loss has {'expected_length': 3}; write a name, or a table such as"),
        ("{name='own_parts:pulled'}", "loss own_parts:pulled needs strength (options: strength, base)"),
        ("{name='no_such'}", "there is no loss (or package.module:function) 'no_such' (allowed: cross_entropy, "),
    ],
)
def test_a_loss_table_is_checked_against_the_function(own, loss, line):
    own(TEXT)
    job = OF_TEXT | {"data": {"path": "own_parts:text"}}
    assert refusal(f"model.loss={loss}", job=job).startswith(line)


def test_loss_and_metrics_of_the_users_own_are_used(own):
    own("def f(scores, batch): return scores[:, 0] * 0 + 3")
    parts = build(load(JOB, ["model.loss=own_parts:f", 'run.metrics=["own_parts:f"]']))
    batch = {"x": torch.zeros(2, 8, 8), "y": torch.zeros(2, dtype=torch.int64), "index": torch.arange(2)}
    assert parts.model.losses(torch.zeros(parts.model.size), batch).tolist() == [3.0, 3.0]
    assert set(parts.metrics) == {"f"} and METRICS["accuracy"] not in parts.metrics.values()


# --- jobs that come with the package ---------------------------------------------------------------------


def test_shipped_jobs_are_found_from_anywhere_and_files_at_hand_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = find_job("jobs/mnist_iid.toml")
    assert shipped.is_absolute() and load(shipped).name == "mnist_iid"
    assert find_job("mnist_iid.toml") == Path("mnist_iid.toml")
    with pytest.raises(UserError, match=r"no job file .*jobs/nothing.toml \(there: .*mnist_iid.toml"):
        load(find_job("jobs/nothing.toml"))
    Path("jobs").mkdir()
    assert find_job("jobs/mnist_iid.toml") == shipped
    assert find_job("jobs/nothing.toml") == Path("jobs/nothing.toml")
    Path("jobs/mnist_iid.toml").touch()
    assert find_job("jobs/mnist_iid.toml") == Path("jobs/mnist_iid.toml")


@pytest.mark.parametrize(
    ("algorithm", "lr"),
    [
        ({"name": "fedavg", "client_opt": {"name": "sgd", "lr": 0.3}}, 0.3),
        ({"name": "mime", "base_opt": {"name": "momentum", "lr": 0.4}}, 0.4),
        ({"name": "scaffold", "client_lr": 0.5}, 0.5),
    ],
)
def test_training_without_federation_uses_the_clients_optimizer_and_batches(algorithm, lr):
    job = load(JOB | {"algorithm": algorithm | {"batches": {"size": 7}}})
    batches, opt = solo_training(job)
    assert batches.size == 7 and opt.lr(0) == lr
