"""Classifiers of transformers, on checkpoints, a tokenizer and reviews made here: no hub can be reached."""

import json
import os
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import mpifl
from data_prep import __main__ as data_prep
from mpifl import evaluate
from mpifl.build import build
from mpifl.comm import Alone
from mpifl.config import UserError, load, resolved, to_toml
from mpifl.console import Console
from mpifl.data.shard import Feature
from mpifl.model import from_module
from mpifl.models import hf
from mpifl.models.hf import Lora, text_classifier
from mpifl.rand import as_tensor

os.environ["HF_HUB_OFFLINE"] = "1"  # the hub's library looks when it is imported
for package in ("transformers", "peft", "tokenizers"):
    pytest.importorskip(package, reason='needs the extra hf: pip install -e ".[hf]"')

ROOT = Path(mpifl.__file__).parent.parent
WORDS = {0: ["dreadful", "tedious", "clumsy"], 1: ["superb", "delightful", "moving"]}
FILLERS = ["the", "film", "was", "and", "plot", "with", "actors", "music", "a", "scene"]
LENGTH, HIDDEN, VOCABULARY = 10, 32, 120
LORA = {"r": 4, "alpha": 8.0, "targets": ["query", "value"]}


def reviews(seed, count):
    """Texts of 4 to 7 words, three of them blame (0) or praise (1), and their labels."""
    rng = np.random.default_rng(seed)
    texts, labels = [], rng.integers(2, size=count)
    for label in labels:
        words = [*rng.choice(WORDS[label], 3), *rng.choice(FILLERS, rng.integers(1, 5))]
        texts.append(" ".join(rng.permutation(words)))
    return texts, labels


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A WordPiece tokenizer trained on reviews, saved as transformers does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=[*special.values()], show_progress=False)
    made.train_from_iterator(reviews(0, 300)[0], trainer)
    ends = [(token, made.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, **special)
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Tiny pretrained language models, without a head for classes: {name: folder}."""
    from transformers import AlbertConfig, AlbertForMaskedLM, DistilBertConfig, DistilBertForMaskedLM

    albert = AlbertConfig(
        vocab_size=VOCABULARY,
        embedding_size=16,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        initializer_range=0.2,  # what is not pretrained at all must still tell words apart
    )
    distilbert = DistilBertConfig(
        vocab_size=VOCABULARY, dim=HIDDEN, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=16
    )
    folder, made = tmp_path_factory.mktemp("checkpoints"), {}
    with torch.random.fork_rng(devices=[]), hf._quiet():
        torch.manual_seed(5)
        for model in (AlbertForMaskedLM(albert), DistilBertForMaskedLM(distilbert)):
            name = model.config.model_type
            made[name] = str(folder / name)
            model.save_pretrained(made[name])
    return made


@pytest.fixture(scope="module")
def dataset(tokenizer, tmp_path_factory):
    """Shards of 4 critics with 40 reviews each, and 200 to test, converted from a saved dataset."""
    datasets = pytest.importorskip("datasets", reason='needs the extra prep: pip install -e ".[prep]"')
    texts, labels = reviews(1, 360)
    critics = [f"critic {row // 40}" for row in range(360)]
    table = {"text": texts, "label": [("blame", "praise")[label] for label in labels], "critic": critics}
    rows = {"train": slice(0, 160), "test": slice(160, 360)}
    parts = {name: {column: values[cut] for column, values in table.items()} for name, cut in rows.items()}
    folder = tmp_path_factory.mktemp("reviews")
    saved = datasets.DatasetDict({name: datasets.Dataset.from_dict(part) for name, part in parts.items()})
    saved.save_to_disk(folder / "saved")
    words = ["hf", "--source", folder / "saved", "--tokenizer", tokenizer, "--length", LENGTH]
    words += ["--partition", "by-column", "--client-column", "critic", "--jobs", 1, "--out", folder / "shards"]
    assert data_prep.main([str(word) for word in words]) == 0
    return folder / "shards"


@pytest.fixture(scope="module")
def with_head(checkpoints, tmp_path_factory):
    """The same models with a head for 2 classes, as transformers draws one: {name: folder}."""
    from transformers import AutoModelForSequenceClassification

    folder, made = tmp_path_factory.mktemp("with_head"), {}
    for name, path in checkpoints.items():
        made[name] = str(folder / name)
        with hf._quiet():
            AutoModelForSequenceClassification.from_pretrained(path, num_labels=2).save_pretrained(made[name])
    return made


def features(length=LENGTH, tokens=VOCABULARY, pad=0, classes=2):
    return {"x": Feature("int32", (length,), classes=tokens, pad=pad), "y": Feature("uint8", (), classes=classes)}


def batch(key=None):
    """Rows of 1, 4, 8 and LENGTH tokens, and one of nothing but pads."""
    x = torch.from_numpy(np.random.default_rng(3).integers(4, VOCABULARY, (5, LENGTH)))
    for row, tokens in enumerate((1, 4, 8, LENGTH, 0)):
        x[row, tokens:] = 0
    made = {"x": x, "y": torch.tensor([0, 1, 1, 0, 1]), "index": torch.arange(5)}
    return made if key is None else made | {"key": as_tensor(key)}


def model_of(checkpoint, seen=None, **options):
    return from_module(lambda: text_classifier(seen or features(), checkpoint, **options))


# --- what is computed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["albert", "distilbert"])
def test_scores_are_those_of_transformers_on_the_tokens_alone(with_head, name):
    from transformers import AutoModelForSequenceClassification

    net = AutoModelForSequenceClassification.from_pretrained(with_head[name]).eval()
    model = model_of(with_head[name])
    scores = model.scores(model.init(0), batch())
    for row, tokens in enumerate((1, 4, 8, LENGTH, 1)):  # of a row of pads, the first is kept
        with torch.no_grad():
            expected = net(input_ids=batch()["x"][row : row + 1, :tokens]).logits[0]
        torch.testing.assert_close(scores[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"lora": Lora(dropout=0.1)}])
def test_a_row_of_pads_alone_spoils_no_gradient(checkpoints, options):
    model = model_of(checkpoints["albert"], **options)
    grad, loss = model.grad_and_loss(model.init(0), batch(key=1))
    assert torch.isfinite(grad).all() and torch.isfinite(loss)


def test_dropout_inside_transformers_and_peft_is_a_function_of_the_key(checkpoints):
    model = model_of(checkpoints["distilbert"], lora=Lora(dropout=0.3))
    grads = [model.grad_and_loss(model.init(0), batch(key))[0] for key in (1, 1, 2)]
    assert torch.equal(grads[0], grads[1]) and not torch.equal(grads[0], grads[2])


def test_adapters_change_nothing_until_they_are_trained(with_head):
    whole, adapted = model_of(with_head["albert"]), model_of(with_head["albert"], lora=Lora())
    theta = adapted.init(0)
    scores = adapted.scores(theta, batch())
    torch.testing.assert_close(scores, whole.scores(whole.init(0), batch()))
    assert not torch.allclose(adapted.scores(theta + 0.1, batch()), scores, atol=0.01)


@pytest.mark.parametrize("options", [{"lora": Lora(r=2)}, {"train": "head"}])
def test_half_precision_is_for_what_is_frozen(checkpoints, options):
    half, full = (model_of(checkpoints["albert"], dtype=name, **options) for name in ("bfloat16", "float32"))
    theta = half.init(0)
    grad, loss = half.grad_and_loss(theta, batch(key=1))
    assert (theta.dtype, grad.dtype, half.size) == (torch.float32, torch.float32, full.size)
    assert {p.dtype for p in half.module.parameters() if not p.requires_grad} == {torch.bfloat16}
    expected, expected_loss = full.grad_and_loss(theta, batch(key=1))
    torch.testing.assert_close(loss, expected_loss, rtol=0.05, atol=0)
    assert torch.nn.functional.cosine_similarity(grad, expected, dim=0) > 0.98


# --- what is trained, and where it begins ----------------------------------------------------------------

HEAD = HIDDEN * (HIDDEN + 1) + 2 * (HIDDEN + 1)  # of both: a pooler or "pre-classifier", and the classifier
ADAPTERS = 2 * 4 * 2 * HIDDEN  # two square layers, rank 4; ALBERT's layers are one


@pytest.mark.parametrize(
    ("name", "targets", "layers"), [("albert", ("query", "value"), 1), ("distilbert", ("q_lin", "v_lin"), 2)]
)
def test_theta_is_what_is_trained(checkpoints, with_head, name, targets, layers):
    whole = model_of(checkpoints[name])
    assert whole.size == sum(tensor.numel() for tensor in load_file(f"{with_head[name]}/model.safetensors").values())
    assert model_of(checkpoints[name], train="head").size == HEAD
    # A head that the checkpoint lacks is trained to its last layer, whatever peft thinks of a layer's name.
    assert model_of(checkpoints[name], lora=Lora(r=4, targets=targets)).size == HEAD + layers * ADAPTERS


def test_theta_starts_from_the_checkpoint_and_a_head_of_the_seed(checkpoints):
    model = model_of(checkpoints["albert"])
    first, again, other = (model.state_dict(model.init(seed)) for seed in (1, 1, 2))
    stored = load_file(f"{checkpoints['albert']}/model.safetensors")
    encoder = [name for name in first if name in stored]
    assert len(first) - len(encoder) == 4  # weight and bias of the pooler and of the classifier
    assert all(torch.equal(first[name], stored[name]) and torch.equal(other[name], stored[name]) for name in encoder)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name in ("albert.pooler.weight", "classifier.weight"):
        assert not torch.equal(first[name], other[name])
        assert 0.1 < first[name].std() < 0.3  # this model's initializer_range is 0.2
    assert not first["classifier.bias"].any()


def test_a_head_that_the_checkpoint_has_is_kept_unless_it_is_for_other_classes(with_head):
    name = "classifier.weight"
    stored = load_file(f"{with_head['albert']}/model.safetensors")
    model = model_of(with_head["albert"])
    assert all(torch.equal(model.state_dict(model.init(seed))[name], stored[name]) for seed in (1, 2))
    model = model_of(with_head["albert"], features(classes=3))
    first, other = (model.state_dict(model.init(seed)) for seed in (1, 2))
    assert first[name].shape == (3, HIDDEN) and not torch.equal(first[name], other[name])
    kept = "albert.pooler.weight"
    assert torch.equal(first[kept], stored[kept]) and torch.equal(other[kept], stored[kept])


def test_an_architecture_alone_is_drawn_from_the_seed(checkpoints, tmp_path):
    shutil.copy(Path(checkpoints["albert"], "config.json"), tmp_path)
    model = model_of(str(tmp_path), pretrained=False)
    thetas = [model.init(seed) for seed in (1, 1, 2)]
    assert model.size == model_of(checkpoints["albert"]).size
    assert torch.equal(thetas[0], thetas[1])
    drawn = model.state_dict((thetas[0] != thetas[2]).float())
    assert all(tensor.mean() > 0.9 for tensor in drawn.values() if tensor.ndim == 2)


def test_a_checkpoint_is_read_once_and_its_frozen_weights_are_held_once(checkpoints):
    hf._load.cache_clear()
    made = [text_classifier(features(), checkpoints["albert"], lora=Lora(targets=("query",))) for _ in range(3)]
    assert (hf._load.cache_info().misses, hf._load.cache_info().hits) == (1, 2)
    for (name, first), second in zip(made[0].named_parameters(), made[1].parameters()):
        own = first.requires_grad or "classifier" in name or "pooler" in name
        assert (first.data_ptr() != second.data_ptr()) == own, name


# --- whole jobs ------------------------------------------------------------------------------------------


def job(checkpoint, dataset, out, **model):
    return {
        "seed": 1,
        "rounds": 5,
        "data": {"path": str(dataset)},
        "model": {"name": "text_classifier", "checkpoint": checkpoint} | model,
        "algorithm": {
            "name": "fedavg",
            "client_opt": {"name": "adamw", "lr": 0.02 if "lora" in model else 0.003},
            "batches": {"size": 10, "epochs": 1},
        },
        "run": {"out": str(out)},
    }


@pytest.fixture(scope="module")
def runs(checkpoints, dataset, tmp_path_factory):
    """Finished runs of the same ALBERT: {"whole" or "lora": (folder, summary)}."""
    out, made = tmp_path_factory.mktemp("runs"), {}
    for name, options in {"whole": {}, "lora": {"lora": LORA}}.items():
        made[name] = out / name, mpifl.run(job(checkpoints["albert"], dataset, out / name, **options))
    return made


@pytest.mark.parametrize("which", ["whole", "lora"])
def test_critics_learn_together_to_tell_praise_from_blame(runs, which):
    folder, summary = runs[which]
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert summary["scores"]["accuracy"] > 0.9 > first["scores"]["accuracy"]


def test_training_leaves_frozen_weights_as_they_are_on_disk(runs, checkpoints):
    held, new = hf._load(checkpoints["albert"], 2, 0, True, "float32", False)
    stored = load_file(f"{checkpoints['albert']}/model.safetensors")
    frozen = {name: parameter for name, parameter in held.named_parameters() if name not in new}
    assert len(frozen) == 23 and all(torch.equal(parameter, stored[name]) for name, parameter in frozen.items())


def test_a_whole_model_is_exported_as_transformers_reads_it(runs, checkpoints, tmp_path):
    from transformers import AutoModelForSequenceClassification

    folder, _ = runs["whole"]
    for file in (Path(checkpoints["albert"], "config.json"), folder / "model.safetensors"):
        shutil.copy(file, tmp_path)
    net, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    model = model_of(checkpoints["albert"])
    theta = model.from_state_dict(load_file(folder / "model.safetensors"))
    x = batch()["x"][:4]
    with torch.no_grad():
        torch.testing.assert_close(net(x, attention_mask=x != 0).logits, model.scores(theta, batch())[:4])


def test_adapters_are_exported_alone_as_peft_reads_them(runs, checkpoints):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    exported = load_file(runs["lora"][0] / "model.safetensors")
    assert sum(tensor.numel() for tensor in exported.values()) == HEAD + ADAPTERS
    with hf._quiet():
        base = AutoModelForSequenceClassification.from_pretrained(checkpoints["albert"], num_labels=2)
        config = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["query", "value"])
        config.modules_to_save = ["albert.pooler"]
        net = get_peft_model(base, config)
    assert not net.load_state_dict(exported, strict=False).unexpected_keys
    model = model_of(checkpoints["albert"], lora=Lora(4, 8.0, targets=("query", "value")))
    scores = model.scores(model.from_state_dict(exported), batch())
    x = batch()["x"][:4]
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(x, attention_mask=x != 0).logits, scores[:4])
        merged = net.merge_and_unload()
        torch.testing.assert_close(merged(x, attention_mask=x != 0).logits, scores[:4], rtol=1e-3, atol=1e-4)


def test_a_finished_run_of_adapters_can_be_scored_again(runs):
    folder, summary = runs["lora"]
    scored = evaluate.evaluate(folder, Alone(), Console(quiet=True))
    assert scored["model"]["accuracy"] == summary["scores"]["accuracy"]


@pytest.mark.launches
def test_three_ranks_give_the_bits_of_one_process_and_send_only_what_is_trained(checkpoints, dataset, launch, tmp_path):
    lora = {"r": 2, "dropout": 0.1, "targets": ["q_lin", "v_lin"]}
    table = job(checkpoints["distilbert"], dataset, "out", lora=lora) | {"rounds": 1}
    (tmp_path / "job.toml").write_text(to_toml(resolved(load(table))))
    done = launch(3, "-m", "mpifl.train", "job.toml", "--quiet", cwd=tmp_path, env={"PYTHONPATH": ROOT})
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    world = json.loads((tmp_path / "out" / "summary.json").read_text())
    alone = mpifl.run(table | {"run": {"out": str(tmp_path / "alone")}})
    assert (world["ranks"], world["digest"], world["scores"]) == (3, alone["digest"], alone["scores"])
    trained = HEAD + ADAPTERS  # in twice as many layers as ALBERT, of half the rank
    assert 0 <= world["bytes_down"] - 4 * trained < 1000  # float32
    assert 0 <= world["bytes_up"] - 8 * trained < 1000  # an exact sum


def test_the_job_of_the_tutorial_runs_on_a_tiny_model(checkpoints, dataset, tmp_path):
    tiny = [f"model.checkpoint={checkpoints['albert']}", f"data.path={dataset}", "rounds=1", f"run.out={tmp_path}/out"]
    summary = mpifl.run(ROOT / "jobs" / "imdb_albert.toml", tiny)
    assert summary["steps"] == 4 * 2 and (tmp_path / "out" / "model.safetensors").exists()


# --- what is refused -------------------------------------------------------------------------------------


def refusal(checkpoint, seen=None, **options):
    with pytest.raises(UserError) as raised:
        text_classifier(seen or features(), checkpoint, **options)
    line = str(raised.value)
    assert line and "\n" not in line
    return line


@pytest.mark.parametrize("name", ["albert/albert-base-v2", "no/such/folder", "./nothing", ""])
def test_a_missing_checkpoint_is_one_line_that_says_what_can_be_given(name):
    line = refusal(name)
    assert line.startswith(f"model.checkpoint '{name}' cannot be loaded: ")
    assert line.endswith("or a name in the local Hugging Face cache, or set download = true")
    assert refusal(name, download=True).endswith("or a name on the hub")


def test_the_network_is_used_only_when_asked_for(checkpoints, monkeypatch):
    class Asked(BaseException):
        """Not to be caught, and tried again, by those who ask."""

    def getaddrinfo(*address, **options):
        raise Asked

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    text_classifier(features(), checkpoints["albert"], lora=Lora())
    refusal("albert/albert-base-v2")
    with pytest.raises(Asked):
        text_classifier(features(), "albert/albert-base-v2", download=True)


def test_damaged_and_foreign_checkpoints_are_refused(checkpoints, tmp_path):
    assert "Unrecognized model" in refusal(str(tmp_path))
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    config.write_text('{"model_type": "vit"}')
    assert "Unrecognized configuration class" in refusal(str(tmp_path))
    shutil.copy(Path(checkpoints["albert"], "config.json"), config)
    assert "no file named model.safetensors" in refusal(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    assert "no file named model.safetensors" in refusal(str(tmp_path))
    weights.write_bytes(Path(checkpoints["albert"], "model.safetensors").read_bytes()[:3000])
    assert "deserializing" in refusal(str(tmp_path))
    shutil.copy(Path(checkpoints["distilbert"], "model.safetensors"), weights)
    assert "lacks most weights of AlbertForSequenceClassification" in refusal(str(tmp_path))


@pytest.mark.parametrize(
    ("seen", "line"),
    [
        (
            features(tokens=VOCABULARY + 1),
            "column 'x' has 121 tokens, the model 120; convert the dataset again with the",
        ),
        (features(pad=1), "column 'x' is padded with 1, the model expects 0; convert the dataset again with the"),
        (
            features(length=17),
            "rows of column 'x' have 17 tokens, the model reads at most 16; convert the dataset again",
        ),
        (features(pad=None), "text_classifier reads padded rows of token ids; column 'x' has (10,), pad None"),
        ({"x": Feature("uint8", (8, 8)), "y": Feature("uint8", (), classes=2)}, "text_classifier reads padded rows of"),
        (features() | {"y": Feature("uint8", ())}, "this model needs a dataset whose column 'y' records its number of"),
    ],
)
def test_other_tokens_than_the_model_was_made_for_are_refused(checkpoints, seen, line):
    assert refusal(checkpoints["albert"], seen).startswith(line)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"lora": {"r": 0}}, "lora.r is 0; the rank must be at least 1"),
        ({"lora": {"alpha": 0}}, "lora.alpha is 0.0; it must be above 0"),
        ({"lora": {"dropout": 1.0}}, "lora.dropout is 1.0; it must be at least 0 and below 1"),
        ({"lora": {"rank": 8}}, "there is no text_classifier.lora option 'rank' (allowed: alpha, dropout, r, targets)"),
        ({"lora": {"targets": ["key", "vaule"]}}, "there is no layer for lora.targets 'vaule'; did you mean 'value'?"),
        ({"lora": {"targets": ["pooler"]}}, "there is no layer for lora.targets 'pooler' (allowed: dense, embedding_"),
        ({"lora": {}, "train": "head"}, 'lora trains adapters and the head: leave out train = "head", or lora'),
        ({"lora": {}, "pretrained": False}, "pretrained = false leaves nothing worth freezing"),
        ({"dtype": "bfloat16"}, 'dtype "bfloat16" is for frozen weights, and there are none; set lora, or train'),
        (
            {"dtype": "int8", "lora": {}},
            "there is no text_classifier.dtype 'int8' (allowed: bfloat16, float16, float32)",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(checkpoints, dataset, options, line):
    with pytest.raises(UserError) as raised:
        build(load(job(checkpoints["albert"], dataset, "out", **options)))
    assert str(raised.value).startswith(line) and "\n" not in str(raised.value)


@pytest.mark.parametrize(("package", "options"), [("transformers", {}), ("peft", {"lora": Lora()})])
def test_a_missing_package_is_answered_with_the_extra_that_has_it(checkpoints, monkeypatch, package, options):
    monkeypatch.setitem(sys.modules, package, None)
    assert refusal(checkpoints["albert"], **options) == (
        f'model text_classifier needs {package}: pip install -e ".[hf]"'
    )
