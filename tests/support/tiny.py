"""A tiny project: a random Llama with a tokenizer, a text of made-up sentences, and params for both."""

import random
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "river",
    "house",
    "sees",
    "finds",
    "leaves",
    "old",
    "small",
    "green",
    "today",
    "never",
    "and",
    "then",
]


def write_text(path: Path, documents: int = 60) -> Path:
    """One document a line, seeded."""
    rng = random.Random(0)
    path.write_text("".join(" ".join(rng.choices(WORDS, k=24)) + "\n" for _ in range(documents)))
    return path


VOCABULARY = {word: i for i, word in enumerate(["<unk>", "<eos>", *WORDS])}


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(folder)


def write_model(folder: Path, layers: int = 4) -> Path:
    """A Llama of some layers with grouped-query attention, in a Hugging Face folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_encoder(folder: Path, make: Callable[[int], Any]) -> Path:
    """A tiny model that reads all tokens at once, with a tokenizer that frames and masks, in a Hugging Face folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    frame = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=frame)
    named = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    make(0).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    return folder


def by_parameters(model: Any, ids: Any, **more: object) -> float:
    """The time of a pass, in place of the measured one, which is noise in so small a layer: 1 ns a parameter."""
    return 1e-9 * sum(parameter.numel() for parameter in model.parameters())


def write_params(path: Path, model: str, text: str, **changes: dict) -> Path:
    """A params file for the tiny model; `changes` override whole keys of sections."""
    params: dict = {
        "prepare": {"model": model},
        "tokenize": {
            "text": text,
            "calibration_sequences": 8,
            "calibration_length": 16,
            "evaluation_windows": 4,
            "evaluation_length": 16,
        },
        "compute": {"device": "cpu", "dtype": "float32", "batch_tokens": 64},
        "gradients": {"sequences": 6},
        "hessian": {"sequences": 6, "estimator": "fisher"},
        "levels": {"number": 3},
        "recover": {"method": "none", "length": 16, "tokens": 256, "held_out": 4, "checks": 2, "batch_tokens": 64},
        "evaluate": {"prompt_tokens": 8, "decode_tokens": 2, "rounds": 2},
    }
    repository = yaml.safe_load((Path(__file__).parents[2] / "params.yaml").read_text())
    preset = {"preset": "balanced"}
    repository.pop("preset")
    merged = {name: section | params.get(name, {}) | changes.get(name, {}) for name, section in repository.items()}
    merged = preset | merged
    path.write_text(yaml.safe_dump(merged, sort_keys=False))
    return path


def change_params(folder: Path, section: str, **values: object) -> None:
    path = folder / "params.yaml"
    params = yaml.safe_load(path.read_text())
    params[section] |= values
    path.write_text(yaml.safe_dump(params))


def run_stages(folder: Path, stages: Sequence[str]) -> None:
    """Run stages of a project in this process; they read and write its params.yaml, artifacts and metrics."""
    for stage in stages:
        metrics = [folder / "metrics"] if stage in {"allocate", "slice", "recover", "export", "evaluate"} else []
        import_module(f"stages.{stage}").main(folder / "params.yaml", folder / "artifacts", *metrics)


def write_project(folder: Path, stages: Sequence[str], **changes: dict) -> Path:
    """A tiny project with a text of 120 documents, whose first stages have run."""
    text = write_text(folder / "text.txt", documents=120)
    write_params(folder / "params.yaml", str(write_model(folder / "model")), str(text), **changes)
    run_stages(folder, stages)
    return folder
