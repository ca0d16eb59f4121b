"""The `libprune curve` command: many sizes of a model from one measurement."""

import time
from pathlib import Path
from typing import Annotated

import typer

from libprune.engine.errors import printable
from libprune.pipeline import stage

OUT = Path("report/curve")
ALL = "all"
"""The word that chooses every ratio."""

Ratios = Annotated[
    list[str] | None,
    typer.Argument(help="Shares to remove, such as 0.1,0.2,0.3; by default 0.1 to 0.9 in tenths.", show_default=False),
]
Run = Annotated[
    str | None,
    typer.Option("--run", help=f"Slice and evaluate these ratios, such as 0.2,0.5, or {ALL}; others are only planned."),
]
Nested = Annotated[bool, typer.Option("--nested", help="Make each smaller model a part of the larger ones.")]
Out = Annotated[Path, typer.Option("--out", help="The folder for what is written.")]


def curve(ratios: Ratios = None, run: Run = None, nested: Nested = False, out: Out = OUT) -> None:
    """Plan many sizes of a model from one measurement, and draw loss against size, memory and speed.

    Measurements for the plans are made first, if they are not up to date. Each size that --run names becomes a DVC
    experiment; sizes that have results are not run again.
    """
    from libprune.curves.measured import require_curve, run_curve
    from libprune.curves.page import write_curve
    from libprune.curves.plans import DEFAULT, parse_ratios, plan_curve
    from libprune.curves.table import Drawn
    from libprune.engine.errors import ParamsError, ProjectError
    from libprune.pipeline.artifacts import read_json
    from libprune.pipeline.layout import Layout
    from libprune.pipeline.params import load_params
    from libprune.project.commands import in_repository
    from libprune.project.run import run as run_stages
    from libprune.project.run import stages_before

    layout = Layout(stage.ROOT)
    with stage.user_errors():
        wanted = parse_ratios(ratios) if ratios else DEFAULT
        chosen = () if run is None else wanted if run == ALL else parse_ratios([run])
        if unplanned := [ratio for ratio in chosen if ratio not in wanted]:
            raise ParamsError(f"--run {unplanned[0]:g} is not among the ratios {', '.join(map('{:g}'.format, wanted))}")
        needed = stages_before(Path(), "allocate")
        if chosen and not in_repository(Path()):
            raise ProjectError(
                f"--run makes DVC experiments, which need a git repository, and {Path().absolute()} is in none; leave "
                "--run out, or run `git init` and `dvc config core.no_scm false`, and commit the project"
            )
        params = load_params(stage.PARAMS)
        require_curve(stage.PARAMS, params.allocate, wanted, nested)
        run_stages(Path(), needed)
        start = time.monotonic()
        planned = plan_curve(layout, params, wanted, nested)
        typer.echo(f"{len(planned.planned)} plans in {time.monotonic() - start:.1f} s")
        try:
            measured, failed, remarks = run_curve(stage.PARAMS, planned, chosen, out, typer.echo)
        except KeyboardInterrupt:
            typer.echo("stopped; the same command goes on from here", err=True)
            raise SystemExit(130) from None
        model = str(read_json(layout.origin, "prepare").get("name") or Path(params.prepare.model).name)
        typer.echo(printable(write_curve(Drawn(model, planned, measured, remarks), out)))
        for name, reason in failed.items():
            typer.echo(printable(f"failed: {name}: {reason}"), err=True)
    if failed:
        raise SystemExit(1)
