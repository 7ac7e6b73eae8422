"""What users get who install a wheel and have no clone: programs, embedded data and the jobs."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    [wheel] = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def run(installed, tmp_path, *words):
    """Run a program of the wheel in an empty folder; the clone is not on the path."""
    command = [sys.executable, "-m", *words]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    where = [sys.executable, "-c", "import mpifl; print(mpifl.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout
    assert found.startswith(str(installed))
    return done


def test_the_job_without_arguments_runs_from_a_wheel(installed, tmp_path):
    done = run(installed, tmp_path, "mpifl.train", "rounds=1", "baselines=false", "run.out=out")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out" / "summary.json").exists()


@pytest.mark.parametrize("job", sorted(path.name for path in (ROOT / "jobs").glob("*.toml")))
def test_jobs_are_found_in_a_wheel(installed, tmp_path, job):
    missing = run(installed, tmp_path, "mpifl.train", f"jobs/{job}")
    assert missing.returncode == 2
    assert "python -m data_prep" in missing.stderr


def test_licence_and_data_are_in_the_wheel(installed):
    assert (installed / "mpifl" / "data" / "digits" / "index.h5").exists()
    assert list(installed.glob("mpifl-*.dist-info/licenses/LICENSE"))
