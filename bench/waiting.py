"""What each stage of a run takes: seconds on the clock, and seconds of all cores together, the children's included.

    python -m bench.waiting --work DIR
    python -m bench.waiting --work DIR --stages slice,evaluate

Runs the stages of dvc.yaml one after the other in a folder of its own, without DVC and so without its cache. The CPU
seconds of one thread (`--threads 1`) hardly depend on what else the machine does, unlike the seconds on the clock.
"""

import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
import yaml

from libprune.pipeline.terminal import text_table

ROOT = Path(__file__).parents[1]


def run_stage(stage: str, work: Path, threads: int | None) -> tuple[float, float]:
    """Run a stage in a folder with its params; seconds on the clock, and of all cores together."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", f"stages.{stage}"], cwd=work, env=environment, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cores = sum(getattr(after, kind) - getattr(before, kind) for kind in ("ru_utime", "ru_stime"))
    return time.perf_counter() - start, cores


def main(
    work: Annotated[
        Path, typer.Option("--work", help="The folder to run in; the params of the demo are copied there.")
    ],
    params: Annotated[Path, typer.Option("--params", help="Other params.")] = ROOT / "params.yaml",
    stages: Annotated[
        str, typer.Option("--stages", help="Some stages, with commas between; the others have run.")
    ] = "",
    threads: Annotated[
        int | None, typer.Option("--threads", help="Threads of torch; as many as cores if absent.")
    ] = None,
) -> None:
    """Run the stages, and print what each of them takes."""
    work.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(params, work / "params.yaml")
    names = stages.split(",") if stages else list(yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"])
    taken = {name: run_stage(name, work, threads) for name in names}
    taken["all"] = sum(one[0] for one in taken.values()), sum(one[1] for one in taken.values())
    rows = [(name, f"{clock:.1f}", f"{cores:.1f}") for name, (clock, cores) in taken.items()]
    print(text_table(rows, ("stage", "seconds", "CPU seconds")))


if __name__ == "__main__":
    typer.run(main)
