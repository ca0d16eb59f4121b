"""Beginnings of text, each continued by the dense and by the pruned model."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from libprune.models.tokens import Ids


def continue_windows(
    models: Mapping[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase, windows: Ids, number: int, length: int
) -> list[dict[str, Any]]:
    """Let models continue the beginnings of some windows, spread over the text.

    Args:
        models: by name, on one device; one runs at a time.
        tokenizer: the tokenizer of all models.
        windows: token ids, ``[windows, window length]``.
        number: the number of windows to take a beginning of; no window is taken twice.
        length: tokens of each beginning and of each continuation; at most half of a window.

    Returns:
        For each window its number (`window`), its beginning (`prompt`), how the text itself goes on (`text`), the
        continuation of each model by the model's name, and `agree`: the tokens from the first on that all models
        have in common.
    """
    number, length = min(number, len(windows)), min(length, windows.shape[1] // 2)
    if not number:
        return []
    chosen = np.linspace(0, len(windows) - 1, number).round().astype(np.int64)
    prompts, truth = windows[chosen, :length], windows[chosen, length : 2 * length]
    written = {name: decode_greedily(model, prompts, length) for name, model in models.items()}
    return [
        {
            "window": int(window),
            "prompt": tokenizer.decode(prompts[row]),
            **{name: _text(tokenizer, prompts[row], ids[row]) for name, ids in {"text": truth, **written}.items()},
            "agree": common_prefix([ids[row] for ids in written.values()]),
        }
        for row, window in enumerate(chosen)
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


def common_prefix(sequences: list[NDArray[np.int64]]) -> int:
    """Length of the longest common prefix of sequences of one length."""
    same = np.all(np.stack(sequences) == sequences[0], axis=0)
    return int(np.cumprod(same).sum())


def _text(tokenizer: PreTrainedTokenizerBase, prompt: NDArray[np.int64], ids: NDArray[np.int64]) -> str:
    """The text that token ids add to a prompt.

    Decoded together with the prompt: alone, they would lose the space or the half of a letter that they begin with.
    """
    before: str = tokenizer.decode(prompt)
    both: str = tokenizer.decode(np.concatenate([prompt, ids]))
    different = (i for i, (old, new) in enumerate(zip(before, both, strict=False)) if old != new)
    return both[next(different, len(before)) :]
