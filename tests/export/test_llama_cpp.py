"""The server of llama.cpp, asked for what it predicts, and what is said where it fails."""

from importlib.metadata import version

import pytest
import torch

from libprune.engine.errors import ExportError
from libprune.export import llama_cpp
from libprune.export.gguf_file import write_gguf
from tests.support.exported import texts, write_pruned


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    _, source = write_pruned(folder, "llama", "uniform")
    write_gguf(folder / "model.gguf", source, "f32")
    return folder / "model.gguf", source


def test_predictions_are_probabilities_and_the_most_probable_token_is_written(exported):
    path, source = exported
    ids = texts()[0].tolist()
    with llama_cpp.llama_cpp(path, context=64, threads=1) as program:
        predicted = program.predict(ids, source.config.vocab_size)
        written = program.write(ids, 5)
        prefill, decode = program.time(ids, 3)
        assert program.version == f"llama.cpp (xllamacpp {version('xllamacpp')})"
    assert predicted.shape == (source.config.vocab_size,)
    assert torch.isclose(predicted.exp().sum(), torch.tensor(1.0), atol=1e-5)
    assert len(written) == 5 and written[0] == int(predicted.argmax())
    assert prefill > 0 and decode > 0


def test_a_token_that_is_part_of_a_character_is_no_obstacle(exported, monkeypatch):
    """The server then leaves probabilities out; they are those of an answer in which it has not."""
    path, source = exported
    ids, asked = texts()[0].tolist(), []

    def complete(self, *args: object, **more: object) -> dict:
        asked.append(more)
        answer = whole(self, *args, **more)
        return {
            key: value for key, value in answer.items() if "logit_bias" in more or key != "completion_probabilities"
        }

    with llama_cpp.llama_cpp(path, context=64, threads=1) as program:
        expected, whole = program.predict(ids, source.config.vocab_size), llama_cpp.LlamaCpp._complete
        monkeypatch.setattr(llama_cpp.LlamaCpp, "_complete", complete)
        monkeypatch.setattr(llama_cpp.LlamaCpp, "tokenize", lambda self, text: [2])
        assert torch.allclose(program.predict(ids, source.config.vocab_size), expected, atol=1e-5)
    assert len(asked) == 2


def test_a_file_that_is_none_is_told_with_what_llama_cpp_says(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF of another kind")
    with (
        pytest.raises(ExportError, match=r"llama\.cpp does not load model\.gguf: it says"),
        llama_cpp.llama_cpp(tmp_path / "model.gguf", context=8, threads=1),
    ):
        pass


def test_a_text_that_is_too_long_for_the_context_is_told(exported):
    path, source = exported
    with (
        llama_cpp.llama_cpp(path, context=256, threads=1) as program,
        pytest.raises(ExportError, match=r"llama\.cpp stopped while it was asked for /completion"),
    ):
        program.predict([5] * 1000, source.config.vocab_size)


def test_a_missing_package_is_one_plain_sentence(monkeypatch):
    assert llama_cpp.missing() is None
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)
    assert llama_cpp.missing() == (
        "llama.cpp was not tried, because its package is not installed: pip install 'libprune[gguf]'"
    )
