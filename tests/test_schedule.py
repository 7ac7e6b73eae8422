"""Schedules: their values at every border, and the one-line errors of bad options."""

import pytest

from mpifl.config import UserError
from mpifl.schedule import constant, cosine, step


def test_constant_never_changes():
    assert {constant(0.3)(round) for round in (0, 1, 999)} == {0.3}


def test_step_multiplies_at_each_multiple_of_every():
    schedule = step(8.0, every=3, factor=0.5)
    assert [schedule(round) for round in range(7)] == [8, 8, 8, 4, 4, 4, 2]


def test_cosine_meets_both_ends_exactly_and_holds_the_last():
    schedule = cosine(0.3, rounds=11, final=0.1)
    assert schedule(0) == 0.3
    assert schedule(10) == schedule(11) == schedule(1000) == 0.1
    assert schedule(5) == pytest.approx(0.2)


def test_cosine_is_antisymmetric_about_its_middle_and_falls_throughout():
    values = [cosine(1.0, rounds=9)(round) for round in range(9)]
    assert [a + b for a, b in zip(values, reversed(values), strict=True)] == pytest.approx([1.0] * 9)
    assert values == sorted(set(values), reverse=True)
    assert values[2] == pytest.approx(0.5 + 0.5 * 0.5**0.5)  # cos(pi / 4), not a straight line


@pytest.mark.parametrize("schedule", [constant, lambda v, warmup: step(v, 1, 0.5, warmup)])
def test_warmup_rises_linearly_to_the_first_value_then_the_schedule_begins(schedule):
    warm, plain = schedule(8.0, warmup=4), schedule(8.0, warmup=0)
    assert [warm(round) for round in range(4)] == [2, 4, 6, 8]
    assert [warm(round) for round in range(4, 10)] == [plain(round) for round in range(6)]


def test_cosine_with_warmup_still_ends_at_its_last_round():
    schedule = cosine(1.0, rounds=10, final=0.25, warmup=4)
    assert [schedule(round) for round in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert schedule(8) > 0.25
    assert schedule(9) == schedule(10) == 0.25


def test_the_shortest_cosine_goes_from_one_end_to_the_other():
    assert [cosine(1.0, rounds=4, warmup=2)(round) for round in range(5)] == [0.5, 1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: constant(float("nan")), "value = nan is not allowed: give a finite number"),
        (lambda: constant(1e39), "value = 1e+39 is not allowed: give a number up to 3.4e+38, the largest of float32"),
        (lambda: constant(float("inf")), "value = inf"),
        (lambda: constant("0.1"), "value = '0.1'"),
        (lambda: constant(True), "value = True"),
        (lambda: constant(1.0, warmup=-1), "warmup = -1 is not allowed: give a whole number, 0 or more"),
        (lambda: constant(1.0, warmup=1.5), "warmup = 1.5"),
        (lambda: step(1.0, every=0, factor=0.5), "every = 0 is not allowed: give a whole number, 1 or more"),
        (lambda: step(1.0, every=2.5, factor=0.5), "every = 2.5"),
        (lambda: step(1.0, every=2, factor=0), "factor = 0 "),
        (lambda: step(1.0, every=2, factor=1.5), "factor = 1.5"),
        (lambda: step(1.0, every=2, factor=0.5, warmup=-3), "warmup = -3"),
        (lambda: cosine(1.0, rounds=1), "rounds = 1 is not allowed: give a whole number, 2 or more"),
        (
            lambda: cosine(1.0, rounds=6, warmup=5),
            "rounds = 6 is not allowed: give a whole number, 7 or more",
        ),
        (lambda: cosine(1.0, rounds=5, final=float("nan")), "final = nan"),
        (lambda: cosine(1.0, rounds=5, warmup="2"), "warmup = '2'"),
    ],
)
def test_bad_options_are_refused_by_name_value_and_range(make, message):
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
