"""Graphs against the models that they are made of; one that holds all: layers of their own widths, and one cache."""

import pytest
import torch

from libprune.engine.errors import ExportError
from libprune.export import graphs
from libprune.export.formats import GraphFolder
from libprune.export.packages import PACKAGES
from tests.support.exported import distance, predicted, texts, write_pruned


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Layers of their own widths, of which one has no attention and one no MLP."""
    folder = tmp_path_factory.mktemp("graph")
    _, source = write_pruned(folder, "llama", "holes")
    GraphFolder("onnx", 1).write(folder / "onnx", source)
    return folder / "onnx", source


def test_onnx_runtime_computes_the_pruned_model(exported):
    folder, source = exported
    assert distance(GraphFolder("onnx", 1), folder, source, texts()) < 1e-3
    with graphs.graph(folder, source, "onnx", threads=1) as program:
        written = program.write(texts()[0].tolist(), 4)
        prefill, decode = program.time(texts()[0, :8].tolist(), 3)
        assert program.version.startswith("ONNX Runtime 1.")
    whole = torch.cat([texts()[:1], torch.tensor([written])], 1)
    assert predicted(source, whole)[0, 23:27].argmax(-1).tolist() == written
    assert prefill > 0 and decode > 0


def test_a_graph_takes_any_length_in_steps_of_any_size(exported):
    folder, source = exported
    ids = texts()[0].tolist()
    with graphs.graph(folder, source, "onnx", threads=1) as program:
        whole = program._step(ids, 0, program._empty()).logits
        first = program._step(ids[:5], 0, program._empty())
        rest = program._step(ids[5:], 5, first.past_key_values).logits
    assert torch.allclose(torch.cat([first.logits, rest], 1), whole, atol=1e-4)


def test_a_graph_that_cannot_be_made_is_told_and_not_hidden(tmp_path, monkeypatch):
    _, source = write_pruned(tmp_path, "llama", "uniform")

    def fails(*args, **kwargs):
        raise RuntimeError("no lowering for aten::special\nand more")

    monkeypatch.setattr(graphs, "decompose_for_generation", fails)
    with pytest.raises(
        ExportError, match=r"transformers cannot export .*pruned as onnx: no lowering for aten::special and more$"
    ):
        graphs.write_graph(tmp_path, source, "onnx")


@pytest.mark.parametrize(("name", "message"), [("bert", "predicts no next token"), ("llava", "reads images")])
def test_a_model_that_does_not_read_and_write_text_alone_is_refused(tmp_path, name, message):
    _, source = write_pruned(tmp_path, name, "uniform")
    with pytest.raises(ExportError, match=message):
        graphs.write_graph(tmp_path, source, "onnx")


def test_a_program_that_is_not_installed_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(graphs, "find_spec", lambda name: None)
    assert graphs.missing("openvino") == (
        "OpenVINO was not tried, because it is not installed: pip install 'libprune[openvino]'"
    )


def test_every_format_has_its_packages_runtime_and_name():
    assert graphs.CONFIGS.keys() == PACKAGES.keys() == graphs.RUNTIMES.keys() == graphs.NAMES.keys()
