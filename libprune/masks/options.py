"""What `libprune masks` does for a network, which its options describe."""

from pathlib import Path

from libprune.engine.errors import LibpruneError
from libprune.masks.inspection import removed, require_units
from libprune.masks.module_files import drawn_inputs, read_inputs, read_network, require_takes
from libprune.masks.modules import Extraction, extraction, inspection


def network_of(
    model: Path, masks: Path | None, family: Path | None, factory: str | None, inputs: Path | None, shape: str | None
) -> Extraction | None:
    """What can be removed of the network that the options describe; None where none of them is given.

    Args:
        model: a state dict, or the folder of a language model.
        masks: a file of masks beside a language model.
        family: the network's family file.
        factory: ``package.module:Name`` of what makes it.
        inputs: a file of examples.
        shape: of a sample, instead.

    Raises:
        LibpruneError: for options that do not go together, or files that cannot be used.
    """
    if family is None and factory is None and inputs is None and shape is None:
        if model.is_file():
            raise LibpruneError(
                f"{model} is a file. Name a folder of a language model; for a network add --family FILE.yaml, "
                "--network package.module:Name, and --inputs FILE or --input-shape SIZES"
            )
        return None
    if family is None or factory is None or (inputs is None) == (shape is None):
        raise LibpruneError(
            "a network needs --family FILE.yaml, --network package.module:Name, and one of --inputs FILE and "
            "--input-shape SIZES"
        )
    if masks is not None:
        raise LibpruneError(f"leave out --masks {masks}: masks of a network are X_orig and X_mask in its state dict")
    examples = drawn_inputs(str(shape)) if inputs is None else read_inputs(inputs)
    masked = read_network(model, factory)
    require_takes(masked.model, examples)
    return extraction(masked, family, examples)


def extract_network(found: Extraction, out: Path, factory: str) -> list[str]:
    """Write the smaller network to a folder; what there is to say about it, line by line.

    Raises:
        LibpruneError: if nothing can be removed, or the outputs differ.
    """
    seen = inspection(found)
    require_units(seen)
    found.save(out)
    proof = found.proof
    return [
        removed(seen),
        f"outputs differ from the masked network's by {proof['difference']:.1e} of {proof['scale']:.1f}; on inputs "
        f"without order by {proof['noise_difference']:.1e} of {proof['noise_scale']:.1f}",
        f'load:   libprune.networks.load(Path("{out}"), {factory.rpartition(":")[2]}())',
    ]
