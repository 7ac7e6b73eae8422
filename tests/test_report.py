"""The report: figures that can be worked out by hand, and a picture that shows what is in the dataset."""

import sys

import numpy as np
import pytest

from data_prep import report as module
from data_prep.__main__ import main
from data_prep.report import COLOURS, _figure, _sample, _tally, effective_number, report
from mpifl.config import UserError
from mpifl.data.shard import Dataset, Feature, embedded
from mpifl.data.writer import ShardWriter


@pytest.fixture
def dataset(tmp_path):
    """Write and open a dataset of one column: lists of rows per client; `central` rows are split "test"."""
    opened = []

    def write(clients, feature, central=None, column="y", split="train"):
        with ShardWriter(tmp_path / f"d{len(opened)}", {column: feature}) as writer:
            arrays = [np.array(rows, feature.dtype).reshape(-1, *feature.shape) for rows in clients]
            if clients:
                writer.write(split, ((f"c{i}", {column: rows}) for i, rows in enumerate(arrays)))
            if central is not None:
                writer.central("test", {column: np.array(central, feature.dtype)})
        opened.append(Dataset(tmp_path / f"d{len(opened)}"))
        return opened[-1]

    yield write
    for found in opened:
        found.close()


def labels(classes, names=None):
    return Feature("uint8", (), classes=classes, names=names)


# ---- figures


@pytest.mark.parametrize(
    ("counts", "expected"),
    [([7, 0, 0], 1), ([5, 5], 2), ([2] * 62, 62), ([0, 0], 0), ([3, 1], 4 / 3**0.75), ([1, 1, 2], 2 * 2**0.5)],
)
def test_effective_number_of_classes(counts, expected):
    assert effective_number(np.array(counts)) == pytest.approx(expected)


def test_table_of_labels(dataset):
    made = dataset([[0, 1], [], [2, 2, 2, 2], [0, 1, 2, 0, 1, 2]], labels(3), central=[0, 1] * 600)
    assert report(made).splitlines() == [
        "split  clients  empty  examples  examples per client  effective classes per client  overall",
        "test   central            1,200                                                         2.0",
        "train        4      1        12            0 / 3 / 6               1.0 / 2.0 / 3.0      2.8",
        "per client: min / median / max",
        "effective classes: exp(entropy) of column y (3 classes), of clients with examples",
    ]  # fmt: skip


def test_table_of_tokens_counts_no_pads(dataset):
    sequences = Feature("int32", (4,), classes=2000, pad=7)
    made = dataset([[[1, 2, 7, 7], [3, 7, 7, 7]], [[7, 7, 7, 7]], [[0, 7, 1500, 0]] * 500], sequences)
    assert report(made).splitlines() == [
        "split  clients  empty  examples  examples per client  tokens per client  overall",
        "train        3      0       503          1 / 2 / 500      0 / 3 / 1,500    1,503",
        "per client: min / median / max",
    ]  # fmt: skip


@pytest.mark.parametrize("feature", [Feature("float32", ()), Feature("uint8", (2,), classes=9), Feature("uint8", ())])
def test_table_of_sizes_where_a_column_is_neither_labels_nor_tokens(dataset, feature):
    made = dataset([np.zeros((n, *feature.shape)) for n in (3, 2)], feature, central=np.zeros((7, *feature.shape)))
    assert report(made).splitlines() == [
        "split  clients  empty  examples  examples per client",
        "test   central                7",
        "train        2      0         5          2 / 2.5 / 3",
        "per client: min / median / max",
        "there is no column y of labels or token sequences, so these are sizes only",
    ]  # fmt: skip


def test_another_column_may_be_the_label(dataset):
    made = dataset([[0, 1], [1, 1]], labels(2), column="domain_id")
    assert "sizes only" in report(made)
    assert "1.0 / 1.5 / 2.0" in report(made, label="domain_id")


def test_of_many_clients_few_are_read_and_the_report_says_so(dataset, monkeypatch):
    read = []
    client = Dataset.client
    monkeypatch.setattr(Dataset, "client", lambda self, split, index: read.append(index) or client(self, split, index))
    made = dataset([[0] * (n % 3) for n in range(50)], labels(2))
    assert "was read" not in report(made)
    assert read == [n for n in range(50) if n % 3]
    read.clear()
    monkeypatch.setattr(module, "MOST_READ", 10)
    assert "train: column y was read of 10 of 50 clients, evenly spread (seed 0)" in report(made)
    assert read == [n for n in _sample(50, 10) if n % 3]
    assert "train       50     17        49" in report(made)  # sizes are of all


def test_of_large_clients_so_many_are_read_as_hold_a_gibibyte_or_can_be_shown(dataset, monkeypatch):
    made = dataset([[0, 1]] * 80, labels(2))
    for most_bytes, read in ((160, None), (120, 60), (1, 50)):  # of 2 bytes each
        monkeypatch.setattr(module, "MOST_BYTES", most_bytes)
        said = f"column y was read of {read} of 80 clients"
        assert said in report(made) if read else "was read" not in report(made)


@pytest.mark.parametrize("clients", [0, 1, 9, 10, 11, 999_983])
def test_a_sample_has_one_client_of_each_of_ten_equal_ranges(clients):
    found = _sample(clients, 10)
    assert len(found) == min(10, clients)
    for number, index in enumerate(found):
        assert clients * number <= index * len(found) + len(found) - 1
        assert index < clients * (number + 1) / len(found)
    assert (np.diff(found) > 0).all()
    np.testing.assert_array_equal(found, _sample(clients, 10))
    assert clients < 1000 or len(set(found - clients * np.arange(10) // 10)) > 5  # anywhere in its range


# ---- the picture


def figure(made, label="y", split="train"):
    return _figure(made, split, label, _tally(made, split, label))


def heights(axes):
    """Of the bars of each container: (classes, clients)."""
    return np.array([[bar.get_height() for bar in bars] for bars in axes.containers])


def test_bars_are_the_label_shares_of_clients_smallest_first(dataset):
    made = dataset([[2, 2, 2, 0], [], [1], [0, 1, 2]], labels(3, ("ant", "$bee_", "_cat and a long tail")))
    left, right = figure(made).axes
    np.testing.assert_allclose(heights(left), np.array([[0, 1, 0], [1, 1, 1], [0.25, 0, 0.75]]).T / [1, 3, 1])
    bottoms = np.array([[bar.get_y() for bar in bars] for bars in left.containers])
    np.testing.assert_allclose(bottoms, np.cumsum(heights(left), axis=0) - heights(left))
    assert [label.get_text() for label in left.get_xticklabels()] == ["1", "3", "4"]
    assert left.get_xlabel() == "examples of the client (3 of 4 clients, smallest first)"
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["_cat and a long ", "$bee_", "ant"]
    assert right.get_title() == "without 1 empty clients"


def test_a_picture_says_of_what_it_is_and_how_that_was_made(tmp_path):
    made = "1,000 clients, dirichlet (alpha 0.5), seed 0; " + "word " * 200
    for number, provenance in enumerate(({"made": made}, {})):
        with ShardWriter(tmp_path / f"pets{number}", {"y": labels(2)}, provenance) as writer:
            writer.write("held_out", [("c", {"y": np.zeros(1, "u1")})])
        pets = Dataset(tmp_path / f"pets{number}")
        title, *lines = figure(pets, split="held_out").get_suptitle().splitlines()
        assert title == f"pets{number}, split held_out"
        assert len(lines) == 3 * bool(provenance)
        assert not lines or lines[0].startswith("1,000 clients, dirichlet (alpha 0.5), seed 0; word")
        pets.close()


def test_clients_of_one_size_have_it_said_once(dataset):
    left, _ = figure(dataset([[0, 1], [], [1, 1]], labels(2))).axes
    assert left.get_xlabel() == "2 of 3 clients, each with 2 examples" and not len(left.get_xticks())


def test_fifty_clients_are_shown_evenly_over_the_sizes(dataset):
    made = dataset([[0] * n for n in np.random.RandomState(0).permutation(491)[:490] + 1], labels(2))
    left, _ = figure(made).axes
    assert heights(left).shape == (2, 50)
    assert left.get_xlabel() == "examples of the client (50 of 490 clients, smallest first)"
    shown = [int(label.get_text()) for label in left.get_xticklabels()]
    np.testing.assert_allclose(shown, np.linspace(1, 490, 6), atol=10)


def test_more_classes_than_colours_make_a_heat_map(dataset):
    classes = len(COLOURS) + 1
    made = dataset([[0, 0, 10, 5], [10]], labels(classes))
    left, _, bar = figure(made).axes
    expected = np.zeros((classes, 2))
    expected[10, 0], expected[[0, 10, 5], 1] = 1, [0.5, 0.25, 0.25]
    np.testing.assert_array_equal(left.get_images()[0].get_array(), expected)
    assert bar.get_ylabel() == "share of the client's examples"
    assert left.get_images()[0].norm(np.array([0, 0.01, 1])).tolist() == pytest.approx([0, 0.1, 1])  # of 1 %, a tenth
    assert len(heights(figure(dataset([[0], [1]], labels(len(COLOURS)))).axes[0])) == len(COLOURS)


def test_every_client_is_in_the_histogram_and_decades_make_its_axis_logarithmic(dataset):
    near, far = [[0] * n for n in (1, 2, 2, 99)], [[0] * n for n in (0, 1, 2, 3, 4, 63, 64, 100)]
    for clients, scale, counted in ((near, "linear", 4), (far, "log", 7)):
        axes = figure(dataset(clients, labels(2))).axes[1]
        assert axes.get_xscale() == scale
        assert heights(axes).sum() == counted
    starts = np.array([bar.get_x() for bar in axes.containers[0]])
    np.testing.assert_array_equal(starts, 2.0 ** np.arange(7))
    assert heights(axes)[0].tolist() == [1, 2, 1, 0, 0, 1, 2]


def test_equal_sizes_are_one_bar_in_the_middle(dataset):
    axes = figure(dataset([[0] * 5] * 3, labels(2))).axes[1]
    assert heights(axes).tolist() == [[3]]
    assert axes.get_xlim() == (3.5, 6.5)


def test_tokens_are_drawn_beside_sizes_and_sizes_alone_without_labels(dataset):
    made = dataset([[[1, 0]], [[2, 3]], [[1, 1], [1, 1]]], Feature("uint8", (2,), classes=9, pad=0))
    left, right = figure(made).axes
    assert heights(left)[0].tolist() == [1, 1, 0, 1]
    assert heights(right)[0].tolist() == [2, 1]
    assert left.get_xlabel() == "tokens per client (column y)"
    assert len(figure(made, label="z").axes) == 1


def test_png_shows_the_colours_of_the_labels_there_are(dataset, tmp_path):
    # Half of the examples have label 0, a quarter label 3 and 7: so have the coloured pixels, legend aside.
    image = pytest.importorskip("matplotlib.image")
    names = ("$\\frac$", "_", *"cdefghij")
    made = dataset([[0, 0, 3, 7], [0, 3], [0, 7]], labels(10, names), central=[1])
    assert "train" in report(made, tmp_path / "picture")
    pixels = np.round(image.imread(tmp_path / "picture", format="png")[..., :3] * 255)
    assert pixels.shape == (800, 2000, 3)
    shown = [(pixels == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=-1).sum() for colour in COLOURS]
    legend = np.median(shown)
    np.testing.assert_allclose(
        (np.array(shown) - legend)[[0, 3, 7]] / (sum(shown) - 10 * legend), [0.5, 0.25, 0.25], atol=0.01
    )
    assert np.ptp(np.delete(shown, [0, 3, 7])) < 0.2 * legend


def test_png_of_empty_clients_decades_of_sizes_and_many_long_names(dataset, tmp_path):
    clients = [[], [0], [0] * 300]
    report(dataset(clients, labels(200, tuple(f"a long name of a class {i}" for i in range(200)))), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# ---- the command


def test_command_reports_and_draws_the_digits(tmp_path, capsys):
    picture = tmp_path / "digits.png"
    assert main(["report", str(embedded("digits")), "--png", str(picture)]) == 0
    said = capsys.readouterr().out
    assert "train      100      0     1,437         14 / 14 / 15" in said and f"picture   {picture}\n" in said
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_picture_leaves_the_one_before(dataset, tmp_path, monkeypatch):
    def interrupted(figure, file, **_):
        (file.write if hasattr(file, "write") else file.write_bytes)(b"half")
        raise KeyboardInterrupt

    (tmp_path / "a.png").write_bytes(b"whole")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report(dataset([[0]], labels(2)), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == b"whole"


def test_command_takes_another_label(dataset, capsys):
    made = dataset([[0, 1], [1, 1]], labels(2), column="domain_id")
    assert main(["report", str(made.path), "--label", "domain_id"]) == 0
    assert capsys.readouterr().out == report(made, label="domain_id") + "\n"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--label", "z"], "there is no column 'z' (allowed: y)"),
        (["--png", "{tmp}/nowhere/a.png"], "nowhere/a.png cannot be written (No such file or directory); choose"),
    ],
)
def test_mistakes_are_one_line_and_status_2(dataset, tmp_path, capsys, arguments, problem):
    made = dataset([[0, 1]], labels(2))
    assert main(["report", str(made.path), *(word.format(tmp=tmp_path) for word in arguments)]) == 2
    printed = capsys.readouterr().err
    assert problem in printed and printed.count("\n") == 1


def test_without_examples_of_clients_there_is_nothing_to_draw(dataset, tmp_path):
    for made in (dataset([], labels(2), central=[0, 1]), dataset([[], []], labels(2))):
        assert "examples" in report(made)
        with pytest.raises(UserError, match=r"no split has clients with examples.*leave out --png"):
            report(made, tmp_path / "a.png")
        assert not (tmp_path / "a.png").exists()


def test_train_is_drawn_or_the_first_split_with_clients(dataset, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(module, "_draw", lambda dataset, split, *_: drawn.append(split))
    report(dataset([[0]], labels(2), central=[1], split="validation"), tmp_path / "a.png")
    with ShardWriter(tmp_path / "both", {"y": labels(2)}) as writer:
        for split in ("held_out", "train"):
            writer.write(split, [("c", {"y": np.zeros(1, "u1")})])
    both = Dataset(tmp_path / "both")
    report(both, tmp_path / "a.png")
    both.close()
    assert drawn == ["validation", "train"]


def test_without_matplotlib_there_is_the_table_and_what_to_install(dataset, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    made = dataset([[0]], labels(2))
    assert "train" in report(made)
    with pytest.raises(UserError, match=r'pip install -e "\.\[prep\]"'):
        report(made, tmp_path / "a.png")
