"""The weights of the parts of mixed criteria, as params."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

Weight = Annotated[float, Field(ge=0)]


class Mixture(BaseModel):
    """Weights of the parts of one criterion: none below 0, and not all 0.

    Every part is a share, 0 to 1, so that its weight is the most that it can add to the importance.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _something_counts(self) -> "Mixture":
        if not any(self.model_dump().values()):
            raise ValueError("all weights are 0, which leaves nothing to rank by; set one above 0")
        return self


class WeightStats(Mixture):
    """Of `weight_stats`."""

    l2: Weight = 0.3
    variance: Weight = 0.2
    nonzero: Weight = 0.2
    entropy: Weight = 0.2
    effective_rank: Weight = 0.1


class ActivationStats(Mixture):
    """Of `activation_stats`."""

    frequency: Weight = 0.2
    magnitude: Weight = 0.3
    variance: Weight = 0.2
    entropy: Weight = 0.2
    range: Weight = 0.1


class GradientFlow(Mixture):
    """Of `gradient_flow`."""

    magnitude: Weight = 0.4
    stability: Weight = 0.2
    snr: Weight = 0.2
    sign_consistency: Weight = 0.2


class Cooperative(Mixture):
    """Of `cooperative`."""

    connection: Weight = 0.3
    uniqueness: Weight = 0.3
    centrality: Weight = 0.2
    cooperation: Weight = 0.2
