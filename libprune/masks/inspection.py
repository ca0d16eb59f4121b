"""What masks have left of the units of a model, and what slicing would save, as numbers and as text."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from libprune.engine import cost
from libprune.engine.architecture import Architecture, Block
from libprune.engine.errors import LibpruneError
from libprune.engine.plan import Plan
from libprune.masks.extraction import Extraction
from libprune.masks.files import Masked
from libprune.pipeline.terminal import gigabytes, text_table


@dataclass(frozen=True)
class BlockMasks:
    """What masks have left of the units of one block.

    Attributes:
        layer: from 0.
        part: its name.
        units: number of units.
        removable: indices of units that are wholly masked and can go.
        folded: indices of the removable units that send a constant, which goes into a bias.
        staying: indices of units that are wholly masked and cannot go.
        why: the reason that these cannot go; empty if there is none of them.
        partly: by index of each other unit the share of its weights that is masked, or zero where there are no masks.
    """

    layer: int
    part: str
    units: int
    removable: list[int]
    folded: list[int]
    staying: list[int]
    why: str
    partly: dict[int, float]


@dataclass(frozen=True)
class MaskInspection:
    """What masks have left of a model, or of a network of the user's own.

    Attributes:
        family: name of the family.
        masks: number of parameters that had a mask; 0 where zeroed weights are all there is.
        outside: masked parameters that belong to no unit, of which nothing is sliced; their zeros stay.
        zeros: share of zeros among the weights of the maps in the layers.
        blocks: every part of every layer.
        decoder: number of parameters inside the layers before anything goes; in a network of all parameters.
        saved_parameters: number of parameters that go with the removable units.
        saved_bytes: bytes that these take as they are stored.
        dtype: type in which the weights are stored.
        shape: shape of the result: `uniform`, which has a stock config, `per_layer`, or `network`.
        biases_added: parts that get biases, to hold constants.
    """

    family: str
    masks: int
    outside: list[str]
    zeros: float
    blocks: list[BlockMasks]
    decoder: int
    saved_parameters: int
    saved_bytes: int
    dtype: str
    shape: str
    biases_added: list[str]

    @property
    def removable(self) -> int:
        """Number of units that can go."""
        return sum(len(block.removable) for block in self.blocks)

    @property
    def of_network(self) -> bool:
        """Whether this is a network of the user's own."""
        return self.shape == "network"

    @property
    def whole(self) -> str:
        """The whole that the saved share is a share of, in a word."""
        return "network" if self.of_network else "decoder"

    @property
    def saved_share(self) -> float:
        """Share of the parameters, of the decoder or of the network, that goes."""
        return self.saved_parameters / self.decoder


def inspection(extracted: Extraction) -> MaskInspection:
    """The numbers of an extraction."""
    masked, own = extracted.masked, extracted.own
    saved = cost.size(own, Plan.dense(own)).total - cost.size(extracted.architecture, extracted.plan).total
    weights = [masked.model.get_parameter(entry.weight) for entry in own.maps]
    carriers = {parameter.name for block in own.blocks() for parameter, _, _ in own.carriers(*block)}
    return MaskInspection(
        family=own.family,
        masks=len(masked.masks),
        outside=sorted(masked.masks.keys() - carriers),
        zeros=sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights),
        blocks=[_block(extracted, block) for block in own.blocks()],
        decoder=own.decoder_parameters,
        saved_parameters=saved,
        saved_bytes=saved * masked.dtype.itemsize,
        dtype=str(masked.dtype).removeprefix("torch."),
        shape=extracted.shape,
        biases_added=list(extracted.decision.added),
    )


def _block(extracted: Extraction, block: Block) -> BlockMasks:
    decision, gone = extracted.decision, ~extracted.plan.keep[block]
    wholly, share = decision.wholly[block], _cut_shares(extracted.masked, extracted.own, block)
    return BlockMasks(
        layer=block[0],
        part=block[1],
        units=len(gone),
        removable=np.flatnonzero(gone).tolist(),
        folded=np.flatnonzero(gone & decision.folded[block]).tolist(),
        staying=np.flatnonzero(wholly & ~gone).tolist(),
        why=decision.stays.get(block, ""),
        partly={int(unit): float(share[unit]) for unit in np.flatnonzero((share > 0) & ~wholly)},
    )


def _cut_shares(masked: Masked, own: Architecture, block: Block) -> Float64[np.ndarray, " units"]:
    """Share of the weights of each unit that is masked, biases and norms left out."""
    count = own.units(block[1])
    cut, all_of = np.zeros(count), np.zeros(count)
    for parameter, dim, units in own.carriers(*block):
        if len(parameter.dims) < 2:
            continue
        entries = masked.cut(parameter.name).movedim(dim, 0).flatten(1)
        owned = units >= 0
        cut += np.bincount(units[owned], entries.sum(1).numpy()[owned], count)
        all_of += np.bincount(units[owned], minlength=count) * entries.shape[1]
    share: Float64[np.ndarray, " units"] = cut / all_of
    return share


def nothing_to_remove(seen: MaskInspection) -> str:
    """Why there is nothing to slice, in a sentence."""
    hit, units = sum(len(block.partly) for block in seen.blocks), sum(block.units for block in seen.blocks)
    stay = sum(len(block.staying) for block in seen.blocks)
    if stay:
        why = next(block.why for block in seen.blocks if block.staying)
        return f"{stay:,} units are wholly masked, but none can go: {why}"
    return (
        f"no unit is wholly masked: {100 * seen.zeros:.1f} % of the weights are zero, spread over {hit:,} of {units:,}"
        " units; slicing needs whole units"
    )


def require_units(seen: MaskInspection) -> None:
    """Stop where nothing can be removed.

    Raises:
        LibpruneError: saying how the zeros lie.
    """
    if not seen.removable:
        raise LibpruneError(nothing_to_remove(seen))


def savings(seen: MaskInspection) -> str:
    """How many units can go, and how many parameters with them, as text."""
    share = f"{seen.saved_parameters:,} parameters, {100 * seen.saved_share:.1f} % of the {seen.whole}"
    return f"{seen.removable:,} units: {share}"


def as_data(seen: MaskInspection) -> dict[str, Any]:
    """All of an inspection for JSON, numbers unrounded."""
    return asdict(seen) | {"removable": seen.removable, "saved_share": seen.saved_share}


def as_text(seen: MaskInspection) -> str:
    """An inspection for reading: a row for every part of a layer, then what slicing saves."""
    header = ("layer", "part", "units", "removable", "folded", "wholly masked, stay", "partly masked", "share of these")
    source = f"{seen.masks} masked parameters" if seen.masks else "zeroed weights"
    maps = "maps" if seen.of_network else "layers' maps"
    first = f"{seen.family}, {source}: {100 * seen.zeros:.1f} % of the weights of the {maps} are zero"
    return "\n".join([first, "", text_table([_row(block) for block in seen.blocks], header), "", *_summary(seen)])


def _row(block: BlockMasks) -> tuple[str, ...]:
    shares = list(block.partly.values())
    counts = (block.units, len(block.removable), len(block.folded), len(block.staying), len(shares))
    spread = f"{100 * min(shares):.1f} to {100 * max(shares):.1f} %" if shares else "-"
    return str(block.layer), block.part, *(f"{count:,}" for count in counts), spread


def _summary(seen: MaskInspection) -> Iterator[str]:
    if seen.removable:
        yield f"slicing removes {savings(seen)}, {gigabytes(seen.saved_bytes)} as {seen.dtype}"
    else:
        yield nothing_to_remove(seen)
    if seen.removable and not seen.of_network:
        code = "a stock config" if seen.shape == "uniform" else "layers of any width, code of its own"
        yield f"the result has the shape {seen.shape}: {code}"
    for part in seen.biases_added:
        yield f"the maps of {part} get biases, which hold the constants of removed units"
    for why in dict.fromkeys(block.why for block in seen.blocks if block.staying):
        blocks = [block for block in seen.blocks if block.staying and block.why == why]
        if seen.of_network:
            yield f"wholly masked units of {', '.join(block.part for block in blocks)} stay: {why}"
        else:
            layers = ", ".join(f"{block.layer} ({block.part})" for block in blocks)
            yield f"wholly masked units stay in layers {layers}: {why}"
    if seen.outside:
        yield f"{len(seen.outside)} masks lie on what no unit carries, the first {seen.outside[0]}; their zeros stay"
