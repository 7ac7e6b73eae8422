"""The exact sum: the same bits in any order and grouping, as accurate as float64 at any scale, one repeat at most."""

import math

import numpy as np
import pytest
import torch
from quadratics import Simulation

from mpifl.config import UserError
from mpifl.data.memory import MemoryDataset
from mpifl.tree import leaves as tree_leaves
from mpifl.uplink.exact import Accumulator, Wire, decode, fits, next_limits, spacing
from mpifl.work import Algorithm, Batching, ClientWork, Upload

SHAPES = {"a": (5,), "b": (2, 3), "c": ()}  # and weight, loss, share: six leaves


LIMITS = np.full(6, 2.0**20)


def random_upload(rng, scale=1.0):
    update = {n: torch.from_numpy(np.asarray(scale * rng.normal(size=s), np.float32)) for n, s in SHAPES.items()}
    stats = {"loss": torch.tensor(rng.exponential()), "share": torch.from_numpy(rng.normal(size=3))}
    return Upload(update, torch.tensor(float(rng.integers(1, 99))), stats=stats)


def reduced(wire, limits, clients, groups):
    """Sum the uploads of each group on a rank of its own, then the ranks' buffers; returns the raw bytes."""
    buffers = []
    for rank, group in enumerate(groups):
        total = Accumulator(wire, limits, clients, rank)
        for client, upload in group:
            assert total.add(client, upload)
        assert total.over is None
        total.report(steps=len(group))
        buffers.append(total.buffers)
    return [torch.from_numpy(np.sum([b[i].numpy() for b in buffers], axis=0)) for i in range(len(buffers[0]))]


# --- the same bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [True, False])
def test_order_and_grouping_change_no_bit_of_what_is_exact(exact):
    rng = np.random.default_rng(0)
    uploads = [(i, random_upload(rng, 10.0 ** rng.integers(-4, 3))) for i in range(23)]
    ranks = 5
    wire = Wire.of(uploads[0][1], ranks, exact)
    seen = set()
    for _ in range(8):
        order = rng.permutation(len(uploads))
        home = rng.integers(ranks, size=len(uploads))
        groups = [[uploads[i] for i in order if home[i] == rank] for rank in range(ranks)]
        answer = decode(wire, reduced(wire, LIMITS, 23, groups))
        update = [answer.sums.update[name].numpy().tobytes() for name in SHAPES] if exact else []
        rest = (answer.sums.weight, answer.sums.count, str(answer.sums.stats), answer.peaks.tobytes())
        seen.add((*update, *rest))
    assert len(seen) == 1


def test_plain_float64_addition_would_not_pass_the_test_above():
    values = np.random.default_rng(0).normal(size=23) * 10.0 ** np.arange(-11, 12)
    assert len({sum(values[i] for i in np.random.default_rng(s).permutation(23)) for s in range(8)}) > 1


def test_the_sum_is_that_of_float64_for_values_of_all_sizes():
    rng = np.random.default_rng(1)
    uploads = [(i, random_upload(rng, 10.0 ** rng.integers(-4, 3))) for i in range(40)]
    wire = Wire.of(uploads[0][1], 1, True)
    sums = decode(wire, reduced(wire, LIMITS, 40, [uploads])).sums
    for name in SHAPES:
        terms = [u.weight.double() * u.update[name].double() for _, u in uploads]
        largest = max(float(term.abs().max()) for term in terms)
        torch.testing.assert_close(sums.update[name], sum(terms), rtol=0, atol=1e-7 * largest)
    assert sums.weight == sum(float(u.weight) for _, u in uploads) and sums.count == 40
    for name in ("loss", "share"):
        expected = np.sum([u.stats[name].numpy() for _, u in uploads], axis=0, dtype=np.float64)
        np.testing.assert_allclose(sums.stats[name], expected, rtol=0, atol=40 * spacing(LIMITS, 40)[0])


def test_whole_numbers_are_counted_exactly():
    upload = Upload({}, torch.tensor(1.0), stats={"correct": torch.tensor(1.0), "rows": torch.tensor(3.0)})
    wire = Wire.of(upload, 1, True)
    sums = decode(wire, reduced(wire, wire.first_limits(), 1000, [[(i, upload) for i in range(1000)]])).sums
    assert (sums.weight, sums.count, sums.stats) == (1000.0, 1000, {"correct": 1000.0, "rows": 3000.0})


def test_each_rank_reports_its_own_row():
    rng = np.random.default_rng(0)
    groups = [[(0, random_upload(rng))], [], [(1, random_upload(rng)), (2, random_upload(rng))]]
    wire = Wire.of(groups[0][0][1], 3, True)
    answer = decode(wire, reduced(wire, wire.first_limits(), 3, groups))
    assert answer.rows["steps"].tolist() == [1, 0, 2]
    assert answer.first("bad") is None and answer.first("over") is None


# --- the grid --------------------------------------------------------------------------------------------


def test_values_at_the_limit_add_exactly_in_cohorts_up_to_a_million():
    for clients in (1, 2, 3, 1000, 2**19, 2**20):
        for limit in (2.0**-60, 1.0, 3.0, 2.0**60):
            grid = float(spacing(np.asarray([limit]), clients)[0])
            assert math.log2(grid) % 1 == 0
            # On the grid magic can round to (52 bits from 1.5 * 2^52), and all sums are below its 53 bits.
            assert limit <= 2.0**51 * grid and clients * limit < 2.0**53 * grid


def test_limits_that_were_adapted_fit_the_values_they_were_adapted_to():
    rng = np.random.default_rng(0)
    wire = Wire.of(random_upload(rng), 1, True)
    for clients in (1, 7, 1000, 2**19, 2**20):
        for _ in range(200):
            peaks = 10.0 ** rng.uniform(-45, 43, size=len(wire.names)) * rng.integers(0, 2, len(wire.names))
            limits = 10.0 ** rng.uniform(-45, 43, size=len(wire.names))
            limits = np.exp2(np.round(np.log2(limits)))
            assert fits(next_limits(wire, limits, peaks, clients), peaks, clients)


def test_a_fitting_grid_resolves_every_leaf_to_a_millionth_of_its_largest_value():
    rng = np.random.default_rng(0)
    for clients in (1, 100, 2**15, 2**20):
        limits = np.exp2(rng.integers(-140, 140, size=4000))
        peaks = limits * 10.0 ** rng.uniform(-20, 1, size=4000)
        fitting = np.asarray([fits(limit[None], peak[None], clients) for limit, peak in zip(limits, peaks)])
        assert 0.1 < fitting.mean() < 0.9
        assert (peaks <= limits)[fitting].all()
        assert (spacing(limits, clients) / 2 <= 5e-7 * peaks)[fitting].all()


def test_a_leaf_of_zeros_always_fits_and_keeps_its_limit():
    wire = Wire.of(Upload({"a": torch.zeros(3)}, torch.zeros(())), 1, True)
    limits, peaks = np.asarray([2.0**-90, 2.0**20]), np.asarray([0.0, 4.0])
    assert fits(limits, peaks, 10)
    assert next_limits(wire, limits, peaks, 10)[0] == 2.0**-90


# --- through the fleet -----------------------------------------------------------------------------------


def echo(upload_of):
    """An algorithm that hands back sums; upload_of: (client, value of its one row) -> Upload."""

    def finish(shared, client, carry):
        return upload_of(client, carry["x"])

    def step(shared, client, carry, batch):
        return {"x": batch["x"][0] * shared["scale"]}

    work = ClientWork(lambda shared, client: {"x": torch.zeros(())}, step, finish, Batching(size=0, epochs=1))
    memory = lambda theta: {"seen": torch.zeros(())}  # noqa: E731
    return Algorithm(lambda theta: {}, lambda state, cohort: state, (work,), lambda state: {}, memory)


class Echo(Simulation):
    """A fleet of clients that each hold one row x, (values,), and upload what `upload_of` makes of it."""

    def __init__(self, values, upload_of, **options):
        rows = [{"x": np.asarray(v, np.float32)[None]} for v in values]
        super().__init__(echo(upload_of), MemoryDataset(rows), check=False, **options)

    def ask(self, scale=1.0):
        """Ask all clients; returns (sums, repeated asks)."""
        self.fleet.begin(self.round)
        everybody = np.arange(self.dataset.clients)[::-1].copy()  # no result may depend on the order
        sums = self.fleet.ask(self.algorithm.works[0], everybody, None, {"scale": torch.tensor(scale)})
        self.fleet.accepted = self.round
        self.round += 1
        return sums, self.fleet.read_traffic().repeats


def weighted(client, x):
    return Upload({"x": x}, client.n * 7, memory={"seen": torch.ones(())}, stats={"largest": x.abs().max()})


@pytest.mark.parametrize("exponent", [-10, -6, -3, 0, 3, 6, 10])
def test_scaled_uploads_agree_with_float64_in_the_first_round_and_later(exponent):
    values = np.random.default_rng(0).normal(size=(30, 50)).astype(np.float32)
    scale = np.float32(10.0**exponent)
    expected = 7 * (values * scale).astype(np.float64).sum(axis=0)
    fleet = Echo(values, weighted)
    for round, most in enumerate((1, 0, 0)):
        sums, repeats = fleet.ask(float(scale))
        assert repeats <= most, f"round {round}"
        np.testing.assert_allclose(sums.update["x"], expected, rtol=0, atol=1e-6 * np.abs(expected).max())
        assert (sums.weight, sums.count) == (210.0, 30)


def test_limits_follow_updates_that_shrink_and_grow_with_one_repeat_at_most():
    values = np.random.default_rng(0).normal(size=(9, 20)).astype(np.float32)
    fleet = Echo(values, weighted)
    rng = np.random.default_rng(1)
    asked_again = []
    for _ in range(60):
        scale = np.float32(10.0 ** rng.uniform(-30, 25))
        expected = 7 * (values * scale).astype(np.float64).sum(axis=0)
        sums, repeats = fleet.ask(float(scale))
        np.testing.assert_allclose(sums.update["x"], expected, rtol=0, atol=1e-6 * np.abs(expected).max())
        asked_again.append(repeats)
    assert set(asked_again) == {0, 1}


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_updates_that_halve_or_double_every_round_are_never_asked_twice(factor):
    values = np.random.default_rng(0).normal(size=(9, 20)).astype(np.float32)
    fleet = Echo(values, lambda client, x: Upload({"x": x}, client.n))
    assert sum(fleet.ask(factor**t)[1] for t in range(60)) == 0


def test_a_value_over_the_limit_asks_exactly_once_more_and_says_so():
    lines = []
    values = np.ones((5, 3), np.float32)
    values[3] = 1e8
    fleet = Echo(values, weighted)
    fleet.fleet.say = lines.append
    sums, repeats = fleet.ask()
    assert repeats == 1 and sums.update["x"].tolist() == [7e8 + 28] * 3
    assert len(lines) == 1 and "round 1: x of client 3 is beyond" in lines[0]
    assert fleet.ask()[1] == 0


def test_a_repeated_ask_keeps_memory_once():
    values = np.full((3, 2), 1e9, np.float32)
    fleet = Echo(values, weighted)
    assert fleet.ask()[1] == 1
    assert fleet.memory()["seen"].tolist() == [1.0, 1.0, 1.0]
    assert [fleet.host.memory.visits(i) for i in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_names_the_lowest_client_its_leaf_and_the_round(value):
    values = np.ones((9, 4), np.float32)
    values[7, 0] = values[3, 2] = value
    fleet = Echo(values, lambda client, x: Upload({"a": torch.ones(2), "later": x}, client.n))
    with pytest.raises(UserError, match="round 1: later of client 3 is NaN or infinite"):
        fleet.ask()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["weight", "loss"])
def test_a_weight_or_statistic_that_is_not_finite_is_named_too(where, value):
    def upload(client, x):
        bad = x[0]
        return Upload({"a": torch.ones(2)}, bad if where == "weight" else client.n, stats={"loss": bad})

    values = np.ones((4, 1), np.float32)
    values[2] = value
    with pytest.raises(UserError, match=f"round 1: {where} of client 2 is NaN"):
        Echo(values, upload).ask()


def test_excluded_clients_are_left_out_counted_and_keep_their_memory():
    values = np.ones((6, 4), np.float32)
    values[1, 0], values[4, 3] = math.nan, math.inf
    fleet = Echo(values, weighted, tolerate=2)
    for _ in range(2):
        fleet.fleet.read_traffic()
        fleet.fleet.begin(fleet.round)
        sums = fleet.fleet.ask(fleet.algorithm.works[0], np.arange(6), None, {"scale": torch.tensor(1.0)})
        fleet.fleet.accepted, fleet.round = fleet.round, fleet.round + 1
        assert (sums.weight, sums.count, sums.stats) == (28.0, 4, {"largest": 4.0})
        assert sums.update["x"].tolist() == [28.0] * 4
        assert fleet.fleet.read_traffic().excluded == 2
    assert fleet.memory()["seen"].tolist() == [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]


def test_a_client_left_out_of_a_repeated_ask_is_counted_once():
    values = np.full((4, 2), 1e9, np.float32)
    values[2] = math.nan
    fleet = Echo(values, weighted, tolerate=2)
    fleet.fleet.begin(0)
    sums = fleet.fleet.ask(fleet.algorithm.works[0], np.arange(4), None, {"scale": torch.tensor(1.0)})
    traffic = fleet.fleet.read_traffic()
    assert (sums.count, traffic.repeats, traffic.excluded) == (3, 1, 1)


def test_float32_sums_updates_roughly_and_weight_and_count_exactly():
    values = np.random.default_rng(0).normal(size=(30, 50)).astype(np.float32)
    for scale in (1e-10, 1.0, 1e10):
        fleet = Echo(values, weighted, exact=False)
        sums, repeats = fleet.ask(scale)
        expected = 7 * scale * values.astype(np.float64).sum(axis=0)
        np.testing.assert_allclose(sums.update["x"], expected, rtol=0, atol=3e-6 * np.abs(expected).max())
        assert (sums.weight, sums.count, repeats) == (210.0, 30, 0)
    values[3] = math.nan
    with pytest.raises(UserError, match="x of client 3 is NaN"):
        Echo(values, weighted, exact=False).ask()


def test_float32_takes_half_the_bytes_up():
    upload = Upload({"x": torch.zeros(1000)}, torch.zeros(()))
    assert Wire.of(upload, 2, False).bytes - Wire.of(upload, 2, False).tail * 8 == 4000
    assert Wire.of(upload, 2, True).bytes - Wire.of(upload, 2, True).tail * 8 == 8000


def test_bytes_up_do_not_depend_on_the_size_of_the_cohort():
    uploads = [random_upload(np.random.default_rng(0)) for _ in range(100)]
    wire = Wire.of(uploads[0], 3, True)
    for n in (10, 100):
        total = Accumulator(wire, wire.first_limits(), n, 0)
        for client in range(n):
            total.add(client, uploads[client])
        assert sum(b.nbytes for b in total.buffers) == wire.bytes


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    "leaves",
    [
        {},
        {"none": torch.zeros(0), "some": torch.ones(2)},
        {"scalar": torch.ones(())},
        {"deep": {"er": torch.ones(2, 2)}},
    ],
    ids=["none", "empty", "scalar", "nested"],
)
def test_uploads_of_any_shape_are_summed(leaves, exact):
    fleet = Echo(np.ones((3, 1)), lambda client, x: Upload(leaves, client.n, stats=leaves), exact=exact)
    sums, _ = fleet.ask()
    flat = dict(tree_leaves(sums.update))
    assert sums.count == 3
    for name, leaf in tree_leaves(leaves):
        torch.testing.assert_close(flat[name], 3.0 * leaf.double())
        torch.testing.assert_close(torch.tensor(sums.stats[name], dtype=torch.float64), 3.0 * leaf.double())


def test_integer_and_boolean_leaves_are_summed_as_numbers():
    update = {"count": torch.tensor([3, 2**30]), "flag": torch.tensor([True, False])}
    sums, _ = Echo(np.ones((3, 1)), lambda client, x: Upload(update, client.n)).ask()
    assert sums.update["count"].tolist() == [9.0, 3.0 * 2**30]
    assert sums.update["flag"].tolist() == [3.0, 0.0]


def test_an_ask_that_nobody_answers_is_a_sum_of_weight_zero():
    fleet = Echo(np.ones((3, 2)), weighted)
    fleet.fleet.begin(0)
    sums = fleet.fleet.ask(fleet.algorithm.works[0], np.arange(0), None, {"scale": torch.tensor(1.0)})
    assert (sums.weight, sums.count) == (0.0, 0)
    assert sums.mean["x"].tolist() == [0.0, 0.0]


def test_random_magnitudes_of_single_clients_never_need_a_second_repeat():
    rng = np.random.default_rng(2)
    for _ in range(25):
        values = (rng.normal(size=(6, 4)) * 10.0 ** rng.uniform(-30, 25, size=(6, 1))).astype(np.float32)
        values[rng.random(6) < 0.3] = 0.0
        fleet = Echo(values, weighted)
        for _ in range(2):
            expected = 7 * values.astype(np.float64).sum(axis=0)
            sums, repeats = fleet.ask()
            assert repeats <= 1
            largest = 7 * np.abs(values).max()
            np.testing.assert_allclose(sums.update["x"], expected, rtol=0, atol=1e-6 * largest)
        assert repeats == 0
