"""Which axes to cut under one budget: channels, groups, query heads, layers and the residual width, alone and together.

    python -m bench.axes --text wiki.valid.raw --work /tmp/axes "channels" "all, uniform"
    python -m bench.axes --work /tmp/axes --table
    python -m bench.axes --work /tmp/axes --curves

The first half of the text calibrates (128 sequences of 256 tokens; gradients on the first 64; levels, depth and width
on the last 4), its second half judges (`--windows` of its windows of 1024 tokens, at even distances). `--of decoder`
counts the share in the layers, `--of total` in the whole model. Nothing is trained. Every row is a sliced folder that
was proved to load; a budget that a setting cannot reach is a row that says so. Rows go to WORK/rows.jsonl; those that
are there are not measured again, and a plan that another setting has come to as well is measured once. `--curves`
prints what the programme predicts for nine sizes, with and without whole layers and the residual width.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from bench.recovery import Judge, base_params
from bench.rows import add_row, read_rows
from libprune.curves.plans import plan_curve
from libprune.pipeline.artifacts import read_architecture, read_plan
from libprune.pipeline.layout import Layout
from libprune.pipeline.params import load_params
from libprune.report.markdown import markdown_table

COLLECTING = (
    "prepare",
    "tokenize",
    "gradients",
    "hessian",
    "activations",
    "ablation",
    "score",
    "levels",
    "depth",
    "width",
)
OUTCOME = ("own", "shape", "slice_seconds", "why")
"""What a row holds of a plan that was sliced and judged, or could not be."""
MEASURED = {"method": "search", "depth": "joint", "width": "auto"}
"""Params by which the base measures all that any setting reads."""


@dataclass(frozen=True)
class Setting:
    """Which axes may be cut, and by what they are chosen.

    Attributes:
        heads: units of the attention, as `prepare.heads`.
        allocate: the params of the allocation that differ from those of the bench.
    """

    heads: str
    allocate: dict[str, Any]


UNIFORM: dict[str, Any] = {"method": "uniform"}
BY_LEVELS: dict[str, Any] = {"method": "search", "shape": "uniform"}
PER_LAYER: dict[str, Any] = {"method": "search", "shape": "per_layer"}
SETTINGS = {
    "channels": Setting("groups", UNIFORM | {"min_groups": 3}),
    "groups and channels": Setting("groups", UNIFORM),
    "groups and channels, by levels": Setting("groups", BY_LEVELS),
    "query heads and channels": Setting("queries", UNIFORM),
    "query heads and channels, by levels": Setting("queries", BY_LEVELS),
    "layers, the rest channels": Setting("groups", UNIFORM | {"depth": "joint", "min_groups": 3}),
    "layers by cosine, the rest channels": Setting("groups", UNIFORM | {"depth": "cosine", "min_groups": 3}),
    "width 504, the rest channels": Setting("groups", UNIFORM | {"width": 504, "min_groups": 3}),
    "all, uniform": Setting("groups", BY_LEVELS | {"depth": "joint", "width": "auto"}),
    "all with query heads, uniform": Setting("queries", BY_LEVELS | {"depth": "joint", "width": "auto"}),
    "all without width, uniform": Setting("groups", BY_LEVELS | {"depth": "joint"}),
    "groups and channels, per layer": Setting("groups", PER_LAYER),
    "all, per layer": Setting("groups", PER_LAYER | {"depth": "joint", "width": "auto"}),
}


def write_params(path: Path, text: str, sections: dict[str, dict[str, Any]]) -> None:
    """The params of the repository with the bench's text and some changes."""
    params = base_params(text)
    params["tokenize"] |= {"calibration_sequences": 128}
    params["gradients"] |= {"sequences": 64}
    params["levels"] |= {"sequences": 4, "number": 6}
    params["depth"] |= {"sequences": 4, "removals": 12, "candidates": 6}
    params["width"] |= {"sequences": 4, "widths": 3}
    for section, changes in sections.items():
        params[section] = params[section] | changes
    path.write_text(yaml.safe_dump(params))


def run(stage: str, params: Path, root: Path) -> str:
    """Run a stage on the artifacts of a folder, with its metrics beside them; what it printed if it failed."""
    command = [sys.executable, "-m", f"stages.{stage}", "--params", str(params), "--artifacts", str(root)]
    command += ["--metrics", str(root.parent / "metrics")] if stage in ("allocate", "slice") else []
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(done.stdout, flush=True)
    return done.stdout if done.returncode else ""


def collect(work: Path, text: str, heads: str) -> Path:
    """The artifacts that all settings with these units of the attention read; each stage runs once."""
    base = work / heads / "artifacts"
    base.mkdir(parents=True, exist_ok=True)
    write_params(base.parent / "params.yaml", text, {"prepare": {"heads": heads}, "allocate": MEASURED})
    for stage in COLLECTING:
        done = base.parent / f"{stage}.done"
        if not done.exists():
            if failed := run(stage, base.parent / "params.yaml", base):
                raise SystemExit(failed)
            done.touch()
    return base


def planned(work: Path, text: str, name: str, of: str, ratio: float, repair: str) -> tuple[Path | None, dict[str, Any]]:
    """A folder with a plan, or None where the setting cannot reach the share; and what was planned."""
    setting, root = SETTINGS[name], work / "run" / "artifacts"
    base = collect(work, text, setting.heads)
    subprocess.run(["rm", "-rf", str(root.parent)], check=True)
    root.mkdir(parents=True)
    for path in base.iterdir():
        (root / path.name).symlink_to(path.resolve())
    share = {"ratio": ratio, "ratio_of": of, "channel_multiple": 1}
    changes = {"prepare": {"heads": setting.heads}, "allocate": share | setting.allocate, "slice": {"repair": repair}}
    write_params(root.parent / "params.yaml", text, changes)
    row: dict[str, Any] = {"setting": name, "of": of, "ratio": ratio, "repair": repair}
    start = time.perf_counter()
    failed = run("allocate", root.parent / "params.yaml", root)
    row |= {"plan_seconds": time.perf_counter() - start}
    if failed:
        return None, row | {"why": failed.strip().splitlines()[-1]}
    allocation = json.loads((root.parent / "metrics" / "allocation.json").read_text())
    layout = Layout(root)
    plan, _ = read_plan(layout, read_architecture(layout))
    return root, row | {"allocation": allocation, "plan": plan.digest}


def measured(root: Path, judge: Callable[[Layout], Judge]) -> dict[str, Any]:
    """The loss of the folder that a plan makes, and its shape; or why the plan cannot be sliced."""
    start = time.perf_counter()
    if failed := run("slice", root.parent / "params.yaml", root):
        return {"why": failed.strip().splitlines()[-1]}
    seconds, layout = time.perf_counter() - start, Layout(root)
    rows: dict[str, Any] = judge(layout).rows({"pruned": layout.pruned})["pruned"]
    return rows | {"shape": shape_of(layout.pruned), "slice_seconds": seconds}


def shape_of(folder: Path) -> str:
    """The shape of a pruned model in its config's own words."""
    config = json.loads((folder / "config.json").read_text())
    keys = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return " ".join(str(config[key]) for key in keys)


def table(rows: list[dict[str, Any]]) -> str:
    """One line a setting, scope and repair; one column a ratio."""
    ratios = sorted({row["ratio"] for row in rows})
    lines: dict[tuple[str, str, str], dict[float, str]] = {}
    for row in rows:
        text = (
            f"× {row['own']['ratio']:.3f} ± {row['own']['se']:.3f} ({row['shape']})" if "own" in row else "not reached"
        )
        lines.setdefault((row["setting"], row["of"], row["repair"]), {})[row["ratio"]] = text
    header = ("axes", "share of", "repair", *(f"{100 * ratio:.0f} %" for ratio in ratios))
    return markdown_table([(*key, *(cells.get(r, "") for r in ratios)) for key, cells in lines.items()], header)


def curves(work: Path) -> str:
    """What the programme predicts for nine shares of the decoder: by shape, with and without the larger axes."""
    base = work / "groups"
    lines: dict[float, list[str]] = {}
    columns = []
    for shape, larger in product(("uniform", "per_layer"), (False, True)):
        chosen = {"depth": "joint", "width": "auto"} if larger else {"depth": "none", "width": None}
        params = yaml.safe_load((base / "params.yaml").read_text())
        asked = {"method": "search", "shape": shape, "evaluations": 0, "channel_multiple": 1}
        path = work / "curve.yaml"
        path.write_text(yaml.safe_dump({**params, "allocate": params["allocate"] | asked | chosen}))
        start = time.perf_counter()
        curve = plan_curve(Layout(base / "artifacts"), load_params(path))
        seconds = time.perf_counter() - start
        columns.append(f"{shape}{', all axes' if larger else ''} ({seconds:.1f} s)")
        for one in curve.planned:
            assert one.divergence is not None
            frame = f" ({len(one.plan.layers)} layers, width {one.plan.width or 'whole'})" if larger else ""
            lines.setdefault(one.ratio, []).append(f"{one.divergence:.3f}{frame}")
    rows = [(f"{100 * ratio:.0f} %", *cells) for ratio, cells in lines.items()]
    return markdown_table(rows, ("removed", *columns))


def main(
    settings: Annotated[list[str] | None, typer.Argument(help="Names of SETTINGS; none: all.")] = None,
    work: Path = Path("/tmp/axes"),
    text: Path | None = None,
    ratio: list[float] = [0.2, 0.35, 0.5],  # noqa: B006
    of: list[str] = ["decoder", "total"],  # noqa: B006
    repair: list[str] = ["local"],  # noqa: B006
    windows: int = 24,
    show: Annotated[bool, typer.Option("--table", help="Only print what was measured.")] = False,
    nine: Annotated[bool, typer.Option("--curves", help="Only print what is predicted for nine sizes.")] = False,
) -> None:
    """Measure settings."""
    if nine:
        print(curves(work))
        return
    path = work / "rows.jsonl"
    rows = read_rows(path)
    done = {(row["setting"], row["of"], row["ratio"], row["repair"]) for row in rows}
    judge = cache(lambda layout: Judge(work, layout, windows, "", 0))
    todo = [
        (name, scope, share, how) for how in repair for scope in of for share in ratio for name in settings or SETTINGS
    ]
    for key in todo if text is not None and not show else []:
        if key in done:
            continue
        root, row = planned(work, str(text.resolve()), *key)
        if root is not None:
            same = [one for one in rows if (one.get("plan"), one["repair"]) == (row["plan"], row["repair"])]
            row |= {name: same[0][name] for name in OUTCOME if name in same[0]} if same else measured(root, judge)
        rows.append(row)
        add_row(path, row)
        print({name: value for name, value in row.items() if name != "allocation"}, flush=True)
    print(table(rows))


if __name__ == "__main__":
    typer.run(main)
