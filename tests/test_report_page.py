"""The page about runs: numbers are those of the run folder, axes tell the truth, and it needs nothing else."""

import csv
import html
import io
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

import mpifl
from mpifl import report
from mpifl.reporting import runs as runs_module
from mpifl.reporting.figures import MOST_TICKS, POINTS, byte_unit, rows, thinned, tick_label, ticks, time_unit
from mpifl.reporting.files import COLOURS, curves_csv
from mpifl.reporting.markup import duration, number
from mpifl.reporting.page import page as made_page
from mpifl.reporting.runs import differing, grouped, read_runs

ROOT = Path(__file__).parents[1]
CSS = (Path(runs_module.__file__).parent / "page.css").read_text()
KIB = 1024


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The folder of a run of the digits job, scored every second round and profiled."""
    out = tmp_path_factory.mktemp("report") / "out"
    words = ["rounds=5", "cohort=10", "baselines=false", "run.eval_every=2", "run.profile=true", f"run.out={out}"]
    mpifl.run(Path(mpifl.__file__).parent / "digits.toml", words)
    return out


@pytest.fixture
def folder(tmp_path):
    """Write a run folder by hand: folder(name, records, seed=0, lr=0.1, summary=None) -> its path."""

    def folder(name, records, seed=0, lr=0.1, summary=None, job_name="hand", rounds=100):
        path = tmp_path / name
        path.mkdir(parents=True)
        head = f'rounds = {rounds}\nseed = {seed}\nname = "{job_name}"\n'
        (path / "config.toml").write_text(f'{head}[algorithm]\nlr = {lr}\n[run]\nout = "{path}"\n')
        (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        if summary is not None:
            (path / "summary.json").write_text(json.dumps(summary))
        return path

    return folder


def record(round, loss=1.0, seconds=1.0, down=KIB, scores=None, **more):
    about = {"round": round, "loss": loss, "imbalance": 1.25, "bytes_down": down, "bytes_up": down}
    about |= {"seconds": {"wait": 0.75 * seconds, "total": seconds}, "host_seconds": {"train": 0.5 * seconds}}
    return about | ({"scores": scores} if scores else {}) | more


def page_of(*folders):
    """The page about these folders, as text."""
    runs = read_runs(folders)
    return made_page(runs, grouped(runs))


def charts(page):
    """(parsed svg, what its read-out knows) of every chart of lines."""
    parsed = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.S)]
    return [(svg, json.loads(svg.attrib["data-chart"])) for svg in parsed if "data-chart" in svg.attrib]


def text_of(page):
    """What is written on a page, without its tags, scripts and styles."""
    return html.unescape(re.sub(r"<[^>]+>", " ", re.sub(r"<(script|style)>.*?</\1>", "", page, flags=re.S)))


# ---- a real run, from the command line


def test_the_command_writes_page_numbers_and_picture_of_a_run(real, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert report.main([str(real), "--out", str(out)]) == 0
    assert capsys.readouterr().out.split() == ["page", str(out), "numbers", *_beside(out, "csv", "picture", "png")]
    assert out.with_suffix(".png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    summary, page = json.loads((real / "summary.json").read_text()), out.read_text(encoding="utf-8")
    text = text_of(page)
    for shown in (summary["digest"], summary["dataset"], summary["hardware"], summary["versions"]["torch"]):
        assert shown in text
    assert f"{summary['accuracy']:.4f} accuracy" in re.sub(r"\s+", " ", text)
    assert (real / "config.toml").read_text() in text and "rank 0" in text and "finished" in text


def _beside(out, *words):
    return [str(out.with_suffix(f".{word}")) if word in ("csv", "png") else word for word in words]


def test_the_page_loads_nothing_and_its_svg_is_well_formed(real):
    page = page_of(real)
    assert not re.findall(r"(?:src|href|srcset|data)\s*=|url\(|@import|https?:|fetch\(|import\(", page)
    assert len(charts(page)) >= 2 * 3 - 2  # accuracy, losses; one process moves no bytes


def test_curves_are_what_metrics_has(real):
    records = [json.loads(line) for line in (real / "metrics.jsonl").read_text().splitlines()]
    page = page_of(real)
    found = {tuple(about["axes"]): about["lines"] for _, about in charts(page)}
    scored = [one for one in records if "scores" in one]
    [[_, _, x, y]] = found["round", "accuracy"]
    assert x == [one["round"] for one in scored] == [2, 4, 5]
    assert y == pytest.approx([one["scores"]["accuracy"] for one in scored], rel=1e-4)
    [[_, _, x, y]] = found["time in rounds (seconds)", "training loss"]
    assert x == pytest.approx(np.cumsum([one["seconds"]["total"] for one in records]), rel=1e-6)
    assert y == pytest.approx([one["loss"] for one in records], rel=1e-4)


def test_csv_has_every_number_of_metrics(real):
    lines = list(csv.DictReader(io.StringIO(curves_csv(read_runs([real])))))
    records = [json.loads(line) for line in (real / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == len(records)
    spent = 0.0
    for line, one in zip(lines, records):
        spent += one["seconds"]["total"]
        assert float(line["seconds so far"]) == pytest.approx(spent)
        assert float(line["loss"]) == one["loss"] and int(line["round"]) == one["round"]
        assert float(line["seconds/train"]) == one["seconds"]["train"]
        assert line["scores/accuracy"] == (str(one["scores"]["accuracy"]) if "scores" in one else "")


# ---- what is drawn


def test_axes_tell_the_truth(folder):
    """A tick stands where its number would be drawn as a value; on every axis, linear or logarithmic."""
    loss, imbalance = [2.5, 1700.0, 0.4, 0.04, 0.3], [1.5, 1.1, 1.9, 1.2, 1.3]
    records = [record(t + 31, loss[t], 37.0 * (t + 1), 3000 * KIB, {"accuracy": 0.1 + 0.2 * t}) for t in range(5)]
    records = [one | {"imbalance": more} for one, more in zip(records, imbalance)]
    page = page_of(folder("a", records))
    kinds = set()
    for svg, about in charts(page):
        [[_, _, xs, ys]] = about["lines"]
        line = next(part.attrib["d"] for part in svg.iter() if part.attrib.get("class", "").startswith("line"))
        points = np.array([pair.split() for pair in line[1:].split("L")], float)
        ticks_of = {"middle": [], "end": []}
        for part in svg.iter():
            if part.attrib.get("class") == "tick":
                place = float(part.attrib["x"]), float(part.attrib["y"]) - 3.5
                ticks_of[part.attrib["text-anchor"]].append((float(part.text.replace(",", "")), *place))
        across, up = np.array(ticks_of["middle"]), np.array(ticks_of["end"])
        assert len(across) >= 2 and len(up) >= 2
        scale = np.log10 if about["axes"][1] == "training loss" else np.asarray
        assert fitted(across[:-1, 0], xs, points[:, 0]) == pytest.approx(across[:-1, 1], abs=0.3)
        assert fitted(scale(up[:, 0]), scale(ys), points[:, 1]) == pytest.approx(up[:, 2], abs=0.3)
        kinds.add(about["axes"][0])
        first, last, left, right, top, bottom = about["frame"]  # where the read-out takes the axes to be
        width, height = map(float, svg.attrib["viewBox"].split()[2:])
        shares = (np.array(xs) - first) / (last - first)
        assert points[:, 0] == pytest.approx(left + shares * (width - left - right), abs=0.1)
        assert points[:, 0].max() == pytest.approx(width - right, abs=0.1)
        assert points[:, 1].min() >= top and points[:, 1].max() <= height - bottom
    assert kinds == {"round", "time in rounds (minutes)", "moved, down and up (MiB)"}


def fitted(values, x, y):
    slope, offset = np.polyfit(x, y, 1)
    return slope * np.asarray(values) + offset


def test_seconds_and_bytes_add_up_over_rounds(folder):
    path = folder("a", [record(1, 3.0, 2.0, KIB), record(2, 2.0, 4.0, 3 * KIB)])
    [row] = rows(grouped(read_runs([path])))
    by_axis = {chart.x_label: chart.lines[0].x.tolist() for chart in row.charts}
    assert by_axis == {"round": [1, 2], "time in rounds (seconds)": [2, 6], "moved, down and up (KiB)": [2, 8]}


def test_rounds_without_a_number_are_left_out(folder):
    losses = [1.0, None, math.nan, math.inf, 0.5]
    path = folder("a", [record(t + 1, loss) for t, loss in enumerate(losses)])
    [row] = rows(grouped(read_runs([path])))
    assert row.charts[0].lines[0].x.tolist() == [1, 5] and row.charts[0].lines[0].y.tolist() == [1.0, 0.5]


@pytest.mark.parametrize("count", [1, 2, 3, POINTS, POINTS + 1, 1003, 99_999])
def test_thinning_keeps_ends_and_extremes(count):
    values = np.random.default_rng(count).normal(size=count).cumsum()
    kept = thinned(values)
    assert len(kept) == count if count <= POINTS else len(kept) <= POINTS
    assert (np.diff(kept) > 0).all() and {0, count - 1} <= set(kept.tolist())
    assert (values[kept].min(), values[kept].max()) == (values.min(), values.max())
    assert np.diff(kept).max(initial=1) <= max(1, 5 * count / POINTS)  # and nothing goes by unseen for long


def test_a_long_run_gives_a_page_of_the_same_size(folder):
    sizes = []
    for name, rounds in (("short", 1000), ("long", 10_000)):
        noise = np.random.default_rng(0).random(rounds).tolist()
        records = [record(t + 1, noise[t], noise[-t], scores={"accuracy": noise[t]}) for t in range(rounds)]
        sizes.append(len(page_of(folder(name, records))))
    assert sizes[1] < 1.1 * sizes[0] < 300_000


@pytest.mark.parametrize("span", [(0, 1), (0.12, 0.97), (-3, 5), (0, 120), (1e-7, 3e-7), (0, 99_999), (5e5, 9e8)])
def test_ticks_are_round_even_and_told_apart(span):
    found = ticks(*span)
    assert 2 <= len(found) <= MOST_TICKS + 1
    assert span[0] - 1e-9 * abs(span[0]) <= found[0] and found[-1] <= span[1] * (1 + 1e-9)
    steps = np.diff(found)
    assert steps == pytest.approx(steps[0]) and float(f"{steps[0]:.0e}") == pytest.approx(steps[0])
    labels = [tick_label(value, steps[0]) for value in found]
    assert len(set(labels)) == len(labels)
    assert [float(label.replace(",", "")) for label in labels] == pytest.approx(found, rel=0.06, abs=1e-9 * steps[0])


def test_units_fit_what_is_shown():
    assert [time_unit(s)[0] for s in (0, 100, 200, 5000, 10_000, 200_000)] == [
        *("seconds", "seconds", "minutes", "minutes", "hours", "days")
    ]
    assert [time_unit(s)[1] for s in (10, 1000, 10_000, 200_000)] == [1, 60, 60 * 60, 24 * 60 * 60]
    assert [byte_unit(KIB**power) for power in range(5)] == [
        (name, KIB**power) for power, name in enumerate(("bytes", "KiB", "MiB", "GiB", "TiB"))
    ]
    assert [duration(s) for s in (0.0123, 3.456, 75, 150, 8000, 400_000)] == [
        *("12.3 ms", "3.46 s", "75.0 s", "2 min", "2 h 13 min", "4 d 15 h")
    ]
    assert [number(v) for v in (0.96944, 12.3456, 1234.5, 2e-5, 3e7, 0.0, math.nan)] == [
        *("0.9694", "12.346", "1,234.5", "2e-05", "3e+07", "0.0000", "–")
    ]


def test_colours_are_told_apart_by_colour_blind_readers():
    """At least 10 apart in CIELAB, as seen with each kind of dichromacy (Machado et al. 2009, severity 1)."""
    light, dark, printed = [re.findall(r"--c\d: (#\w{6});", part) for part in re.split(r"@media", CSS)][:3]
    assert tuple(light) == COLOURS == tuple(printed) and len(dark) == len(light)
    for colours, card in ((light, "#ffffff"), (dark, "#181c23")):
        for seen in (np.eye(3), *DICHROMACY):
            labs = [lab(np.clip(seen @ linear(colour), 0, 1)) for colour in colours]
            apart = [np.linalg.norm(a - b) for i, a in enumerate(labs) for b in labs[:i]]
            assert min(apart) > 10
        grounds = (luminance(card), *map(luminance, colours))
        contrast = [(max(grounds[0], one) + 0.05) / (min(grounds[0], one) + 0.05) for one in grounds[1:]]
        assert min(contrast) > 2


DICHROMACY = np.array(
    [
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    ]
)


def linear(colour):
    """sRGB "#rrggbb" -> linear (3,)."""
    parts = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def luminance(colour):
    return float(linear(colour) @ [0.2126, 0.7152, 0.0722])


def lab(rgb):
    """Linear sRGB (3,) -> CIELAB (3,), white D65."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = (
        np.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116 for v in to_xyz @ rgb / np.array([0.95047, 1, 1.08883])
    )
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


# ---- several runs


def test_runs_that_differ_by_seed_are_one_line_with_its_band(folder):
    folders = [
        folder("a", [record(t, 1.0 * t, 1.0) for t in (1, 2, 3)], seed=1),
        folder("b", [record(t, 3.0 * t, 3.0) for t in (1, 2)], seed=2),
        folder("other", [record(1, 9.0)], seed=1, lr=0.2),
    ]
    groups = grouped(read_runs(folders))
    assert [[run.name for run in group.runs] for group in groups] == [["a", "b"], ["other"]]
    [row] = rows(groups)
    mean, other = row.lines
    assert mean.label == "a, b (2 seeds)" and other.label == "other" and mean.tone != other.tone
    assert mean.x.tolist() == [1, 2]  # the rounds that both have
    assert (mean.y.tolist(), mean.low.tolist(), mean.high.tolist()) == ([2, 4], [1, 2], [3, 6])
    assert row.charts[1].lines[0].x.tolist() == [2, 4] and other.low is None


def test_a_run_repeated_with_the_same_seed_is_no_second_seed(folder):
    groups = grouped(read_runs([folder(name, [record(1)], seed=3) for name in "ab"]))
    assert [group.name for group in groups] == ["a", "b"]


def test_a_folder_of_seeds_stands_for_its_runs_in_order(folder, tmp_path):
    for seed in (10, 9):
        folder(f"many/seed-{seed}", [record(1)], seed=seed)
    found = read_runs([tmp_path / "many", tmp_path / "many" / "seed-9"])
    assert [run.name for run in found] == ["seed-9", "seed-10"]
    assert [group.name for group in grouped(found)] == ["many (2 seeds)"]


def test_names_are_as_long_as_it_takes_to_tell_runs_apart(folder):
    found = read_runs([folder(f"{above}/run", [record(1)]) for above in ("x", "y")])
    assert [run.name for run in found] == ["x/run", "y/run"]


def test_a_comparison_names_scores_their_spread_and_what_differs(folder):
    scores = {1: 0.8, 2: 0.9}
    folders = [folder(f"s{s}", [record(1, scores={"accuracy": scores[s]})], seed=s) for s in scores]
    folders.append(folder("fast", [record(1, scores={"accuracy": 0.5})], lr=0.7))
    text = re.sub(r"\s+", " ", text_of(page_of(*folders)))
    assert "s1, s2 (2 seeds) 0.8500 ± 0.0707" in text  # |0.8 - 0.9| / sqrt(2)
    assert re.search(r"algorithm\.lr 0\.1 0\.7", text) and re.search(r"seed 1, 2 0", text)
    assert "name hand" not in text and "run.out" not in text.split("Curves")[0]
    assert differing(read_runs(folders)) == ["seed", "algorithm.lr"]


def test_scores_of_several_models_share_a_chart(folder):
    each = {"accuracy": 0.7, "accuracy/cluster0": 0.6, "accuracy/cluster1": 0.8, "test_loss": 1.0}
    drawn = rows(grouped(read_runs([folder("a", [record(1, scores=each)])])))
    found = {row.title: [line.label for line in row.lines] for row in drawn}
    assert list(found) == ["accuracy", "test_loss", "accuracy of each model", "training loss"]
    assert found["accuracy of each model"] == ["cluster0", "cluster1"]


# ---- clients and ranks


def test_clients_by_what_the_model_gives_them(folder):
    path = folder("a", [record(1)], summary={"ranks": 3})
    accuracies = [step / 100 for step in range(101)] + [None, math.nan]
    columns = {"examples": [5.0] * 103, "accuracy": accuracies}
    (path / "evaluation.json").write_text(json.dumps({"model": {"split": "test", "clients": columns}}))
    page = page_of(path)
    counts = [int(count) for count in re.findall(r"<title>([\d,]+) from", page)]
    assert sum(counts) == 101 and len(counts) == 20
    cells = " ".join(["0.0000 0.0500 0.1000 0.2500 0.5000 0.7500 0.9000 0.9500 1.0000", "0.5000", "101"])
    assert cells in re.sub(r"\s+", " ", text_of(page))
    assert "mpifl.evaluate" not in page


def test_what_is_not_recorded_comes_with_what_records_it(folder):
    path = folder("a run", [record(1)], summary={"ranks": 3})
    text = text_of(page_of(path))
    assert f"python -m mpifl.evaluate '{path}'" in text and "run.profile=true" in text


def test_ranks_are_shown_where_the_run_was_profiled(folder):
    path = folder("a", [record(1)])
    (path / "profile").mkdir()
    (path / "profile" / "phases.txt").write_text(
        "    rank    wait   train    rest   total   steps  ms/step\n"
        "       0    4.00    0.00    1.00    5.00\n"
        "       2    1.00    3.50    0.50    5.00     700    5.000\n"
        "       1    1.00    2.50    0.50    4.00     500    5.000\n"
        "slowest host: rank 2, busy 3.50 s, 17 % over the mean\n"
    )
    [run] = read_runs([path])
    assert list(run.rank_seconds) == ["rank 0", "rank 2", "rank 1"]
    assert run.rank_seconds["rank 2"] == {"wait": 1.0, "train": 3.5, "rest": 0.5}
    page = page_of(path)
    widths = re.findall(r'style="width:([\d.]+)%" title="train: (\S+) s', page.split("Seconds of each rank")[1])
    assert [(float(width), float(s)) for width, s in widths] == [(70.0, 3.5), (50.0, 2.5)]


# ---- runs that are not what one would wish


def test_a_killed_run_is_shown_as_far_as_it_went(folder):
    path = folder("a", [record(1, 2.0), record(2, 1.5), record(3, 1.0)], rounds=50)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 4, "loss": 0.5, "cli')
    (path / "failure-20260101-000000.txt").write_text("mpifl: rank 2 <died> in phase train\n")
    (path / "checkpoints" / "round-00000002").mkdir(parents=True)
    (path / "checkpoints" / "round-00000002" / "COMPLETE").touch()
    (path / "checkpoints" / "round-00000003").mkdir()
    [run] = read_runs([path])
    assert (run.done, run.finished, run.unread) == (3, False, 1)
    text = text_of(page_of(path))
    for said in ("unfinished: 3 of 50 rounds", "rank 2 <died> in phase train", "round-00000002"):
        assert said in text
    assert "round-00000003" not in text


@pytest.mark.parametrize("metrics", [None, "", "half a li"])
def test_a_run_without_rounds_has_a_page_and_no_charts(metrics, folder, tmp_path, capsys):
    path = folder("a", [])
    (path / "metrics.jsonl").unlink() if metrics is None else (path / "metrics.jsonl").write_text(metrics)
    assert report.main([str(path), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert not charts(page) and "No round is finished yet" in page and "nan" not in text_of(page)
    assert not (tmp_path / "page.png").exists() and "picture   none" in capsys.readouterr().out


def test_of_a_round_that_was_done_twice_the_later_counts(folder):
    path = folder("a", [record(1, 3.0), record(2, 2.0), record(3, 9.0), record(2, 2.0), record(3, 1.0, extra=5)])
    [run] = read_runs([path])
    assert run.columns["round"].tolist() == [1, 2, 3] and run.column("loss").tolist() == [3.0, 2.0, 1.0]
    assert run.summed("seconds/total").tolist() == [1, 2, 3]
    assert np.isnan(run.column("extra")[:2]).all() and run.column("extra")[2] == 5


def test_what_stands_in_a_run_is_text_and_no_markup(folder):
    evil = "<script>alert(1)</script>"
    records = [record(1, scores={f"accuracy{evil}": 0.5, f"x/{evil}": 1.0})]
    page = page_of(*(folder(name, records, job_name=evil) for name in ("a<b>", "b<b>")))
    assert evil in text_of(page) and evil not in page and not re.search(r"[ab]<b>", page)
    assert page.count("<script>") == 1 and charts(page)


@pytest.mark.parametrize(
    ("prepare", "why"),
    [
        (lambda path: None, "is no folder"),
        (lambda path: path.mkdir(), "has neither config.toml nor seed-"),
        (lambda path: path.write_text("x"), "is no folder"),
        (lambda path: (path.mkdir(), (path / "config.toml").write_text("a = [")), "is not valid TOML"),
        (lambda path: _with_summary(path, "{"), "summary.json is not valid JSON"),
        (lambda path: _with_summary(path, "[]"), "summary.json holds no table"),
    ],
)
def test_what_is_no_run_is_refused_in_a_line(prepare, why, tmp_path, capsys):
    prepare(tmp_path / "run")
    out = tmp_path / "page.html"
    assert report.main([str(tmp_path / "run"), "--out", str(out)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert why in line and str(tmp_path / "run") in line and not list(tmp_path.glob("page*"))


def _with_summary(path, text):
    path.mkdir()
    (path / "config.toml").write_text("rounds = 1\n")
    (path / "summary.json").write_text(text)


def test_without_a_run_the_command_says_what_it_wants(capsys):
    assert report.main([]) == 2
    assert "which runs?" in capsys.readouterr().err


# ---- its own files, and nobody else's


def test_only_a_reports_files_are_replaced(real, tmp_path, capsys):
    out, words = tmp_path / "page.html", "run,seed and other words of mine"
    for _ in range(2):  # its own it replaces
        assert report.main([str(real), "--out", str(out)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"page.html", "page.csv", "page.png"}
    for mine in list(tmp_path.iterdir()):
        made = mine.read_bytes()
        mine.write_text(words)
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        assert report.main([str(real), "--out", str(out)]) == 2
        assert f"{mine} already exists" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
        mine.write_bytes(made)


@pytest.mark.parametrize(("out", "why"), [("page.png", "must end in .html"), ("no/page.html", "cannot be written")])
def test_a_page_that_cannot_be_is_refused(out, why, real, tmp_path, capsys):
    assert report.main([str(real), "--out", str(tmp_path / out)]) == 2
    assert why in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_neither_torch_nor_matplotlib_is_needed(real, tmp_path):
    code = """
import sys
sys.modules["matplotlib"] = None
from mpifl.report import main
status = main(sys.argv[1:])
print(status, *{"torch", "h5py", "mpi4py"} & set(sys.modules))
"""
    command = [sys.executable, "-c", code, str(real), "--out", "page.html"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, env=_environment())
    lines = done.stdout.splitlines()
    assert lines[-1] == "0", done.stdout + done.stderr
    assert lines[2] == "picture   none: pictures need a package: pip install matplotlib"
    assert {path.name for path in tmp_path.iterdir()} == {"page.html", "page.csv"}


def _environment():
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PMI", "OMPI", "MPI", "HYDRA"))}
    return own | {"PYTHONPATH": str(ROOT)}
