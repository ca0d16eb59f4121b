"""Text that the dense model writes: its tokens follow the model's distribution, and batches that are saved are used."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from libprune.engine import cost
from libprune.engine.architecture import Architecture
from libprune.engine.describe import describe
from libprune.engine.errors import SourceError
from libprune.engine.plan import Plan
from libprune.models.folder import fingerprint, load_model
from libprune.pipeline.layout import Layout
from libprune.texts.self_text import GREEDY, SelfText
from tests.support import tiny
from tests.support.models import FAMILIES, VOCAB, write_dense


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def architecture(folder) -> Architecture:
    return describe(load_model(folder, torch.float32), fingerprint(folder))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def make_writer(folder, architecture, tokenizer, tmp_path) -> Callable[[], SelfText]:
    """Makes a writer that saves its batches in a folder of the test's own."""
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "model").symlink_to(folder)
    return lambda: SelfText(Layout(tmp_path / "artifacts"), architecture, tokenizer, "cpu", "float32")


@pytest.fixture
def writer(make_writer) -> SelfText:
    return make_writer()


@pytest.mark.parametrize("length", [2, GREEDY + 1, GREEDY + 2, 40])
def test_sampled_sequences_have_the_length_asked_for_and_no_special_token(writer, tokenizer, length):
    ids, how = writer.sample(9, length, 3)
    assert ids.shape == (9, length)
    assert ids.dtype == np.int64
    assert not set(ids.flatten().tolist()) & set(tokenizer.all_special_ids)
    assert how["at_once"] == min(9, writer.at_once(length))


def test_ids_of_which_the_tokenizer_knows_nothing_are_not_written(tokenizer, tmp_path):
    """Embeddings are often padded to a round number of rows."""
    assert len(tokenizer) < VOCAB
    dense = write_dense(FAMILIES["gpt2"](0), tmp_path / "artifacts" / "model")
    writer = SelfText(Layout(tmp_path / "artifacts"), dense.architecture, tokenizer, "cpu", "float32")
    assert writer.sample(20, 10, 0)[0].max() < len(tokenizer)


@pytest.mark.parametrize("length", [1, 16, 100_000])
def test_the_cache_of_the_sequences_at_once_is_as_large_as_the_weights_at_most(writer, architecture, length):
    size = cost.size(architecture, Plan.dense(architecture))
    at_once = writer.at_once(length)
    assert (at_once + 1) * length * size.cache > size.total
    assert at_once == 1 or at_once * length * size.cache <= size.total


def test_a_writer_that_was_stopped_goes_on_after_its_last_batch(make_writer, tmp_path, monkeypatch):
    """What is saved of the first batch is used, what is missing of the others is written as it would have been."""
    monkeypatch.setattr(SelfText, "at_once", lambda self, length: 1)
    whole, _ = make_writer().sample(3, 12, 0)
    assert len(np.unique(whole, axis=0)) == 3
    first, *others = sorted(tmp_path.glob(".work/self/*/*.npy"), key=lambda path: int(path.stem.split("-")[0]))
    assert len(others) == 2
    np.save(first, marked := whole[:1] + 1000)
    others[1].unlink()
    last = make_writer()
    np.testing.assert_array_equal(last.sample(3, 12, 0)[0], np.concatenate([marked, whole[1:]]))
    assert not (last.sample(1, 12, 1)[0] == marked).all()
    last.forget()
    assert not (tmp_path / ".work/self").exists()


def test_sampling_leaves_the_random_numbers_of_others_alone(writer):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    writer.sample(2, 8, 0)
    assert torch.equal(torch.rand(3), expected)


def test_sampled_tokens_follow_the_models_distribution(writer, folder):
    """After the greedy tokens, the next one's frequencies are its probabilities, given the same beginning."""
    ids, _ = writer.sample(1500, GREEDY + 2, 0)
    model = load_model(folder, torch.float32)
    heads, counts = np.unique(ids[:, :-1], axis=0, return_counts=True)
    head = heads[counts.argmax()]
    drawn = ids[(ids[:, :-1] == head).all(1), -1]
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(head)[None]).logits[0, -1]
    logits[[0, 1]] = -torch.inf
    expected = logits.softmax(0).numpy()
    shares = np.bincount(drawn, minlength=len(expected)) / len(drawn)
    assert np.abs(shares - expected).max() < 4 * np.sqrt(0.25 / len(drawn))
    assert (ids[:, 1 : GREEDY + 1] == _greedy(model, ids[:, :1])).all()


def _greedy(model, start: np.ndarray) -> np.ndarray:
    ids = torch.from_numpy(start)
    for _ in range(GREEDY):
        with torch.no_grad():
            logits = model(input_ids=ids).logits[:, -1]
        logits[:, [0, 1]] = -torch.inf
        ids = torch.cat([ids, logits.argmax(1, keepdim=True)], 1)
    return ids[:, 1:].numpy()


def test_a_model_that_does_not_generate_text_is_refused(tokenizer, tmp_path):
    encoder = SelfText(Layout(tmp_path), describe(FAMILIES["bert"](0)), tokenizer, "cpu", "float32")
    with pytest.raises(SourceError, match=r"this model does not write text; name a text in tokenize\.text"):
        encoder.sample(2, 8, 0)
