"""When does H-GSP help? One factor at a time: criterion, allocation, temperature, threshold, gradient fix.

    python -m bench.least_loss --text wiki.valid.raw --work /tmp/least --table    # collects what this reads, no more
    python -m bench.hgsp --work /tmp/least --ratio 0.2 --ratio 0.5 --repair none --repair local

The text and the protocol are those of bench/least_loss.py; `--questions 200` asks the first 200 of PIQA as well. The
stages hessian (fisher) and sensitivity run first where they have not. Rows go to WORK/hgsp.jsonl; those that are there
are not measured again.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from bench.least_loss import Bench, _run
from bench.rows import add_row, read_rows
from libprune.report.markdown import markdown_table

BASE: dict[str, Any] = {"method": "hgsp", "temperature": 1.0, "threshold": "percentile:25"}
FIXES = ("normalize", "adaptive", "depth", "adaptive+depth")
TASKS = ("piqa_file",)
RANKS = {"criterion": "wanda", "scaling": "rank"}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "hgsp (T 1, percentile:25), unit_fisher": ({}, {}),
    "uniform": ({}, {"method": "uniform"}),
    "global": ({}, {"method": "global"}),
    "T 0.5": ({}, {"temperature": 0.5}),
    "T 2": ({}, {"temperature": 2.0}),
    "blockwise": ({}, {"threshold": "blockwise"}),
    "layerwise": ({}, {"threshold": "layerwise"}),
    "taylor": ({"criterion": "taylor"}, {}),
    "taylor_2nd": ({"criterion": "taylor_2nd"}, {}),
    "taylor, uniform": ({"criterion": "taylor"}, {"method": "uniform"}),
    "taylor, global": ({"criterion": "taylor"}, {"method": "global"}),
    **{f"fix {fix}": ({}, {"gradient_fix": fix}) for fix in FIXES},
    **{f"taylor, fix {fix}": ({"criterion": "taylor"}, {"gradient_fix": fix}) for fix in FIXES},
    "wanda in ranks": (RANKS, {}),
    "wanda in ranks, uniform": (RANKS, {"method": "uniform"}),
    "wanda in ranks, global": (RANKS, {"method": "global"}),
    "no floor": ({}, {"min_groups": 0, "min_channels": 0, "depth": "units"}),
    "collapse below 0.4": ({}, {"collapse_below": 0.4, "depth": "units"}),
}
"""By name what is set of the score, and what differs in the allocation from the first."""


def prepare(work: Path) -> None:
    """Run the stages that the other bench does not need."""
    params = yaml.safe_load((work / "params.yaml").read_text())
    params["hessian"]["estimator"] = "fisher"
    params["allocate"] |= BASE
    path = work / "params_hgsp.yaml"
    path.write_text(yaml.safe_dump(params))
    for stage in ("hessian", "sensitivity"):
        _run(stage, path, work / "artifacts", work / f"{stage}.done")


def where(kept: list[list[int]], units: list[int]) -> str:
    """The kept shares of groups and channels, in per cent, of the first, middle and last third of the layers."""
    third = len(kept) // 3
    parts = [kept[:third], kept[third : 2 * third], kept[2 * third :]]
    means = [[sum(row[i] for row in part) / len(part) / units[i] for i in range(len(units))] for part in parts]
    return ", ".join("/".join(f"{100 * value:.0f}" for value in mean) for mean in means)


def table(rows: list[dict[str, Any]], units: list[int]) -> str:
    """One line a setting and ratio, one column a repair; accuracy of what was repaired last."""
    repairs = sorted({row["repair"] for row in rows}, key=["none", "local", "sequential"].index)
    lines: dict[tuple[float, str], dict[str, str]] = {}
    for row in rows:
        cells = lines.setdefault((row["ratio_asked"], row["setting"]), {})
        cells[row["repair"]] = f"× {row['ratio']:.3f} ± {row['ratio_se']:.3f}"
        cells["where"] = where(row["kept"], units)
        if row["tasks"]:
            found = row["tasks"]["pruned"][TASKS[0]]
            cells["task"] = f"{100 * found['acc']:.1f} ± {100 * found['acc_se']:.1f} %"
    header = ("removed", "setting", *repairs, "PIQA", "groups/channels kept, %, by thirds of the depth")
    columns = [*repairs, "task", "where"]
    body = [
        (f"{100 * ratio:.0f} %", name, *(cells.get(column, "") for column in columns))
        for (ratio, name), cells in sorted(
            lines.items(), key=lambda item: (item[0][0], list(SETTINGS).index(item[0][1]))
        )
    ]
    return markdown_table(body, header)


def main(
    settings: Annotated[list[str] | None, typer.Argument(help="Names of SETTINGS; none: all.")] = None,
    work: Path = Path("/tmp/least"),
    ratio: list[float] = [0.2, 0.5],  # noqa: B006
    repair: list[str] = ["none", "local"],  # noqa: B006
    windows: int = 12,
    questions: int = 0,
) -> None:
    """Measure settings."""
    prepare(work)
    path = work / "hgsp.jsonl"
    rows = read_rows(path)
    done = {(row["setting"], row["ratio_asked"], row["repair"], bool(row["tasks"])) for row in rows}
    bench = Bench(work, windows, sequences=0, questions=questions, tasks=TASKS)
    for share in ratio:
        for name in settings or SETTINGS:
            score, changes = SETTINGS[name]
            for way in repair:
                if (name, share, way, bool(questions)) not in done:
                    setting = score, {**BASE, **changes}, {"repair": way}
                    rows.append(bench.measure(name, share, setting) | {"repair": way})
                    add_row(path, rows[-1])
                    print({key: value for key, value in rows[-1].items() if key != "kept"}, flush=True)
    print(table(rows, [bench.architecture.units(part) for part in bench.architecture.parts]))


if __name__ == "__main__":
    typer.run(main)
