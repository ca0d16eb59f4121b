"""Speed of prefill and decoding, dense beside pruned."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one model, as medians over the rounds; `decode` is None for models that do not write."""

    prefill: float
    decode: float | None


@dataclass(frozen=True)
class SpeedComparison:
    """Speeds of both models, timed alternately in one process.

    A ratio is pruned speed divided by dense speed, its median over the rounds; a spread is its smallest and largest.
    """

    dense: Speed
    pruned: Speed
    prefill_ratio: float
    decode_ratio: float | None
    prefill_spread: tuple[float, float]
    decode_spread: tuple[float, float] | None


def compare_speed(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    prompt: Tensor,
    decode_tokens: int,
    rounds: int,
    after: Callable[[], object] = lambda: None,
) -> SpeedComparison:
    """Time prefill and decoding of both models.

    Args:
        dense: the dense model.
        pruned: the pruned model, on the same device in the same dtype.
        prompt: token ids ``[1, length]``, on the models' device.
        decode_tokens: tokens decoded one by one after the prompt; 0 for models that do not write.
        rounds: timed rounds, after one that is not counted.
        after: called after each round.
    """
    dense_once = partial(_time_once, dense, prompt, decode_tokens)
    pruned_once = partial(_time_once, pruned, prompt, decode_tokens)
    return compare_timed(dense_once, pruned_once, prompt.shape[1], decode_tokens, rounds, after)


Timed = Callable[[], tuple[float, float]]
"""Runs one model once: seconds of prefill, and of decoding."""


def compare_timed(
    dense: Timed,
    pruned: Timed,
    prompt_tokens: int,
    decode_tokens: int,
    rounds: int,
    after: Callable[[], object] = lambda: None,
) -> SpeedComparison:
    """Run both models alternately, in whatever program.

    Args:
        dense: runs the dense model.
        pruned: runs the pruned model.
        prompt_tokens: tokens of the prompt that both take.
        decode_tokens: tokens that both write after it; 0 if they write none.
        rounds: timed rounds, after one that is not counted.
        after: called after each round.
    """
    times: list[tuple[tuple[float, float], tuple[float, float]]] = []
    for index in range(rounds + 1):
        # Which model goes first alternates, so that a drift of the machine favours neither.
        first, second = (dense, pruned) if index % 2 else (pruned, dense)
        one, two = first(), second()
        times.append((one, two) if index % 2 else (two, one))
        after()
    counted = times[1:]
    prefill = [d[0] / p[0] for d, p in counted]
    decode = [d[1] / p[1] for d, p in counted if decode_tokens]
    speeds = [
        Speed(
            prompt_tokens / statistics.median(pair[side][0] for pair in counted),
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
