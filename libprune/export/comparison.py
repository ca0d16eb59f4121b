"""Whether another program computes what the model computes, and how fast."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from libprune.engine.errors import ExportError
from libprune.export.formats import Program
from libprune.export.source import Source
from libprune.results.proof import reload
from libprune.results.speed import SpeedComparison

PROMPTS, LENGTH, WRITTEN = 4, 128, 24
"""Beginnings of evaluation windows that a program predicts the next token of, their tokens at most, and the tokens that
it writes after the first of them."""


@dataclass(frozen=True)
class Agreement:
    """How near a program comes to the model, which transformers runs in float32.

    Attributes:
        prompts: number of texts that the next token was predicted of.
        tokens: tokens of each.
        difference: largest difference of the logarithm of a probability, over all tokens and texts, nats.
        divergence: mean divergence of the program's prediction from the model's, nats a token.
        same_first: texts of which both find the same next token most probable.
        written: tokens that the program wrote after the first text, always the most probable one.
        same_written: those of them that the model finds most probable too, after what the program wrote before.
    """

    prompts: int
    tokens: int
    difference: float
    divergence: float
    same_first: int
    written: int
    same_written: int

    def sentence(self) -> str:
        """What was compared and how near it is, in a sentence."""
        return (
            f"on {self.prompts} texts of {self.tokens} tokens its predictions diverge by {self.divergence:.1e} nats "
            f"(largest difference of a logarithm {self.difference:.2g}), and {self.same_written} of {self.written} "
            "tokens that it writes are the ones that the model finds most probable"
        )


def choose_prompts(windows: Int[Tensor, "windows length"]) -> Int[Tensor, "prompts tokens"]:
    """Beginnings of evaluation windows, spread over the text, with room for the tokens that are written after them.

    Args:
        windows: token ids of the evaluation text.
    """
    rows = torch.linspace(0, len(windows) - 1, min(PROMPTS, len(windows))).round().long()
    return windows[rows, : LENGTH + WRITTEN]


def compare(program: Program, source: Source, texts: Int[Tensor, "prompts length"], limit: float) -> Agreement:
    """Compare what a program predicts and writes with what the model predicts.

    The model is loaded in a fresh process. It predicts after the very tokens that the program has written, so that one
    token on which two predictions are level counts once.

    Args:
        program: the exported model in its program.
        source: the model.
        texts: of `choose_prompts`; the last tokens give way to those that the program writes.
        limit: largest divergence that is no fault, nats a token.

    Raises:
        ExportError: if the divergence is larger, or not a number.
    """
    number = min(WRITTEN, texts.shape[1] // 2)
    length = texts.shape[1] - number
    vocab = source.config.vocab_size
    predicted = torch.stack([program.predict(text[:length].tolist(), vocab) for text in texts])
    written = program.write(texts[0, :length].tolist(), number)
    seen = texts.clone()
    seen[0, length : length + len(written)] = torch.tensor(written)
    logits = reload(source.folder, seen, source.record.remote, source.head)["logits"]
    expected = logits[:, length - 1].log_softmax(-1)
    likely = logits[0, length - 1 : length - 1 + len(written)].argmax(-1)
    result = Agreement(
        prompts=len(texts),
        tokens=length,
        difference=float((predicted - expected).abs().max()),
        divergence=float((expected.exp() * (expected - predicted)).sum(-1).mean().clamp(min=0)),  # keeps NaN
        same_first=int((predicted.argmax(-1) == expected.argmax(-1)).sum()),
        written=len(written),
        same_written=int((likely == torch.tensor(written)).sum()),
    )
    if not result.divergence <= limit or not result.difference < torch.inf:
        raise ExportError(
            f"{program.version} computes something else than the model in {source.folder}: {result.sentence()}; at "
            f"most {limit:g} nats are rounding. This is a defect of libprune or of the program; please report it, and "
            "take the format out of export.formats"
        )
    return result


def speed_sentence(speed: SpeedComparison) -> str:
    """How much faster the pruned model is than the dense one in the same program, in a sentence."""
    (low, high), (least, most) = speed.prefill_spread, speed.decode_spread or (0.0, 0.0)
    return (
        f"prefill × {speed.prefill_ratio:.2f} ({low:.2f} to {high:.2f}) and decode × {speed.decode_ratio:.2f} "
        f"({least:.2f} to {most:.2f}) of the dense model's speed in the same program"
    )
