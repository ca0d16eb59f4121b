"""The stage teacher: the text to train on, and what the dense model predicts there, stored so that it can go on."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from libprune.engine.errors import ArtifactError, LibpruneError, SourceError
from libprune.models.folder import load_model
from libprune.models.sequences import Sequences
from libprune.models.tokens import read_tokens
from libprune.pipeline.artifacts import read_architecture, read_json, read_table
from libprune.pipeline.layout import Layout
from libprune.recovery import predictions, teacher
from libprune.recovery.predictions import StoredTeacher
from tests.support import tiny
from tests.support.caches import private_cache
from tests.support.closure import run_without_torch
from tests.support.files import tree
from tests.support.models import FAMILIES
from tests.support.processes import both, require_to_wait, together

__all__ = ["private_cache"]

K, LENGTH, SEQUENCES, HELD_OUT = 4, 16, 20, 4
AT_ONCE = 3
SMALL = AT_ONCE * LENGTH * K * 6
"""Bytes of a file that holds `AT_ONCE` sequences."""
FILES = 8
RECOVER = {"method": "full", "length": LENGTH, "tokens": LENGTH * SEQUENCES, "held_out": HELD_OUT, "temperature": 2.0}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return tiny.write_project(tmp_path_factory.mktemp("project"), ("prepare", "tokenize"), recover=RECOVER)


@pytest.fixture
def place(project, tmp_path) -> Path:
    """A copy of the project."""
    return shutil.copytree(project, tmp_path / "place", ignore=shutil.ignore_patterns(".work", "model"))


@pytest.fixture(autouse=True)
def _small_files(monkeypatch) -> None:
    monkeypatch.setattr(predictions, "_SHARD", SMALL)


def work_in(place: Path) -> set[str]:
    """What is left of unfinished work, beside the digests of files that were read."""
    return {path.name for path in (place / ".work").glob("*")} - {"digests.json"}


def copy_model(project: Path, place: Path) -> None:
    if not (place / "artifacts/model").exists():
        shutil.copytree(project / "artifacts/model", place / "artifacts/model")


@pytest.fixture
def run(project, place):
    """Runs the stage under changed params; the layout that it has written into."""
    copy_model(project, place)

    def run_stage(**changes: Any) -> Layout:
        tiny.change_params(place, "recover", **changes)
        tiny.run_stages(place, ["teacher"])
        return Layout(place / "artifacts")

    return run_stage


def read(layout: Layout) -> tuple[Sequences, dict[str, Any]]:
    return read_tokens(layout.recovery_tokens, read_architecture(layout).fingerprint, stage="teacher")


# The text


def test_a_stage_that_has_nothing_to_do_writes_so_without_torch(place):
    tiny.change_params(place, "recover", method="none", top_k=K)
    assert run_without_torch("teacher", place) == ["recover.method is none: no text to train on is drawn"]
    table, meta = read_table(place / "artifacts/tokens/recovery.parquet", "teacher")
    assert (len(table["input_ids"]), meta["sequences"]) == (0, 0)
    assert json.loads((place / "artifacts/teacher/teacher.json").read_text()) == {"top_k": None}


def test_the_tokens_say_where_they_are_from(run, place, project, capsys):
    layout = run()
    sequences, meta = read(layout)
    text = str(project / "text.txt")
    assert sequences.ids.shape == (SEQUENCES + HELD_OUT, LENGTH)
    assert (meta["held_out"], meta["text"], meta["sequences"], meta["length"]) == (HELD_OUT, text, 24, LENGTH)
    (how,) = meta["sources"]
    expected = {"source": text, "part": "the first 84 documents", "share": 1, "seed": 0, "mode": "joined", "skipped": 0}
    assert {key: how[key] for key in expected} == expected
    assert len(how["windows"]) == SEQUENCES + HELD_OUT
    said = f"recovery: 20 sequences of 16 tokens to train on and 4 held out, from {text}; read were 84 documents "
    said += "of 2,016 tokens in 1 file, "
    assert f"{said}which begin 'never green sees bird" in capsys.readouterr().out
    assert read_json(layout.teacher / "teacher.json", "teacher") == {
        "model": read_architecture(layout).fingerprint,
        "teacher": read_architecture(layout).fingerprint,
        "tokens": meta["tokens"],
        "top_k": None,
        "at_once": 0,
    }
    assert work_in(place) == set()


def test_several_texts_are_recorded_each(run, project, place):
    other = tiny.write_text(place / "other.txt", documents=40)
    other.write_text(other.read_text().replace("the", "never"))
    text = str(project / "text.txt")
    layout = run(text=[{"text": text, "share": 0.75}, {"text": str(other), "share": 0.25}])
    _, meta = read(layout)
    assert meta["text"] == f"75 % {text}, 25 % {other}"
    assert [(how["source"], how["share"]) for how in meta["sources"]] == [(text, 0.75), (str(other), 0.25)]


def test_text_that_the_model_writes_leaves_no_unfinished_work(run, place):
    layout = run(text="self")
    sequences, meta = read(layout)
    assert (len(sequences), meta["text"], meta["sources"][0]["mode"]) == (24, "self", "sampled")
    assert work_in(place) == set()


def test_the_text_that_judges_is_refused_and_nothing_is_written(run, project, place):
    copy = shutil.copyfile(project / "text.txt", place / "copy.txt")
    with pytest.raises(SourceError, match=r"100 % of the text .* is in the text to train on \(.*copy\.txt\)"):
        run(text=str(copy), top_k=K)
    assert not (place / "artifacts/tokens/recovery.parquet").exists()
    assert not (place / "artifacts/teacher").exists()


def test_sequences_longer_than_the_positions_of_the_model_are_refused(run):
    with pytest.raises(LibpruneError, match=r"recover\.length"):
        run(length=1 << 20)


def test_missing_evaluation_tokens_are_asked_for(run, place):
    (place / "artifacts/tokens/evaluation.parquet").unlink()
    with pytest.raises(ArtifactError, match="run `dvc repro tokenize` first"):
        run()


# Stored predictions


@pytest.mark.parametrize("k", [K, 100])
def test_stored_predictions_are_the_largest_of_the_dense_model(run, k, capsys):
    layout = run(top_k=k)
    sequences, meta = read(layout)
    model = load_model(layout.model, torch.float32)
    with torch.no_grad():
        logits = model(sequences.ids).logits
    wanted = (logits / 2).log_softmax(-1).topk(min(k, logits.shape[-1]))
    origin = {"model": read_architecture(layout).fingerprint, "tokens": meta["tokens"], "top_k": k, "temperature": 2.0}
    said = StoredTeacher(layout.teacher, origin).predict(torch.arange(len(sequences)), {}).predictions
    torch.testing.assert_close(said.log_probabilities.float(), wanted.values, rtol=1e-3, atol=1e-3)
    there = logits.log_softmax(-1).gather(-1, said.ids.long())
    torch.testing.assert_close(there, logits.log_softmax(-1).gather(-1, wanted.indices))
    assert f"{k * 6} a position" in capsys.readouterr().out


def test_what_is_announced_is_what_is_written(run, capsys):
    layout = run(top_k=K)
    files = sorted(layout.teacher.glob("*.safetensors"))
    assert len(files) == FILES
    stored = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    assert stored == 24 * LENGTH * K * 6
    assert f"{LENGTH * K * 6} bytes a sequence, {K * 6} a position" in capsys.readouterr().out


def test_nothing_is_left_but_the_lock(run, place):
    stale = place / ".work/teacher/0123456789abcdef/predictions-00000.safetensors"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of other settings")
    layout = run(top_k=K)
    assert work_in(place) == {"teacher.lock"}
    assert {path.name for path in layout.teacher.iterdir()} == {
        "teacher.json",
        *(f"predictions-{number:05d}.safetensors" for number in range(FILES)),
    }
    assert {path.name for path in layout.root.iterdir() if path.name.startswith(".")} == set()


def test_one_sequence_more_than_fits_is_a_file_of_its_own(run):
    layout = run(top_k=K, tokens=LENGTH * 9)
    sizes = [len(load_file(file)["ids"]) for file in sorted(layout.teacher.glob("*.safetensors"))]
    assert sizes == [3, 3, 3, 3, 1]


@pytest.fixture
def stopping(monkeypatch) -> Iterator[SimpleNamespace]:
    """The stage stops when `after` files are written; how many it wrote is counted."""
    control, write = SimpleNamespace(after=10**6, written=0), teacher.write_predictions

    def counted(*args: Any) -> None:
        if control.after == 0:
            raise KeyboardInterrupt
        control.after -= 1
        control.written += 1
        write(*args)

    monkeypatch.setattr(teacher, "write_predictions", counted)
    return control


def stop_after(run: Any, stopping: SimpleNamespace, files: int, **changes: Any) -> None:
    stopping.after = files
    with pytest.raises(KeyboardInterrupt):
        run(top_k=K, **changes)
    stopping.after, stopping.written = 10**6, 0


def test_a_stopped_stage_goes_on_without_computing_a_file_again(run, place, stopping, capsys):
    whole = tree(run(top_k=K).teacher)
    shutil.rmtree(place / "artifacts/teacher")
    stop_after(run, stopping, 5)
    assert not (place / "artifacts/teacher").exists()
    capsys.readouterr()
    assert tree(run(top_k=K).teacher) == whole
    assert stopping.written == FILES - 5
    assert f"continues from a saved state: 5 of {FILES} files are there" in capsys.readouterr().out
    assert work_in(place) == {"teacher.lock"}


def test_a_stage_that_was_stopped_at_the_end_loads_no_model(run, stopping, monkeypatch):
    def fails(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(teacher, "writing_folder", fails)
        with pytest.raises(KeyboardInterrupt):
            run(top_k=K)
    stopping.written = 0
    monkeypatch.setattr(teacher, "load_teacher", fails)
    assert len(tree(run(top_k=K).teacher)) == FILES + 1
    assert stopping.written == 0


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"temperature": 1.0}, {"top_k": K - 1}, {"tokens": LENGTH * 19}, {"held_out": 5}], ids=str
)
def test_what_was_stored_for_other_settings_is_not_gone_on_from(run, stopping, changes):
    stop_after(run, stopping, 5)
    found = run(**({"top_k": K} | changes))
    assert stopping.written == len(list(found.teacher.glob("*.safetensors")))


def test_what_only_the_training_depends_on_changes_nothing(run, stopping):
    stop_after(run, stopping, 5)
    run(top_k=K, method="lora", learning_rate=0.1, checks=2, optimizer="adafactor", lora_rank=3, cross_entropy=0.5)
    assert stopping.written == FILES - 5


def test_a_changed_text_gives_other_predictions(run, project, place):
    first = run(top_k=K)
    one, (_, meta) = tree(first.teacher), read(first)
    text = place / "text.txt"
    text.write_text((project / "text.txt").read_text().replace("old", "green"))
    tiny.change_params(place, "tokenize", text=str(text))
    tiny.run_stages(place, ["tokenize"])
    second = run(top_k=K)
    two, (_, other) = tree(second.teacher), read(second)
    assert meta["tokens"] != other["tokens"]
    assert one.keys() == two.keys()
    assert all(one[name] != two[name] for name in one)
    assert json.loads(two["teacher.json"])["tokens"] == other["tokens"]


def test_a_disk_without_room_is_refused_before_any_work_but_counts_what_is_there(run, stopping, monkeypatch):
    needed = 24 * LENGTH * K * 6
    stop_after(run, stopping, 5)
    usage = shutil._ntuple_diskusage
    for free, enough in ((needed // 8, False), (needed // 2, True)):
        monkeypatch.setattr("libprune.models.memory.shutil.disk_usage", lambda _, free=free: usage(0, 0, free))
        if enough:
            run(top_k=K)
        else:
            with pytest.raises(LibpruneError, match=r"teacher needs .*; store fewer predictions \(recover\.top_k\)"):
                run(top_k=K)
    assert stopping.written == FILES - 5


# Other models


def test_predictions_of_a_model_of_masked_tokens_are_of_what_it_reads(tmp_path):
    model, text = tiny.write_encoder(tmp_path / "source", FAMILIES["bert"]), tiny.write_text(tmp_path / "t.txt", 200)
    tiny.write_params(tmp_path / "params.yaml", str(model), str(text), recover=RECOVER | {"top_k": K})
    tiny.run_stages(tmp_path, ["prepare", "tokenize", "teacher"])
    layout = Layout(tmp_path / "artifacts")
    check(layout, masked=True)


def test_predictions_of_a_model_that_tells_classes_apart_are_one_a_document(tmp_path):
    model = tiny.write_encoder(tmp_path / "source", FAMILIES["bert_classifier"])
    words = [line.split() for line in tiny.write_text(tmp_path / "t.txt", 200).read_text().splitlines()]
    rows = [{"text": " ".join(line[: 1 + n % 20]), "label": n % 3} for n, line in enumerate(words)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny.write_params(tmp_path / "params.yaml", str(model), str(tmp_path / "t.jsonl"), recover=RECOVER | {"top_k": 2})
    tiny.run_stages(tmp_path, ["prepare", "tokenize", "teacher"])
    layout = Layout(tmp_path / "artifacts")
    check(layout, masked=False)


def check(layout: Layout, masked: bool) -> None:
    """The stored predictions are those of each sequence alone, without padding."""
    sequences, meta = read(layout)
    about = json.loads((layout.teacher / "teacher.json").read_text())
    stored = StoredTeacher(layout.teacher, {"tokens": meta["tokens"]})
    model = load_model(layout.model, torch.float32)
    lengths = [LENGTH] * len(sequences) if masked else sequences.lengths.tolist()
    for number, length in enumerate(lengths):
        said = stored.predict(torch.tensor([number]), {}).predictions.log_probabilities.float()
        with torch.no_grad():
            logits = model(sequences.ids[number : number + 1, :length]).logits
        wanted = (logits / 2).log_softmax(-1).topk(about["top_k"]).values
        assert said.shape == wanted.shape
        torch.testing.assert_close(said, wanted, rtol=2e-3, atol=2e-3)


# Several processes


TWO = f"import libprune.recovery.predictions as p; p._SHARD = {SMALL}; run('teacher')\n"


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_give_the_files_of_one(run, place, python, sharded):
    whole = tree(run(top_k=K).teacher)
    tokens = (place / "artifacts/tokens/recovery.parquet").read_bytes()
    shutil.rmtree(place / "artifacts/teacher")
    (place / "artifacts/tokens/recovery.parquet").unlink()
    together(python, place, TWO, LIBPRUNE_SHARD=str(int(sharded)))
    assert tree(place / "artifacts/teacher") == whole
    assert (place / "artifacts/tokens/recovery.parquet").read_bytes() == tokens
    assert work_in(place) == {"teacher.lock"}


def test_two_processes_go_on_where_one_was_stopped(run, place, python, stopping):
    whole = tree(run(top_k=K).teacher)
    shutil.rmtree(place / "artifacts/teacher")
    stop_after(run, stopping, 5)
    together(python, place, TWO)
    assert tree(place / "artifacts/teacher") == whole


ALONE = """
import sys
sys.argv = ["teacher"]
import_module("stages.teacher").app()
"""


def test_where_the_first_process_cannot_draw_the_text_the_second_ends_too(place, python):
    """Which it does alone, with the model that this copy of the project lacks."""
    first, second = both(python, place, ALONE)
    assert (first.returncode, second.returncode) == (1, 1)
    assert first.stderr.splitlines()[-1] == "error: artifacts/model does not exist; run `dvc repro prepare` first"
    said = second.stderr.splitlines()[-1]
    assert re.match(r"error: process 0 of this stage, on .*, has failed, so process 1 ends: artifacts/model does", said)


def test_a_second_run_waits_for_the_first(run, place, python):
    tiny.change_params(place, "recover", top_k=K)
    require_to_wait(python, place, "teacher", "teacher/teacher.json")
