"""The dense model of a layout: loaded from its source, described, written, and its weights summed up by unit."""

from dataclasses import asdict, replace
from functools import partial

from libprune.engine.describe import describe, without_weights
from libprune.engine.errors import SourceError
from libprune.models.families import use_families
from libprune.models.folder import write_dense
from libprune.models.origin import find_origin
from libprune.models.source import load_dense, load_dense_config, processor_files
from libprune.pipeline.artifacts import write_architecture, write_units
from libprune.pipeline.atomic import write_json
from libprune.pipeline.digests import sealed
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Prepare
from libprune.pipeline.sources import resolve
from libprune.statistics.weights import weight_columns


def _require_content(section: Prepare) -> None:
    """Stop if the config of a local folder promises more parameters than its files have bytes, before memory is taken.

    Raises:
        LibpruneError: naming both numbers; or if the config is no model's.
    """
    folder = resolve(section.model)
    if folder is None or folder.is_file():
        return
    held = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    model = without_weights(load_dense_config(section), section.trust_remote_code)
    promised = sum(parameter.numel() for parameter in model.parameters())
    if 0 < held < promised:
        raise SourceError(
            f"prepare.model = {section.model!r}: by its config.json it has {promised:,} parameters, but its "
            f".safetensors files have only {held:,} bytes; one of the two is of another model"
        )


def prepare_layout(layout: Layout, section: Prepare) -> None:
    """Load the dense model from its source; write it as a plain folder, its description, origin and per-unit weights.

    Args:
        layout: all four are written into it.
        section: the source of the model, and what the user vouches for.

    Raises:
        LibpruneError: if the model cannot be loaded, or is not wholly described by its family.
    """
    use_families(section.families)
    _require_content(section)
    model, tokenizer = load_dense(section)
    described = describe(model, accept=section.accept_config)
    architecture = replace(described, fingerprint=write_dense(layout.model, model, tokenizer, processor_files(section)))
    write_architecture(layout, architecture)
    write_json(layout.origin, sealed(asdict(find_origin(section)) | {"model": architecture.fingerprint}))
    columns = partial(weight_columns, architecture, dict(model.named_parameters()))
    write_units(layout.weights, architecture, columns, {"model": architecture.fingerprint, "source": section.model})
