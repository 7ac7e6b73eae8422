"""What ranks find out, as it travels to rank 0, and how to speak of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Fact:
    """A row of the table."""

    name: str
    value: str


@dataclass(frozen=True)
class Problem:
    """What would stop, spoil or slow down a job, and the command or setting that mends it ("": `what` says it)."""

    what: str
    mend: str = ""


Found = Iterator[Fact | Problem]


@dataclass
class Folder:
    """A folder that the job's key names, or the nearest one above it that is there: path, file system, bytes free.

    lock: why files cannot be locked there, "" if they can or it was not tried.
    """

    key: str
    path: str
    kind: str
    free: int
    lock: str = ""


@dataclass
class Gpu:
    """The GPU that a rank takes: id, name, bytes free, and the ids of all that it sees."""

    id: str
    name: str
    free: int
    seen: list[str]


@dataclass
class Memory:
    """Bytes of main memory: free on the node, and left in the cgroup that has least (None: no limit).

    resident: what this rank has already. address_space: what `ulimit -v` leaves it (None: no limit).
    """

    free: int
    resident: int
    cgroup: str = ""
    left: int | None = None
    address_space: int | None = None


@dataclass
class Needs:
    """Bytes that the job is expected to take, by its plan: resident, of rank 0 and of a host; in messages and on disk.

    down: the largest buffer from rank 0. up: the largest sum. disk: checkpoints and models.
    """

    server: int
    host: int
    down: int
    up: int
    disk: int


@dataclass
class Rank:
    """What a rank found out; what it could not is left as it is, and `failed` says why: probe -> (exception, text).

    node: the lowest rank on the same node. launcher: what started it. mpi: what the library says of itself. allotted:
    cores that its control group has. needs: known to rank 0. doing: the probe that had not ended in time. run_folder:
    what is wrong with the file that rank 0 makes there, "" if nothing: "missing", "no answer" or "not written: why".
    clock: seconds ahead of rank 0, at least and at most.
    """

    rank: int = 0
    node: int = 0
    host: str = ""
    launcher: str = ""
    mpi: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    wheels: list[str] = field(default_factory=list)
    processor: str = ""
    cores: list[int] = field(default_factory=list)
    allotted: list[int] = field(default_factory=list)
    fabrics: list[str] = field(default_factory=list)
    shared_memory: int | None = None
    folders: list[Folder] = field(default_factory=list)
    gpu: Gpu | None = None
    memory: Memory | None = None
    digests: dict[str, str] = field(default_factory=dict)
    needs: Needs | None = None
    run_folder: str = ""
    clock: tuple[float, float] = (0.0, 0.0)
    failed: dict[str, tuple[str, str]] = field(default_factory=dict)
    doing: str = ""

    def table(self) -> dict[str, Any]:
        """As a table of what JSON can hold."""
        return asdict(self)

    @staticmethod
    def of(table: dict[str, Any]) -> Rank:
        """Read what `table` gave."""
        kinds = {"gpu": Gpu, "memory": Memory, "needs": Needs}
        found = {name: kinds[name](**value) if name in kinds and value else value for name, value in table.items()}
        return Rank(**{**found, "folders": [Folder(**folder) for folder in table["folders"]]})


def groups(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Items by what `key` gives, in order of the first of each."""
    found: dict[K, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def most_common(items: Sequence[T], key: Callable[[T], K]) -> K:
    """What `key` gives most often; of several, the first."""
    return max(groups(items, key).items(), key=lambda entry: len(entry[1]))[0]


def by_node(ranks: Iterable[Rank]) -> list[list[Rank]]:
    """The ranks of each node."""
    return list(groups(ranks, lambda rank: rank.node).values())


def spoken(ranks: Sequence[Rank]) -> str:
    """Say who: "rank 3 on node07", or "ranks 0-2, 7 on node07 and 3 more nodes"."""
    hosts = list(dict.fromkeys(rank.host for rank in ranks))
    more = f" and {plural(len(hosts) - 1, 'more node')}" if len(hosts) > 1 else ""
    return f"rank{'s' * (len(ranks) > 1)} {ranges(rank.rank for rank in ranks)} on {hosts[0]}{more}"


def ranges(numbers: Iterable[int]) -> str:
    """Write numbers, ascending, as "0-2, 7"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def plural(count: int, thing: str) -> str:
    """Say how many: "1 core", "2 cores"."""
    return f"{count} {thing}{'s' * (count != 1)}"
