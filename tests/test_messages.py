"""What a host receives of an ask is its own part of what rank 0 sent, whoever is asked and whoever comes next."""

from collections import deque

import numpy as np
import pytest
import torch

from mpifl.engine.host import Ask
from mpifl.messages import ASK, NOBODY, Header, Receiver, Sender


class Wire:
    """Rank 0's side keeps what it sends; a host's side, on any rank, is then given the same, call by call."""

    def __init__(self, size):
        self.size, self.sent = size, []

    def announce(self, buffer):
        self.sent.append(buffer.copy())

    def publish(self, nbytes, fill):
        buffer = np.zeros(nbytes, np.uint8)
        fill(buffer)
        self.announce(buffer)
        return buffer

    def scatter(self, table, row):
        self.sent.append(table.copy())
        row[:] = table[0]

    def room(self, nbytes):
        """Memory for sums."""

    def at(self, rank):
        return Delivered(deque(self.sent), rank)


class Delivered:
    def __init__(self, left, rank):
        self.left, self.rank = left, rank

    def announce(self, buffer):
        buffer[:] = self.left.popleft()

    def publish(self, nbytes):
        assert nbytes == len(self.left[0])
        return self.left.popleft()

    def scatter(self, table, row):
        row[:] = self.left.popleft()[self.rank]

    def room(self, nbytes):
        """Memory for sums."""


CASES = {
    "some": ([1, 2, 1, 3], [3, 3]),
    "nobody next": ([1, 1, 2], []),
    "nobody now": ([], [2, 1, 1]),
    "nobody at all": ([], []),
}


@pytest.mark.parametrize(("home", "home_ahead"), CASES.values(), ids=CASES)
def test_each_rank_gets_its_clients_and_those_of_the_next_round_in_order(home, home_ahead):
    home, home_ahead = np.array(home, np.int64), np.array(home_ahead, np.int64)
    ids, ahead = 10 + np.arange(len(home)), 100 + np.arange(len(home_ahead))
    given = {"version": torch.arange(len(home), dtype=torch.int32)}
    shared = {"theta": torch.arange(5.0)}
    wire = Wire(4)
    question = Ask(2, 7, ids, shared, np.array([0.5]), len(ids), given, attempt=1, ahead=ahead)
    parts = [Sender(wire).send(ASK, question, home, 6, home_ahead)]
    assert parts[0].room == wire.room
    for rank in (1, 2, 3):
        comm = wire.at(rank)
        header = Header.await_from(comm)
        assert (header.command, header.round, header.accepted) == (ASK, 7, 6)
        parts.append(Receiver(comm).receive(header))
        assert not comm.left and parts[-1].room == comm.room
    for rank, part in enumerate(parts):
        assert part.ids.tolist() == ids[home == rank].tolist()
        assert part.ahead.tolist() == ahead[home_ahead == rank].tolist()
        assert part.given["version"].tolist() == np.flatnonzero(home == rank).tolist()
        assert (part.work, part.round, part.attempt, part.clients) == (2, 7, 1, len(ids))
        assert torch.equal(part.shared["theta"], shared["theta"]) and part.limits.tolist() == [0.5]


def test_an_ask_that_gives_clients_nothing_may_ask_nobody():
    wire = Wire(3)
    mine = Sender(wire).send(ASK, Ask(0, 0, NOBODY, {}, np.zeros(1), 0), NOBODY, -1)
    comm = wire.at(2)
    theirs = Receiver(comm).receive(Header.await_from(comm))
    assert [len(part.ids) + len(part.ahead) for part in (mine, theirs)] == [0, 0]
