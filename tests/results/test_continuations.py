"""Beginnings of text, each continued by several models: greedy, from the text, and as a reader would see them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from libprune.results.continuations import choose_beginnings, common_prefix, decode_greedily, show_continuations
from tests.support import tiny
from tests.support.models import ENCODERS, FAMILIES, tokens

LENGTH = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("continuations") / "model")


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def windows():
    return np.random.default_rng(0).integers(2, 2 + len(tiny.WORDS), (7, 12))


def continue_windows(
    models_of: dict, tokenizer: PreTrainedTokenizerFast, windows: np.ndarray, number: int, length: int
):
    """What models write after the beginnings of some windows, as a reader would see it."""
    chosen = choose_beginnings(windows, number, length)
    size = chosen.prompts.shape[1]
    written = {name: decode_greedily(model, chosen.prompts, size) for name, model in models_of.items()}
    return show_continuations(tokenizer, chosen, written)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ENCODERS])
def test_greedy_writes_what_generate_does_for_every_prompt_alone(family):
    model, prompts = FAMILIES[family](0), tokens(3, 9)
    found = decode_greedily(model, prompts.numpy(), 5)
    for row, prompt in zip(found, prompts, strict=True):
        alone = {"inputs": prompt[None], "attention_mask": torch.ones(1, 9, dtype=torch.long)}
        expected = model.generate(**alone, do_sample=False, max_new_tokens=5, pad_token_id=0)
        assert row.tolist() == expected[0, 9:].tolist()


def test_every_written_token_is_the_likeliest_after_all_that_stands_before_it():
    model, prompts = FAMILIES["llama"](0), tokens(2, 6)
    ids = torch.cat([prompts, torch.from_numpy(decode_greedily(model, prompts.numpy(), 4))], 1)
    with torch.no_grad():
        likeliest = model(input_ids=ids).logits.argmax(-1)
    assert torch.equal(ids[:, 6:], likeliest[:, 5:-1])


@given(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.data())
def test_sequences_agree_up_to_the_first_difference(first, data):
    other = data.draw(st.lists(st.integers(0, 2), min_size=len(first), max_size=len(first)))
    until = next((i for i, (a, b) in enumerate(zip(first, other, strict=True)) if a != b), len(first))
    assert common_prefix(np.array(first), np.array(other)) == until
    assert common_prefix(np.array(first), np.array(first)) == len(first)


def test_prompts_are_beginnings_of_windows_over_the_whole_text_and_the_text_goes_on(model, tokenizer, windows):
    found = continue_windows({"dense": model}, tokenizer, windows, 3, LENGTH)
    assert [entry["window"] for entry in found] == [0, 3, 6]
    for entry in found:
        own = windows[entry["window"]]
        assert entry["prompt"] == tokenizer.decode(own[:LENGTH])
        assert entry["prompt"] + entry["text"] == tokenizer.decode(own[: 2 * LENGTH])


def test_each_model_agrees_with_the_dense_one_as_far_as_their_words_do_and_the_dense_one_with_itself_wholly(
    model, tokenizer, windows, folder
):
    other = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(8)
    same = continue_windows({"dense": model, "pruned": model}, tokenizer, windows, 7, LENGTH)
    assert all(entry["dense"] == entry["pruned"] for entry in same)
    assert all(entry["agree"] == LENGTH for entry in same)
    all_three = {"dense": model, "pruned": other, "recovered": model}
    found = continue_windows(all_three, tokenizer, windows, 7, LENGTH)
    assert [entry["dense"] for entry in found] == [entry["dense"] for entry in same]
    for entry in found:
        words = [entry[name].split() for name in ("dense", "pruned")]
        assert words[0][: entry["agree"]] == words[1][: entry["agree"]]
        assert entry["agree_recovered"] == LENGTH
    assert any(entry["agree"] < LENGTH for entry in found)


def test_none_are_made_when_none_are_asked_for_and_no_window_is_taken_twice(model, tokenizer, windows):
    assert show_continuations(tokenizer, choose_beginnings(windows, 0, LENGTH), {}) == []
    found = continue_windows({"dense": model}, tokenizer, windows, 99, LENGTH)
    assert [entry["window"] for entry in found] == list(range(len(windows)))


def test_beginnings_and_continuations_fill_at_most_the_window(model, tokenizer, windows):
    (entry,) = continue_windows({"dense": model, "pruned": model}, tokenizer, windows, 1, 99)
    assert entry["prompt"] + entry["text"] == tokenizer.decode(windows[0])
    assert entry["agree"] == 6


def test_letters_that_a_cut_splits_come_out_whole():
    """One token a byte, three a letter: the prompt ends inside one, and the continuation shows it whole."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer, text = PreTrainedTokenizerFast(tokenizer_object=raw), "日本語で|書く<b>字"
    window = np.array([tokenizer(text)["input_ids"]])
    config = LlamaConfig(vocab_size=256, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    models_of = {"dense": LlamaForCausalLM(config)}
    lengths = [n for n in range(1, 1 + window.shape[1] // 2) if "\ufffd" not in tokenizer.decode(window[0, : 2 * n])]
    assert any("\ufffd" in tokenizer.decode(window[0, :n]) for n in lengths)
    for length in lengths:
        (entry,) = continue_windows(models_of, tokenizer, window, 1, length)
        whole = tokenizer.decode(window[0, : 2 * length])
        assert whole.endswith(entry["text"])
        assert entry["prompt"].rstrip("\ufffd") + entry["text"] == whole
