"""Mixtures of experts while they are looked at: their stacked tensors as modules that hooks can watch.

transformers stores the weights of all experts of a layer in one tensor, ``[experts, output, input]`` or ``[experts,
input, output]``, and multiplies by them in a function that no module hook sees. `exposed` puts a `StackedMap` beside
each such tensor, and lets the experts run by `run_experts`, which calls them. It computes what the other
implementations of transformers do, up to rounding, on any device.

A mixture is one wide map whose input is sparse: the outputs of all experts' activations side by side, times the weight
by which the router adds the expert to the token, and zero for experts that were not chosen. So the weight of the
router counts with the input of the second tensor, and what is known of other maps holds for it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from libprune.engine.architecture import STAND_IN, Architecture
from libprune.engine.errors import FamilyError

IMPLEMENTATION = "libprune"
"""The name of `run_experts` among the implementations of transformers, for `config._experts_implementation`."""
_PREFIX = STAND_IN.removeprefix(".")


@dataclass(frozen=True)
class Routing:
    """The rows in which the tokens of a batch go through their experts, the experts ascending.

    Attributes:
        order: the row's place among the choices of all tokens, token by token.
        tokens: the token of each row, counted over the sequences of the batch.
        experts: its expert.
        weights: by which the expert's output is added to the token.
        total: number of tokens.
        counts: rows of each expert, on the host.
    """

    order: Int[Tensor, " rows"]
    tokens: Int[Tensor, " rows"]
    experts: Int[Tensor, " rows"]
    weights: Float[Tensor, " rows"]
    total: int
    counts: tuple[int, ...]

    @staticmethod
    def of(chosen: Int[Tensor, "tokens k"], weights: Float[Tensor, "tokens k"], copies: int) -> "Routing":
        """The rows of a router's choice."""
        flat = chosen.flatten()
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=copies).tolist()
        tokens, sorted_weights = order // chosen.shape[1], weights.flatten()[order]
        return Routing(order, tokens, flat[order], sorted_weights, len(chosen), tuple(counts))


class StackedMap(nn.Module):
    """The linear maps of one stacked tensor, one for each expert. It has no parameters of its own.

    The tensor may lie on the host: only the weights of experts that have rows are used, and brought to these.

    Attributes:
        copies: number of experts.
        watch: called with what each row adds to its token and the routing, where the map consumes; None for nothing.
        on_gradient: by the name that a tensor has in its module, such as ``gate_up_proj_bias``: called in backward with
            a tensor whose `grad` is that of one use. Autograd then gives the parameter itself no gradient, so that
            processes that share it out (FSDP2) each see their own.
    """

    watch: Callable[[Tensor, Routing], None] | None = None

    def __init__(self, owner: nn.Module, name: str, transposed: bool, consumes: bool) -> None:
        """Stand in for a tensor.

        Args:
            owner: the module that has it.
            name: its name there.
            transposed: whether it is stored ``[experts, input, output]``.
            consumes: whether the outputs of a token's experts are added up.
        """
        super().__init__()
        self._owner, self._name = [owner], name  # in a list, so that the owner is no submodule of its own child
        self._transposed, self._consumes = transposed, consumes
        self.on_gradient: dict[str, Callable[[Tensor], None]] = {}
        self.copies = int(getattr(owner, name).shape[0])

    def forward(self, x: Float[Tensor, "rows input"], routing: Routing) -> Float[Tensor, "_ output"]:
        """Run each row through its expert.

        Args:
            x: an input for each row; of maps that consume, already multiplied by the row's weight.
            routing: of the rows.

        Returns:
            An output for each row; of maps that consume, for each token the sum of its rows.
        """
        weights, biases = self._tensor(self._name), self._tensor(f"{self._name}_bias")
        assert weights is not None
        rows = torch.split(x, list(routing.counts))
        each = [self._one(part, weight) for part, weight in zip(rows, weights.unbind(0), strict=True)]
        out = torch.cat(each)
        if biases is not None:
            bias = biases.to(x.device)[routing.experts]
            out = out + (bias * routing.weights[:, None].to(bias.dtype) if self._consumes else bias)
        if not self._consumes:
            return out
        if self.watch is not None:
            self.watch(out, routing)
        by_token = out[torch.argsort(routing.order)].unflatten(0, (routing.total, -1))
        return by_token.sum(1, dtype=torch.promote_types(out.dtype, torch.float32)).to(out.dtype)

    def _tensor(self, name: str) -> Tensor | None:
        """The tensor of all experts by its name; None where there is none. With `on_gradient` it is a leaf."""
        tensor: Tensor | None = getattr(self._owner[0], name, None)
        if tensor is None or name not in self.on_gradient or not torch.is_grad_enabled():
            return tensor
        leaf = tensor.detach().requires_grad_(True)
        leaf.register_post_accumulate_grad_hook(self.on_gradient[name])
        return leaf

    def _one(self, rows: Float[Tensor, "rows input"], weight: Tensor) -> Float[Tensor, "rows output"]:
        """What one expert makes of its rows; where it has none, its weights are not read."""
        if weight.device != rows.device:
            weight = weight.to(rows.device) if len(rows) else torch.empty_like(weight, device=rows.device)
        return rows @ (weight if self._transposed else weight.mT)


def run_experts(
    experts: Any,
    hidden_states: Float[Tensor, "tokens model"],
    top_k_index: Int[Tensor, "tokens k"],
    top_k_weights: Float[Tensor, "tokens k"],
) -> Float[Tensor, "tokens model"]:
    """The implementation of a mixture that `exposed` sets: by modules that hooks can watch."""
    routing = Routing.of(top_k_index, top_k_weights, experts.num_experts)
    maps = {name.removeprefix(_PREFIX): child for name, child in experts.named_children() if name.startswith(_PREFIX)}
    first = maps["gate_up_proj" if experts.has_gate else "up_proj"](hidden_states[routing.tokens], routing)
    inner = experts._apply_gate(first) if experts.has_gate else experts.act_fn(first)
    out: Tensor = maps["down_proj"](inner * routing.weights[:, None].to(inner.dtype), routing)
    return out


Model = TypeVar("Model", bound=nn.Module)


def exposed(model: Model, architecture: Architecture) -> Model:
    """Put a module beside each stacked tensor of a model, and let its mixtures run by them from now on.

    A model without mixtures, or one that is exposed already, stays as it is.

    Raises:
        FamilyError: if the experts of the model cannot be run so.
    """
    stacks = [entry for entry in architecture.maps if entry.stack]
    if stacks:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # not above: dense models need none of it

        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, run_experts)
    for entry in stacks:
        path, _, name = entry.module.rpartition(STAND_IN)
        try:
            owner: Any = model.get_submodule(path)
        except AttributeError:  # of a part that is gone from a pruned model
            continue
        if getattr(owner, "has_post_expert_norm", True):
            raise FamilyError(f"{path} of this model runs its experts in a way that libprune does not know")
        if _PREFIX + name not in owner._modules:
            consumes = entry.stack in entry.input.names
            owner.add_module(_PREFIX + name, StackedMap(owner, name, entry.transposed, consumes))
        owner.config._experts_implementation_internal = IMPLEMENTATION
    return model


class _WithoutExperts(TorchFunctionMode):
    """Inside, the first linear map gives minus infinity as the logit of some experts."""

    def __init__(self, removed: Tensor) -> None:
        super().__init__()
        self._removed, self._seen = removed, False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and not self._seen:
            self._seen = True
            return result.masked_fill(self._removed.to(result.device), float("-inf"))
        return result


@contextmanager
def only_experts(
    model: nn.Module, architecture: Architecture, layer: int, part: str, keep: NDArray[np.bool_]
) -> Iterator[None]:
    """Inside the context, the router of a layer chooses none of the removed experts, as if they were not there.

    Their logits are minus infinity, and so is what is added to them for the choice alone. With no expert kept the
    router is left as it is.
    """
    if keep.all() or not keep.any():
        yield
        return
    removed = torch.from_numpy(~keep)
    router = model.get_submodule(f"{architecture.layers_path}.{layer}.{architecture.parts[part].router}")
    forward, axis = router.forward, architecture.parts[part].axis
    biases = [model.get_buffer(b.name) for b in architecture.buffers if b.layer == layer and axis in b.dims[0].names]
    before = [bias.clone() for bias in biases]
    try:
        router.forward = partial(_route, forward, removed)
        for bias in biases:
            bias.masked_fill_(removed.to(bias.device), float("-inf"))
        yield
    finally:
        vars(router).pop("forward", None)
        for bias, values in zip(biases, before, strict=True):
            bias.copy_(values)


def _route(forward: Any, removed: Tensor, *args: Any, **kwargs: Any) -> Any:
    with _WithoutExperts(removed):
        return forward(*args, **kwargs)
