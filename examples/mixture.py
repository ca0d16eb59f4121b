"""A small mixture of experts, trained in minutes on a CPU: a model to prune where no checkpoint can be had.

    python -m examples.mixture FOLDER

It has the shape of Qwen3 MoE: 4 layers, in each 8 experts, of which a token goes through 2. The tokenizer, byte-level
BPE, and the weights are learned from the first three quarters of the documents of a text. The weights that are kept are
those of the epoch with the lowest loss on the next tenth. Nothing is learned from the last 15 %, or chosen by them:
`tokenize.evaluation_share: 0.15` judges on them, and calibrates on the others.
"""

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from examples.byte_text import NEWS
from libprune.engine.errors import SourceError
from libprune.pipeline.stage import quiet, user_errors

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

EVALUATION_SHARE = 0.15
"""Share of the documents, at the end of the text, that the model never sees."""
_VALIDATION_SHARE = 0.1
_LENGTH = 128
"""Tokens of a sequence, in training and in validation."""
_DROPOUT = 0.2
"""Of embeddings, and of what attention and the experts add."""
_WEIGHT_DECAY = 0.1
_BALANCE = 0.02
"""Weight of the loss that spreads the tokens of each layer over its experts (Fedus et al. 2021, "Switch Transformers",
section 2.2)."""
_LARGEST_GRADIENT = 1.0


class Parts(NamedTuple):
    """The documents of a text, by what they are for."""

    training: list[str]
    validation: list[str]
    evaluation: list[str]


@dataclass(frozen=True)
class Shape:
    """The sizes of a mixture.

    Attributes:
        layers: their number; each has attention and a mixture.
        hidden: width of the residual stream.
        inner: channels of an expert.
        experts: in each layer.
        chosen: experts that a token goes through.
        vocabulary: tokens, most.
    """

    layers: int = 4
    hidden: int = 128
    inner: int = 128
    experts: int = 8
    chosen: int = 2
    vocabulary: int = 1024


@dataclass(frozen=True)
class Schedule:
    """How a mixture is trained.

    Attributes:
        epochs: passes over as many tokens as the training part has.
        batch: sequences of a step.
        rate: largest learning rate; it rises to it in the first twentieth and falls along a half cosine.
    """

    epochs: int = 12
    batch: int = 8
    rate: float = 3e-3


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training part gave; losses in nats a token.

    Attributes:
        training_loss: mean over the pass, with dropout and the weights of each step.
        validation_loss: with the weights at its end.
        seconds: that training took.
    """

    training_loss: float
    validation_loss: float
    seconds: float


def divide(documents: list[str]) -> Parts:
    """The parts of a text, in its order.

    Raises:
        SourceError: if there are too few documents for three parts.
    """
    last, middle = (round(share * len(documents)) for share in (EVALUATION_SHARE, _VALIDATION_SHARE))
    if not last or not middle:
        raise SourceError(
            f"the text has {len(documents)} documents, too few to set some apart for validation and evaluation; "
            "give one with 10 or more (a text file holds one a line)"
        )
    first = len(documents) - last - middle
    return Parts(documents[:first], documents[first : first + middle], documents[first + middle :])


def learn_tokenizer(documents: list[str], vocabulary: int) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer, which can write any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[end], initial_alphabet=alphabet, show_progress=False
    )
    learned.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=learned, eos_token=end, pad_token=end)


def token_ids(tokenizer: "PreTrainedTokenizerFast", documents: list[str]) -> "Tensor":
    """The tokens ``[tokens]`` of documents with an empty line between them, as the stage tokenize joins them."""
    import torch

    return torch.tensor(tokenizer("\n\n".join(documents))["input_ids"])


def new_model(shape: Shape, tokenizer: "PreTrainedTokenizerFast", seed: int) -> "Qwen3MoeForCausalLM":
    """A mixture with random weights."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.inner,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=shape.hidden // 4,
        num_experts=shape.experts,
        num_experts_per_tok=shape.chosen,
        norm_topk_prob=True,
        router_aux_loss_coef=0.0,  # it lets a layer use one expert if another layer does not
        initializer_range=shape.hidden**-0.5,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("eager")  # on a CPU, the fastest
    return model


def epochs_of(
    model: "Qwen3MoeForCausalLM", training: "Tensor", validation: "Tensor", schedule: Schedule, seed: int
) -> Iterator[Epoch]:
    """Train a model in place by AdamW, and yield after every epoch.

    Args:
        model: to be trained.
        training: token ids ``[tokens]``; each step draws sequences that begin anywhere.
        validation: token ids ``[tokens]``.
        schedule: how.
        seed: of the sequences and of dropout.

    Raises:
        SourceError: if a part is shorter than a sequence.
    """
    import torch

    for name, ids in (("training", training), ("validation", validation)):
        if len(ids) <= _LENGTH:
            raise SourceError(f"the {name} part has {len(ids):,} tokens; a sequence has {_LENGTH}; give a longer text")
    torch.manual_seed(seed)
    steps = math.ceil(len(training) / (schedule.batch * _LENGTH))
    optimizer = torch.optim.AdamW(_groups(model), lr=schedule.rate, betas=(0.9, 0.95))
    rates = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, schedule.rate, schedule.epochs * steps, pct_start=0.05, cycle_momentum=False
    )
    for _ in range(schedule.epochs):
        start, total = time.perf_counter(), 0.0
        with _dropping(model.train()):
            for _ in range(steps):
                begins = torch.randint(len(training) - _LENGTH, (schedule.batch, 1))
                ids = training[begins + torch.arange(_LENGTH)]
                found = model(input_ids=ids, labels=ids, output_router_logits=True)
                optimizer.zero_grad()
                (found.loss + _BALANCE * _imbalance(model.config, found.router_logits)).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), _LARGEST_GRADIENT)
                optimizer.step()
                rates.step()
                total += found.loss.item() / steps
        seconds = time.perf_counter() - start
        yield Epoch(total, mean_loss(model.eval(), validation), seconds)


def _imbalance(config: "Qwen3MoeConfig", logits: tuple["Tensor", ...]) -> "Tensor":
    """The loss of uneven use of experts, mean over layers; 1 if all are used alike, times the experts of a token."""
    import torch
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    each = [load_balancing_loss_func((layer,), config.num_experts, config.num_experts_per_tok) for layer in logits]
    return torch.stack(each).mean()


def _groups(model: "nn.Module") -> list[dict[str, Any]]:
    """The parameters of an optimizer; gains of norms are not drawn to 0."""
    parameters = list(model.parameters())
    return [
        {"params": [one for one in parameters if one.ndim > 1], "weight_decay": _WEIGHT_DECAY},
        {"params": [one for one in parameters if one.ndim == 1], "weight_decay": 0.0},
    ]


@contextmanager
def _dropping(model: "Qwen3MoeForCausalLM") -> Iterator[None]:
    """Inside the context, embeddings and what is added to the residual stream are dropped at random."""
    from torch.nn.functional import dropout

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        return (dropout(output[0], _DROPOUT), *output[1:]) if isinstance(output, tuple) else dropout(output, _DROPOUT)

    parts = [part for layer in model.model.layers for part in (layer.self_attn, layer.mlp)]
    with ExitStack() as stack:
        for part in [model.model.embed_tokens, *parts]:
            stack.callback(part.register_forward_hook(hook).remove)
        yield


def mean_loss(model: "Qwen3MoeForCausalLM", ids: "Tensor") -> float:
    """The mean loss of the tokens ``[tokens]`` in whole sequences, in nats; the first of each is given."""
    import torch

    sequences = ids[: len(ids) // _LENGTH * _LENGTH].view(-1, _LENGTH)
    with torch.no_grad():
        losses = [float(model(input_ids=one, labels=one).loss) * len(one) for one in sequences.split(16)]
    return sum(losses) / len(sequences)


def unigram_loss(training: "Tensor", judged: "Tensor", vocabulary: int) -> float:
    """The loss in nats a token of the tokens' frequencies in training, one added to each count."""
    counts = training.bincount(minlength=vocabulary) + 1
    return float(-(counts[judged] / counts.sum()).log().mean())


def main(
    out: Annotated[Path, typer.Argument(help="The folder of the model to write.")],
    text: Annotated[str, typer.Option(help="A file, package://NAME/path, or another text that libprune reads.")] = NEWS,
    layers: Annotated[int, typer.Option(min=1, help="Layers.")] = 4,
    hidden: Annotated[int, typer.Option(min=32, help="Width of the residual stream, a multiple of 32.")] = 128,
    inner: Annotated[int, typer.Option(min=4, help="Channels of an expert, a multiple of 4.")] = 128,
    vocabulary: Annotated[int, typer.Option(min=257, help="Tokens of the vocabulary.")] = 1024,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training part.")] = 12,
    seed: Annotated[int, typer.Option(help="Of weights, sequences and dropout.")] = 0,
) -> None:
    """Train a mixture of experts on a text, and write model and tokenizer as a folder."""
    quiet()  # before anything that shows progress is imported
    from libprune.pipeline.atomic import writing_folder
    from libprune.pipeline.sections import Tokenize
    from libprune.texts.chosen import calibration_source
    from libprune.texts.source import open_text

    with user_errors():
        parts = divide(list(open_text(calibration_source(Tokenize(text=text))).documents()))
        tokenizer = learn_tokenizer(parts.training, vocabulary)
        training, validation, evaluation = (token_ids(tokenizer, part) for part in parts)
        model = new_model(Shape(layers, hidden, inner, vocabulary=vocabulary), tokenizer, seed)
        typer.echo(f"{len(training):,} tokens to train on, {sum(p.numel() for p in model.parameters()):,} parameters")
        best, weights = math.inf, model.state_dict()
        for number, epoch in enumerate(epochs_of(model, training, validation, Schedule(epochs), seed), 1):
            typer.echo(
                f"epoch {number}/{epochs}: perplexity per token {math.exp(epoch.training_loss):.1f} training, "
                f"{math.exp(epoch.validation_loss):.1f} validation; {epoch.seconds:.0f} s"
            )
            if epoch.validation_loss < best:
                best = epoch.validation_loss
                weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(weights)
        with writing_folder(out) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        loss, floor = mean_loss(model, evaluation), unigram_loss(training, evaluation, len(tokenizer))
    typer.echo(
        f"{out}: perplexity per token {math.exp(loss):.1f} on the evaluation part, {math.exp(floor):.1f} by "
        "frequencies alone"
    )


if __name__ == "__main__":
    typer.run(main)
