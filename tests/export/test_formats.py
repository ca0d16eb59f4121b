"""The formats that params ask for, and the check of how a program reads text."""

import pytest

from libprune.engine.errors import ExportError
from libprune.export import packages
from libprune.export.formats import EXACT, ROUNDED, GgufFile, GraphFolder, asked_for
from libprune.export.llama_cpp import LlamaCpp
from libprune.pipeline.sections import Export
from tests.support.exported import write_pruned


def test_formats_are_those_asked_for_each_once():
    params = Export(formats=("gguf", "onnx", "gguf"), gguf_types=("q8_0", "f16", "q8_0"), threads=3)
    assert asked_for(params) == [GgufFile("q8_0", 3), GgufFile("f16", 3), GraphFolder("onnx", 3)]
    assert [form.file for form in asked_for(params)] == ["model.q8_0.gguf", "model.f16.gguf", "onnx"]
    assert [form.limit for form in asked_for(params)] == [ROUNDED, EXACT, EXACT]
    assert asked_for(Export(formats=("transformers",), pad_channels=8)) == []


def test_a_package_that_a_format_needs_is_asked_for_before_anything_is_written(monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"pip install 'libprune\[onnx\]'"):
        asked_for(Export(formats=("gguf", "onnx")))


def test_a_text_that_is_read_as_other_tokens_stops(tmp_path, monkeypatch):
    _, source = write_pruned(tmp_path, "llama", "uniform")
    program, form = LlamaCpp("http://nowhere"), GgufFile("f16", 1)
    monkeypatch.setattr(LlamaCpp, "tokenize", lambda self, text: [9, 9])
    with pytest.raises(ExportError, match=r"first at token 0: \[9, 9\] for \[2, 4, 27\]"):
        form.check(program, source, "acz")
