"""Beginnings of text, each continued by the dense, the pruned and the recovered model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from libprune.models.tokens import Ids


@dataclass(frozen=True)
class Beginnings:
    """Beginnings of some windows, spread over the text.

    Attributes:
        windows: the number of each window.
        prompts: token ids of their beginnings, ``[windows, length]``.
        following: token ids of how the text itself goes on, ``[windows, length]``.
    """

    windows: Ids
    prompts: Ids
    following: Ids


def choose_beginnings(windows: Ids, number: int, length: int) -> Beginnings:
    """Choose beginnings of some windows.

    Args:
        windows: token ids, ``[windows, window length]``.
        number: the number of windows to take a beginning of; no window is taken twice.
        length: tokens of each beginning and of each continuation; at most half of a window.
    """
    number, length = min(number, len(windows)), min(length, windows.shape[1] // 2)
    chosen = np.linspace(0, len(windows) - 1, number).round().astype(np.int64)
    return Beginnings(chosen, windows[chosen, :length], windows[chosen, length : 2 * length])


def show_continuations(
    tokenizer: PreTrainedTokenizerBase, beginnings: Beginnings, written: Mapping[str, Ids]
) -> list[dict[str, Any]]:
    """Continuations as a reader would see them.

    Args:
        tokenizer: the tokenizer of all models.
        beginnings: the beginnings that were continued.
        written: by the name of a model the token ids that it wrote, ``[windows, length]``; the dense model is `dense`.

    Returns:
        For each window its number (`window`), its beginning (`prompt`), how the text itself goes on (`text`), the
        continuation of each model by the model's name, and the tokens from the first on that a model has in common with
        the dense one: `agree` of `pruned`, and `agree_<name>` of another model.
    """
    return [
        {
            "window": int(window),
            "prompt": tokenizer.decode(prompt),
            "text": _text(tokenizer, prompt, beginnings.following[row]),
            **{name: _text(tokenizer, prompt, ids[row]) for name, ids in written.items()},
            **{
                "agree" if name == "pruned" else f"agree_{name}": common_prefix(written["dense"][row], ids[row])
                for name, ids in written.items()
                if name != "dense"
            },
        }
        for row, (window, prompt) in enumerate(zip(beginnings.windows, beginnings.prompts, strict=True))
    ]


def decode_greedily(
    model: PreTrainedModel, prompts: Int[np.ndarray, "prompts length"], tokens: int
) -> Int[np.ndarray, "prompts tokens"]:
    """Continue prompts by the most likely next token; neither the end of a text nor a generation config stops it.

    Args:
        model: a model that writes, on its device.
        prompts: token ids, ``[prompts, length]``.
        tokens: the number of tokens that follow each prompt.

    Returns:
        The new token ids, ``[prompts, tokens]``.
    """
    ids = torch.from_numpy(prompts).to(model.device)
    cache, written = DynamicCache(config=model.config), list[Tensor]()
    with torch.no_grad():
        for _ in range(tokens):
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            ids = logits[:, -1:].argmax(-1)
            written.append(ids)
    continued: NDArray[np.int64] = torch.cat(written, 1).cpu().numpy()
    return continued


def common_prefix(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """Length of the longest common prefix of two sequences of one length."""
    return int(np.cumprod(one == other).sum())


def _text(tokenizer: PreTrainedTokenizerBase, prompt: NDArray[np.int64], ids: NDArray[np.int64]) -> str:
    """The text that token ids add to a prompt.

    Decoded together with the prompt: alone, they would lose the space or the half of a letter that they begin with.
    """
    before: str = tokenizer.decode(prompt)
    both: str = tokenizer.decode(np.concatenate([prompt, ids]))
    different = (i for i, (old, new) in enumerate(zip(before, both, strict=False)) if old != new)
    return both[next(different, len(before)) :]
