"""Proof that a pruned folder loads: a fresh process without libprune computes its logits.

The process cannot import libprune, has no network, and reads nothing but the folder.
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from libprune.engine.architecture import Architecture
from libprune.engine.errors import LibpruneError
from libprune.engine.heads import HEADS, HeadName, writes
from libprune.engine.plan import Plan
from libprune.engine.surgery import masked
from libprune.models.layers import set_parameters
from libprune.models.memory import LOADING_CODE, Keep, in_memory
from libprune.pipeline.processes import FreshPython, fresh_python

TOLERANCE = 1e-4
"""How far outputs may differ in float32, of the largest one."""

_PROGRAM = (
    """
import sys
import torch
import transformers
from contextlib import nullcontext
from safetensors.torch import load_file, save_file
folder, remote, loader, writes, scratch, tokens, result = sys.argv[1:]
"""
    + LOADING_CODE
    + """
ids = load_file(tokens)["ids"]
with loading_on_disk(Path(scratch)) if scratch else nullcontext():
    model = getattr(transformers, loader).from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=remote == "remote", local_files_only=True
    ).eval()
computed = {"parameters": torch.tensor(sum(parameter.numel() for parameter in model.parameters()))}
with torch.no_grad():
    computed["logits"] = model(input_ids=ids)[0]
    if writes == "writes":
        half = max(1, ids.shape[1] // 2)
        first = model(input_ids=ids[:, :half], use_cache=True)
        cached = model(input_ids=ids[:, half:], past_key_values=first.past_key_values, use_cache=True).logits
        computed["cached"] = torch.cat([first.logits, cached], dim=1)
        prompt = ids[:1, :half]
        new = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
        computed["generated"] = new[:, prompt.shape[1] :].contiguous()
save_file(computed, result)
"""
)


@dataclass(frozen=True)
class Verification:
    """How far the reloaded model's logits lie from the masked dense model's.

    Attributes:
        difference: largest absolute difference of a logit, in one pass or in two with the KV cache.
        scale: largest absolute logit.
    """

    difference: float
    scale: float


def agrees(difference: float, scale: float) -> bool:
    """Whether outputs are finite and lie within `TOLERANCE` of those expected.

    Args:
        difference: largest absolute difference of an output.
        scale: largest absolute output that is expected.
    """
    return math.isfinite(scale) and difference <= TOLERANCE * scale


def verify_folder(
    folder: Path,
    ids: Int[Tensor, "batch length"],
    expected: Float[Tensor, "..."],
    remote: bool,
    head: HeadName,
    disk: Path | None = None,
    python: FreshPython | None = None,
) -> Verification:
    """Load a folder in a fresh process and compare its float32 logits.

    Args:
        folder: the pruned model's folder.
        ids: token ids, ``[batch, length]``.
        expected: the masked (and repaired) dense model's logits, float32.
        remote: whether the folder's own modeling file has to be trusted.
        head: the model's head.
        disk: as of `reload`.
        python: as of `reload`.

    Raises:
        LibpruneError: if it does not load, does not generate, or computes something else.
    """
    computed = reload(folder, ids, remote, head, disk, python)
    given = torch.stack([computed[name] for name in ("logits", "cached") if name in computed])
    difference = float((given - expected).abs().max())  # NaN if one of them is, in whatever way it was computed
    result = Verification(difference, float(expected.abs().max()))
    if not agrees(result.difference, result.scale):
        raise LibpruneError(
            f"the model in {folder} loads but computes something else: {HEADS[head].outputs} differ by "
            f"{difference:.3g} of {result.scale:.3g} from what is expected of it. This is a defect of libprune; please "
            "report the plan"
        )
    if "generated" in computed and computed["generated"].shape[1] < 1:
        raise LibpruneError(f"the model in {folder} loads but generates nothing")
    return result


def reload(
    folder: Path,
    ids: Int[Tensor, "batch length"],
    remote: bool,
    head: HeadName,
    disk: Path | None = None,
    python: FreshPython | None = None,
) -> dict[str, Tensor]:
    """Load a model folder in a fresh process and compute its logits in float32.

    Args:
        folder: a Hugging Face folder.
        ids: token ids, ``[batch, length]``.
        remote: whether the folder's own modeling file has to be trusted.
        head: the model's head.
        disk: a folder for the weights in float32, which are then not held in memory; None: they are.
        python: the process, which was started before; None: it is started now.

    Returns:
        `parameters`, their number, and `logits` of one pass, ``[batch, length, vocab]`` or ``[batch, labels]``, or the
        last hidden states of a model without a head, ``[batch, length, width]``; of a model that writes also `cached`,
        the logits of two passes with the KV cache, and `generated`, new token ids ``[1, tokens]`` after the first half
        of the first row.

    Raises:
        LibpruneError: if it does not load or run, with the last line of what Python says.
    """
    with nullcontext(python) if python else fresh_python() as python:
        tokens, result = python.folder / "tokens.safetensors", python.folder / "result.safetensors"
        save_file({"ids": ids.contiguous()}, tokens)
        how = ["remote" if remote else "stock", HEADS[head].auto_class, "writes" if writes(head) else "reads"]
        place = str(disk.resolve()) if disk else ""
        fault = python.run(_PROGRAM, [str(folder.resolve()), *how, place, str(tokens), str(result)])
        if fault is not None:
            raise LibpruneError(f"the model in {folder} does not load in a fresh process: {fault}")
        return {name: tensor.clone() for name, tensor in load_file(result).items()}


def reference_logits(model: torch.nn.Module, ids: Int[Tensor, "batch length"]) -> Float[Tensor, "..."]:
    """Logits of a model on the given ids, ``[batch, length, vocab]`` or ``[batch, labels]``, in float32.

    A model without a head gives its last hidden states, ``[batch, length, width]``.
    """
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False)[0]
    return logits.float()


def masked_logits(
    model: torch.nn.Module,
    architecture: Architecture,
    plan: Plan,
    weights: Mapping[str, Tensor],
    ids: Int[Tensor, "batch length"],
    keep: Keep = in_memory,
) -> Float[Tensor, "..."]:
    """Set the parameters of a dense model to ``weights``, read one at a time; its `reference_logits` under the plan.

    Args:
        keep: where the model's parameters are put.
    """
    with torch.no_grad():
        for parameter in architecture.parameters:
            set_parameters(model, {parameter.name: weights[parameter.name]}, keep)
        for buffer in architecture.buffers:
            model.get_buffer(buffer.name).copy_(weights[buffer.name])
    with masked(model, architecture, plan):
        return reference_logits(model, ids)
