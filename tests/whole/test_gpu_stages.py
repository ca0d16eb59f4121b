"""Every stage that runs a model, on a pretended GPU: it mixes no devices, and writes what it writes on a CPU."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from libprune.collection import calibration
from libprune.pipeline.artifacts import read_table
from libprune.results import evaluate
from tests.support import tiny
from tests.support.pretended import on_gpu, pretending

FIRST = ("prepare", "tokenize", "gradients", "activations", "score")
MEASURED = ("depth", "levels", "width", "allocate", "slice", "teacher", "recover", "evaluate")
FEW = {"sequences": 2}
CHANGES: dict[str, dict] = {
    "tokenize": {"calibration_sequences": 16},
    "score": {"scaling": "rank"},
    "depth": FEW | {"removals": 1},
    "levels": FEW | {"number": 2},
    "allocate": {"method": "search", "worth": "none", "depth": "joint", "evaluations": 1},
    "slice": {"repair": "sequential", "producer_steps": 1},
}


@pytest.fixture
def gpu(monkeypatch) -> None:
    """A GPU with room for all, on which models are placed."""

    def placed(model: PreTrainedModel, *given: Any) -> PreTrainedModel:
        return model if given[-1].type == "cpu" else on_gpu(model)

    for module in (calibration, evaluate):
        monkeypatch.setattr(module, "place", placed)
    answers: dict[str, Callable[..., object]] = {"mem_get_info": lambda *_: (1 << 40, 1 << 40)}
    answers |= dict.fromkeys(("set_device", "synchronize"), lambda *_: None)
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)


def tables(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    return {str(path.relative_to(folder)): read_table(path, "any")[0] for path in folder.rglob("artifacts/*.parquet")}


def test_on_a_gpu_the_stages_write_what_they_write_on_a_cpu(tmp_path, gpu, quick_proof):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    tiny.write_project(one, FIRST, **CHANGES)
    shutil.copytree(one, two)
    tiny.run_stages(one, MEASURED)
    tiny.change_params(two, "compute", device="cuda")
    with pretending():
        tiny.run_stages(two, MEASURED)
    found, expected = tables(two), tables(one)
    assert found.keys() == expected.keys() >= {f"artifacts/{name}.parquet" for name in ("depth", "levels", "plan")}
    for name, table in expected.items():
        for column, values in table.items():
            close = {"rtol": 1e-4, "atol": 1e-7} if values.dtype.kind == "f" else {}
            agree = np.testing.assert_allclose if close else np.testing.assert_array_equal
            agree(found[name][column], values, err_msg=f"{name}, {column}", **close)
