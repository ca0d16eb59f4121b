"""What a narrow calibration text costs on other text, and whether two texts mend it.

    python -m bench.mixed_text wiki.valid.raw package://gensim/test/test_data/lee_background.cor --work /tmp/mixed

Statistics and repair read the first half of the first text, or as many tokens, one half of them from the first half of
the second text. Both are judged on windows of 1024 tokens of the second halves. Nothing is trained afterwards. A ratio
is the perplexity over the dense model's; `mixed over alone` compares both calibrations window by window.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.recovery import IN_32, PER_LAYER, PRODUCERS, Setting, pruned_layout
from libprune.models.compute import resolve_device, resolve_dtype
from libprune.models.folder import load_model
from libprune.models.sequences import Sequences
from libprune.models.tokens import read_tokens
from libprune.pipeline.artifacts import read_architecture
from libprune.pipeline.layout import Layout
from libprune.report.markdown import markdown_table
from libprune.results.perplexity import Losses, estimate_ratio, window_losses
from libprune.texts.windows import evenly

SETTINGS = {
    "20 %, `functional` in multiples of 32, `local`": Setting("fast", 0.2, {}, IN_32),
    "50 %, `functional`, producer steps": Setting("fast", 0.5, {}, PER_LAYER | PRODUCERS),
}


def judged_windows(alone: Layout, mixed: Layout, windows: int) -> dict[str, Sequences]:
    """Windows at even distances of the second halves of both texts."""
    fingerprint = read_architecture(alone).fingerprint
    first, _ = read_tokens(alone.evaluation_tokens, fingerprint)
    both, about = read_tokens(mixed.evaluation_tokens, fingerprint)
    second = both[torch.tensor(about["sources"][1]["rows"])]
    return {
        name: found[torch.from_numpy(evenly(len(found), min(windows, len(found))))]
        for name, found in (("first text", first), ("second text", second))
    }


def losses_of(folder: Path, windows: dict[str, Sequences]) -> dict[str, Losses]:
    """The losses of a model on each window, by text."""
    device = resolve_device("auto")
    model = load_model(folder, resolve_dtype("auto", device), trust_remote_code=True).to(device)
    return {name: window_losses(model, one, 1024, folder.name) for name, one in windows.items()}


def main(
    text: Path,
    beside: Annotated[str, typer.Argument(help="The second text, as tokenize.text names one.")],
    alone: Annotated[Path, typer.Option(help="Folder of bench.recovery, or a new one.")] = Path("/tmp/recovery"),
    work: Path = Path("/tmp/mixed"),
    windows: int = 24,
) -> None:
    """Measure both calibrations."""
    name = str(text.resolve())
    both: list[dict[str, Any]] = [{"text": name, "share": 0.5}, {"text": beside, "share": 0.5}]
    dense, other = pruned_layout(alone, name, Setting(None, 0.0))[0], pruned_layout(work, both, Setting(None, 0.0))[0]
    judged, rows = judged_windows(dense, other, windows), []
    whole = losses_of(dense.model, judged)
    for setting, one in SETTINGS.items():
        layouts = [pruned_layout(alone, name, one)[0], pruned_layout(work, both, one)[0]]
        narrow, mixed = (losses_of(layout.pruned, judged) for layout in layouts)
        for part, windows_of in judged.items():
            pairs = [(whole, narrow), (whole, mixed), (narrow, mixed)]
            ratios = [estimate_ratio(before[part], after[part]) for before, after in pairs]
            cells = [f"× {ratio.value:.3f} ± {ratio.error:.3f}" for ratio in ratios]
            rows.append((setting, f"{part}, {len(windows_of)} windows", *cells))
            print(rows[-1], flush=True)
    print(markdown_table(rows, ("setting", "judged on", "alone", "mixed", "mixed over alone")))


if __name__ == "__main__":
    typer.run(main)
