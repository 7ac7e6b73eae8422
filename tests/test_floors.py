"""The house has floors: a module imports only from below, or from its own floor. New modules must be given one."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mpifl

PACKAGE = Path(mpifl.__file__).parent
FLOORS = {
    "ground": ["config", "tree", "rand", "optim", "perceptron", "schedule", "process"],
    "contracts": ["work", "model"],
    "catalogue": ["algorithms.*", "uplink.*", "models.*", "measure", "placement", "faults"],
    "one rank": ["data.*", "engine.*"],
    "fleet": ["comm", "launcher", "flat", "node", "messages", "fleet", "sharded", "checkpoint", "saving"],
    "programs": [
        *("train", "evaluate", "bench.*", "doctor.*", "plan", "build", "console"),
        *(
            "results",
            "scoring",
            "conclusion",
            "journal",
            "baselines",
            "launch",
            "session",
            "command_line",
            "dry_run",
            "profiling",
        ),
        *("stopping", "lock", "watchdog", "supervise", "status", "report", "reporting.*", "writers"),
    ],
}
ORDER = list(FLOORS)
ONLY_IN = {
    "mpi4py": {"comm"},
    "h5py": {"data.shard", "data.column", "data.pieces", "data.newfile", "data.writer", "bench.reading"},
    # Models of other libraries: imported where one is made, as they take seconds and are optional.
    "transformers": {"models.hf"},
    "peft": {"models.hf"},
}
PICKLES = {"pickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib", "torch.save", "torch.load"}
LOW_FLOORS_MAY_IMPORT = {"torch", "numpy", "mpifl", *sys.stdlib_module_names}
IMPURE = {"os", "io", "sys", "time", "datetime", "random", "secrets", "pathlib", "tempfile", "socket", "subprocess"}


def modules() -> dict[str, str]:
    """Dotted name within the package -> source; a package's own file is called package.__init__."""
    paths = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text() for path in paths}


MODULES = modules()


def floors_of(module: str) -> list[str]:
    names = {module, f"{module.split('.')[0]}.*"}
    return [floor for floor, patterns in FLOORS.items() if names & set(patterns)]


def imported(source: str) -> set[str]:
    """Every module imported anywhere in the source, in functions too; `torch.save` and its like count as well."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"write imports in full: from {'.' * node.level}{node.module or ''}"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            found |= {f"torch.{node.attr}"}
    return found


def siblings(source: str) -> set[str]:
    """Modules of this package that the source imports."""
    names = {name.removeprefix("mpifl.") for name in imported(source) if name.startswith("mpifl.")}
    return names & set(MODULES)


def may_import(importer: str, target: str) -> bool:
    (above,), (below,) = floors_of(importer), floors_of(target)
    if above != below:
        return ORDER.index(below) < ORDER.index(above)
    if above == "catalogue" and "." in target:  # what is chosen by name knows nothing of what else could be chosen
        package = importer.split(".")[0]
        return package != "algorithms" and target.startswith(f"{package}.")
    return True


def complaints(module: str, source: str) -> list[str]:
    """Everything that is wrong with what a module imports."""
    names = imported(source)
    roots = {name.split(".")[0] for name in names}
    (floor,) = floors_of(module)
    found = [f"{module} imports {target}" for target in siblings(source) if not may_import(module, target)]
    found += [f"{module} imports {name}" for name, homes in ONLY_IN.items() if name in roots and module not in homes]
    found += [f"{module} pickles with {name}" for name in (names | roots) & PICKLES]
    found += [f"{module} passes allow_pickle"] if "allow_pickle" in source else []
    if floor in ORDER[:3]:
        found += [f"{module} imports {name}" for name in roots - LOW_FLOORS_MAY_IMPORT - set(ONLY_IN)]
        found += [f"{module} imports {name}" for name in names if name.startswith("torch.distributed")]
    if floor == "catalogue":
        found += [f"{module} imports {name}, but has no I/O, clock or chance" for name in roots & IMPURE]
    return found


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_on_one_floor_and_imports_from_below(module):
    assert len(floors_of(module)) == 1, f"give {module} a floor in {Path(__file__).name}: {', '.join(FLOORS)}"
    assert not complaints(module, MODULES[module])


def test_every_place_on_a_floor_is_taken():
    for floor, patterns in FLOORS.items():
        for pattern in patterns:
            prefix = pattern.removesuffix("*")
            assert any(name.startswith(prefix) for name in MODULES), f"nothing is called {pattern} on floor {floor}"


def test_no_two_modules_need_each_other():
    needs = {module: siblings(source) for module, source in MODULES.items()}
    while free := [module for module, below in needs.items() if not below & set(needs)]:
        for module in free:
            del needs[module]
    assert not needs, f"in or above a cycle: {', '.join(needs)}"


def test_the_package_itself_imports_only_the_standard_library():
    roots = {name.split(".")[0] for name in imported((PACKAGE / "__init__.py").read_text())}
    assert roots <= set(sys.stdlib_module_names)


def test_only_build_and_the_package_itself_import_by_name():
    by_name = {module for module, source in MODULES.items() if "import_module" in source or "__import__" in source}
    assert by_name == {"build"}


def test_data_preparation_writes_shards_through_the_package_alone():
    # These two only read what others publish so: tff.py HDF5, and cifar.py pickles, by an Unpickler that calls
    # nothing but two functions of its own, whatever the pickle names.
    reads = {"tff.py": "h5py", "cifar.py": "pickle"}
    for path in (PACKAGE.parent / "data_prep").glob("*.py"):
        roots = {name.split(".")[0] for name in imported(path.read_text())}
        assert not roots & ({"h5py", "mpi4py", "pickle"} - {reads.get(path.name)}), path.name


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("algorithms.fedavg", "from mpifl.algorithms.mime import mime"),
        ("algorithms.fedavg", "from mpifl.algorithms import mime"),
        ("algorithms.fedavg", "from mpifl.uplink.exact import Wire"),
        ("models.cnn", "from mpifl.algorithms.fedavg import fedavg"),
        ("measure", "from mpifl.models.linear import mlp"),
        ("algorithms.fedavg", "from mpifl.engine.serial import visit"),
        ("algorithms.fedavg", "def f():\n    from mpifl.comm import World"),
        ("algorithms.fedavg", "import mpifl.fleet"),
        ("algorithms.fedavg", "from torch.distributed import all_reduce"),
        ("algorithms.fedavg", "import scipy"),
        ("uplink.exact", "from mpi4py import MPI"),
        ("uplink.exact", "import time"),
        ("work", "from mpifl.measure import accuracy"),
        ("model", "from mpifl import measure"),
        ("optim", "from mpifl.model import Model"),
        ("rand", "import h5py"),
        ("engine.host", "from mpifl.fleet import Fleet"),
        ("data.batches", "import h5py"),
        ("models.cnn", "import transformers"),
        ("build", "def f():\n    from peft import LoraConfig"),
        ("fleet", "import mpi4py.MPI"),
        ("fleet", "from mpifl.launch import agree"),
        ("results", "import pickle"),
        ("results", "import torch\ntorch.save({}, 'model.pt')"),
        ("results", "from torch import load"),
        ("results", "import numpy as np\nnp.load('x.npy', allow_pickle=True)"),
    ],
)
def test_what_must_not_be_is_seen(module, line):
    assert complaints(module, line)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("algorithms.hypcluster", "from mpifl.measure import example_sums"),
        ("models.cnn", "from mpifl.models.linear import mlp"),
        ("models.hf", "def f():\n    from transformers import AutoConfig"),
        ("engine.host", "from mpifl.data.batches import batches"),
        ("comm", "from mpi4py import MPI"),
        ("bench.step", "from mpifl.engine.serial import visit"),
    ],
)
def test_what_may_be_is_let_through(module, line):
    assert not complaints(module, line)


def test_a_new_module_has_no_floor_until_it_is_given_one():
    assert not floors_of("helpers") and not floors_of("newpackage.module")
    assert floors_of("algorithms.apfl") == ["catalogue"]


NO_MPI = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mpi4py":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
"""


def run_fresh(code, cwd):
    """Run code in an interpreter of its own where mpi4py cannot be imported; returns its stdout."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PMI", "OMPI", "MPI", "HYDRA"))}
    environment = own | {"PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-c", NO_MPI + code]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_neither_torch_nor_mpi_nor_hdf5(tmp_path):
    code = "import mpifl; print(*({'torch', 'numpy', 'mpi4py', 'h5py'} & set(sys.modules)), mpifl.__version__)"
    assert run_fresh(code, tmp_path).split() == [mpifl.__version__]


def test_every_public_name_can_be_had_and_a_job_be_run_without_mpi_and_optional_packages(tmp_path):
    code = """
import mpifl
for name in mpifl.__all__:
    getattr(mpifl, name)
from mpifl.train import main
status = main(["rounds=1", "cohort=2", "baselines=false", "run.out=out", "--quiet"])
print(status, *{"mpi4py", "transformers", "peft"} & set(sys.modules))
"""
    assert run_fresh(code, tmp_path).split() == ["0"]
    assert (tmp_path / "out" / "summary.json").is_file()


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mpifl.nothing  # noqa: B018 - looking is the test
