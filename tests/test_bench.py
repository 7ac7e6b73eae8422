"""Benchmarks: the contestants do the same work, and table and JSON have the same rows. Never how fast."""

import json

import pytest
import torch

from mpifl import bench
from mpifl.models.cnn import EmnistConv
from mpifl.models.linear import mlp

CASES = [f"{net}, {extras}" for net in ("dense", "conv") for extras in ("bare", "mask", "key", "mask + key")]


@pytest.fixture
def two_steps(monkeypatch):
    few = {name: (net, plain, 2) for name, (net, plain, _) in bench.STEP_NETS.items()}
    monkeypatch.setattr(bench, "STEP_NETS", few)


@pytest.mark.parametrize(
    ("net", "mask", "key"),
    [
        ("dense", False, False),
        ("dense", True, False),
        ("dense", True, True),  # no dropout in this one
        ("conv", False, False),
        ("conv", True, False),
    ],
)
def test_both_loops_train_the_same_model(net, mask, key):
    factory, plain, _ = bench.STEP_NETS[net]
    model, batches = bench.from_module(factory), bench.made_batches(3, mask, key)
    first = model.init(0)
    ours = first - bench.engine_loop(model, batches)().update["pseudo_grad"]
    hand = torch.cat([p.detach().reshape(-1) for p in bench.hand_loop(plain(), model, batches)()])
    assert (hand - first).abs().max() > 1e-4
    torch.testing.assert_close(ours, hand, rtol=1e-5, atol=1e-6)


def test_with_a_key_the_hand_written_conv_loop_drops_out_too():
    batches = bench.made_batches(1, False, True)
    net = bench.PlainConv()
    bench.hand_loop(net, bench.from_module(EmnistConv), batches)
    assert net.training and not torch.equal(net(batches[0]["x"]), net(batches[0]["x"]))


def test_masks_keep_every_row_and_keys_differ_from_step_to_step():
    batches = bench.made_batches(3, True, True)
    assert all(batch["mask"].all() for batch in batches)
    assert len({int(batch["key"]) for batch in batches}) == 3


def test_each_hand_run_starts_from_the_same_parameters():
    net = mlp(bench.EMNIST)
    loop = bench.hand_loop(net, bench.from_module(lambda: mlp(bench.EMNIST)), bench.made_batches(2, False, False))
    once = [p.detach().clone() for p in loop()]
    for first, again in zip(once, loop()):
        assert torch.equal(first, again.detach())


def test_contestants_take_turns_and_the_first_turn_does_not_count(monkeypatch):
    ran, now = [], [0.0]
    costs = {"a": [100.0, 1.0, 5.0, 3.0], "b": [100.0, 8.0, 2.0, 4.0]}
    monkeypatch.setattr(bench.time, "process_time", lambda: now[0])

    def contestant(name):
        ran.append(name)
        now[0] += costs[name].pop(0)

    assert bench.medians(3, lambda: contestant("a"), lambda: contestant("b")) == [3.0, 4.0]
    assert "".join(ran) == "abababab"


def test_step_prints_a_table_and_appends_the_same_cases_as_json_lines(two_steps, tmp_path, capsys):
    file = tmp_path / "cases.jsonl"
    file.write_text("earlier\n")
    assert bench.main(["step", "--repeats", "1", "--json", str(file)]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["step", "ms", "hand", "ms", "ours", "ratio"]
    assert [row[:20].strip() for row in rows] == CASES
    earlier, *lines = file.read_text().splitlines()
    assert earlier == "earlier"
    for row, case, line in zip(rows, CASES, map(json.loads, lines), strict=True):
        assert line["family"] == "step" and line["case"] == case
        assert line["ms_hand"] > 0 and line["ratio"] == pytest.approx(line["ms_ours"] / line["ms_hand"])
        assert row[20:].split() == [f"{line[name]:.3f}" for name in ("ms_hand", "ms_ours", "ratio")]
        assert line["versions"]["torch"] == torch.__version__ and line["hardware"]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_without_a_family_it_lists_them(arguments, capsys):
    assert bench.main(arguments) == 0
    out = capsys.readouterr().out
    for name, family in bench.FAMILIES.items():
        assert f"  {name} " in out and family.__doc__.splitlines()[0] in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["stepp"], "there is no benchmark 'stepp'; did you mean 'step'?"),
        (["step", "--repeats", "0"], "--repeats: '0' is not a whole number of at least 1"),
        (["step", "--repeats", "many"], "--repeats: 'many' is not a whole number of at least 1"),
        (["step", "--json", "missing/cases.jsonl"], "--json is 'missing/cases.jsonl', which cannot be written"),
        (["step", "--fast"], "unrecognized arguments: --fast"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_mistakes_are_refused_in_one_line_before_anything_is_measured(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bench.main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("mpifl: ") and err.count("\n") == 1 and words in err
    assert not list(tmp_path.iterdir())
