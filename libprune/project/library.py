"""The steps of the pipeline as functions of a Python program: each does what the stages of the same names do.

All that they compute lies as artifacts in one folder, which `docs/formats.md` describes, so that a program can stop
after any step and go on another day. Nothing is cached: a function that is called again computes again.
"""

import io
from collections.abc import Mapping
from contextlib import chdir, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from libprune.engine.errors import ProjectError
from libprune.engine.plan import Plan
from libprune.engine.tables import Columns
from libprune.engine.yaml_file import read_yaml
from libprune.pipeline.artifacts import read_architecture, read_json, read_plan, read_table
from libprune.pipeline.atomic import writing
from libprune.pipeline.layout import Layout
from libprune.pipeline.params import Params, load_params
from libprune.pipeline.stage import quiet
from libprune.project.params_file import changed, params_text

Settings = Mapping[str, Any]
"""Values of params by key, such as `{"score.criterion": "wanda"}`; they hold for later steps too."""


@dataclass(frozen=True)
class Work:
    """A model that is being pruned.

    Attributes:
        folder: where the params and all artifacts of it lie.
    """

    folder: Path

    @property
    def layout(self) -> Layout:
        """The paths of the artifacts."""
        return Layout(self.folder / "artifacts")

    @property
    def params(self) -> Params:
        """The params that the next step is done with."""
        return load_params(self.folder / "params.yaml")


def load(model: str | Path, text: str | Path, folder: str | Path, settings: Settings | None = None) -> Work:
    """Load a model and draw calibration and evaluation windows from a text.

    Args:
        model: a folder, a GGUF file, a hub id, or `package://name/file`.
        text: a file, a folder, a hub id, or `package://name/file`.
        folder: where all that is computed is written; it does not exist, or was made by this function.
        settings: values of params by key.

    Raises:
        LibpruneError: if the model or the text cannot be read, or a value of the params is not valid.
    """
    work = Work(Path(folder))
    if work.folder.exists() and not (work.folder / "params.yaml").is_file():
        raise ProjectError(f"{work.folder} exists and holds no params.yaml; name a folder that does not exist")
    _write(work, params_text({"prepare.model": str(model), "tokenize.text": str(text), **(settings or {})}))
    _run(work, "sources", "prepare", "tokenize")
    return work


def collect(work: Work, settings: Settings | None = None) -> None:
    """Collect gradients, activations, and what else the params ask for; interrupted work is resumed.

    Raises:
        LibpruneError: if a statistic is not finite, or a value of the params is not valid.
    """
    _change(work, settings)
    _run(work, "gradients", "hessian", "activations", "ablation")


def score(work: Work, settings: Settings | None = None) -> Columns:
    """Score every unit that can be removed, from what was collected.

    Returns:
        The importance table: arrays of one entry for each unit, by the name of the column (see `docs/formats.md`).

    Raises:
        LibpruneError: if the criterion needs what was not collected.
    """
    _change(work, settings)
    _run(work, "score")
    return read_table(work.layout.scores, "score")[0]


def allocate(work: Work, ratio: float | None = None, settings: Settings | None = None) -> Plan:
    """Decide which units stay, so that the share that is asked for goes.

    Args:
        work: with scores.
        ratio: the share of the decoder layers' parameters to remove, between 0 and 1; None for that of the params.
        settings: values of params by key.

    Raises:
        LibpruneError: if the share cannot be removed.
    """
    _change(work, {} if ratio is None else {"allocate.ratio": ratio}, settings)
    _run(work, "sensitivity", "depth", "levels", "width", "latency", "allocate")
    return read_plan(work.layout, read_architecture(work.layout))[0]


def prune(work: Work, settings: Settings | None = None) -> Path:
    """Write the pruned model, train it if `recover.method` asks for it, and export it if `export.formats` does.

    Returns:
        The folder of the final model, which transformers loads.

    Raises:
        LibpruneError: if the model cannot be written, or does not compute what it should.
    """
    _change(work, settings)
    _run(work, "slice", "teacher", "recover", "export")
    return work.layout.pruned if work.params.recover.method == "none" else work.layout.recovered


def evaluate(work: Work, settings: Settings | None = None) -> dict[str, Any]:
    """Measure perplexity, size and speed of the dense and the final model.

    Returns:
        The content of `artifacts/evaluation.json` (see `docs/formats.md`).

    Raises:
        LibpruneError: if there is no pruned model.
    """
    _change(work, settings)
    _run(work, "evaluate")
    return read_json(work.layout.evaluation, "evaluate")


def _change(work: Work, *settings: Settings | None) -> None:
    path = work.folder / "params.yaml"
    values = {key: value for given in settings for key, value in (given or {}).items()}
    if values:
        read_yaml(path)
        _write(work, changed(path.read_text(), values))


def _write(work: Work, text: str) -> None:
    with writing(work.folder / "params.yaml") as partial:
        partial.write_text(text)


def _run(work: Work, *stages: str) -> None:
    """Run stages as functions; what they print for people is not shown."""
    quiet()
    with chdir(work.folder), redirect_stdout(io.StringIO()):
        for stage in stages:
            import_module(f"libprune.stages.{stage}").main()
