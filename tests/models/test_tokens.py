"""Tokens as an artifact, written, read back and refused where foreign; and what tokenizers put around a text."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    GemmaTokenizer,
    GPT2Tokenizer,
    GPTNeoXTokenizer,
    LlamaTokenizer,
    MPNetTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    RobertaTokenizer,
)

from libprune.engine.errors import ArtifactError, SourceError
from libprune.models.sequences import Sequences
from libprune.models.tokens import (
    Frame,
    frame_of,
    read_tokens,
    require_known,
    require_sequences,
    write_tokens,
)
from tests.support.models import FAMILIES, MIXTURES

IDS = np.arange(60).reshape(20, 3)


def test_tokens_come_back_and_those_of_another_model_are_refused(tmp_path):
    path = tmp_path / "repair.parquet"
    write_tokens(path, Sequences(torch.from_numpy(IDS)), {"model": "here", "source": "a text"})
    found, meta = read_tokens(path, "here")
    np.testing.assert_array_equal(found.ids, IDS)
    assert (meta["source"], meta["sequences"], meta["length"]) == ("a text", 20, 3)
    np.testing.assert_array_equal(read_tokens(path, "here", 4)[0].ids, IDS[:4])
    with pytest.raises(ArtifactError, match="belongs to model 'here', but the current model is 'elsewhere'"):
        read_tokens(path, "elsewhere")
    with pytest.raises(SourceError, match=r"21 repair sequences .* holds 20; raise tokenize\.repair_sequences"):
        read_tokens(path, "here", 21)


def test_the_digest_names_the_tokens(tmp_path):
    digests = []
    for ids in (IDS, IDS.copy(), IDS + 1, IDS[:10]):
        write_tokens(tmp_path / "tokens.parquet", Sequences(torch.from_numpy(ids)), {"model": "here"})
        digests.append(read_tokens(tmp_path / "tokens.parquet", "here")[1]["tokens"])
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_targets_and_lengths_come_back_where_there_are_some(tmp_path):
    path, ids = tmp_path / "tokens.parquet", torch.from_numpy(IDS)
    labelled = Sequences(ids, torch.arange(20) % 2, torch.arange(20) % 3 + 1)
    masked = Sequences(ids, torch.where(ids % 2 == 0, ids, -100))
    for sequences in (Sequences(ids), masked, labelled):
        write_tokens(path, sequences, {"model": "here"})
        stored, _ = read_tokens(path, "here")
        for name in ("ids", "targets", "lengths"):
            expected, tensor = getattr(sequences, name), getattr(stored, name)
            assert (tensor is None) == (expected is None)
            assert expected is None or torch.equal(tensor, expected)


def test_the_digest_names_targets_and_lengths_too(tmp_path):
    path, ids = tmp_path / "tokens.parquet", torch.from_numpy(IDS)
    digests = set()
    for parts in ((None, None), (ids, None), (ids + 1, None), (ids, torch.full((20,), 3)), (ids, torch.full((20,), 2))):
        write_tokens(path, Sequences(ids, *parts), {"model": "here"})
        digests.add(read_tokens(path, "here")[1]["tokens"])
    assert len(digests) == 5


def test_all_sequences_are_used_unless_fewer_are_asked_for(tmp_path):
    stored = Sequences(torch.from_numpy(IDS))
    assert [require_sequences(number, stored, tmp_path) for number in (None, 0, 7, 20)] == [20, 0, 7, 20]


# What tokenizers put around a text

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "[CLS]", "[SEP]", "[MASK]", "[PAD]", "[UNK]", "<|endoftext|>"]
LETTERS = {
    token: number for number, token in enumerate([*SPECIAL, "a", "b", "\u0120a", "\u0120", "\u2581a", "\u2581", "##a"])
}


def backend(before: str = "", after: str = "") -> PreTrainedTokenizerFast:
    """A tokenizer as published in one file alone, with a template for what stands around a text."""
    tokenizer = Tokenizer(models.WordLevel(LETTERS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if before or after:
        special = [(token, LETTERS[token]) for token in (before, after) if token]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(filter(None, (before, "$A", after))), special_tokens=special
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def gpt2(**settings: object) -> PreTrainedTokenizerBase:
    return GPT2Tokenizer(vocab=LETTERS, merges=[], **settings)


CONVENTIONS: dict[str, tuple[Callable[[], PreTrainedTokenizerBase], str, str]] = {
    "llama": (lambda: LlamaTokenizer(vocab=LETTERS, merges=[], add_bos_token=True), "<s>", ""),
    "llama_mha": (lambda: backend("<s>"), "<s>", ""),
    "mistral": (lambda: backend("<s>"), "<s>", ""),
    "gemma2": (lambda: GemmaTokenizer(add_bos_token=True), "<bos>", ""),
    "gemma3": (lambda: GemmaTokenizer(add_bos_token=True), "<bos>", ""),
    "qwen2": (lambda: Qwen2Tokenizer(vocab=LETTERS, merges=[]), "", ""),
    "qwen3": (lambda: Qwen2Tokenizer(vocab=LETTERS, merges=[]), "", ""),
    "phi3": (backend, "", ""),
    "gpt2": (gpt2, "", ""),
    "gpt_neox": (lambda: GPTNeoXTokenizer(vocab=LETTERS, merges=[]), "", ""),
    "opt": (lambda: gpt2(add_bos_token=True, bos_token="</s>", eos_token="</s>", unk_token="</s>"), "</s>", ""),
    "smollm3": (backend, "", ""),
    "olmo2": (backend, "", ""),
    "starcoder2": (gpt2, "", ""),
    "bert": (lambda: BertTokenizer(vocab=LETTERS), "[CLS]", "[SEP]"),
    "bert_classifier": (lambda: BertTokenizer(vocab=LETTERS), "[CLS]", "[SEP]"),
    "bert_embedding": (lambda: BertTokenizer(vocab=LETTERS), "[CLS]", "[SEP]"),
    "distilbert": (lambda: BertTokenizer(vocab=LETTERS), "[CLS]", "[SEP]"),
    "roberta": (lambda: RobertaTokenizer(vocab=LETTERS, merges=[]), "<s>", "</s>"),
    "mpnet": (lambda: MPNetTokenizer(vocab=LETTERS), "<s>", "</s>"),
    "modernbert": (lambda: backend("<s>", "</s>"), "<s>", "</s>"),
    "an end": (lambda: backend("<s>", "</s>"), "<s>", "</s>"),
}
"""By family how its published tokenizers are made, and what these put before and behind a text."""


ONE_FILE = {"apertus", "arcee", "cohere2", "ernie4_5", "exaone4", "gemma", "glm4", "granite", "hunyuan_v1_dense"}
ONE_FILE |= {"gemma4_text", "ministral3", "nanochat", "olmo3", "qwen3_5", "seed_oss", *MIXTURES}
"""Families whose tokenizers are published as a tokenizer.json, whose template says what stands around a text. The cases
that are made by `backend`, with one and without, are theirs too."""


def test_the_convention_of_every_family_is_listed():
    assert CONVENTIONS.keys() | ONE_FILE >= FAMILIES.keys()


@pytest.mark.parametrize("family", CONVENTIONS)
def test_what_a_tokenizer_puts_around_a_text_is_found_before_and_after_it_is_saved(family, tmp_path):
    make, before, after = CONVENTIONS[family]
    tokenizer = make()
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        expected = {"before": [before] * bool(before), "after": [after] * bool(after)}
        assert frame_of(one).record(one) == expected


def test_windows_lie_in_the_frame_and_there_must_be_room():
    frame = Frame((7, 8), (9,))
    ids = frame.around(np.arange(6).reshape(2, 3))
    assert ids.tolist() == [[7, 8, 0, 1, 2, 9], [7, 8, 3, 4, 5, 9]]
    assert frame.room(6) == 3
    with pytest.raises(
        SourceError, match="windows of 3 tokens have no room beside the 3 that the tokenizer puts around"
    ):
        frame.room(3)


def test_a_token_that_the_model_does_not_know_is_named():
    tokenizer = backend()
    ids = torch.tensor([[0, 1, 11], [2, 3, 4]])
    require_known(Sequences(ids), 12, tokenizer)
    require_known(Sequences(ids, torch.tensor([0, 1]), torch.tensor([2, 3])), 11, tokenizer)  # behind the end
    message = (
        r"has the token 'b' with the id 11, but the model has embeddings for the ids 0 to 10 alone; give the model"
    )
    for sequences in (Sequences(ids), Sequences(ids.clip(max=5), torch.where(ids == 11, ids, -100))):
        with pytest.raises(SourceError, match=message):
            require_known(sequences, 11, tokenizer)
