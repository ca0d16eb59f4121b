"""Agreement of a program with the model, on programs whose faults are known."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from libprune.engine.errors import ExportError
from libprune.export import comparison
from libprune.export.comparison import LENGTH, WRITTEN, choose_prompts, compare, speed_sentence
from libprune.models.folder import load_model
from libprune.results.speed import Speed, SpeedComparison
from tests.support.exported import run_here, texts, write_pruned


@dataclass
class InTorch:
    """The model itself as a program, each of its logits changed by a function of its index."""

    model: torch.nn.Module
    temperature: float = 1.0
    version: str = "a program 1.0"

    def predict(self, ids: Sequence[int], vocab: int) -> Tensor:
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([list(ids)])).logits[0, -1]
        return (logits / self.temperature).log_softmax(-1)

    def write(self, ids: Sequence[int], number: int) -> list[int]:
        written: list[int] = []
        for _ in range(number):
            written.append(int(self.predict([*ids, *written], 0).argmax()))
        return written

    def time(self, ids: Sequence[int], number: int) -> tuple[float, float]:
        return 1.0, 1.0


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """The model runs in this process; a test of the stage runs it in a fresh one."""
    monkeypatch.setattr(comparison, "reload", run_here)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    _, source = write_pruned(tmp_path_factory.mktemp("pruned"), "llama", "per_layer")
    return source, load_model(source.folder, torch.float32, trust_remote_code=True)


def test_the_model_agrees_with_itself(pruned):
    source, model = pruned
    agreement = compare(InTorch(model), source, texts(3), limit=1e-6)
    assert agreement.difference < 1e-4
    assert (agreement.prompts, agreement.tokens, agreement.written) == (3, 12, 12)
    assert (agreement.same_first, agreement.same_written) == (3, 12)


def test_a_program_that_computes_something_else_stops_with_its_figures(pruned):
    source, model = pruned
    with pytest.raises(ExportError, match=r"a program 1\.0 computes something else than .*12 of 12 tokens"):
        compare(InTorch(model, temperature=3.0), source, texts(), limit=1e-3)
    with pytest.raises(ExportError, match="computes something else"):
        compare(InTorch(model, temperature=float("nan")), source, texts(), limit=1e-3)


def test_a_divergence_is_that_of_the_two_distributions(pruned):
    source, model = pruned
    rows = texts(2)
    agreement = compare(InTorch(model, temperature=1.5), source, rows, limit=10.0)
    exact, changed = (
        torch.stack([InTorch(model, warm).predict(row[:12].tolist(), 0) for row in rows]) for warm in (1.0, 1.5)
    )
    expected = torch.nn.functional.kl_div(changed, exact, log_target=True, reduction="batchmean")
    assert agreement.divergence == pytest.approx(float(expected), rel=1e-4)
    assert agreement.difference == pytest.approx(float((changed - exact).abs().max()), rel=1e-3)


def test_prompts_are_spread_over_the_windows():
    windows = torch.arange(9)[:, None].expand(9, 512)
    chosen = choose_prompts(windows)
    assert chosen[:, 0].tolist() == [0, 3, 5, 8]
    assert chosen.shape[1] == LENGTH + WRITTEN
    assert choose_prompts(windows[:2, :16]).shape == (2, 16)


def test_speeds_are_said_with_their_spread():
    speed = SpeedComparison(Speed(1.0, 1.0), Speed(2.0, 1.0), 2.0, 1.0, (1.9, 2.1), (0.9, 1.1))
    assert speed_sentence(speed) == (
        "prefill × 2.00 (1.90 to 2.10) and decode × 1.00 (0.90 to 1.10) of the dense model's speed in the same program"
    )
