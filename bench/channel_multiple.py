"""What channels in multiples cost in loss, against single channels.

    python -m bench.channel_multiple --artifacts artifacts --text wiki.valid.raw --rows /tmp/multiples.jsonl

Reads the artifacts of a run up to the score stage, with what the methods need beside the scores, and writes only the
rows. For each method and multiple, the masked and locally repaired dense model is judged on evaluation windows of the
artifacts and on windows of the text, both at even distances. A multiple may remove another share than the one asked
for. So it is compared with single channels twice: at the share asked for, and at the share that the multiple has
removed. A plan that is in the rows is not measured again.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoTokenizer

from bench.rows import add_row, read_rows
from libprune.allocation.decide import Decision, decide
from libprune.allocation.evidence import read_evidence
from libprune.engine import cost
from libprune.engine.surgery import masked
from libprune.models.compute import resolve_device, resolve_dtype
from libprune.models.folder import load_model
from libprune.models.layers import replaced
from libprune.models.sequences import Sequences
from libprune.models.tokens import read_tokens
from libprune.pipeline.artifacts import read_architecture, read_scores
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Allocate
from libprune.repair.repairs import local_repair
from libprune.report.markdown import markdown_table
from libprune.results.perplexity import estimate_perplexity, estimate_ratio, window_losses
from libprune.texts.windows import evenly

SAME = 0.001
"""Shares removed that differ by less than this count as the same."""
MULTIPLES = (1, 32, 64, 128, 256)
METHODS = ["uniform", "global"]
DENSE = "dense"


class Bench:
    """The dense model with its scores, and the windows that judge."""

    def __init__(self, artifacts: Path, text: Path, windows: int, length: int, batch_tokens: int) -> None:
        self.layout, self.batch_tokens = Layout(artifacts), batch_tokens
        self.architecture = read_architecture(self.layout)
        device = resolve_device("auto")
        self.model = load_model(self.layout.model, resolve_dtype("auto", device)).to(device)
        self.scores = read_scores(self.layout)
        self.repair = local_repair(self.layout, self.architecture)
        own, _ = read_tokens(self.layout.evaluation_tokens, self.architecture.fingerprint)
        own = own[torch.from_numpy(evenly(len(own), min(windows, len(own))))]
        self.windows = {"own": own, text.name: self._windows_of(text, windows, length)}

    def _windows_of(self, text: Path, windows: int, length: int) -> Sequences:
        tokenizer = AutoTokenizer.from_pretrained(self.layout.model, local_files_only=True)
        ids = torch.tensor(tokenizer(text.read_text(), add_special_tokens=False, verbose=False)["input_ids"])
        starts = torch.linspace(0, len(ids) - length, windows).round().long()
        return Sequences(torch.stack([ids[start : start + length] for start in starts]))

    def decide(self, method: str, multiple: int, ratio: float) -> Decision:
        """The plan of a method, as the allocate stage makes it."""
        params = Allocate(method=method, ratio=ratio, channel_multiple=multiple, evaluations=0)
        return decide(self.scores, params, read_evidence(self.layout, self.scores, params))

    def losses(self) -> dict[str, list[float]]:
        """The loss of each window, by text, nats."""
        return {
            name: window_losses(self.model, windows, self.batch_tokens, name).tolist()
            for name, windows in self.windows.items()
        }

    def measure(self, method: str, multiple: int, ratio: float, known: dict[str, Any]) -> dict[str, Any]:
        """One row; the losses of plans that are known by their digest are taken over."""
        plan = self.decide(method, multiple, ratio).plan
        if plan.digest not in known:
            with replaced(self.model, self.repair(plan)), masked(self.model, self.architecture, plan):
                known[plan.digest] = self.losses()
        return {
            "method": method,
            "multiple": multiple,
            "ratio": ratio,
            "plan": plan.digest,
            "removed": 1 - cost.size(self.architecture, plan).decoder / self.architecture.decoder_parameters,
            "kept": [[plan.kept(layer, part) for part in self.architecture.parts] for layer in plan.layers],
            "losses": known[plan.digest],
        }


def table(rows: list[dict[str, Any]], methods: list[str], ratio: float) -> str:
    """One line a method and multiple: its perplexity, and its ratio to single channels at both shares."""
    found = {(row["method"], row["multiple"], row["ratio"]): row for row in rows}
    dense = found[DENSE, 0, 0.0]
    lines = []
    for method in methods:
        for multiple in MULTIPLES:
            row = found[method, multiple, ratio]
            counts = list(zip(*row["kept"], strict=True))
            shapes = ", ".join(str(min(c)) if min(c) == max(c) else f"{min(c)} to {max(c)}" for c in counts)
            line = [method, str(multiple), shapes, f"{100 * row['removed']:.2f} %"]
            for text, losses in row["losses"].items():
                line.append(f"{estimate_perplexity(_array(losses)).value:.2f} (× {_ratio(dense, row, text)})")
                asked = found[method, 1, ratio]
                for other in (asked, found.get((method, 1, row["removed"]), asked)):
                    line.append(f"× {_ratio(other, row, text)}" if multiple > 1 else "")
            lines.append(tuple(line))
    heads = [
        head
        for text in dense["losses"]
        for head in (f"perplexity, {text} (to dense)", "to 1, asked share", "to 1, same share")
    ]
    return markdown_table(lines, ("method", "multiple", "kept", "removed", *heads))


def _array(losses: list[float]) -> Any:
    return torch.tensor(losses, dtype=torch.float64).numpy()


def _ratio(one: dict[str, Any], other: dict[str, Any], text: str) -> str:
    estimate = estimate_ratio(_array(one["losses"][text]), _array(other["losses"][text]))
    return f"{estimate.value:.3f} ± {estimate.error:.3f}"


def main(
    text: Annotated[Path, typer.Option(help="A held-out text.")],
    artifacts: Path = Path("artifacts"),
    rows: Path = Path("/tmp/multiples.jsonl"),
    ratio: float = 0.2,
    windows: int = 24,
    length: int = 512,
    batch_tokens: int = 1024,
    method: Annotated[list[str], typer.Option(help="Methods of allocation.")] = METHODS,
) -> None:
    """Measure all multiples and print the table."""
    measured = read_rows(rows)
    bench = Bench(artifacts, text, windows, length, batch_tokens)

    known = {row["plan"]: row["losses"] for row in measured}

    def keep(row: dict[str, Any]) -> dict[str, Any]:
        measured.append(row)
        add_row(rows, row)
        return row

    def measure(method: str, multiple: int, share: float) -> dict[str, Any]:
        there = [row for row in measured if (row["method"], row["multiple"], row["ratio"]) == (method, multiple, share)]
        return there[0] if there else keep(bench.measure(method, multiple, share, known))

    if DENSE not in known:
        dense = {"method": DENSE, "multiple": 0, "ratio": 0.0, "plan": DENSE, "removed": 0.0, "kept": []}
        keep(dense | {"losses": bench.losses()})
    for name in method:
        single = measure(name, 1, ratio)["removed"]
        for multiple in MULTIPLES:
            removed = measure(name, multiple, ratio)["removed"]
            if abs(removed - single) > SAME:
                measure(name, 1, removed)
    print(table(measured, method, ratio))


if __name__ == "__main__":
    typer.run(main)
