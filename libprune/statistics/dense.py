"""The dense model of a layout: loaded from its source, described, written, and its weights summed up by unit."""

from dataclasses import asdict, replace
from functools import partial

from libprune.engine.describe import describe
from libprune.models.folder import write_dense
from libprune.models.origin import find_origin
from libprune.models.source import load_dense
from libprune.pipeline.artifacts import write_architecture, write_units
from libprune.pipeline.atomic import write_json
from libprune.pipeline.digests import sealed
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Prepare
from libprune.statistics.weights import weight_columns


def prepare_layout(layout: Layout, section: Prepare) -> None:
    """Load the dense model from its source; write it as a plain folder, its description, origin and per-unit weights.

    Args:
        layout: all four are written into it.
        section: the source of the model, and what the user vouches for.

    Raises:
        LibpruneError: if the model cannot be loaded, or is not wholly described by its family.
    """
    model, tokenizer = load_dense(section)
    described = describe(model, accept=section.accept_config)
    architecture = replace(described, fingerprint=write_dense(layout.model, model, tokenizer))
    write_architecture(layout, architecture)
    write_json(layout.origin, sealed(asdict(find_origin(section)) | {"model": architecture.fingerprint}))
    columns = partial(weight_columns, architecture, dict(model.named_parameters()))
    write_units(layout.weights, architecture, columns, {"model": architecture.fingerprint, "source": section.model})
