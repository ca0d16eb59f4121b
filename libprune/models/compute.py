"""The device, the precision and the losses of a model that is run, and checks of both."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers import PreTrainedModel

from libprune.engine.errors import LibpruneError, StatisticsError
from libprune.models.embeddings import projected_losses
from libprune.models.sequences import NO_TARGET, Sequences
from libprune.pipeline.terminal import Bar

PATIENCE = 3.0
"""Seconds of work that show no progress bar."""
_CPU_BF16 = {"amx_bf16", "avx512_bf16"}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that a params value names; `auto` is a GPU if there is one, `cuda` the GPU of this process.

    Raises:
        LibpruneError: if the device cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        require_known(device)
        torch.empty(1, device=device)
    except (LibpruneError, RuntimeError, AssertionError) as error:
        raise LibpruneError(f"compute.device = {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def require_known(device: torch.device) -> None:
    """Stop at a device of a kind that libprune does not run on.

    Raises:
        LibpruneError: naming the device.
    """
    if device.type not in {"cpu", "cuda"}:
        raise LibpruneError(f"libprune runs on CPUs and on GPUs that PyTorch calls cuda, not on {device}")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that a params value names; `auto` is bfloat16 if the hardware multiplies it natively, else float32."""
    if name != "auto":
        return _DTYPES[name]
    native = bool(_CPU_BF16 & _cpu_flags()) if device.type == "cpu" else _gpu_multiplies_bf16(device)
    return torch.bfloat16 if native else torch.float32


def _gpu_multiplies_bf16(device: torch.device) -> bool:
    """Whether a GPU has matrix units for bfloat16, as NVIDIA's have from Ampere on; True where none is here to ask."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return True
    return torch.cuda.get_device_capability(device) >= (8, 0)


def named_dtype(name: str, otherwise: torch.dtype) -> torch.dtype:
    """The dtype that a params value names; `auto` is the dtype `otherwise`."""
    return otherwise if name == "auto" else _DTYPES[name]


def _cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return set()
    lines = (line for line in info.read_text().splitlines() if line.startswith("flags"))
    return set(next(lines, "").split())


def passes_with_bar(
    sequences: Sequences, batch_tokens: int, device: torch.device, label: str | Bar
) -> Iterator[Sequences]:
    """The passes over all sequences, on the device, with a progress bar; each holds sequences of one length.

    Args:
        sequences: all sequences.
        batch_tokens: the most tokens in a pass, which holds at least one sequence.
        device: the device that the sequences are moved to.
        label: text of the progress bar; or a bar of more than these passes, which goes on by one a sequence.
    """
    shown = nullcontext(label) if isinstance(label, Bar) else Bar(total=len(sequences), desc=label, unit="seq")
    with shown as bar:
        for batch in sequences.passes(max(1, batch_tokens // sequences.ids.shape[1])):
            yield batch.to(device)
            bar.update(len(batch))


def per_sequence(x: Shaped[Tensor, "..."], sequences: int) -> Shaped[Tensor, "sequences tokens width"]:
    """The input or output of a module as ``[sequences, tokens, width]``, also if the layer has joined the first two
    dimensions, as OPT's layers do before their MLP.
    """
    return x.unflatten(0, (sequences, -1)) if x.ndim == 2 else x if x.ndim == 3 else x.flatten(1, -2)


def sequence_losses(model: PreTrainedModel, sequences: Sequences) -> Float[Tensor, " batch"]:
    """Mean negative log-likelihood of each sequence's targets, in nats; ``[batch]``, float32.

    Of a model that gives embeddings it is the loss of `libprune.models.embeddings`, whose gradient is that of random
    projections of the embedding.

    If the targets are the next tokens, the last position has none. It is ignored rather than cut off: slicing the
    logits, by far the largest tensor, would copy them forward and pad them backward.
    """
    if sequences.pooling is not None:
        return projected_losses(model, sequences)
    return logits_losses(model(input_ids=sequences.ids, use_cache=False).logits, sequences)


def logits_losses(logits: Float[Tensor, "batch ... vocab"], sequences: Sequences) -> Float[Tensor, " batch"]:
    """Mean negative log-likelihood of each sequence's targets under logits, in nats; ``[batch]``, float32."""
    losses: Tensor = _InParts.apply(logits.flatten(0, -2), sequences.predicted.flatten())
    return losses.view(len(sequences), -1).sum(1) / sequences.counted


def rows_at_once(logits: Shaped[Tensor, "... vocab"]) -> int:
    """How many rows of logits to work through at a time.

    On a CPU what is computed of them then stays in its cache, which takes a quarter of the time. On a GPU it only
    keeps five tensors of their size out of memory.
    """
    return max(1, (1 << 19 if logits.device.type == "cpu" else 1 << 25) // logits.shape[-1])


class _InParts(torch.autograd.Function):
    """The cross-entropy of each row of logits, in float32, some rows at a time, forward and backward.

    Backward computes the probabilities again, so that nothing but the logits is kept.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(rows, targets)
        size = rows_at_once(rows)
        return torch.cat([_row_losses(*part) for part in zip(rows.split(size), targets.split(size), strict=True)])

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        rows, targets = ctx.saved_tensors
        size, again = rows_at_once(rows), torch.is_grad_enabled()  # for derivatives of the gradient
        gradients = []
        for part, wanted, factor in zip(*(one.split(size) for one in (rows, targets, outer)), strict=True):
            with torch.enable_grad():
                own = part if again else part.detach().requires_grad_()
                losses = _row_losses(own, wanted)
            gradients += torch.autograd.grad(losses, own, factor, create_graph=again)
        return torch.cat(gradients), None


def _row_losses(rows: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(rows.float(), targets, ignore_index=NO_TARGET, reduction="none")


KEPT = 1 << 30
"""The most bytes of logits that `KeptLogits` keeps."""


class KeptLogits:
    """Logits that are compared more than once: computed once and kept while they fit into a part of the host's memory.

    Those on a GPU are not kept: it computes them faster than its memory can spare the room.
    """

    def __init__(self, most: int = KEPT) -> None:
        """Keep no logits yet.

        Args:
            most: bytes that may be kept.
        """
        self._most, self._kept = most, dict[Hashable, Tensor]()

    def of(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """The logits of a key: those that are kept, or else what the function computes."""
        if (kept := self._kept.get(key)) is not None:
            return kept
        logits = compute()
        if logits.device.type == "cpu" and sum(one.nbytes for one in self._kept.values()) + logits.nbytes <= self._most:
            self._kept[key] = logits
        return logits


def require_finite(values: Shaped[Tensor, "batch ..."], first: int, what: str) -> None:
    """Stop if a value is not finite.

    Args:
        values: ``[batch, ...]``, one entry for each calibration sequence.
        first: index of the batch's first sequence.
        what: name of the values, for the message.

    Raises:
        StatisticsError: naming the values and the sequence.
    """
    if torch.isfinite(values.sum()):
        return  # infinities and NaNs survive a sum, which is far cheaper than a look at each value
    finite = torch.isfinite(values.reshape(len(values), -1)).all(1)
    if not finite.all():
        sequence = first + int((~finite).nonzero()[0])
        raise StatisticsError(
            f"{what} is not finite for calibration sequence {sequence}; try compute.dtype: float32, "
            "and check that the model is sound on this text"
        )


def require_finite_rows(rows: Float[Tensor, "rows width"], sequences: Int[Tensor, " rows"], what: str) -> None:
    """Stop if a value is not finite in rows that belong to sequences, such as the tokens of an expert.

    Raises:
        StatisticsError: naming the values and the sequence.
    """
    if not torch.isfinite(rows.sum()):
        broken = sequences[~torch.isfinite(rows).all(1)]
        if len(broken):
            require_finite(rows.new_full((1,), torch.nan), int(broken.min()), what)


class Finite:
    """Checks that values are finite; on a GPU without waiting for it after each.

    Inside `run` a GPU only notes the answers. The host asks for them once, when the work of a pass has been handed out.
    If a value was not finite, it does the pass again, and then waits at each check, which names the value.
    """

    def __init__(self) -> None:
        self._notes: list[Tensor] | None = None

    def holds(self, values: Shaped[Tensor, "..."]) -> bool:
        """Whether a sum of values is finite; True where a GPU is asked later."""
        finite = torch.isfinite(values.sum(dtype=torch.promote_types(values.dtype, torch.float32)))
        if self._notes is None or not values.is_cuda:
            return bool(finite)
        self._notes.append(finite)
        return True

    def require(self, values: Shaped[Tensor, "batch ..."], first: int, what: str) -> None:
        """Stop if a value is not finite, as `require_finite` does."""
        if not self.holds(values):
            require_finite(values, first, what)

    def require_rows(self, rows: Float[Tensor, "rows width"], sequences: Int[Tensor, " rows"], what: str) -> None:
        """Stop if a value of a row is not finite, as `require_finite_rows` does."""
        if not self.holds(rows):
            require_finite_rows(rows, sequences, what)

    def run(self, work: Callable[[], object], uncounted: Callable[[], AbstractContextManager[object]]) -> None:
        """Do the work of a pass, whose values are checked by this.

        Args:
            work: the pass; done a second time where a value was not finite on a GPU.
            uncounted: a context in which the work adds nothing to any sum, for the second time.

        Raises:
            StatisticsError: naming the values and the sequence.
        """
        notes = self._notes = []
        try:
            work()
        finally:
            self._notes = None
        if notes and not bool(torch.stack(notes).all()):
            with uncounted():
                work()


def require_precise(network: nn.Module) -> None:
    """Stop if a network computes in half precision.

    Raises:
        LibpruneError: naming the first parameter of such a type.
    """
    for name, parameter in network.named_parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            raise LibpruneError(
                f"{name} is {str(parameter.dtype).removeprefix('torch.')}, in which statistics and proofs drown in "
                "rounding; give network.float() and inputs of that type, and convert what comes out"
            )
