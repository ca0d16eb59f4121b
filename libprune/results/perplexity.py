"""What pruning cost and what it bought: perplexity, size and speed, dense beside pruned."""

import math
import statistics
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from libprune.models.compute import passes_with_bar, sequence_losses
from libprune.models.sequences import Sequences

Losses = Float[np.ndarray, " windows"]
Hits = Bool[np.ndarray, " windows"]


def window_losses(model: PreTrainedModel, windows: Sequences, batch_tokens: int, label: str) -> Losses:
    """Mean negative log-likelihood of the targets of each evaluation window, in nats; ``[windows]``."""
    device = next(model.parameters()).device
    with torch.no_grad():
        losses = [
            sequence_losses(model, batch).double().cpu()
            for batch in passes_with_bar(windows, batch_tokens, device, label)
        ]
    return torch.cat(losses).numpy()


def label_hits(model: PreTrainedModel, windows: Sequences, batch_tokens: int, label: str) -> Hits:
    """Whether the label that the model finds most likely is the right one, for each sequence."""
    device = next(model.parameters()).device
    with torch.no_grad():
        found = [
            (model(input_ids=batch.ids).logits.argmax(-1) == batch.targets).cpu()
            for batch in passes_with_bar(windows, batch_tokens, device, label)
        ]
    return torch.cat(found).numpy()


def accuracy(hits: Hits) -> dict[str, float]:
    """Share of right answers with its standard error, as `libprune.results.tasks` gives it."""
    share, number = float(hits.mean()), len(hits)
    return {"n": float(number), "acc": share, "acc_se": math.sqrt(share * (1 - share) / max(1, number - 1))}


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error."""

    value: float
    error: float


def perplexity(losses: Losses) -> Estimate:
    """exp(mean loss) over equally long windows, and its standard error by the delta method.

    The windows are the independent samples, not the tokens in them.
    """
    mean = float(losses.mean())
    error = float(losses.std(ddof=1)) / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
    value = math.exp(mean) if mean < _LARGEST else math.inf
    return Estimate(value, value * error)


_LARGEST = math.log(sys.float_info.max)


def perplexity_ratio(dense: Losses, pruned: Losses) -> Estimate:
    """Pruned over dense perplexity on the same windows; the pairing makes its error far smaller."""
    return perplexity(pruned - dense)


@dataclass(frozen=True)
class Speed:
    """Tokens per second: medians over the rounds; no decoding in models that do not write."""

    prefill: float
    decode: float | None


@dataclass(frozen=True)
class SpeedComparison:
    """Both models, timed alternately in one process; each ratio is the median over the rounds."""

    dense: Speed
    pruned: Speed
    prefill_ratio: float
    decode_ratio: float | None
    prefill_spread: tuple[float, float]
    decode_spread: tuple[float, float] | None


def compare_speed(
    dense: PreTrainedModel, pruned: PreTrainedModel, prompt: Tensor, decode_tokens: int, rounds: int
) -> SpeedComparison:
    """Time prefill and decode of both models.

    Args:
        dense: the dense model.
        pruned: the pruned model, on the same device in the same dtype.
        prompt: token ids ``[1, length]``.
        decode_tokens: tokens decoded one by one after the prompt; 0 for models that do not write.
        rounds: timed rounds, after one that is not counted.
    """
    times: list[tuple[tuple[float, float], tuple[float, float]]] = []
    for index in range(rounds + 1):
        # Which model goes first alternates, so that a drift of the machine favours neither.
        first, second = (dense, pruned) if index % 2 else (pruned, dense)
        one, two = _time_once(first, prompt, decode_tokens), _time_once(second, prompt, decode_tokens)
        times.append((one, two) if index % 2 else (two, one))
    counted = times[1:]
    prefill = [d[0] / p[0] for d, p in counted]
    decode = [d[1] / p[1] for d, p in counted if decode_tokens]
    length = prompt.shape[1]
    speeds = [
        Speed(
            length / statistics.median(pair[side][0] for pair in counted),
            decode_tokens / statistics.median(pair[side][1] for pair in counted) if decode_tokens else None,
        )
        for side in (0, 1)
    ]
    return SpeedComparison(
        dense=speeds[0],
        pruned=speeds[1],
        prefill_ratio=statistics.median(prefill),
        decode_ratio=statistics.median(decode) if decode else None,
        prefill_spread=(min(prefill), max(prefill)),
        decode_spread=(min(decode), max(decode)) if decode else None,
    )


def _time_once(model: PreTrainedModel, prompt: Tensor, decode_tokens: int) -> tuple[float, float]:
    """Seconds of one prefill and of decoding the given number of tokens greedily with the KV cache."""
    with torch.no_grad():
        start = _now(prompt)
        if not decode_tokens:
            model(input_ids=prompt)
            return _now(prompt) - start, 0.0
        cache = DynamicCache(config=model.config)
        output = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        middle = _now(prompt)
        for _ in range(decode_tokens):
            token = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=token, past_key_values=cache, use_cache=True)
        end = _now(prompt)
    return middle - start, end - middle


def _now(on: Tensor) -> float:
    if on.is_cuda:
        torch.cuda.synchronize(on.device)
    return time.perf_counter()
