"""What `libprune masks` does with a model that its options describe."""

from pathlib import Path

from libprune.engine.errors import LibpruneError
from libprune.masks.extraction import LanguageExtraction, extraction
from libprune.masks.files import read_masked
from libprune.masks.inspection import inspection, require_units, savings
from libprune.masks.module_files import drawn_inputs, read_inputs, read_network, require_takes
from libprune.masks.modules import NetworkExtraction, network_extraction
from libprune.pipeline.atomic import writing_folder
from libprune.report.programs import how_to_load


def extraction_of(
    model: Path, masks: Path | None, family: Path | None, factory: str | None, inputs: Path | None, shape: str | None
) -> LanguageExtraction | NetworkExtraction:
    """What can be removed of the model that the options describe: a network if one of the last four is given.

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
        return extraction(read_masked(model, masks))
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
    return network_extraction(masked, family, examples)


def save(extracted: LanguageExtraction | NetworkExtraction, out: Path, model: Path, factory: str | None) -> list[str]:
    """Write the smaller model to a folder; what there is to say about it, line by line.

    Args:
        extracted: what can be removed.
        out: the folder, which must not exist.
        model: the folder of a dense language model.
        factory: of a network what makes it.

    Raises:
        LibpruneError: if nothing can be removed, or the outputs differ.
    """
    seen = inspection(extracted)
    require_units(seen)
    if isinstance(extracted, NetworkExtraction):
        extracted.save(out)
        proof = extracted.proof
        return [
            f"removed {savings(seen)}",
            f"outputs differ from the masked network's by {proof['difference']:.1e} of {proof['scale']:.1f}; on inputs "
            f"without order by {proof['noise_difference']:.1e} of {proof['noise_scale']:.1f}",
            f'load:   libprune.networks.load(Path("{out}"), {str(factory).rpartition(":")[2]}())',
        ]
    with writing_folder(out) as folder:
        proof = extracted.save(folder, model)
    return [
        f"removed {savings(seen)}",
        f"logits differ from the masked model's by {proof['removal_difference']:.1e} of {proof['logit_scale']:.1f}; "
        f"reloaded in a fresh process by {proof['logit_difference']:.1e}",
        f"load:   {how_to_load(str(out), extracted.shape, extracted.own.head)}",
    ]
