"""The stage export on a tiny project: files, what is said of them, and that nothing is left of a failure."""

import json
import shutil
from dataclasses import replace

import pytest

from libprune.engine.describe import describe
from libprune.engine.errors import ExportError
from libprune.export import comparison, llama_cpp
from libprune.export.export import export_layout
from libprune.export.gguf_file import write_gguf
from libprune.models.sequences import Sequences
from libprune.models.tokens import read_tokens, write_tokens
from libprune.pipeline.artifacts import read_architecture, write_architecture
from libprune.pipeline.atomic import write_json
from libprune.pipeline.layout import NOTE, Layout
from libprune.pipeline.sections import Compute, Export, Slice
from libprune.results.prune import prune
from libprune.results.record import read_record
from stages import export as stage
from tests.support.exported import run_here, texts, write_tokenizer
from tests.support.models import FAMILIES
from tests.support.sliced import write_collected, write_trained
from tests.support.tiny import write_params


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pruned tiny model with evaluation windows, and nothing recovered."""
    layout, _ = write_collected(tmp_path_factory.mktemp("made"), "llama", "uniform", write_tokenizer)
    origin = read_architecture(layout).fingerprint
    text = read_tokens(layout.calibration_tokens, origin)[1]["tokens"]
    layout.pruned.mkdir()
    prune(layout, layout.pruned, Compute(device="cpu", dtype="float32"), Slice(repair="none"))
    write_tokens(
        layout.evaluation_tokens, Sequences(texts(6, 24)), {"model": origin, "source": "some text", "calibration": text}
    )
    layout.recovered.mkdir()
    write_json(layout.recovered / NOTE, {"method": "none"})
    return layout


@pytest.fixture
def layout(made, tmp_path):
    """A copy of it, with an empty folder for files."""
    shutil.copytree(made.root, tmp_path / "artifacts")
    (tmp_path / "artifacts/exported").mkdir()
    return Layout(tmp_path / "artifacts")


PARAMS = Export(
    formats=("gguf", "transformers"), gguf_types=("f16",), pad_channels=8, prompt_tokens=8, decode_tokens=3, rounds=2
)


def test_files_are_written_tried_and_timed(layout, tmp_path):
    outcome = export_layout(layout, PARAMS, layout.exported, tmp_path / "scratch")
    folder, file = outcome.files
    assert (folder.format, file.format) == ("transformers", "gguf f16")
    assert (layout.exported / folder.file / "config.json").is_file()
    assert file.bytes == (layout.exported / file.file).stat().st_size
    assert file.agreement is not None and file.agreement.same_written == file.agreement.written
    assert file.speed is not None and file.speed.dense.prefill > 0
    assert file.dense_bytes is not None and file.dense_bytes > file.bytes
    (note,) = outcome.notes
    assert "channels of zeros fill" in note
    lines = "\n".join(outcome.sentences(layout.exported))
    assert "llama-quantize" in lines and "of the dense model's speed in the same program" in lines
    assert outcome.metrics()["gguf f16"]["bytes"] == file.bytes
    assert outcome.plan["model"] == read_architecture(layout).fingerprint
    json.dumps(outcome.content())


def test_the_final_model_is_the_recovered_one(layout, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "reload", run_here)
    shutil.rmtree(layout.recovered)
    write_trained(layout.pruned, layout.recovered)
    params = Export(formats=("gguf",), gguf_types=("f32",), speed=False)
    outcome = export_layout(layout, params, layout.exported, tmp_path / "scratch")
    assert outcome.model == str(layout.recovered)
    assert read_record(layout.recovered).recovery is not None
    assert not (tmp_path / "scratch").exists()


def test_without_the_program_the_file_is_written_and_said_to_be_untried(layout, monkeypatch):
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)
    outcome = export_layout(layout, Export(formats=("gguf",), gguf_types=("f16",)), layout.exported)
    (file,) = outcome.files
    assert file.agreement is None and file.speed is None and file.program is None
    assert "llama.cpp was not tried" in "\n".join(outcome.sentences(layout.exported))
    assert (layout.exported / file.file).is_file()


def test_the_stage_writes_what_the_report_reads_and_nothing_of_a_failure(layout, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "reload", run_here)
    chosen = {"formats": ["gguf"], "gguf_types": ["f32"], "speed": False}
    params = write_params(tmp_path / "params.yaml", "model", "text", export=chosen)
    stage.main(params, layout.root, tmp_path / "metrics")
    written = json.loads(layout.export.read_text())
    assert [row["file"] for row in written["files"]] == ["model.f32.gguf"]
    before = sorted(path.name for path in layout.exported.iterdir())

    def of_another_model(path, source, kind):
        write_gguf(path, source, "f16")
        raise ExportError("the program computes something else")

    monkeypatch.setattr("libprune.export.gguf_file.write_gguf", of_another_model)
    with pytest.raises(ExportError):
        stage.main(params, layout.root, tmp_path / "metrics")
    assert sorted(path.name for path in layout.exported.iterdir()) == before
    assert json.loads(layout.export.read_text()) == written


def test_a_mixture_of_experts_is_refused_by_name(tmp_path):
    layout = Layout(tmp_path)
    write_architecture(layout, replace(describe(FAMILIES["mixtral"](0)), fingerprint="a"))
    with pytest.raises(ExportError, match=r"export\.formats: mixtral models are mixtures of experts"):
        export_layout(layout, Export(formats=("gguf",)), tmp_path)


def test_no_format_is_no_work(layout, tmp_path):
    params = write_params(tmp_path / "params.yaml", "model", "text")
    stage.main(params, layout.root, tmp_path / "metrics")
    assert json.loads(layout.export.read_text()) == {"files": []}
    assert [path.name for path in layout.exported.iterdir()] == ["nothing.json"]
