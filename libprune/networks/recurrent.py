"""Recurrent language models of LSTM and of spiking units, side by side in the same layers.

With x_t the input of a layer at step t and y_t = [h_t, s_t] its output, both kinds read the last output of both:

    i, f, g, o = W_x x_t + b + W_y y_{t-1}      LSTM (Hochreiter & Schmidhuber 1997; Gers et al. 2000)
    c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)
    h_t = sigmoid(o) tanh(c_t)

    I_t = V_x x_t + d + V_y y_{t-1}             leaky integrate-and-fire, LIF (snntorch.Leaky, reset by subtraction)
    u_t = β u_{t-1} + I_t - θ s_{t-1}
    s_t = 1 if u_t > θ, else 0

The derivative of the spike is taken as 1 / (1 + k |u_t - θ|)², that of a fast sigmoid (Zenke & Ganguli 2018).

torch.nn.LSTM is one module that hides its maps. Here every map is a `torch.nn.Linear`, so that what a unit is read by
can be watched, masked and cut; and all sizes are read from the weights, so that a layer whose maps were replaced by
narrower ones runs as it is.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from libprune.engine.errors import NetworkError

BETA = 0.9
"""β, the share of its membrane potential that a LIF unit keeps from one step to the next."""
THRESHOLD = 1.0
"""θ, the membrane potential above which a LIF unit fires."""
SLOPE = 25.0
"""k of the fast sigmoid."""
_GATES = 4


class LayerState(NamedTuple):
    """What a layer hands on from one step to the next."""

    output: Float[Tensor, "batch units"]
    """y, the LSTM units before the spiking ones."""
    cell: Float[Tensor, "batch hidden"]
    """c of the LSTM units."""
    membrane: Float[Tensor, "batch spiking"]
    """u of the LIF units."""


State = tuple[LayerState, ...]
"""The states of all layers of a model."""


def detached(state: State) -> State:
    """A state without the graph that computed it: truncated backpropagation through time is cut here."""
    return tuple(LayerState(*(tensor.detach() for tensor in layer)) for layer in state)


class RecurrentLayer(nn.Module):
    """One layer of LSTM units and LIF units.

    A kind of unit that a layer is made without has no modules. β and θ are scalars, so that no tensor beside the
    weights and biases of the maps has an axis of units.

    The gates stand in the order i, f, g, o of torch.nn.LSTM, hidden rows each.

    Attributes:
        gates_input: W_x and b, ``[4 * hidden, inputs]``.
        gates_recurrent: W_y, ``[4 * hidden, hidden + spiking]``.
        current_input: V_x and d, ``[spiking, inputs]``.
        current_recurrent: V_y, ``[spiking, hidden + spiking]``.
        neuron: a `snntorch.Leaky`; it keeps no state from one call of the layer to the next.
    """

    gates_input: nn.Linear
    gates_recurrent: nn.Linear
    current_input: nn.Linear
    current_recurrent: nn.Linear
    neuron: nn.Module

    def __init__(self, inputs: int, hidden: int, spiking: int = 0) -> None:
        """Make a layer with random weights; the forget gates begin open, with a bias of 1 (Jozefowicz et al. 2015).

        Args:
            inputs: width of the input.
            hidden: LSTM units.
            spiking: LIF units.

        Raises:
            NetworkError: if a size makes no sense, or there are LIF units and snntorch is not installed.
        """
        super().__init__()
        _require_sizes(1, inputs=inputs)
        _require_sizes(0, hidden=hidden, spiking=spiking)
        if hidden + spiking == 0:
            raise NetworkError("a recurrent layer of 0 LSTM and 0 spiking units cannot be made; ask for 1 or more")
        if hidden:
            self.gates_input = nn.Linear(inputs, _GATES * hidden)
            self.gates_recurrent = nn.Linear(hidden + spiking, _GATES * hidden, bias=False)
            nn.init.ones_(self.gates_input.bias.detach()[hidden : 2 * hidden])
        if spiking:
            self.current_input = nn.Linear(inputs, spiking)
            self.current_recurrent = nn.Linear(hidden + spiking, spiking, bias=False)
            self.neuron = _leaky()

    @property
    def hidden(self) -> int:
        """LSTM units, by the weights as they are now."""
        return len(self.gates_recurrent.weight) // _GATES if "gates_recurrent" in self._modules else 0

    @property
    def spiking(self) -> int:
        """LIF units, by the weights as they are now."""
        return len(self.current_recurrent.weight) if "current_recurrent" in self._modules else 0

    def forward(
        self, inputs: Float[Tensor, "batch time inputs"], state: LayerState | None = None
    ) -> tuple[Float[Tensor, "batch time units"], LayerState]:
        """The outputs of all steps, LSTM units before LIF units, and the state after the last of them.

        Args:
            inputs: of at least one step; the input maps run once over all of them.
            state: before the first step; None: all zero.

        Raises:
            NetworkError: if the state is of another batch size or other units.
        """
        output, cell, membrane = self._zero_state(inputs) if state is None else self._checked(state, inputs)
        hidden, spiking = self.hidden, self.spiking
        gates = self.gates_input(inputs).unbind(1) if hidden else ()
        currents = self.current_input(inputs).unbind(1) if spiking else ()
        outputs = []
        for time in range(inputs.shape[1]):
            parts = []
            if hidden:
                activity, cell = _lstm_step(gates[time] + self.gates_recurrent(output), cell)
                parts.append(activity)
            if spiking:
                spikes, membrane = self.neuron(currents[time] + self.current_recurrent(output), membrane)
                parts.append(spikes.to(inputs.dtype))
            output = torch.cat(parts, 1)
            outputs.append(output)
        if spiking:
            self.neuron.mem = inputs.new_zeros(0)  # it would hold the graph, which cannot be copied with the module
        return torch.stack(outputs, 1), LayerState(output, cell, membrane)

    def _zero_state(self, inputs: Tensor) -> LayerState:
        sizes = (self.hidden + self.spiking, self.hidden, self.spiking)
        return LayerState(*(inputs.new_zeros(len(inputs), size) for size in sizes))

    def _checked(self, state: LayerState, inputs: Tensor) -> LayerState:
        expected = [tuple(tensor.shape) for tensor in self._zero_state(inputs)]
        shapes = [tuple(tensor.shape) for tensor in state]
        if shapes != expected:
            raise NetworkError(
                f"a state of output, cell and membrane {shapes} does not fit a layer that needs {expected}; start from "
                "no state where the batch or the units are others"
            )
        return state


class RecurrentLM(nn.Module):
    """A language model: embedding, recurrent layers, decoder; dropout on the input of every layer and of the decoder.

    Attributes:
        embedding: ``[vocab, embedding]``.
        layers: one `RecurrentLayer` after another.
        decoder: ``[vocab, hidden]`` and a bias.
    """

    def __init__(
        self, vocab: int, embedding: int, hidden: int, layers: int, snn_ratio: float = 0.0, dropout: float = 0.0
    ) -> None:
        """Make a model with random weights.

        Args:
            vocab: token ids.
            embedding: width of their embeddings.
            hidden: units of each layer, LSTM and LIF together.
            layers: recurrent layers.
            snn_ratio: share of the units that spike, 0 to 1, rounded to whole units.
            dropout: probability, 0 to below 1.

        Raises:
            NetworkError: if an argument is out of range, or units spike and snntorch is not installed.
        """
        super().__init__()
        _require_sizes(1, vocab=vocab, embedding=embedding, hidden=hidden, layers=layers)
        if not 0 <= snn_ratio <= 1:
            raise NetworkError(f"snn_ratio = {snn_ratio} is no share of units; give a number from 0 to 1")
        if not 0 <= dropout < 1:
            raise NetworkError(f"dropout = {dropout} is no probability below 1; give a number from 0 to below 1")
        spiking = round(snn_ratio * hidden)
        widths = [embedding] + [hidden] * (layers - 1)
        self.embedding = nn.Embedding(vocab, embedding)
        self.layers = nn.ModuleList(RecurrentLayer(width, hidden - spiking, spiking) for width in widths)
        self.dropout = nn.Dropout(dropout)
        self.decoder = nn.Linear(hidden, vocab)

    def forward(self, ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time vocab"]:
        """The logits of the token after each position, from a state of zeros.

        Raises:
            NetworkError: as `step`.
        """
        return self.step(ids)[0]

    def step(
        self, ids: Int[Tensor, "batch time"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch time vocab"], State]:
        """The logits of the token after each position, and the state after the last one.

        Args:
            ids: any number of positions, which go on where those of the state ended.
            state: from an earlier call, `detached` where the gradient is to end; None: all zero.

        Raises:
            NetworkError: if there is no position, or the state is of another batch size or model.
        """
        if ids.shape[1] == 0:
            raise NetworkError("ids hold no position; give ids [batch, time] with at least one step in time")
        before = (None,) * len(self.layers) if state is None else state
        if len(before) != len(self.layers):
            raise NetworkError(f"a state of {len(before)} layers does not fit a model of {len(self.layers)}")
        values, after = self.embedding(ids), []
        for layer, past in zip(self.layers, before, strict=True):
            values, present = layer(self.dropout(values), past)
            after.append(present)
        return self.decoder(self.dropout(values)), tuple(after)


def from_torch(lstm: nn.Module) -> nn.ModuleList:
    """The layers of a `torch.nn.LSTM` as layers of explicit maps that compute the same from copies of its weights.

    torch adds two biases, which become one. The layers take the batch first, whatever `batch_first` says; dropout
    between them is left to who calls them.

    Args:
        lstm: in one direction and without projections.

    Raises:
        NetworkError: if it is another module, has two directions or projections.
    """
    if not isinstance(lstm, nn.LSTM):
        raise NetworkError(f"{type(lstm).__name__} is not a torch.nn.LSTM; only that can be converted")
    if lstm.bidirectional:
        raise NetworkError("an LSTM with bidirectional=True cannot be converted; only one direction is supported")
    if lstm.proj_size:
        raise NetworkError(
            f"an LSTM with proj_size={lstm.proj_size} cannot be converted; projections are not supported"
        )
    return nn.ModuleList(_converted(weights) for weights in lstm.all_weights)


def _converted(weights: list[nn.Parameter]) -> RecurrentLayer:
    """A layer from the input weight, the recurrent weight and, if there are any, two biases of torch.nn.LSTM."""
    read, recurrent, *biases = (weight.detach() for weight in weights)
    layer = RecurrentLayer(read.shape[1], recurrent.shape[1]).to(read)
    with torch.no_grad():
        layer.gates_input.weight.copy_(read)
        layer.gates_recurrent.weight.copy_(recurrent)
        layer.gates_input.bias.copy_(sum(biases, torch.zeros_like(read[:, 0])))
    return layer


def _lstm_step(
    gates: Float[Tensor, "batch gates"], cell: Float[Tensor, "batch hidden"]
) -> tuple[Float[Tensor, "batch hidden"], Float[Tensor, "batch hidden"]]:
    """h_t and c_t from the gates before their nonlinearities and c_{t-1}."""
    write, keep, value, read = gates.chunk(_GATES, 1)
    cell = keep.sigmoid() * cell + write.sigmoid() * value.tanh()
    return read.sigmoid() * cell.tanh(), cell


def _leaky() -> nn.Module:
    try:
        from snntorch import Leaky
    except ModuleNotFoundError as error:
        raise NetworkError(
            f"spiking units need snntorch, and there is no module {error.name!r}; run "
            "`pip install 'libprune[networks]'`, or make a network without spiking units"
        ) from error
    neuron: nn.Module = Leaky(beta=BETA, threshold=THRESHOLD, spike_grad=_spike, reset_mechanism="subtract")
    return neuron


def _spike(excess: Tensor) -> Tensor:
    """1 where the potential exceeds the threshold, else 0; snntorch's own `fast_sigmoid` cannot be pickled."""
    from snntorch.surrogate import FastSigmoid

    spikes: Tensor = FastSigmoid.apply(excess, SLOPE)
    return spikes


def _require_sizes(least: int, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < least:
            raise NetworkError(f"{name} = {size} is no size; give a whole number from {least}")
