"""Text that the dense model writes itself, for users who have no text.

Text that is sampled from a model follows the distribution that it was trained on. Liu et al., LLM-QAT (arXiv
2305.17888) train on such text without data, and Williams et al., Self-calibration for Language Model Quantization and
Pruning (arXiv 2410.17170) prune on it. As in LLM-QAT, a sequence begins with a random token, goes on with a few most
likely tokens, so that it has a subject, and is sampled from there on.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from libprune.engine import cost
from libprune.engine.architecture import Architecture
from libprune.engine.errors import SourceError
from libprune.engine.heads import writes
from libprune.engine.plan import Plan
from libprune.models.compute import resolve_device, resolve_dtype
from libprune.models.folder import load_model
from libprune.models.tokens import Frame, Ids, frame_of
from libprune.pipeline.artifacts import require
from libprune.pipeline.atomic import remove, writing
from libprune.pipeline.layout import Layout
from libprune.pipeline.terminal import Bar

GREEDY = 4
"""Number of most likely tokens behind the first, random one; LLM-QAT takes three to five."""
TEMPERATURE = 1.0
"""The temperature of sampling: the model's own distribution."""
TOP_K = 0
"""The number of most likely tokens that are sampled from; 0 is all, so that none is missing from the statistics."""


class SelfText:
    """The dense model as a writer of text; it is loaded when the first sequence is asked for.

    Args:
        architecture: description of the dense model.
        tokenizer: tokenizer of the dense model.
        device: `compute.device` of the params.
        dtype: `compute.dtype` of the params.
    """

    def __init__(
        self, layout: Layout, architecture: Architecture, tokenizer: PreTrainedTokenizerBase, device: str, dtype: str
    ) -> None:
        self._folder, self._architecture, self._tokenizer = layout.model, architecture, tokenizer
        self._device_name, self._dtype_name = device, dtype
        self._work = layout.work / "self"

    def sample(self, count: int, length: int, seed: int | None) -> tuple[Ids, dict[str, Any]]:
        """Write sequences of ordinary tokens, in those that the tokenizer puts around a text.

        The same arguments give the same sequences on the same machine. Every batch is saved, so that a run that was
        stopped continues after its last batch.

        Args:
            count: number of sequences.
            length: tokens of each.
            seed: seed of calibration sequences; None for evaluation sequences, whose random numbers no seed uses.

        Returns:
            Token ids ``[count, length]``, and their provenance.

        Raises:
            SourceError: if the model does not generate text, or `length` leaves no room for any.
        """
        if not writes(self._architecture.head):
            raise SourceError(
                "this model does not write text; name a text in tokenize.text or recover.text instead of self"
            )
        frame = frame_of(self._tokenizer)
        frame.room(length)
        step = min(count, self.at_once(length))
        label = "written text" if seed is not None else "evaluation text"
        how: dict[str, Any] = {"greedy": GREEDY, "temperature": TEMPERATURE, "top_k": TOP_K, "at_once": step}
        how |= {"compute_dtype": str(self._dtype).removeprefix("torch."), "frame": frame.record(self._tokenizer)}
        which = {"model": self._architecture.fingerprint, "device": str(self._device), "length": length, "seed": seed}
        saved = self._work / hashlib.sha256(json.dumps(which | how).encode()).hexdigest()[:16]
        batches = []
        with Bar(total=count * length, desc=label, unit="tok") as bar:
            for first in range(0, count, step):
                number = min(step, count - first)
                path = saved / f"{first}-{number}.npy"
                if path.exists():
                    bar.update(number * length)
                else:
                    _save(path, self._batch(frame, number, length, _key(seed, first), bar))
                batches.append(np.load(path))
        return np.concatenate(batches), how

    def forget(self) -> None:
        """Delete the saved batches, once the sequences are written as artifacts."""
        remove(self._work)

    def at_once(self, length: int) -> int:
        """The most sequences of `length` tokens whose cache takes no more memory than the weights; at least 1."""
        size = cost.size(self._architecture, Plan.dense(self._architecture))
        return max(1, size.total // max(1, size.cache * length + size.state))

    def _batch(self, frame: Frame, count: int, length: int, key: int, bar: Any) -> Ids:
        width = frame.room(length)
        greedy = min(GREEDY, width - 1)
        start = np.random.default_rng(key).choice(self._ordinary, size=(count, 1))
        with _seeded(key, self._device), torch.inference_mode():
            ids = torch.from_numpy(Frame(frame.before, ()).around(start)).to(self._device)
            if greedy:
                ids = self._go_on(ids, greedy, bar)
            if width > 1 + greedy:
                ids = self._go_on(ids, width - 1 - greedy, bar, do_sample=True, temperature=TEMPERATURE, top_k=TOP_K)
        bar.update(count * (length - width + 1))
        return Frame((), frame.after).around(ids.cpu().numpy())

    def _go_on(self, ids: Int[Tensor, "batch start"], count: int, bar: Any, **how: Any) -> Int[Tensor, "batch end"]:
        how |= {"max_new_tokens": count, "suppress_tokens": self._others}
        return self._model.generate(ids, attention_mask=torch.ones_like(ids), streamer=_Progress(bar), **how)

    @cached_property
    def _device(self) -> torch.device:
        return resolve_device(self._device_name)

    @cached_property
    def _dtype(self) -> torch.dtype:
        return resolve_dtype(self._dtype_name, self._device)

    @cached_property
    def _model(self) -> PreTrainedModel:
        model = load_model(require(self._folder, "prepare"), self._dtype).to(self._device)
        model.generation_config = GenerationConfig()  # the folder's own may penalise, truncate or stop
        return model

    @cached_property
    def _ordinary(self) -> Ids:
        """The ids of the tokenizer's tokens, without special tokens, ascending."""
        added = {i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        known = {i for i in self._tokenizer.get_vocab().values() if i < self._vocab}
        return np.array(sorted(known - added - set(self._tokenizer.all_special_ids)), dtype=np.int64)

    @cached_property
    def _others(self) -> list[int]:
        """Ids that are never written: special tokens, and rows of the embedding without a token of the tokenizer."""
        return np.setdiff1d(np.arange(self._vocab), self._ordinary).tolist()

    @property
    def _vocab(self) -> int:
        return int(self._model.config.get_text_config().vocab_size)


class _Progress(BaseStreamer):
    """Moves a progress bar by every token that is written; the first ones that `generate` sends are the prompt's."""

    def __init__(self, bar: Any) -> None:
        self._bar, self._prompt = bar, True

    def put(self, value: Tensor) -> None:
        if not self._prompt:
            self._bar.update(value.numel())
        self._prompt = False

    def end(self) -> None:
        pass


def _save(path: Path, ids: Ids) -> None:
    with writing(path) as partial, partial.open("wb") as file:
        np.save(file, ids)


def _key(seed: int | None, first: int) -> int:
    """The random seed of the batch that begins with sequence `first`."""
    words = (0, first) if seed is None else (1, first, seed)
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
