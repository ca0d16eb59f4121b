"""The paths of all artifacts."""

from dataclasses import dataclass
from pathlib import Path

NOTHING = "nothing.json"
"""The one file of the folder of a stage that had nothing to do, with the params that say so."""
NOTE = "recovery.json"
"""The file of the folder of the recovered model where there is none; a recovered model has its record instead."""


class Place:
    """An attribute of a `Layout`: a path below its root."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, layout: "Layout", owner: type) -> Path:
        return layout.root / self._name


@dataclass(frozen=True)
class Layout:
    """The paths of all artifacts below one folder."""

    root: Path = Path("artifacts")

    sources = Place("sources")
    """Links to the local files and folders that models and texts are read from."""

    @property
    def work(self) -> Path:
        """The folder of unfinished work, outside of the artifacts."""
        return self.root.parent / ".work"

    @property
    def digests(self) -> Path:
        """The file that keeps the digests of files that were read, outside of the artifacts."""
        return self.work / "digests.json"

    model = Place("model")
    """The dense model, a Hugging Face folder."""
    architecture = Place("architecture.json")
    """Axes, sizes and parameters of the dense model."""
    origin = Place("origin.json")
    """Name, licence and place on the hub of the dense model."""
    vocabulary = Place("vocabulary.json")
    """Which tokens stayed, and the tokenizer that was given; a note where all did."""
    weights = Place("weights.parquet")
    """Per-unit costs and weight norms."""
    calibration_tokens = Place("tokens/calibration.parquet")
    """Token ids that statistics are collected on."""
    repair_tokens = Place("tokens/repair.parquet")
    """Token ids that the sequential repair is fitted to."""
    evaluation_tokens = Place("tokens/evaluation.parquet")
    """Token ids that both models are evaluated on."""
    recovery_tokens = Place("tokens/recovery.parquet")
    """Token ids that the pruned model is trained on."""
    teacher = Place("teacher")
    """What the dense model predicts on these tokens."""
    gradients = Place("gradients")
    """Mean gradients by layer and their per-unit sums."""
    hessian = Place("hessian")
    """Diagonals of the Hessian by layer and their per-unit sums."""
    activations = Place("activations")
    """Activation statistics by layer and their per-unit sums."""
    ablation = Place("ablation.parquet")
    """The measured loss increase of masking single units."""
    sensitivity = Place("sensitivity.parquet")
    """The measured loss increase of removing whole layers, and each block alone."""
    depth = Place("depth.parquet")
    """The order in which whole layers or parts go, with the divergence without them."""
    levels = Place("levels.parquet")
    """The measured divergence of the model when one block alone is taken to a level."""
    widths = Place("width.parquet")
    """The measured divergence of the model when its residual stream is narrower."""
    width_axes = Place("width")
    """The axes along which the residual stream is narrowed, and moments along them."""
    latency = Place("latency.json")
    """The measured time of a layer by its width."""
    scores = Place("scores.parquet")
    """The global importance table."""
    plan = Place("plan.parquet")
    """The importance table with the decision."""
    exported = Place("exported")
    """The final model in the formats of other programs."""
    export = Place("export.json")
    """What these programs made of it."""
    evaluation = Place("evaluation.json")
    """Everything measured of the dense and the pruned model."""
    model_card = Place("model_card.md")
    """The model card of the result, with the figures of the evaluation."""
    pruned = Place("pruned")
    """The pruned model, a Hugging Face folder."""
    recovered = Place("recovered")
    """The pruned model after training, a Hugging Face folder."""
