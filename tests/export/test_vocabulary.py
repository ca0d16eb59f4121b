"""The tokenizer in a GGUF file, against the one of the folder, which llama.cpp must read alike."""

import json
import random
from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from libprune.engine.errors import ExportError
from libprune.export.llama_cpp import llama_cpp
from libprune.export.vocabulary import tokenized, write_vocabulary

_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
TEXTS = (
    "It's 2026, and we'll count to 123456.7 -- or not!\n\n  Then\tgo on ...",
    "Grüße aus Zürich: 你好, мир! 🦙🦙",
    "  def f(x):\n      return x**2  # done\n",
    "",
)


def byte_level(*steps: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps]) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(_corpus(), trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return tokenizer


def _split(pattern: str) -> list[pre_tokenizers.PreTokenizer]:
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return [pre_tokenizers.Split(Regex(pattern), "isolated"), byte]


def _gpt2() -> Tokenizer:
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))


def _smollm() -> Tokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return byte_level(digits, pre_tokenizers.ByteLevel(add_prefix_space=False))


def _llama3() -> Tokenizer:
    tokenizer = byte_level(*_split(rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"))
    rules = json.loads(tokenizer.to_str())
    rules["model"]["ignore_merges"] = True
    return Tokenizer.from_str(json.dumps(rules))


def _olmo2() -> Tokenizer:
    return byte_level(*_split(rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"))


def _qwen2() -> Tokenizer:
    return byte_level(*_split(rf"{_WORDS}|\p{{N}}|{_REST}"))


def _pieces(prepend: bool) -> Tokenizer:
    """A tokenizer like that of Llama 2, or like that of Gemma, which puts no space before a text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [normalizers.Prepend("\u2581")] if prepend else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", *bytes_])
    tokenizer.train_from_iterator(_corpus(), trainer)
    rules = json.loads(tokenizer.to_str())
    rules["added_tokens"] = rules["added_tokens"][:3]
    return Tokenizer.from_str(json.dumps(rules))


KINDS = {
    "gpt-2": _gpt2,
    "smollm": _smollm,
    "llama-bpe": _llama3,
    "dbrx": _olmo2,
    "qwen2": _qwen2,
    "default": lambda: _pieces(True),
    "default, no space": lambda: _pieces(False),
}


def _corpus() -> list[str]:
    rng = random.Random(0)
    words = ("the", "cat", "on", "a", "mat", "then", "it's", "12", "345", "def", "x", "y", "Grüße")
    return [" ".join(rng.choices(words, k=12)) + "\n" for _ in range(200)]


def write_folder(folder: Path, tokenizer: Tokenizer) -> int:
    """A folder with a tokenizer, and how many tokens it knows."""
    first, last = ("<s>", "</s>") if tokenizer.token_to_id("<s>") is not None else ("<|endoftext|>",) * 2
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=first, eos_token=last)
    fast.add_tokens([AddedToken("<|tool|>", special=False, normalized=False)])
    fast.chat_template = "{{ messages[0]['content'] }}"
    fast.save_pretrained(folder)
    return len(fast)


def write_model(path: Path, folder: Path, size: int) -> None:
    """A tiny model in a GGUF file with the tokenizer of a folder."""
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {"block_count": 1, "context_length": 256, "embedding_length": 8, "feed_forward_length": 8}
    for key, value in (sizes | {"attention.head_count": 1, "attention.head_count_kv": 1}).items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(size)
    write_vocabulary(writer, folder, size)
    square = np.zeros((8, 8), dtype=np.float32)
    names = [f"blk.0.{name}.weight" for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up")]
    for name in (*names, "blk.0.ffn_down.weight"):
        writer.add_tensor(name, square)
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"):
        writer.add_tensor(name, square[0])
    writer.add_tensor("token_embd.weight", np.zeros((size, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_reads_texts_as_the_tokenizer_does(tmp_path, kind):
    size = write_folder(tmp_path, KINDS[kind]()) + 3
    write_model(tmp_path / "model.gguf", tmp_path, size)
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == kind.split(",")[0]
    assert len(fields["tokenizer.ggml.tokens"].contents()) == size
    assert fields["tokenizer.ggml.token_type"].contents()[-3:] == [gguf.TokenType.UNUSED] * 3
    assert fields["tokenizer.chat_template"].contents() == "{{ messages[0]['content'] }}"
    with llama_cpp(tmp_path / "model.gguf", context=256, threads=1) as program:
        for text in TEXTS:
            assert program.tokenize(text) == tokenized(tmp_path, text), text


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), "of type WordLevel; libprune writes BPE tokenizers"),
        (byte_level(*_split(r"\w+|\s")), "splits texts by rules that libprune does not know.*Split and ByteLevel"),
        (byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), "splits texts by rules"),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(tmp_path, tokenizer, message):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    with pytest.raises(ExportError, match=message):
        write_vocabulary(writer, tmp_path, 1000)
    writer.close()


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    with pytest.raises(ExportError, match=r"has no tokenizer\.json"):
        write_vocabulary(writer, tmp_path, 10)
    writer.close()


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    size = write_folder(tmp_path, _gpt2())
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    with pytest.raises(ExportError, match=f"has token {size - 1}, but the model knows {size - 1} tokens"):
        write_vocabulary(writer, tmp_path, size - 1)
    writer.close()
