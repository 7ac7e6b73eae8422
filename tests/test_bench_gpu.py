"""Family gpu on the CPU: it goes on where it was, and counts operations as anyone can."""

import json
from argparse import Namespace
from itertools import pairwise

import pytest
import torch

from mpifl.bench import gpu
from mpifl.bench.__main__ import main
from mpifl.config import UserError


def options(**changes):
    usual = {"only": ["peak"], "device": "cpu", "folder": None, "json": None, "rounds": 2, "fedjax": None, "pfl": None}
    return Namespace(**usual | changes)


def test_what_a_file_holds_is_shown_and_not_measured_again(tmp_path, capfd, monkeypatch):
    file = tmp_path / "gpu.jsonl"
    lines = [
        {"family": "gpu", "case": "peak, tf32", "TFLOP_per_s": 123.0},
        {"family": "round", "case": "peak, bf16", "TFLOP_per_s": 5.0},  # of another family
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    measured = []
    monkeypatch.setattr(gpu, "matrix_peak", lambda dtype, device: measured.append(dtype) or 7.0)
    assert main(["gpu", "--device", "cpu", "--only", "peak", "--json", str(file)]) == 0
    assert measured == ["float32", "bf16"]
    written = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["case"] for line in written[2:]] == ["peak, float32", "peak, bf16"]
    assert "123.000" in capfd.readouterr().out
    assert main(["gpu", "--device", "cpu", "--only", "peak", "--json", str(file)]) == 0
    assert len(measured) == 2 and len(file.read_text().splitlines()) == 4


def test_operations_of_a_perceptron_are_those_of_its_products():
    widths = [64, 30, 10]
    table = {
        "rounds": 2,
        "data": {"path": "digits"},
        "model": {"name": "mlp", "hidden": [30]},
        "algorithm": {"name": "fedavg", "batches": {"size": 5}},
        "run": {},
    }
    weights = [a * b for a, b in pairwise(widths)]
    forward, of_weights, of_inputs = sum(weights), sum(weights), sum(weights[1:])
    assert gpu.flops_of_an_example(table) == 2 * (forward + of_weights + of_inputs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(UserError, match="sees no GPU here; --device cpu"):
        next(gpu.cases(options(device="cuda")))
