"""What a GPU is measured by runs on a CPU as well, line by line, with shapes of a few thousand parameters."""

from pathlib import Path

import pytest

from bench import gpu
from bench.rows import read_rows
from libprune.statistics import latency
from tests.support import tiny

FEW = gpu.Texts(sequences=8, length=16, at_once=64, trained=128, decoded=2, rounds=1)


def refused(folder: Path) -> list[tuple[str, str]]:
    return [(row["what"], row["not run"]) for row in read_rows(folder / "rows.jsonl") if "not run" in row]


def test_every_measurement_of_a_mixture_runs(monkeypatch, quick_proof, tmp_path):
    """Only an odd width of experts is refused, by the grouped kernels of PyTorch."""
    monkeypatch.setattr(gpu, "Texts", lambda: FEW)
    monkeypatch.setattr(latency, "_seconds", tiny.by_parameters)  # the time of so small a layer is noise
    work = tmp_path / "work"
    gpu.main(work, shapes="tiny-mixture", device="cpu", minutes=10.0, layers=2)
    assert refused(work) == [("257 of 320 (multiple of 1)", "RuntimeError: strides should be multiple of 16 bytes")]
    assert (work / "gpu.md").read_text().count("tiny-mixture, 2 of 4 layers, bfloat16, random weights") == 3
    rows = read_rows(work / "rows.jsonl")
    assert {row["what"] for row in rows if "tokens_per_second" in row} >= {"forward+backward", "gradients"}
    assert {row["what"] for row in rows if "seconds" in row} == {*gpu.STAGES, "all"}


def test_passes_and_speeds_of_a_dense_model_run(tmp_path):
    bench = gpu.Bench(tmp_path, gpu.Gauge(gpu.resolve_device("cpu")), FEW, minutes=10.0)
    rows = [*gpu.passes(bench, gpu.SHAPES["tiny"]), *gpu.speeds(bench, gpu.SHAPES["tiny"])]
    assert len(rows) == 6 + len(gpu.MULTIPLES)
    assert [row for row in rows if "not run" in row] == []


def test_nothing_begins_when_the_minutes_are_over(tmp_path):
    bench = gpu.Bench(tmp_path, gpu.Gauge(gpu.resolve_device("cpu")), FEW, minutes=0.0)
    assert [row["not run"] for row in gpu.speeds(bench, gpu.SHAPES["tiny"])] == ["the 0 minutes were over"] * 4


@pytest.mark.parametrize("name", ["llama-8b", "qwen3-30b-a3b"])
def test_the_shapes_are_those_of_the_real_models(name):
    shape = gpu.SHAPES[name]
    config = shape.config(**shape.sizes, num_hidden_layers=shape.layers)
    with gpu.torch.device("meta"):
        model = gpu.AutoModelForCausalLM.from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == {"llama-8b": 8_030_261_248, "qwen3-30b-a3b": 30_532_122_624}[name]
