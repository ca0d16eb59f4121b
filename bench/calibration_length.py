"""Does the length of the sequences that gradients are collected on matter? As many tokens, cut differently.

    python -m bench.least_loss --text wiki.valid.raw --work /tmp/least --table    # collects what this reads, no more
    python -m bench.calibration_length --work /tmp/least

Only the scores differ: the repair reads the same Gram matrices for all. Text, windows and protocol are those of
bench/least_loss.py. Rows go to WORK/lengths.jsonl; those that are there are not measured again.
"""

from pathlib import Path
from typing import Any

import typer
import yaml

from bench.least_loss import Bench, _run
from bench.rows import add_row, read_rows
from libprune.pipeline.artifacts import read_table
from libprune.pipeline.layout import Layout
from libprune.report.markdown import markdown_table
from libprune.statistics.gradient_health import gradient_ratio

TOKENS = 128 * 256
CRITERIA, REPAIRS = ("unit_fisher", "taylor"), ("none", "local")


def collect(work: Path, length: int) -> Path:
    """Gradients on sequences of one length; everything else is linked from the other bench."""
    root = work / f"length-{length}"
    root.mkdir(exist_ok=True)
    for name in ("model", "architecture.json", "origin.json", "weights.parquet"):
        if not (root / name).exists():
            (root / name).symlink_to((work / "artifacts" / name).resolve())
    params: dict[str, Any] = yaml.safe_load((work / "params.yaml").read_text())
    count = TOKENS // length
    params["tokenize"] |= {"calibration_length": length, "calibration_sequences": count}
    params["gradients"] |= {"sequences": count}
    path = work / f"params_length_{length}.yaml"
    path.write_text(yaml.safe_dump(params))
    for stage in ("tokenize", "gradients"):
        _run(stage, path, root, work / f"{stage}-{length}.done")
    return root


def main(
    lengths: list[int] = [128, 256, 512],  # noqa: B006
    work: Path = Path("/tmp/least"),
    ratio: float = 0.2,
    windows: int = 12,
) -> None:
    """Measure lengths."""
    roots = {length: collect(work, length) for length in lengths}
    path = work / "lengths.jsonl"
    rows = read_rows(path)
    done = {(row["length"], row["criterion"], row["repair"], row["ratio_asked"]) for row in rows}
    bench = Bench(work, windows, sequences=0, questions=0)
    for length, root in roots.items():
        bench.scored = Layout(root)
        for criterion in CRITERIA:
            for repair in REPAIRS:
                if (length, criterion, repair, ratio) in done:
                    continue
                setting = {"criterion": criterion}, {"method": "global"}, {"repair": repair}
                row = bench.measure(f"{criterion}, global", ratio, setting)
                row |= {"length": length, "criterion": criterion, "repair": repair}
                rows.append(row)
                add_row(path, row)
    cells = {(row["length"], row["criterion"], row["repair"]): row for row in rows if row["ratio_asked"] == ratio}
    body = [
        (
            f"{TOKENS // length} × {length}",
            f"{gradient_ratio(read_table(root / 'gradients/layers.parquet', 'gradients')[0]):.1f}",
            *(
                f"× {cells[length, c, r]['ratio']:.3f} ± {cells[length, c, r]['ratio_se']:.3f}"
                for c in CRITERIA
                for r in REPAIRS
            ),
        )
        for length, root in roots.items()
    ]
    print(markdown_table(body, ("gradients on", "gradient ratio", *(f"{c}, {r}" for c in CRITERIA for r in REPAIRS))))


if __name__ == "__main__":
    typer.run(main)
