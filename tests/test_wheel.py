"""What users get who install a wheel and have no clone: programs, embedded data and the jobs."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
JOBS = sorted(path.name for path in (ROOT / "jobs").glob("*.toml") if "made_by" in path.read_text(encoding="utf-8"))
# One process for all, since importing torch takes longer than anything asked of it here.
PROGRAM = """
import sys
import mpifl, data_prep
from mpifl.train import main

print(mpifl.__file__, data_prep.__file__)
for job in sys.argv[1:]:
    print(job, main([job]), flush=True)
sys.exit(main(["rounds=1", "baselines=false", "run.out=out"]))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [wheel] = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


@pytest.fixture(scope="module")
def done(installed, tmp_path_factory):
    """The wheel's program run in an empty folder, the clone not on the path: (folder, what it printed)."""
    folder = tmp_path_factory.mktemp("empty")
    command = [sys.executable, "-c", PROGRAM, *(f"jobs/{name}" for name in JOBS)]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert finished.stdout.startswith(f"{installed}/mpifl/__init__.py {installed}/data_prep/__init__.py\n")
    return folder, finished


def test_the_job_without_arguments_runs_from_a_wheel(done):
    folder, finished = done
    assert finished.returncode == 0 and (folder / "out" / "summary.json").exists()


def test_jobs_are_found_in_a_wheel_and_say_what_data_they_miss(done):
    _, finished = done
    answers = finished.stderr.splitlines()
    assert [f"jobs/{name} 2" in finished.stdout.splitlines() for name in JOBS] == [True] * len(JOBS)
    assert len(answers) == len(JOBS), finished.stderr
    for name, answer in zip(JOBS, answers):
        made_by = tomllib.loads((ROOT / "jobs" / name).read_text(encoding="utf-8"))["data"]["made_by"]
        assert answer.endswith(f"there is no such folder; make it with: {made_by}")


def test_licence_and_data_are_in_the_wheel(installed):
    assert (installed / "mpifl" / "data" / "digits" / "index.h5").exists()
    assert list(installed.glob("mpifl-*.dist-info/licenses/LICENSE"))
