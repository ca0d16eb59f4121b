"""The scores of a layout: the importance table with its metadata and the model that it belongs to."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from libprune.engine.architecture import Architecture
from libprune.engine.tables import Columns
from libprune.pipeline.artifacts import read_architecture, read_table, same_origin
from libprune.pipeline.layout import Layout


@dataclass(frozen=True)
class Scores:
    """The importance of every unit of a model.

    Attributes:
        table: a row a unit, in the order of `libprune.engine.tables.unit_index`, with `importance`, `score` (importance
            per parameter), `cost` and the components of the criterion.
        meta: how the scores were made: `criterion`, `scaling`, `fusion`, `comparable`, `gradient_orders`, and the
            digests of the model and, where it was used, of the text.
        tokens: the digest of the calibration text beside them, whether they were made from it or not.
    """

    architecture: Architecture
    table: Columns
    meta: Mapping[str, Any]
    tokens: str | None = None

    @property
    def origin(self) -> dict[str, Any]:
        """The digests of the model and, where a text is known, of the tokens, which all statistics must be of."""
        found = {key: self.meta[key] for key in ("model", "tokens") if key in self.meta}
        return found if self.tokens is None else found | {"tokens": self.tokens}

    def compares(self, worth: str) -> bool:
        """Whether the scores compare between layers and parts: as they are, or by the worth of their blocks.

        Args:
            worth: the value of `allocate.worth`.
        """
        return worth != "none" or (bool(self.meta["comparable"]) and self.meta["scaling"] == "none")

    def with_columns(self, columns: Columns) -> "Scores":
        """Scores whose table has these columns, new or in the place of others."""
        return replace(self, table=self.table | columns)


def read_scores(layout: Layout) -> Scores:
    """The scores that the score stage has written.

    Raises:
        ArtifactError: if they or the calibration text are missing, or they belong to another model or text.
    """
    architecture = read_architecture(layout)
    table, meta = read_table(layout.scores, "score")
    _, text = read_table(layout.calibration_tokens, "tokenize")
    origin = {"model": architecture.fingerprint, "tokens": text["tokens"]}
    same_origin(layout.calibration_tokens, text, {"model": origin["model"]})
    same_origin(layout.scores, meta, origin if "tokens" in meta else {"model": origin["model"]})
    return Scores(architecture, table, meta, text["tokens"])
