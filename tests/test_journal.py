"""Rounds are scored by rank 0 while hosts train on: the same numbers, in order, and nothing of a run is lost."""

import json
import time
from contextlib import closing

import pytest

import mpifl
from mpifl.comm import Alone
from mpifl.config import UserError
from mpifl.console import Console
from mpifl.engine.clock import Clock
from mpifl.engine.host import Host
from mpifl.fleet import Fleet
from mpifl.journal import Journal
from mpifl.results import Totals


class Folder:
    """Keeps what is written."""

    def __init__(self):
        self.written = []

    def round(self, record):
        self.written.append(record["round"])


def record(number):
    zeros = dict.fromkeys(("examples", "steps", "bytes_down", "bytes_up", "excluded", "repeated_asks", "clients"), 0)
    return zeros | {"round": number, "loss": 1.0, "imbalance": 1.0, "seconds": {"total": 1.0}}


def scoring(blocks, result):
    for _ in range(blocks):
        yield None
    yield result


def journal():
    return Journal(Folder(), Totals(), Console(quiet=True), 9, Clock())


def test_records_wait_behind_the_one_that_is_scored_and_come_in_order():
    book = journal()
    first, second = record(1), record(2)
    book.add(first)
    book.score(second, scoring(2, {"loss": 0.5, "accuracy": 0.7}))
    for later in (second, record(3)):
        book.add(later)
    assert book.folder.written == [1]
    assert [book.work() for _ in range(2)] == [True, True] and book.folder.written == [1]
    assert book.work() and book.folder.written == [1, 2, 3]
    assert second["scores"] == {"test_loss": 0.5, "accuracy": 0.7}
    assert book.totals.scores == second["scores"] and not book.work()


def test_finish_counts_what_was_left():
    book = journal()
    book.score(record(1), scoring(4, {"loss": 0.5}))
    book.work()
    assert (book.finish(), book.finish()) == (4, 0)


def test_time_is_booked_as_evaluation_and_the_round_at_hand_stays():
    book = journal()
    book.clock.enter("wait")
    book.clock.round = 7

    def other_round():
        book.clock.round = 3
        yield None
        book.clock.enter("train")  # as an engine leaves it in between
        yield {"loss": 0.0}

    book.score(record(4), other_round())
    book.work()
    assert book.clock.round == 7 and book.clock.account == ""
    assert book.clock.lap().keys() <= {"start", "wait", "evaluate"}


def test_a_run_that_breaks_off_leaves_all_its_rounds():
    with pytest.raises(UserError), closing(journal()) as book:
        book.score(first := record(1), scoring(3, {"loss": 0.5}))
        for one in (first, record(2)):
            book.add(one)
        raise UserError("diverged")
    assert book.folder.written == [1, 2] and "scores" not in first


def job(out, **run):
    return {
        "rounds": 5,
        "cohort": 7,
        "data": {"path": "parts:awkward_dataset"},
        "model": {"name": "parts:net_with_dropout"},
        "algorithm": {"name": "fedavg", "batches": {"size": 4}},
        "run": {"out": str(out), "eval_batch": 3} | run,
    }


@pytest.mark.mpi(ranks=3, timeout=60)
@pytest.mark.parametrize("eval_every", [1, 2])
def test_the_server_scores_to_the_same_bits(tmp_path, eval_every):
    lines = {}
    for scored_by in ("server", "hosts"):
        out = tmp_path / scored_by
        if mpifl.run(job(out, scored_by=scored_by, eval_every=eval_every)) is None:
            continue
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        lines[scored_by] = [(one["round"], one.get("scores"), one["bytes_up"]) for one in records]
    if lines:
        mpifl.run(job(tmp_path / "alone", eval_every=eval_every), comm=Alone())
        alone = [json.loads(line) for line in (tmp_path / "alone" / "metrics.jsonl").read_text().splitlines()]
        assert lines["server"] == lines["hosts"]
        assert [line[:2] for line in lines["server"]] == [(one["round"], one.get("scores")) for one in alone]
        assert sum(scores is not None for _, scores, _ in lines["server"]) == {1: 5, 2: 3}[eval_every]


@pytest.mark.mpi(ranks=3, timeout=60)
def test_hosts_train_the_next_round_while_the_server_scores(tmp_path, monkeypatch):
    events = []
    send, ask_here, answer = Fleet._send, Fleet.ask_here, Host.answer

    def noted_send(fleet, *what):
        events.append("asked")
        return send(fleet, *what)

    def noted_pieces(fleet, *what):
        pieces = ask_here(fleet, *what)
        while True:
            try:
                next(pieces)
            except StopIteration as done:
                return done.value
            events.append("scored")
            yield

    def slow_answer(host, *what):
        time.sleep(0.2 * (host.rank > 0))
        return answer(host, *what)

    monkeypatch.setattr(Fleet, "_send", noted_send)
    monkeypatch.setattr(Fleet, "ask_here", noted_pieces)
    monkeypatch.setattr(Host, "answer", slow_answer)
    summary = mpifl.run(job(tmp_path / "out", scored_by="server", eval_every=2, eval_batch=512))
    if summary is None:
        return
    # The last round is scored by the hosts, asked once more.
    round_and_scores = ["asked", *["scored"] * 3]
    assert events == ["asked", "asked", *round_and_scores, "asked", *round_and_scores, "asked"]
