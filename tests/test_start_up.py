"""What is imported at the start: for a plan torch on rank 0 alone, and nothing optional that was not asked for."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "h5py", "rich"}
OPTIONAL = {
    *("transformers", "peft", "datasets", "tokenizers", "huggingface_hub", "accelerate"),
    *("matplotlib", "pandas", "pyarrow", "scipy", "sklearn", "PIL", "msgpack", "hdf5plugin"),
    *("torch._dynamo", "torch._inductor", "torch.utils.tensorboard"),
}
PROGRAM = """
import json, sys
from pathlib import Path
from mpifl.command_line import main
from mpifl.launcher import launched_rank

status = [main([*words.split()]) for words in sys.argv[2:]]
Path(sys.argv[1], f"rank-{launched_rank()}.json").write_text(json.dumps([status, [*sys.modules]]))
"""


@pytest.fixture
def started(launch, tmp_path):
    """Run command lines one after the other in each rank: (their statuses, modules imported) per rank, and stderr."""

    def started(ranks, *lines):
        done = launch(ranks, "-c", PROGRAM, tmp_path, *lines, env={"PYTHONPATH": str(ROOT)}, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        files = sorted(tmp_path.glob("rank-*.json"))
        return [(status, set(modules)) for status, modules in map(json.loads, map(Path.read_text, files))], done.stderr

    return started


@pytest.mark.launches
def test_for_a_plan_ranks_other_than_0_import_nothing_heavy_and_share_its_fate(started):
    ranks, said = started(3, "--help", "--dry-run", "--dry-run model.hidden=[-1]", "--dry-run --frobnicate")
    assert [status for status, _ in ranks] == [[0, 0, 2, 2]] * 3
    lines = said.splitlines()
    assert [line.split(";")[0] for line in lines] == [
        "mpifl: mlp hidden is [-1]",
        "mpifl: unrecognized arguments: --frobnicate",
    ]
    assert [imported & HEAVY for _, imported in ranks] == [HEAVY, set(), set()]
    assert not ranks[0][1] & OPTIONAL


def test_help_and_mistakes_of_the_command_line_need_no_torch(started):
    [(status, imported)], _ = started(None, "--help", "--version", "--frobnicate")
    assert status == [0, 0, 2]
    assert not imported & HEAVY


def test_training_imports_nothing_optional(started):
    [(status, imported)], _ = started(None, "rounds=1 cohort=2 baselines=false --quiet")
    assert status == [0] and "torch" in imported
    assert not imported & OPTIONAL
