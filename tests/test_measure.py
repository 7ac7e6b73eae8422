"""Metrics are sums over examples: the same however the examples are split, and equal to what a plain program counts."""

import json
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import vmap

import mpifl
from mpifl import evaluate
from mpifl.build import build
from mpifl.comm import Alone
from mpifl.config import UserError, load
from mpifl.console import score_rows
from mpifl.data.memory import MemoryDataset
from mpifl.data.shard import Feature
from mpifl.engine.clock import Clock
from mpifl.engine.serial import visit
from mpifl.fleet import Fleet
from mpifl.measure import (
    BLOCK,
    Counts,
    Ratio,
    accuracy,
    confusion,
    example_sums,
    means,
    per_domain,
    ratios,
    scoring,
    summed,
    token_accuracy,
    token_loss,
    top_k,
)
from mpifl.model import Model, cross_entropy, token_cross_entropy
from mpifl.scoring import score_clients
from mpifl.session import Session

CLASSES, IDS, LENGTH, OOV = 6, 12, 7, 11
OUTSIDE = (0, 1, 2, OOV)
GIVEN = {  # models whose scores are a column of the batch
    kind: Model(1, lambda seed: torch.zeros(1), lambda theta, batch: batch["scores"], loss)
    for kind, loss in {"classes": cross_entropy, "tokens": token_cross_entropy}.items()
}
METRICS_OF = {
    "classes": {
        "accuracy": accuracy,
        "top_k": partial(top_k, k=3),
        "confusion": confusion,
        "by domain": partial(per_domain, metric=accuracy, domains=3),
        "confusion by domain": partial(per_domain, metric=confusion, domains=3),
        "scores": lambda scores, batch: scores,
    },
    "tokens": {
        "token_accuracy": partial(token_accuracy, outside=OUTSIDE),
        "token_loss": token_loss,
        "by domain": partial(per_domain, metric=token_accuracy, domains=2),
    },
}


def examples(kind, n, seed=0):
    """Scores, labels and domains; in token data every id outside the vocabulary is a target, and the best score."""
    rng = np.random.default_rng(seed)
    if kind == "classes":
        scores, y = rng.normal(size=(n, CLASSES)), rng.integers(0, CLASSES, n)
    else:
        scores, y = rng.normal(size=(n, LENGTH, IDS)), rng.integers(3, IDS - 1, (n, LENGTH))
        y = np.where(rng.random(y.shape) < 0.4, rng.choice(OUTSIDE, y.shape), y)
        y[0] = 0  # a sequence without a target
        scores[rng.random(scores.shape[:2]) < 0.3, rng.choice(OUTSIDE)] = 9.0
    scores = scores + 1.5 * np.eye(scores.shape[-1])[y]  # so that half of the predictions are right
    columns = {"scores": scores.astype(np.float32), "y": y, "domain_id": rng.integers(0, 2, n)}
    return {name: torch.from_numpy(column) for name, column in columns.items()}


def batch_of(columns, rows=slice(None)):
    batch = {name: column[rows] for name, column in columns.items()}
    return batch | {"index": torch.arange(len(batch["y"]))}


def padded(batch, rng):
    """The batch with rows that do not count planted among it: other labels, and scores that are not numbers."""
    n = len(batch["y"])
    places = np.sort(rng.choice(n + 4, n, replace=False))
    more = {name: leaf.new_zeros((n + 4, *leaf.shape[1:])) for name, leaf in batch.items()}
    more["scores"] += torch.nan
    for name, leaf in batch.items():
        more[name][places] = leaf
    mask = torch.zeros(n + 4, dtype=torch.bool)
    mask[places] = True
    return more | {"mask": mask}


def score(kind, batches, metrics=None):
    """Stats of scoring these batches, added up over visits: one visit per list of batches."""
    work = scoring(GIVEN[kind], METRICS_OF[kind] if metrics is None else metrics, "test", "block")
    total = {}
    for of_visit in batches:
        stats = visit(work, {"theta": torch.zeros(1)}, None, of_visit).stats
        total = {name: total.get(name, 0.0) + value for name, value in stats.items()}
    return {name: value.numpy() for name, value in total.items()}


# --- sums ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", METRICS_OF)
def test_any_split_over_batches_and_visits_padded_or_not_gives_the_same_sums(kind):
    columns, rng = examples(kind, 50), np.random.default_rng(1)
    whole = score(kind, [[batch_of(columns)]])
    assert set(METRICS_OF[kind]) < set(whole) and whole["examples"] == 50
    for _ in range(5):
        order = rng.permutation(50)
        cuts = np.sort(rng.choice(np.arange(1, 50), 7, replace=False))
        batches = [batch_of(columns, torch.from_numpy(rows)) for rows in np.split(order, cuts)]
        batches = [padded(batch, rng) if i % 2 else batch for i, batch in enumerate(batches)]
        sums = score(kind, [batches[:3], batches[3:4], batches[4:]])
        assert sums.keys() == whole.keys()
        for name, total in sums.items():
            if total.dtype == np.float64 and np.array_equal(whole[name], np.rint(whole[name])):
                np.testing.assert_array_equal(total, whole[name], err_msg=name)
            np.testing.assert_allclose(total, whole[name], rtol=1e-6, err_msg=name)


def test_a_batch_of_masked_rows_alone_adds_nothing():
    batch = padded(batch_of(examples("classes", 3)), np.random.default_rng(0))
    batch["mask"] = torch.zeros(7, dtype=torch.bool)
    assert all(not total.any() for total in score("classes", [[batch]]).values())


def test_values_of_any_shape_are_averaged_over_examples_and_ratios_elementwise():
    batch = batch_of(examples("classes", 9))
    metrics = {
        "row": lambda scores, batch: scores,
        "ratio": lambda scores, batch: Ratio(torch.tensor([6.0, 5.0]), torch.tensor([4.0, 0.0])),
        "count": lambda scores, batch: Counts(torch.tensor([[7.0]])),
    }
    reported = means(score("classes", [[batch], [batch]], metrics))
    assert reported["row"] == pytest.approx(batch["scores"].double().mean(dim=0).tolist())
    assert (reported["ratio"], reported["count"]) == ([1.5, 0.0], [[14.0]])
    assert reported["loss"] == pytest.approx(F.cross_entropy(batch["scores"], batch["y"]).item())
    assert set(reported) == {"loss", "row", "ratio", "count"}


def test_ratios_of_single_clients_are_undefined_where_nothing_counts():
    stats = {"hits": [3.0, 0.0], "hits/weight": [4.0, 0.0], "examples": [4.0, 2.0], "weight": [4.0, 2.0]}
    np.testing.assert_array_equal(ratios(stats, undefined=np.nan)["hits"], [0.75, np.nan])
    vectors = {"hits": [[3.0, 1.0], [0.0, 2.0]], "hits/weight": [[4.0, 4.0], [0.0, 8.0]]}
    np.testing.assert_array_equal(ratios(vectors)["hits"], [[0.75, 0.25], [0.0, 0.25]])


def test_scoring_is_without_the_key_of_training():
    seen = []
    model = Model(
        1, GIVEN["classes"].init, lambda theta, batch: seen.append("key" in batch) or batch["scores"], cross_entropy
    )
    keyed = batch_of(examples("classes", 5)) | {"key": torch.tensor(1)}
    visit(scoring(model, {}, "test", "block"), {"theta": torch.zeros(1)}, None, [keyed])
    assert seen == [False]


def test_numbers_only_leaves_out_what_is_more_than_a_number():
    work = scoring(GIVEN["classes"], METRICS_OF["classes"], "test", "client", numbers_only=True)
    stats = visit(work, {"theta": torch.zeros(1)}, None, [batch_of(examples("classes", 5))]).stats
    assert set(ratios(stats)) == {"loss", "accuracy", "top_k"}


# --- classification --------------------------------------------------------------------------------------


def test_confusion_agrees_with_accuracy_and_with_the_counts_of_classes():
    columns = examples("classes", 80)
    counts = np.asarray(means(score("classes", [[batch_of(columns)]]))["confusion"])
    expected = np.zeros((CLASSES, CLASSES))
    for scores, true in zip(columns["scores"].numpy(), columns["y"].numpy()):
        expected[true, scores.argmax()] += 1
    np.testing.assert_array_equal(counts, expected)
    assert not np.array_equal(counts, counts.T), "a symmetric matrix would not tell rows from columns"
    right = accuracy(columns["scores"], columns).mean().item()
    assert 0.2 < right < 0.9 and counts.trace() / counts.sum() == pytest.approx(right)


def test_top_1_is_accuracy_top_all_is_one_and_between_it_grows():
    columns = examples("classes", 200)
    columns["scores"][::3] = columns["scores"][::3].round()  # many ties
    hits = [top_k(columns["scores"], columns, k=k) for k in range(1, CLASSES + 1)]
    assert torch.equal(hits[0], accuracy(columns["scores"], columns)) and hits[-1].min() == 1
    assert all((more >= less).all() and more.sum() > less.sum() for less, more in pairwise(hits))
    untied = columns["scores"][1::3]
    places = (untied > untied.gather(1, columns["y"][1::3, None])).sum(dim=1)
    assert torch.equal(hits[2][1::3], (places < 3).float())


@pytest.mark.parametrize("kind", METRICS_OF)
def test_domains_add_up_to_the_whole_and_each_is_the_metric_of_its_rows(kind):
    columns = examples(kind, 60)
    batch = padded(batch_of(columns), np.random.default_rng(0))
    plain = {"classes": ("accuracy", "confusion", "scores"), "tokens": ("token_accuracy", "token_loss")}[kind]
    for metric in (METRICS_OF[kind][name] for name in plain):
        by_domain = per_domain(batch["scores"], batch, metric, domains=3)
        whole = summed(metric(batch["scores"], batch), batch)
        for parts, total in zip(by_domain, whole, strict=True):
            assert parts.shape == (3, *total.shape) and not parts[2].any()
            torch.testing.assert_close(parts.sum(dim=0), total)
        for domain in range(2):
            rows = batch_of(columns, columns["domain_id"] == domain)
            alone = summed(metric(rows["scores"], rows), rows)
            torch.testing.assert_close(type(alone)(*(part[domain] for part in by_domain)), alone)


# --- language --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outside", [OUTSIDE, (0, 1, 2), (0, 5, 7, OOV), (0,)])
def test_token_accuracy_by_brute_force(outside):
    columns = examples("tokens", 40)
    assert all((columns["y"] == id).any() and (columns["scores"].argmax(-1) == id).any() for id in OUTSIDE)
    hits = counted = 0
    for sequence, targets in zip(columns["scores"].tolist(), columns["y"].tolist()):
        for scores, target in zip(sequence, targets):
            if target not in outside:
                words = [id for id in range(IDS) if id not in outside]
                hits, counted = hits + (max(words, key=lambda id: scores[id]) == target), counted + 1
    found = token_accuracy(columns["scores"], columns, outside=outside)
    assert [part.item() for part in found] == [hits, counted]
    assert 0 < hits < counted < columns["y"].numel()


def test_no_option_makes_padding_a_target_and_the_default_lets_oov_count():
    columns = examples("tokens", 40)
    y = columns["y"]
    weights = {outside: token_accuracy(columns["scores"], columns, outside).weights.item() for outside in [(), (1,)]}
    assert weights == {(): (y != 0).sum(), (1,): ((y != 0) & (y != 1)).sum()}
    assert token_accuracy(columns["scores"], columns).weights == (y > 2).sum()


def test_token_loss_is_the_mean_over_all_tokens_not_over_sequences():
    columns = examples("tokens", 40)
    targets = columns["y"] != 0
    logs = columns["scores"].double().log_softmax(dim=-1)
    losses = -logs.gather(2, columns["y"][..., None])[..., 0]
    reported = means(score("tokens", [[batch_of(columns, slice(0, 9))], [batch_of(columns, slice(9, 40))]]))
    assert reported["token_loss"] == pytest.approx(losses[targets].mean().item(), rel=1e-6)
    assert reported["token_loss"] != pytest.approx(reported["loss"], rel=1e-3)  # which weighs sequences alike


@pytest.mark.parametrize("kind", METRICS_OF)
def test_metrics_run_under_vmap_as_one_by_one(kind):
    batches = [padded(batch_of(examples(kind, 8, seed)), np.random.default_rng(seed)) for seed in range(3)]
    together = {name: torch.stack([batch[name] for batch in batches]) for name in batches[0]}
    for metric in METRICS_OF[kind].values():
        sums = lambda batch, metric=metric: tuple(summed(metric(batch["scores"], batch), batch))  # noqa: E731
        for found, *expected in zip(vmap(sums)(together), *map(sums, batches), strict=True):
            torch.testing.assert_close(found, torch.stack(expected))


# --- in jobs ---------------------------------------------------------------------------------------------


def share_of_examples_whose_best_score_is_above_the_mean_of_the_scores_by_parity_of_the_label(scores, batch):
    odd = F.one_hot(batch["y"] % 2, 2)
    high = (scores.amax(dim=-1) > scores.mean(dim=-1) + 1).to(odd.dtype)
    return Ratio(example_sums(odd * high[:, None], batch), example_sums(odd, batch))


LONG = share_of_examples_whose_best_score_is_above_the_mean_of_the_scores_by_parity_of_the_label.__name__
CLASS_METRICS = [
    {"name": "per_domain", "metric": "accuracy", "domains": 2},
    "accuracy",
    {"name": "top_k", "k": 2},
    {"name": "top_k", "k": 3, "as": "top-3"},
    "confusion",
    {"name": "per_domain", "metric": {"name": "top_k", "k": 2}, "domains": 2, "as": "top_k by domain"},
    f"test_measure:{LONG}",
]
TOKEN_METRICS = [
    {"name": "token_accuracy", "outside": list(OUTSIDE)},
    "token_loss",
    {"name": "per_domain", "metric": {"name": "token_accuracy", "outside": list(OUTSIDE)}, "domains": 2},
]


def class_dataset():
    """Clients of unequal size, one without examples, and a central test split of three blocks."""
    columns = [examples("classes", n, seed) for seed, n in enumerate((9, 0, 5, 12, 7), start=1) if n] + [
        examples("classes", 2 * BLOCK + 10)
    ]
    arrays = [{name: column.numpy() for name, column in one.items()} for one in columns]
    arrays = [{"x": one["scores"] * [3, 1, 1, 1, 1, 1], **one} for one in arrays]
    arrays = [{"x": one["x"].astype(np.float32), "y": one["y"], "domain_id": one["domain_id"]} for one in arrays]
    empty = {name: array[:0] for name, array in arrays[0].items()}
    features = {
        "x": Feature("float32", (CLASSES,)),
        "y": Feature("int64", (), classes=CLASSES),
        "domain_id": Feature("int64", (), classes=2),
    }
    return MemoryDataset([arrays[0], empty, *arrays[1:-1]], arrays[-1], features)


def token_dataset():
    """As above; the first client's targets are all outside the vocabulary, and there is no test split."""
    clients = [examples("tokens", n, seed) for seed, n in enumerate((4, 9, 6, 30), start=1)]
    clients[0]["y"] = clients[0]["y"].clamp(max=2)
    arrays = [{"x": one["y"].roll(1, 1).numpy(), "y": one["y"].numpy(), **one} for one in clients]
    arrays = [{name: np.asarray(one[name]) for name in ("x", "y", "domain_id")} for one in arrays]
    features = {name: Feature("int64", (LENGTH,), classes=IDS) for name in ("x", "y")}
    return MemoryDataset(arrays, features=features | {"domain_id": Feature("int64", (), classes=2)})


def char_net(features):
    return nn.Sequential(nn.Embedding(IDS, 5), nn.Linear(5, IDS))


JOBS = {
    "classes": ("class_dataset", "logistic", CLASS_METRICS),
    "tokens": ("token_dataset", "test_measure:char_net", TOKEN_METRICS),
}


def job(kind, out, **changes):
    dataset, model, metrics = JOBS[kind]
    return {
        "rounds": 2,
        "data": {"path": f"test_measure:{dataset}"},
        "model": {"name": model},
        "algorithm": {"name": "fedavg", "batches": {"size": 4}},
        "run": {"metrics": metrics, "out": str(out)},
    } | changes


def scores_of(out):
    return [json.loads(line)["scores"] for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.mpi(ranks=3, timeout=90)
def test_scores_are_the_same_on_one_rank_and_on_three(tmp_path):
    for kind in JOBS:
        summary = mpifl.run(job(kind, tmp_path / kind))
        if summary is None:
            continue  # a host: rank 0 compares
        assert summary["ranks"] == 3
        mpifl.run(job(kind, tmp_path / f"{kind} alone"), comm=Alone())
        world, alone = scores_of(tmp_path / kind), scores_of(tmp_path / f"{kind} alone")
        assert world == alone and len(world) == 2 and world[0] != world[1]


@dataclass
class Done:
    out: Path
    summary: dict
    scores: dict
    log: str


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Both jobs, run."""
    finished = {}
    for kind in JOBS:
        out = tmp_path_factory.mktemp("measure") / kind
        summary = mpifl.run(job(kind, out, baselines=True, baseline_epochs=1))
        finished[kind] = Done(out, summary, scores_of(out)[-1], (out / "log.txt").read_text())
    return finished


def test_scores_of_a_job_hang_together_and_long_names_survive(done):
    scores = done["classes"].scores
    confusion, domains = np.asarray(scores["confusion"]), class_dataset().rows("test", 0, 2000)["domain_id"]
    assert confusion.sum() == len(domains) == 2 * BLOCK + 10
    assert confusion.trace() / confusion.sum() == scores["accuracy"] < scores["top_k"] < scores["top-3"] < 1
    sizes = np.bincount(domains)
    assert scores["per_domain"] @ sizes == pytest.approx(scores["accuracy"] * sizes.sum())
    assert scores["top_k by domain"] @ sizes == pytest.approx(scores["top_k"] * sizes.sum())
    assert len(scores[LONG]) == 2 and min(scores[LONG]) > 0
    tokens = done["tokens"].scores
    assert 0 < min(tokens["per_domain"]) < tokens["token_accuracy"] < max(tokens["per_domain"]) < 1


def test_files_hold_everything_and_people_are_told_what_fits(done):
    summary, log = done["classes"].summary, done["classes"].log
    assert json.loads((done["classes"].out / "summary.json").read_text())["scores"] == done["classes"].scores
    assert summary["metrics"] == ["per_domain", "accuracy", "top_k", "top-3", "confusion", "top_k by domain", LONG]
    line = next(line for line in log.splitlines() if line.startswith("round 2/2"))
    assert "accuracy 0." in line and not any(name in line for name in ("per_domain", "confusion", LONG))
    first, second = summary["scores"]["per_domain"]
    assert f"{first:.4f}, {second:.4f}\n" in log and "6 x 6 numbers in summary.json\n" in log
    assert "accuracy, centralized" in log  # the first metric that is one number
    assert 0 < summary["baselines"]["mean client alone"] < 1


def test_vectors_are_printed_while_they_are_short():
    rows = score_rows({"short": [0.25] * 10, "long": [0.5] * 11, "number": 0.125, "grid": [[1.0, 2.0]]}, "a file")
    assert rows == [
        ("short", ", ".join(["0.2500"] * 10)),
        ("long", "11 numbers in a file"),
        ("number", "0.1250"),
        ("grid", "1 x 2 numbers in a file"),
    ]


def test_job_file_of_a_run_gives_the_same_job(done):
    again = load(done["classes"].out / "config.toml")
    assert again.run.metrics == tuple(CLASS_METRICS)


def test_evaluation_prints_distributions_of_numbers_over_clients_that_have_them(done, capsys):
    assert evaluate.main([str(done["tokens"].out), "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)["model"]
    assert scored["per_domain"] == done["tokens"].scores["per_domain"]
    assert "per_domain, mean of clients" not in scored
    session = Session.open(load(done["tokens"].out / "config.toml"), Alone(), Clock())
    fleet = Fleet(Alone(), session.host, say=lambda text: None)
    clients = score_clients(fleet, session.scorer, session.theta)
    assert set(clients) == {"examples", "loss", "token_accuracy", "token_loss"}
    assert np.isnan(clients["token_accuracy"]).tolist() == [True, False, False, False]
    assert 0 < scored["token_accuracy, mean of clients"] < 1
    assert evaluate.main([str(done["classes"].out)]) == 0
    printed = capsys.readouterr().out
    assert "6 x 6 numbers in the output of --json" in printed and "top-3, lowest decile of clients" in printed


def test_rows_of_clients_keep_the_shape_of_a_stat():
    session = Session.open(load(job("classes", "unused")), Alone(), Clock())
    dataset, model, metrics = session.parts.dataset, session.parts.model, session.parts.metrics
    session.host.works = (work := scoring(model, metrics, "train", "client"),)
    fleet = Fleet(Alone(), session.host, say=lambda text: None)
    ids, stats = fleet.rows(work, np.asarray([4, 3, 1, 0]), {"theta": session.theta})
    assert ids.tolist() == [0, 3, 4]  # client 1 has no examples
    assert stats["confusion"].shape == (3, CLASSES, CLASSES) and stats["accuracy"].shape == stats["weight"].shape == (
        3,
    )
    for id, counts in zip(ids, stats["confusion"]):
        labels = dataset.client("train", int(id))["y"]
        np.testing.assert_array_equal(counts.sum(axis=1), np.bincount(labels, minlength=CLASSES))


def test_rows_scored_at_a_time_change_no_score(tmp_path):
    few, many = (
        mpifl.run(job("classes", tmp_path / str(size), rounds=1), [f"run.eval_batch={size}"]) for size in (100, 512)
    )
    assert few["digest"] == many["digest"]
    for name, value in many["scores"].items():
        assert few["scores"][name] == pytest.approx(np.asarray(value), rel=1e-6), name
    table = load(job("classes", "unused", baselines=True), ["run.eval_batch=100", "run.eval_rows=201"])
    session = Session.open(table, Alone(), Clock())
    works = (*session.scorer.works, session.baselines.score)
    assert [work.batches.size for work in works] == [3, *[100] * (len(works) - 1)] and len(session.scorer.blocks) == 67


def test_seeds_give_mean_and_deviation_of_vectors_too(tmp_path):
    summary = mpifl.run(job("classes", tmp_path / "out", rounds=1, seeds=2, cohort=2))
    vectors = [each["scores"]["per_domain"] for each in summary["seeds"]]
    spread = summary["scores"]["per_domain"]
    assert vectors[0] != vectors[1] and spread["mean"] == pytest.approx(np.mean(vectors, axis=0))
    assert spread["deviation"] == pytest.approx(np.std(vectors, axis=0, ddof=1))


@pytest.mark.parametrize(
    ("metrics", "line"),
    [
        ("[{k = 5}]", "run.metrics has {'k': 5}; write a name, or a table such as {name = \"accuracy\"}"),
        ('[{name = "top_k", K = 5}]', "there is no metric top_k option 'K' (allowed: k)"),
        ('[{name = "top_k", k = "5"}]', "metric top_k.k is '5'; it must be an integer"),
        ('[{name = "top_k", k = 0}]', "metric top_k: k is 0; it must be from 1 to the 3 classes scored"),
        ('[{name = "top_k", k = 4}]', "metric top_k: k is 4; it must be from 1 to the 3 classes scored"),
        ('[{name = "top_k", k = 2}, "top_k"]', "run.metrics has a second 'top_k' ("),
        ('[{name = "top_k", as = "test_loss"}]', "run.metrics has a second 'test_loss' ("),
        ('[{name = "top_k", as = "a.b"}]', "run.metrics has as = 'a.b'; write a name without . and /"),
        ('[{name = "top_k", as = "a/b"}]', "run.metrics has as = 'a/b'; write a name without . and /"),
        ('["per_domain"]', "metric per_domain needs metric, domains (options: metric, domains)"),
        (
            '[{name = "per_domain", metric = "acuracy", domains = 2}]',
            "there is no metric (or package.module:function) 'acuracy'; did you mean 'accuracy'?",
        ),
        (
            '[{name = "per_domain", metric = "accuracy", domains = 0}]',
            "metric per_domain: domains is 0; it must be from 1 to 100",
        ),
        (
            '[{name = "per_domain", metric = "accuracy", domains = 2}]',
            "metric per_domain needs a column 'domain_id'; the dataset has x, y",
        ),
        (
            '["token_accuracy"]',
            "metric token_accuracy takes scores (B, L, ids) and y (B, L), here a batch has scores (",
        ),
    ],
)
def test_metrics_that_cannot_be_collected_are_refused_in_one_line(metrics, line):
    without_domains = job("classes", "unused", data={"path": "parts:awkward_dataset"})
    with pytest.raises(UserError) as raised:
        build(load(without_domains, [f"run.metrics={metrics}"]))
    assert str(raised.value).startswith(line) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["accuracy", "top_k", "confusion"])
def test_metrics_of_single_labels_refuse_sequences(name):
    with pytest.raises(UserError, match=r"y \(2, 7\); for sequences there is token_accuracy"):
        build(load(job("tokens", "unused") | {"run": {"metrics": [name]}}))


def test_a_domain_beyond_those_asked_for_is_not_left_out_in_silence():
    columns = examples("classes", 9)
    assert columns["domain_id"].max() == 1
    line = "per_domain: domains is 1, and there is a domain_id 1; it must be more"
    with pytest.raises(UserError, match=line):
        per_domain(columns["scores"], columns, accuracy, domains=1)
    with pytest.raises(UserError, match=line):
        build(load(job("classes", "unused"), ['run.metrics=[{name="per_domain", metric="accuracy", domains=1}]']))


def test_ids_that_are_not_scored_and_too_many_classes_are_refused():
    columns = examples("tokens", 2)
    for outside in ((0, 12), (0, -1), tuple(range(12))):
        with pytest.raises(
            UserError, match=r"outside is \[0, .*\]; it must hold some of the ids scored, 0 to 11, and not"
        ):
            token_accuracy(columns["scores"], columns, outside=outside)
    with pytest.raises(UserError, match="confusion: 1001 classes are scored; it is for 1000 at most"):
        confusion(torch.zeros(2, 1001), {"y": torch.zeros(2, dtype=torch.int64)})


def unmasked(scores, batch):
    return Ratio(torch.ones(()), torch.ones(()))


def unlike(scores, batch):
    return Ratio(torch.zeros(2), torch.zeros(3))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("unmasked", 'gives sums over rows that batch["mask"] leaves out; use mpifl.measure.example_sums'),
        ("unlike", "gives a Ratio of (2,) to (3,); values and weights must have one shape"),
    ],
)
def test_sums_of_the_users_own_are_tried_before_training(name, line):
    with pytest.raises(UserError) as raised:
        build(load(job("classes", "unused") | {"run": {"metrics": [f"test_measure:{name}"]}}))
    assert str(raised.value) == f"metric {name} {line}"
