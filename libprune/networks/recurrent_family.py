"""The family of a recurrent model, written from its layers: how many there are and which kinds of units they have."""

from collections.abc import Iterator

from libprune.engine.module_family import NetworkFamily
from libprune.networks.recurrent import RecurrentLayer, RecurrentLM

_GATES = 4


def family(model: RecurrentLM, embedding: bool = False) -> NetworkFamily:
    """The description of a model whose layers are of explicit maps.

    Layer i has the axes ``h{i}`` of its LSTM units and ``s{i}`` of its spiking ones, where it has some. The four gates
    of an LSTM unit go together, and with them what the layer itself, the next one or the decoder reads of the unit.

    Args:
        model: made as it is, or with layers from `libprune.networks.recurrent.from_torch`.
        embedding: whether features of the embedding, axis ``e``, can go as well.
    """
    modules, reads, units = {"embedding": "vocab -> e"}, "e", []
    for number, layer in enumerate(model.layers):
        assert isinstance(layer, RecurrentLayer)
        axes = [f"{kind}{number}" for kind, size in (("h", layer.hidden), ("s", layer.spiking)) if size]
        gives = " + ".join(axes)
        modules |= {f"layers.{number}.{name}": text for name, text in _layer(layer, number, reads, gives)}
        units += axes
        reads = gives
    prunable = ["e", *units] if embedding else units
    return NetworkFamily(family="recurrent", prunable=prunable, modules=modules | {"decoder": f"{reads} -> vocab"})


def _layer(layer: RecurrentLayer, number: int, reads: str, gives: str) -> Iterator[tuple[str, str]]:
    """The modules of a layer, each with its description."""
    if layer.hidden:
        gates = " + ".join([f"h{number}"] * _GATES)
        yield "gates_input", f"{reads} -> {gates}"
        yield "gates_recurrent", f"{gives} -> {gates}"
    if layer.spiking:
        yield "current_input", f"{reads} -> s{number}"
        yield "current_recurrent", f"{gives} -> s{number}"
        yield "neuron", f"s{number}"
