"""The paths of all artifacts."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Layout:
    """The paths of all artifacts below one folder."""

    root: Path = Path("artifacts")

    @property
    def model(self) -> Path:
        """The dense model, a Hugging Face folder."""
        return self.root / "model"

    @property
    def architecture(self) -> Path:
        """Axes, sizes and parameters of the dense model."""
        return self.root / "architecture.json"

    @property
    def weights(self) -> Path:
        """Per-unit costs and weight norms."""
        return self.root / "weights.parquet"

    @property
    def calibration_tokens(self) -> Path:
        """Token ids that statistics are collected on."""
        return self.root / "tokens" / "calibration.parquet"

    @property
    def evaluation_tokens(self) -> Path:
        """Token ids that both models are evaluated on."""
        return self.root / "tokens" / "evaluation.parquet"

    @property
    def gradients(self) -> Path:
        """Mean gradients by layer and their per-unit sums."""
        return self.root / "gradients"

    @property
    def hessian(self) -> Path:
        """Diagonals of the Hessian by layer and their per-unit sums."""
        return self.root / "hessian"

    @property
    def activations(self) -> Path:
        """Activation statistics by layer and their per-unit sums."""
        return self.root / "activations"

    @property
    def ablation(self) -> Path:
        """The measured loss increase of masking single units."""
        return self.root / "ablation.parquet"

    @property
    def sensitivity(self) -> Path:
        """The measured loss increase of removing whole layers, and each block alone."""
        return self.root / "sensitivity.parquet"

    @property
    def levels(self) -> Path:
        """The measured divergence of the model when one block alone is taken to a level."""
        return self.root / "levels.parquet"

    @property
    def latency(self) -> Path:
        """The measured time of a layer by its width."""
        return self.root / "latency.json"

    @property
    def scores(self) -> Path:
        """The global importance table."""
        return self.root / "scores.parquet"

    @property
    def plan(self) -> Path:
        """The importance table with the decision."""
        return self.root / "plan.parquet"

    @property
    def evaluation(self) -> Path:
        """Everything measured of the dense and the pruned model."""
        return self.root / "evaluation.json"

    @property
    def pruned(self) -> Path:
        """The pruned model, a Hugging Face folder."""
        return self.root / "pruned"
