"""The text that a pruned model is trained on: one text or several with shares, and never the text that judges it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from libprune.engine.errors import SourceError
from libprune.engine.heads import HeadName
from libprune.models.sequences import NO_TARGET, Sequences, joined
from libprune.models.tokens import Ids
from libprune.pipeline.sections import Recover, Share, Tokenize
from libprune.texts.chosen import SELF
from libprune.texts.draw import MOST_SHARED, Drawn, Sample, TextProvenance, draw_training_windows
from libprune.texts.labels import draw_training_examples
from libprune.texts.shares import divided, keys_of, named, parts_of, several, shares_of
from libprune.texts.windows import training_rows

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
        rows: the token ids of all that the sequences were drawn from: a row for each document of a labelled text, cut
            off where evaluation documents are; else rows in which the text goes on.
        read: what was read of each text, in words.
        read_before: the share of the held-out tokens that the statistics or the repair have read too.
    """

    sequences: Sequences
    held_out: int
    sources: list[TextProvenance]
    rows: list[Ids]
    read: list[str]
    read_before: float = 0.0

    @property
    def names(self) -> str:
        """The names of the texts, with their shares of the sequences if there are several."""
        return named([(one["source"], one["share"]) for one in self.sources])

    def sentence(self) -> str:
        """A line for the terminal that says what was drawn."""
        number, length = len(self.sequences) - self.held_out, self.sequences.length
        most = "" if self.sequences.lengths is None else "up to "
        return (
            f"recovery: {number:,} sequences of {most}{length:,} tokens to train on and {self.held_out:,} held out, "
            f"from {'; '.join([self.names, *self.read])}{self._caution()}"
        )

    def _caution(self) -> str:
        if self.read_before <= MOST_SHARED:
            return ""
        return (
            f"; the statistics or the repair have read {100 * self.read_before:.0f} % of the held-out tokens, so the "
            "loss there is too low, and may end the training too early: use more text, or name another recover.text"
        )


def draw_training(
    settings: Tokenize,
    params: Recover,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    head: HeadName,
    sample: Sample,
    read: Sequence[Ids] = (),
) -> TrainingText:
    """Draw the sequences to train on, and those that are held out.

    A repair fits weights to text, and the loss on that text says little about others. So the sequences of which least
    was read before are held out. Of one of several texts that gives too few sequences for its share, sequences are
    repeated.

    Args:
        settings: the calibration text, whose documents are the default, and the evaluation text, which is left out.
        params: another text or several, and how much of them.
        tokenizer: tokenizer of the dense model.
        config: config of the dense model.
        head: head of the dense model.
        sample: writes sequences, for the text `self`.
        read: the tokens of each sequence that the statistics or the repair have read, as they stand in the text.

    Raises:
        SourceError: if a text cannot be read or holds too little.
    """
    shares = shares_of(params.text or settings.text)
    if head == "sequence_classification" and len(shares) > 1:
        raise SourceError(several("recover"))
    wanted = -(-params.tokens // params.length)
    counts, held = (divided(number, [one.share for one in shares]) for number in (wanted, params.held_out))
    before = _ReadBefore(read, tokenizer, head)
    draw = _Draw(tokenizer, config, head, sample, before)
    parts = []
    for share, count, held_out in zip(shares, counts, held, strict=True):
        part = _part_of_calibration(share, settings)
        sizes = {"calibration_sequences": count, "calibration_length": params.length, "seed": params.seed}
        own = part or settings.model_copy(update=_EVALUATION | keys_of(share))
        parts.append(draw.of(own.model_copy(update=sizes), held_out, part is None))
    sequences = _joined([drawn.sequences for drawn, _ in parts], counts, held)
    sources = [drawn.provenance | {"share": share.share} for (drawn, _), share in zip(parts, shares, strict=True)]
    told = [drawn.read for drawn, _ in parts if drawn.read]
    last = before.shares(originals(sequences[len(sequences) - sum(held) :]))
    rows = [row for _, rows in parts for row in rows]
    return TrainingText(sequences, sum(held), sources, rows, told, float(last.mean()))


def _part_of_calibration(share: Share, settings: Tokenize) -> Tokenize | None:
    """The settings of the calibration text that a text is, by its name and the other keys that are given, if any.

    Of several such texts it is the one with no other keys, or else the first.
    """
    keys = keys_of(share)
    for wanted in (keys, {key: value for key, value in keys.items() if value is not None}):
        for part in parts_of(settings):
            if all(getattr(part, key) == value for key, value in wanted.items()):
                return part
    return None


@dataclass(frozen=True)
class _Draw:
    """Draws the sequences of one text for a model."""

    tokenizer: PreTrainedTokenizerBase
    config: PreTrainedConfig
    head: HeadName
    sample: Sample
    read: "_ReadBefore"

    def of(self, settings: Tokenize, held_out: int, whole: bool) -> tuple[Drawn, list[Ids]]:
        """The sequences, and the rows of all that they were drawn from, as in `TrainingText`."""
        if self.head == "sequence_classification":
            drawn = draw_training_examples(settings, self.tokenizer, self.config, held_out, whole, self.read.shares)
            cut = self.tokenizer(drawn.documents, truncation=True, max_length=settings.evaluation_length)
            return drawn, list(map(np.array, cut["input_ids"]))
        if settings.text == SELF:
            return self._written(settings, held_out)
        drawn, windows = draw_training_windows(settings, self.tokenizer, self.head, held_out, whole, self.read.shares)
        return drawn, [windows.flatten()]

    def _written(self, settings: Tokenize, held_out: int) -> tuple[Drawn, list[Ids]]:
        count = settings.calibration_sequences
        ids, how = self.sample(count + held_out, settings.calibration_length, settings.seed)
        chosen = training_rows(len(ids), count, held_out, settings.seed, SELF, read=self.read.shares(list(ids)))
        how |= {"source": SELF, "mode": "sampled", "seed": settings.seed}
        return Drawn(Sequences(torch.from_numpy(ids[chosen])), how, []), list(ids)


class _ReadBefore:
    """Sequences that were read before, and how much of others is in them."""

    def __init__(self, read: Sequence[Ids], tokenizer: PreTrainedTokenizerBase, head: HeadName) -> None:
        self._tokenizer, self._whole = tokenizer, head == "sequence_classification"
        self._read = _plain(read, tokenizer)

    def shares(self, rows: Sequence[Ids]) -> Float[NDArray[np.float64], " rows"]:
        """The share of each row that was read, special tokens left out.

        A labelled document was read as a whole if it begins as one that was, as far as both are kept. Of other rows,
        tokens in runs that were read count: `RUN` tokens long, or half a row where rows are short.
        """
        plain = _plain(rows, self._tokenizer)
        if self._whole:
            kept = min(max(map(len, some), default=0) for some in (plain, self._read))
            begun = {row[:kept].tobytes() for row in self._read}
            return np.array([row[:kept].tobytes() in begun for row in plain], dtype=np.float64)
        run = max(1, min(RUN, max(map(len, plain), default=0) // 2))
        known = np.unique(np.concatenate([np.zeros(0, dtype=np.uint64), *(_runs(row, run) for row in self._read)]))
        return np.array([_inside(_runs(row, run), known, run) / max(1, len(row)) for row in plain])


def _joined(parts: list[Sequences], counts: list[int], held: list[int]) -> Sequences:
    """The sequences of all texts, those that are trained on, as many as asked for, before the held-out ones."""
    if len(parts) == 1:
        return parts[0]
    trained, last = [], []
    for part, count, number in zip(parts, counts, held, strict=True):
        given = len(part) - number
        trained.append(part[torch.arange(count) % given])
        last.append(part[given:])
    return joined([*trained, *last])


def require_unseen(text: TrainingText, evaluation: Sequences, tokenizer: PreTrainedTokenizerBase) -> None:
    """Stop if the text to train on holds the text that the result is judged on, under whatever name.

    All of the text is compared, not only the sequences that were drawn from it; without special tokens, which stand
    around windows. A token of the evaluation text counts as seen if it lies in a run of `RUN` tokens that the text to
    train on holds too, and a labelled document if it is there as a whole.

    Args:
        text: the text to train on.
        evaluation: the sequences that the models are evaluated on.
        tokenizer: tokenizer of both.

    Raises:
        SourceError: if more than `MOST_SHARED` of the evaluation text was seen.
    """
    rows, judged = (_plain(rows, tokenizer) for rows in (text.rows, originals(evaluation)))
    shared = seen_documents(rows, judged) if evaluation.lengths is not None else seen_share(rows, judged)
    if shared > MOST_SHARED:
        raise SourceError(
            f"{100 * shared:.0f} % of the text that the models are evaluated on is in the text to train on "
            f"({text.names}); name another tokenize.evaluation_text or another recover.text (null: the documents that "
            "calibration sequences are drawn from)"
        )


def _plain(rows: Sequence[Ids], tokenizer: PreTrainedTokenizerBase) -> list[Ids]:
    """The tokens of each row without special ones."""
    special = np.array(tokenizer.all_special_ids)
    return [row[~np.isin(row, special)] for row in rows]


def originals(sequences: Sequences) -> list[Ids]:
    """The tokens of each sequence as they stand in the text: masked ones are uncovered."""
    ids, targets = sequences.ids, sequences.targets
    if targets is not None and targets.ndim == 2:
        ids = torch.where(targets == NO_TARGET, ids, targets)
    lengths = [ids.shape[1]] * len(ids) if sequences.lengths is None else sequences.lengths.tolist()
    return [row[:length].numpy() for row, length in zip(ids, lengths, strict=True)]


def seen_documents(rows: Sequence[Ids], judged: Sequence[Ids]) -> float:
    """The share of the tokens of documents that lie in documents which are among other ones."""
    known = {row.tobytes() for row in rows}
    return sum(len(row) for row in judged if row.tobytes() in known) / max(1, sum(map(len, judged)))


def seen_share(rows: Sequence[Ids], judged: Sequence[Ids]) -> float:
    """The share of a text's tokens that lie in runs of tokens which another text holds too.

    Runs that recur in the text itself count for nothing, unless all do: the instruction that stands before every
    conversation is in any text of that kind.

    Args:
        rows: tokens of the other text.
        judged: tokens of the text. A run is `RUN` tokens long, or as long as the longest row of either text if that is
            shorter.
    """
    run = max(1, min(RUN, max(map(len, rows)), max(map(len, judged))))
    runs = [hashes for row in judged if len(hashes := _runs(row, run))]
    if not runs:
        return 0.0
    known, times = np.unique(np.concatenate(runs), return_counts=True)
    counted = known[times == 1] if (times == 1).any() else known
    every = (_runs(row, run) for row in rows)
    seen = np.unique(np.concatenate([hashes[_among(hashes, counted)] for hashes in every]))
    return sum(_inside(hashes, seen, run) for hashes in runs) / sum(_inside(hashes, counted, run) for hashes in runs)


def _inside(hashes: NDArray[np.uint64], chosen: NDArray[np.uint64], run: int) -> int:
    """The number of tokens of a row that lie in chosen runs, which are ascending."""
    if not len(hashes):
        return 0
    return int((np.convolve(_among(hashes, chosen), np.ones(run, dtype=np.int64)) > 0).sum())


def _among(hashes: NDArray[np.uint64], chosen: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which hashes are among ascending ones."""
    if not len(chosen):
        return np.zeros(len(hashes), dtype=bool)
    return chosen[np.searchsorted(chosen, hashes).clip(max=len(chosen) - 1)] == hashes


def _runs(row: Ids, run: int) -> NDArray[np.uint64]:
    """A hash of every run of tokens of a row; none of a shorter row."""
    if len(row) < run:
        return np.zeros(0, dtype=np.uint64)
    factors = np.random.default_rng(0).integers(1, 1 << 63, run, dtype=np.uint64) | np.uint64(1)
    mixed = (row.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    return np.lib.stride_tricks.sliding_window_view(mixed, run) @ factors
