"""The text that a pruned model is trained on: one text or several with shares, and never the text that judges it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from libprune.engine.errors import SourceError
from libprune.engine.heads import HeadName
from libprune.models.sequences import NO_TARGET, Sequences
from libprune.pipeline.sections import Recover, Share, Tokenize
from libprune.texts.draw import MOST_SHARED, Drawn, Sample, TextProvenance, draw_training_windows
from libprune.texts.labels import draw_training_examples
from libprune.texts.source import SELF
from libprune.texts.windows import training_windows

RUN = 32
"""Number of tokens in a row that two texts do not share by chance."""
_EVALUATION = {f"evaluation_{key}": None for key in ("text", "config", "split", "column")}


@dataclass(frozen=True)
class TrainingText:
    """Sequences to train on, and where they come from.

    Attributes:
        sequences: those that are trained on, and behind them the held-out ones.
        held_out: number of held-out sequences.
        sources: how the sequences of each text were drawn.
    """

    sequences: Sequences
    held_out: int
    sources: list[TextProvenance]

    @property
    def names(self) -> str:
        """The names of the texts, with their shares of the sequences if there are several."""
        if len(self.sources) == 1:
            return str(self.sources[0]["source"])
        return ", ".join(f"{100 * one['share']:.0f} % {one['source']}" for one in self.sources)

    def sentence(self) -> str:
        """A line for the terminal that says what was drawn."""
        number, length = len(self.sequences) - self.held_out, self.sequences.length
        return (
            f"recovery: {number:,} sequences of up to {length:,} tokens to train on and {self.held_out:,} held out, "
            f"from {self.names}"
        )


def draw_training(
    settings: Tokenize,
    params: Recover,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    head: HeadName,
    sample: Sample,
) -> TrainingText:
    """Draw the sequences to train on.

    Args:
        settings: the calibration text, whose documents are the default, and the evaluation text, which is left out.
        params: another text or several, and how much of them.
        tokenizer: tokenizer of the dense model.
        config: config of the dense model.
        head: head of the dense model.
        sample: writes sequences, for the text `self`.

    Raises:
        SourceError: if a text cannot be read or holds too little.
    """
    shares = params.text if isinstance(params.text, tuple) else (Share(text=params.text or settings.text, share=1),)
    if head == "sequence_classification" and len(shares) > 1:
        raise SourceError("recover.text lists several texts, but a model that tells classes apart takes one; name one")
    wanted = -(-params.tokens // params.length)
    drawn, held = [], []
    for share in shares:
        own = settings if params.text is None else settings.model_copy(update=_EVALUATION | _keys(share))
        own = own.model_copy(
            update={
                "calibration_sequences": max(1, round(share.share * wanted)),
                "calibration_length": params.length,
                "seed": params.seed,
            }
        )
        held.append(max(1, round(share.share * params.held_out)))
        whole = params.text is not None  # a text of its own has no part that is left to evaluation
        drawn.append(_draw(own, held[-1], whole, tokenizer, config, head, sample))
    sequences = _joined([one.sequences for one in drawn], held)
    sources = [one.provenance | {"share": share.share} for one, share in zip(drawn, shares, strict=True)]
    return TrainingText(sequences, sum(held), sources)


def _keys(share: Share) -> dict[str, Any]:
    return share.model_dump(exclude={"share"})


def _draw(
    settings: Tokenize,
    held_out: int,
    whole: bool,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    head: HeadName,
    sample: Sample,
) -> Drawn:
    if settings.text == SELF and head != "sequence_classification":
        count = settings.calibration_sequences
        ids, how = sample(count + held_out, settings.calibration_length, settings.seed)
        chosen = training_windows(count + held_out, count, held_out, settings.seed)
        how |= {"source": SELF, "mode": "sampled", "seed": settings.seed}
        return Drawn(Sequences(torch.from_numpy(ids[chosen])), how, [])
    if head == "sequence_classification":
        return draw_training_examples(settings, tokenizer, config, held_out, whole)
    return draw_training_windows(settings, tokenizer, head, held_out, whole)


def _joined(parts: list[Sequences], held: list[int]) -> Sequences:
    """The sequences of all texts, those that are trained on before the held-out ones."""
    if len(parts) == 1:
        return parts[0]
    split = [(part[: len(part) - number], part[len(part) - number :]) for part, number in zip(parts, held, strict=True)]
    ordered = [part for group in zip(*split, strict=True) for part in group]
    targets = [part.targets for part in ordered if part.targets is not None]
    ids = torch.cat([part.ids for part in ordered])
    return Sequences(ids, torch.cat(targets) if targets else None)


def require_unseen(training: Sequences, evaluation: Sequences, name: str) -> None:
    """Stop if the text to train on holds the text that the result is judged on, under whatever name.

    The tokens are compared, wherever the windows begin: a token of the evaluation text counts as seen if it lies in
    a run of `RUN` tokens that the text to train on holds too.

    Args:
        training: all sequences to train on, the held-out ones included.
        evaluation: the sequences that the models are evaluated on.
        name: the name of the text to train on, for the message.

    Raises:
        SourceError: if more than `MOST_SHARED` of the evaluation text was seen.
    """
    shared = seen_share(training, evaluation)
    if shared > MOST_SHARED:
        raise SourceError(
            f"{100 * shared:.0f} % of the text that the models are evaluated on is in the text to train on ({name}); "
            "name another recover.text or another tokenize.evaluation_text"
        )


def seen_share(training: Sequences, evaluation: Sequences) -> float:
    """The share of the evaluation tokens that lie in runs of `RUN` tokens which the training sequences hold too."""
    rows = _originals(evaluation)
    run = min(RUN, *(len(row) for row in rows))
    wanted = [_runs(row, run) for row in rows]
    known = np.unique(np.concatenate(wanted))
    met = np.unique(np.concatenate([np.intersect1d(_runs(row, run), known) for row in _originals(training)]))
    seen = 0
    for row, hashes in zip(rows, wanted, strict=True):
        inside = np.zeros(len(row), dtype=np.bool_)
        for start in np.flatnonzero(np.isin(hashes, met)):
            inside[start : start + run] = True
        seen += int(inside.sum())
    return seen / sum(map(len, rows))


def _originals(sequences: Sequences) -> list[NDArray[np.int64]]:
    """The tokens of each sequence as they stand in the text: masked ones are uncovered."""
    ids, targets = sequences.ids, sequences.targets
    if targets is not None and targets.ndim == 2:
        ids = torch.where(targets == NO_TARGET, ids, targets)
    lengths = [ids.shape[1]] * len(ids) if sequences.lengths is None else sequences.lengths.tolist()
    return [row[:length].numpy() for row, length in zip(ids, lengths, strict=True)]


def _runs(row: NDArray[np.int64], run: int) -> NDArray[np.uint64]:
    """A hash of every run of tokens of a sequence; none of a shorter sequence."""
    if len(row) < run:
        return np.zeros(0, dtype=np.uint64)
    factors = np.random.default_rng(0).integers(1, 1 << 63, run, dtype=np.uint64) | np.uint64(1)
    mixed = (row.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    return np.lib.stride_tricks.sliding_window_view(mixed, run) @ factors
