"""The tokenizer of a model as metadata of a GGUF file.

llama.cpp cuts text by rules of its own, which the file names. The name is found by what the tokenizer's own file says
of these rules, not by its vocabulary, so that a tokenizer with another vocabulary and known rules is written too.
"""

import json
import re
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType
from tokenizers import Tokenizer

from libprune.engine.errors import ExportError

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT_FORMS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPLITS = {
    rf"{_SHORT_FORMS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    rf"{_SHORT_FORMS}|{_WORDS}|\p{{N}}|{_REST}": "qwen2",
}
"""Regular expressions that texts are split by before merging, to llama.cpp's name of them
(`llm_tokenizer_bpe` in its src/llama-vocab.cpp)."""
_SPACE = "\u2581"


def write_vocabulary(writer: GGUFWriter, folder: Path, size: int) -> None:
    """Write the tokenizer of a folder into the metadata of a GGUF file, with its special tokens and chat template.

    Args:
        writer: of the file.
        folder: a model folder with a `tokenizer.json`.
        size: number of tokens that the model knows; more than the tokenizer has are filled up with unused ones.

    Raises:
        ExportError: if the folder has no such file, or llama.cpp has no tokenizer that does the same.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ExportError(f"{folder} has no tokenizer.json, which a GGUF file needs; take gguf out of export.formats")
    rules = json.loads(path.read_text())
    if rules["model"]["type"] != "BPE":
        raise ExportError(
            f"{path} is a tokenizer of type {rules['model']['type']}; libprune writes BPE tokenizers into GGUF files. "
            "Take gguf out of export.formats, or use convert_hf_to_gguf.py of llama.cpp"
        )
    pieces = bool(rules["model"].get("byte_fallback"))
    texts, kinds = _tokens(folder, rules, size, pieces)
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre("default" if pieces else _split_of(path, rules))
    writer.add_token_list(texts)
    if pieces:
        writer.add_token_scores(_scores(rules, texts))
        writer.add_add_space_prefix(_begins_with_space(rules))
    writer.add_token_types(kinds)
    SpecialVocab(folder, load_merges=not pieces, n_vocab=size).add_to_gguf(writer, quiet=True)


def _tokens(folder: Path, rules: dict[str, Any], size: int, pieces: bool) -> tuple[list[str], list[int]]:
    """The text and the kind of every token."""
    known = max([*rules["model"]["vocab"].values(), *(token["id"] for token in rules["added_tokens"])])
    if known >= size:
        raise ExportError(f"{folder}/tokenizer.json has token {known:,}, but the model knows {size:,} tokens")
    texts, kinds = [f"[PAD{index}]" for index in range(size)], [TokenType.UNUSED] * size
    for text, index in rules["model"]["vocab"].items():
        texts[index], kinds[index] = text, TokenType.NORMAL
        if pieces and re.fullmatch("<0x[0-9A-F]{2}>", text):
            kinds[index] = TokenType.BYTE
    for token in rules["added_tokens"]:
        index, text = token["id"], token["content"]
        texts[index] = text
        kinds[index] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        if pieces and text == rules["model"].get("unk_token"):
            kinds[index] = TokenType.UNKNOWN
        elif not token["special"]:
            texts[index] = text.replace(_SPACE, " ")
    return texts, kinds


def _split_of(path: Path, rules: dict[str, Any]) -> str:
    """llama.cpp's name of the rules that a text is split by before bytes are merged.

    Raises:
        ExportError: if none of the known ones is meant.
    """
    steps = rules["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if kinds == ["ByteLevel"] and last.get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and last.get("use_regex", True):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
            name = _SPLITS.get(steps[0]["pattern"].get("Regex", ""))
            if name == "llama-bpe" and not rules["model"].get("ignore_merges"):
                return "dbrx"  # the same rules, but a text that is a token is still merged from bytes
            if name is not None:
                return name
    raise ExportError(
        f"{path} splits texts by rules that libprune does not know from llama.cpp ({' and '.join(map(str, kinds))}); "
        "take gguf out of export.formats, or use convert_hf_to_gguf.py of llama.cpp"
    )


def _scores(rules: dict[str, Any], texts: list[str]) -> list[float]:
    """Scores by which llama.cpp merges pieces in the order of the tokenizer's merges, the highest first."""
    rank: dict[str, int] = {}
    for index, merge in enumerate(rules["model"]["merges"]):
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        rank.setdefault(first + second, index)
    return [float(-rank.get(text, len(rank))) for text in texts]


def _begins_with_space(rules: dict[str, Any]) -> bool:
    """Whether the tokenizer puts a space before a text."""
    normalizer, splitter = rules["normalizer"] or {}, rules["pre_tokenizer"] or {}
    steps = normalizer.get("normalizers", [normalizer])
    prepends = any(step.get("type") == "Prepend" for step in steps)
    return prepends or splitter.get("prepend_scheme", "never") != "never"


def tokenized(folder: Path, text: str) -> list[int]:
    """The token ids of a text by the tokenizer of a folder, without the special tokens around it."""
    ids: list[int] = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    return ids
