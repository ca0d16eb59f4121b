"""What the dense model predicts on the text to train on: computed as it is needed, or stored beforehand."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from libprune.models.compute import KeptLogits
from libprune.models.sequences import Sequences
from libprune.pipeline.artifacts import damage, read_json, require, same_origin
from libprune.pipeline.atomic import writing
from libprune.pipeline.digests import sealed
from libprune.pipeline.shards import load_tensor, save_tensors
from libprune.recovery.idle import ABOUT
from libprune.recovery.losses import Taught, TopPredictions

_TENSORS = ("log_probabilities", "ids")
BYTES = 6
"""Bytes of one stored prediction: its token as int32, its log-probability as float16."""
_SHARD = 1 << 26
"""Bytes of a file of predictions, about."""


def model_inputs(ids: Tensor, mask: Tensor | None) -> dict[str, Any]:
    """The arguments of a forward pass.

    Args:
        ids: token ids, ``[batch, length]``.
        mask: 1 for tokens, 0 behind the end of a sequence, ``[batch, length]``; None if all sequences are whole.
    """
    return {"input_ids": ids} | ({} if mask is None else {"attention_mask": mask})


def attention_mask(sequences: Sequences) -> Tensor | None:
    """1 for tokens and 0 behind the end of a sequence, ``[sequences, length]``; None if all have the whole length."""
    if sequences.lengths is None:
        return None
    return (torch.arange(sequences.length) < sequences.lengths[:, None]).long()


@runtime_checkable
class Teacher(Protocol):
    """A source of what the dense model predicts."""

    def held(self) -> int:
        """Bytes of the weights that it holds in memory."""

    def predict(self, index: Tensor, inputs: Mapping[str, Tensor]) -> Taught:
        """What the dense model says of a batch, given the numbers of its sequences and its inputs."""


@dataclass(frozen=True)
class LiveTeacher:
    """The dense model beside the trained one.

    Attributes:
        model: on its device, in evaluation mode.
        hidden: whether hidden states are wanted.
        held_out: the number of the first held-out sequence; None if there is none. On a CPU the model runs only once
            over these sequences, which every check compares again.
        on_disk: whether the weights are read from disk as they are needed.
    """

    model: PreTrainedModel
    hidden: bool
    held_out: int | None = None
    on_disk: bool = False
    _kept: KeptLogits = field(default_factory=KeptLogits, init=False, repr=False)

    def held(self) -> int:
        """Bytes of the model's weights; 0 where they lie on disk."""
        held = [] if self.on_disk else self.model.parameters()
        return sum(parameter.numel() * parameter.element_size() for parameter in held)

    def predict(self, index: Tensor, inputs: Mapping[str, Tensor]) -> Taught:
        """What the dense model says of a batch, given the numbers of its sequences and its inputs."""
        numbers = tuple(index.tolist())
        if not self.hidden and self.held_out is not None and min(numbers) >= self.held_out:
            return Taught(self._kept.of(numbers, lambda: self._say(inputs)[0]))
        said = self._say(inputs)
        return Taught(said[0], said.hidden_states if self.hidden else ())

    def _say(self, inputs: Mapping[str, Tensor]) -> Any:
        with torch.no_grad():
            return self.model(**inputs, output_hidden_states=self.hidden, use_cache=False)


def read_about(folder: Path, origin: Mapping[str, Any]) -> dict[str, Any]:
    """What the teacher stage says of its predictions, even if it has stored none.

    Args:
        folder: the artifact.
        origin: what it must be of.

    Raises:
        ArtifactError: if it is missing, damaged, or of something else.
    """
    about = read_json(require(folder, "teacher") / ABOUT, "teacher")
    same_origin(folder, about, origin)
    return about


class StoredTeacher:
    """Predictions that the teacher stage has stored.

    Args:
        folder: the artifact.
        origin: the model, the text and the temperature that it must be of.

    Raises:
        ArtifactError: if it is missing, damaged, or of another model, text or temperature.
    """

    def __init__(self, folder: Path, origin: Mapping[str, Any]) -> None:
        self._folder, self._about = folder, read_about(folder, origin)
        self._of_files = {key: value for key, value in self._about.items() if key != "at_once"}
        self._whole: set[Path] = set()

    def held(self) -> int:
        """No bytes: predictions are read as they are asked for."""
        return 0

    def predict(self, index: Tensor, inputs: Mapping[str, Tensor]) -> Taught:
        """What the dense model says of a batch, given the numbers of its sequences and its inputs."""
        rows = [self._row(number) for number in index.tolist()]
        stacked = (torch.stack(column).to(index.device) for column in zip(*rows, strict=True))
        return Taught(TopPredictions(*stacked))

    def _row(self, number: int) -> tuple[Tensor, Tensor]:
        path = require(shard_path(self._folder, number // self._about["at_once"]), "teacher")
        row = number % self._about["at_once"]
        if path not in self._whole:
            for name in _TENSORS:
                same_origin(path, load_tensor(path, name, "teacher")[1], self._of_files)
            self._whole.add(path)
        with damage(path, "teacher"), safe_open(path, framework="pt") as file:
            log_probabilities, ids = (file.get_slice(name)[row] for name in _TENSORS)
            return log_probabilities, ids


def shard_path(folder: Path, number: int) -> Path:
    """The file that holds the predictions of some consecutive sequences."""
    return folder / f"predictions-{number:05d}.safetensors"


def sequences_at_once(positions: int, k: int) -> int:
    """Sequences in one file of predictions: as many as `_SHARD` bytes hold, at least one."""
    return max(1, _SHARD // (positions * k * BYTES))


def top_predictions(logits: Float[Tensor, "... vocab"], k: int, temperature: float) -> TopPredictions:
    """The `k` largest predictions at each position, of logits that are divided by a temperature."""
    top = (logits.float() / temperature).log_softmax(-1).topk(min(k, logits.shape[-1]))
    return TopPredictions(top.values.half().cpu(), top.indices.int().cpu())


def write_predictions(path: Path, parts: Sequence[TopPredictions], meta: Mapping[str, Any]) -> None:
    """Write the predictions of consecutive sequences, ``[sequences, ..., k]`` each, whole or not at all."""
    tensors = {name: torch.cat([getattr(part, name) for part in parts]) for name in _TENSORS}
    with writing(path) as partial:
        save_tensors(partial, tensors, meta)


def describe_teacher(folder: Path, meta: Mapping[str, Any], at_once: int) -> None:
    """Write what the files of predictions hold."""
    (folder / ABOUT).write_text(json.dumps(sealed({**meta, "at_once": at_once}), indent=2) + "\n")
