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
    """The units of one part of one layer.

    Attributes:
        layer: from 0.
        part: its name.
        units: how many there are.
        removable: those that are wholly masked and can go.
        folded: those of them that send a constant, which goes into a bias.
        staying: those that are wholly masked and cannot go.
        why: they cannot; empty where there is none.
        partly: the other units of whose weights some are masked (where there are no masks: zero): the share.
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
        family: of the model.
        masks: parameters that had a mask; 0 where zeroed weights are all there is.
        outside: masked parameters that no unit carries, of which nothing is sliced; their zeros stay.
        zeros: share of the weights of the blocks' maps that are zero.
        blocks: every part of every layer.
        decoder: parameters inside the blocks, as the model is; of a network all.
        saved_parameters: parameters that go if the removable units do.
        saved_bytes: the same as stored.
        dtype: that they are stored in.
        shape: of the result: `uniform`, a stock config, or `per_layer`; `network` of a network.
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
        """Units that can go."""
        return sum(len(block.removable) for block in self.blocks)

    @property
    def of_network(self) -> bool:
        """Whether this is a network of the user's own."""
        return self.shape == "network"

    @property
    def whole(self) -> str:
        """What the saved share is of."""
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


def nothing_to_remove(found: MaskInspection) -> str:
    """Why there is nothing to slice, in a sentence."""
    hit, units = sum(len(block.partly) for block in found.blocks), sum(block.units for block in found.blocks)
    stay = sum(len(block.staying) for block in found.blocks)
    if stay:
        why = next(block.why for block in found.blocks if block.staying)
        return f"{stay:,} units are wholly masked, but none can go: {why}"
    return (
        f"no unit is wholly masked: {100 * found.zeros:.1f} % of the weights are zero, spread over {hit:,} of {units:,}"
        " units; slicing needs whole units"
    )


def require_units(found: MaskInspection) -> None:
    """Stop where nothing can be removed.

    Raises:
        LibpruneError: saying how the zeros lie.
    """
    if not found.removable:
        raise LibpruneError(nothing_to_remove(found))


def removed(found: MaskInspection) -> str:
    """What has gone, in a sentence."""
    share = f"{found.saved_parameters:,} parameters, {100 * found.saved_share:.1f} % of the {found.whole}"
    return f"removed {found.removable:,} units: {share}"


def as_data(found: MaskInspection) -> dict[str, Any]:
    """All of an inspection for JSON, numbers unrounded."""
    return asdict(found) | {"removable": found.removable, "saved_share": found.saved_share}


def as_text(found: MaskInspection) -> str:
    """An inspection for reading: a row for every part of a layer, then what slicing saves."""
    header = ("layer", "part", "units", "removable", "folded", "wholly masked, stay", "partly masked", "share of these")
    source = f"{found.masks} masked parameters" if found.masks else "zeroed weights"
    maps = "maps" if found.of_network else "layers' maps"
    first = f"{found.family}, {source}: {100 * found.zeros:.1f} % of the weights of the {maps} are zero"
    return "\n".join([first, "", text_table([_row(block) for block in found.blocks], header), "", *_summary(found)])


def _row(block: BlockMasks) -> tuple[str, ...]:
    shares = list(block.partly.values())
    counts = (block.units, len(block.removable), len(block.folded), len(block.staying), len(shares))
    spread = f"{100 * min(shares):.1f} to {100 * max(shares):.1f} %" if shares else "-"
    return str(block.layer), block.part, *(f"{count:,}" for count in counts), spread


def _summary(found: MaskInspection) -> Iterator[str]:
    if found.removable:
        share = f"{found.saved_parameters:,} parameters, {100 * found.saved_share:.1f} % of the {found.whole}"
        yield f"slicing removes {found.removable:,} units: {share}, {gigabytes(found.saved_bytes)} as {found.dtype}"
    else:
        yield nothing_to_remove(found)
    if found.removable and not found.of_network:
        code = "a stock config" if found.shape == "uniform" else "layers of any width, code of its own"
        yield f"the result has the shape {found.shape}: {code}"
    for part in found.biases_added:
        yield f"the maps of {part} get biases, which hold the constants of removed units"
    for why in dict.fromkeys(block.why for block in found.blocks if block.staying):
        blocks = [block for block in found.blocks if block.staying and block.why == why]
        if found.of_network:
            yield f"wholly masked units of {', '.join(block.part for block in blocks)} stay: {why}"
        else:
            layers = ", ".join(f"{block.layer} ({block.part})" for block in blocks)
            yield f"wholly masked units stay in layers {layers}: {why}"
    if found.outside:
        yield f"{len(found.outside)} masks lie on what no unit carries, the first {found.outside[0]}; their zeros stay"
