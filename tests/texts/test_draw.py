"""Windows drawn from texts: from disjoint documents in every form, and recorded as they were drawn."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from libprune.engine.errors import SourceError
from libprune.models.sequences import Sequences
from libprune.models.tokens import read_tokens
from libprune.pipeline.artifacts import read_architecture
from libprune.pipeline.layout import Layout
from libprune.report.provenance import gather_provenance
from libprune.texts.draw import MARGIN, Drawn, require_disjoint
from libprune.texts.windows import cut_windows
from stages import prepare, tokenize
from tests.support import tiny
from tests.support.caches import private_cache
from tests.support.hub import REVISION, write_cached

__all__ = ["private_cache"]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The tiny model, prepared, and a text of documents of 24 words, each of one token."""
    folder = tmp_path_factory.mktemp("project")
    model = tiny.write_model(folder / "model")
    text = tiny.write_text(folder / "text.txt", documents=400)
    prepare.main(tiny.write_params(folder / "params.yaml", str(model), str(text)), folder / "artifacts")
    return folder


@pytest.fixture
def run(project, tmp_path):
    """Runs the stage under changed params; both artifacts as ids and metadata."""
    layout = Layout(project / "artifacts")
    fingerprint = read_architecture(layout).fingerprint

    def run_stage(**changes: object) -> list[tuple]:
        text = str(project / "text.txt")
        params = tiny.write_params(tmp_path / "params.yaml", "unused", text, tokenize={"text": text} | SIZES | changes)
        tokenize.main(params, layout.root)
        found = (read_tokens(path, fingerprint) for path in (layout.calibration_tokens, layout.evaluation_tokens))
        return [(sequences.ids.numpy(), meta) for sequences, meta in found]

    return run_stage


SIZES = {"calibration_sequences": 8, "calibration_length": 16, "evaluation_windows": 4, "evaluation_length": 12}


def lines(project: Path) -> list[str]:
    return (project / "text.txt").read_text().splitlines()


@pytest.fixture(scope="module")
def tokenizer(project):
    return AutoTokenizer.from_pretrained(project / "model")


def rows(ids: np.ndarray) -> set[bytes]:
    return {row.tobytes() for row in ids}


# What is recorded


@pytest.mark.parametrize("documents", ["joined", "apart"])
def test_the_record_is_enough_to_draw_the_same_windows_again(run, project, tokenizer, documents):
    for (ids, meta), length in zip(run(documents=documents), (16, 12), strict=True):
        first, count = re.fullmatch(r"the (first|last) (\d+) documents", meta["part"]).groups()
        texts = lines(project)[: int(count)] if first == "first" else lines(project)[-int(count) :]
        available = cut_windows(texts, tokenizer, length, meta["mode"])
        np.testing.assert_array_equal(available.ids[meta["windows"]], ids)
        assert (meta["documents"], meta["available"]) == (len(texts), len(available.ids))
        assert (meta["source"], meta["revision"], meta["column"]) == (str(project / "text.txt"), None, "text")


def test_the_record_of_a_hub_text_names_data_set_revision_config_and_split(run, project, tmp_path):
    half = {"train": lines(project)[:300], "test": lines(project)[300:]}
    write_cached(tmp_path / "cache", "Salesforce/wikitext", half, "wikitext-2-raw-v1")
    for (_, meta), split in zip(run(text="wikitext2"), half, strict=True):
        named = {"source": "wikitext2", "data_set": "Salesforce/wikitext", "config": "wikitext-2-raw-v1"}
        expected = named | {"revision": REVISION, "split": split, "streaming": False, "part": "all documents"}
        assert {key: meta[key] for key in expected} == expected


def test_the_report_names_the_data_set_config_split_and_commit(run, project, tmp_path):
    layout = Layout(project / "artifacts")
    write_cached(tmp_path / "cache", "owner/data", {"train": lines(project)}, "some")
    run(text="owner/data", config="some")
    assert gather_provenance(layout, origin(layout), project).text == f"owner/data, some, train, {REVISION}"
    run()
    assert gather_provenance(layout, origin(layout), project).text == str(project / "text.txt")


def origin(layout: Layout) -> dict[str, str]:
    """The digests that artifacts of a layout carry."""
    model = read_architecture(layout).fingerprint
    return {"model": model, "tokens": read_tokens(layout.calibration_tokens, model)[1]["tokens"]}


def test_the_stage_says_what_it_drew(run, capsys):
    run()
    said = capsys.readouterr().out
    assert re.search(r"^calibration: 8 windows of 16 tokens \(128 tokens\), of 420 in 280 documents: .*first 280", said)
    assert re.search(r"^evaluation: 4 windows of 12 tokens \(48 tokens\), of 240 in 120 documents: ", said, re.M)


# Documents apart


def test_a_window_of_documents_apart_lies_within_one(run, project):
    within = {" ".join(words[i : i + 16]) for words in map(str.split, lines(project)) for i in range(9)}
    texts = {
        mode: {" ".join(tiny.WORDS[i - 2] for i in row) for row in run(documents=mode)[0][0]}
        for mode in ("apart", "joined")
    }
    assert texts["apart"] <= within
    assert not texts["joined"] <= within


def test_documents_shorter_than_a_window_are_counted_and_told(run, project, tmp_path, capsys):
    path = tmp_path / "mixed.txt"
    path.write_text("\n".join(line if i % 2 else line[:20] for i, line in enumerate(lines(project))))
    calibration, evaluation = run(text=str(path), documents="apart")
    assert (calibration[1]["skipped"], evaluation[1]["skipped"]) == (140, 60)
    assert "280 documents, 140 of them shorter than a window: " in capsys.readouterr().out
    with pytest.raises(
        SourceError, match=r"calibration needs 8 windows of 30 .*; 280 of its 280 documents are shorter"
    ):
        run(text=str(path), documents="apart", calibration_length=30)


# Streams


def test_a_stream_without_a_held_out_split_is_read_apart(run, project):
    """What is evaluated on comes from its head and does not depend on the seed; the rest is drawn by it."""
    text = lines(project)
    found = {seed: run(streaming=True, documents="apart", seed=seed) for seed in (0, 1)}
    (calibration, meta), (evaluation, other) = found[0]
    read = other["documents"]
    assert other["part"] == f"the first {read} documents"
    assert meta["part"] == f"documents after the first {read}"
    of_head = {tuple(line.split()[i : i + 12]) for line in text[:read] for i in (0, 12)}
    of_rest = {tuple(line.split()[:16]) for line in text[read:]}
    assert {tuple(tiny.WORDS[i - 2] for i in row) for row in evaluation} <= of_head
    assert {tuple(tiny.WORDS[i - 2] for i in row) for row in calibration} <= of_rest
    np.testing.assert_array_equal(found[1][1][0], evaluation)
    assert rows(found[1][0][0]) != rows(calibration)
    np.testing.assert_array_equal(run(streaming=True, documents="apart")[0][0], calibration)


@pytest.mark.parametrize("documents", ["joined", "apart"])
def test_a_stream_is_read_until_there_is_something_to_draw_from_and_not_much_further(run, documents):
    for _, meta in run(streaming=True, documents=documents):
        asked = len(meta["windows"])
        assert meta["available"] >= MARGIN * asked
        assert asked <= meta["documents"] <= 2 * MARGIN * asked


def test_a_stream_that_is_too_short_says_what_it_gave(run, project, tmp_path):
    (tmp_path / "t.txt").write_text("\n".join(lines(project)[:8]))
    with pytest.raises(SourceError, match=r"calibration needs 8 windows of 16 tokens, the text gives \d \("):
        run(text=str(tmp_path / "t.txt"), streaming=True)


# Disjoint texts


def test_a_copy_under_another_name_is_refused(run, project, tmp_path):
    copy = tmp_path / "copy.txt"
    copy.write_text("\n".join(reversed(lines(project)[:200])))
    with pytest.raises(SourceError, match=r"100 % of the text to evaluate on \('.*copy\.txt'\) is in the text to"):
        run(evaluation_text=str(copy))


def test_a_text_that_repeats_itself_cannot_be_set_apart(run, project, tmp_path):
    (tmp_path / "t.txt").write_text("\n".join(lines(project)[:20] * 20))
    with pytest.raises(SourceError, match="take out what is repeated"):
        run(text=str(tmp_path / "t.txt"))


def test_a_few_recurring_headings_do_no_harm(run, project, tmp_path):
    headed = (f"= today =\n{line}" for line in lines(project))
    (tmp_path / "t.txt").write_text("\n".join(headed))
    calibration, evaluation = run(text=str(tmp_path / "t.txt"))
    assert len(calibration[0]) == 8
    assert len(evaluation[0]) == 4


# Conversations


def test_conversations_are_calibrated_and_evaluated_on(run, project, tmp_path):
    """The template of the tiny model puts the contents of the messages one behind the other."""
    for name, part in (("one", lines(project)[:200]), ("two", lines(project)[200:])):
        chats = ([{"role": "user", "content": f"{line} "}, {"role": "assistant", "content": line}] for line in part)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{line} {line}" for line in part))
    chosen = {"text": str(tmp_path / "one.jsonl"), "column": "messages"}
    written = {"text": str(tmp_path / "one.txt")}
    for more in ({}, {"evaluation_text": "two"}):
        others = [{key: str(tmp_path / f"{name}.{kind}") for key, name in more.items()} for kind in ("jsonl", "txt")]
        for (found, _), (expected, _) in zip(run(**chosen, **others[0]), run(**written, **others[1]), strict=True):
            np.testing.assert_array_equal(found, expected)


# Text that the model writes


def test_sampled_text_is_the_same_again_and_other_under_another_seed(run):
    (calibration, meta), (evaluation, other) = run(text="self")
    assert calibration.shape == (8, 16)
    assert evaluation.shape == (4, 12)
    assert meta["source"] == other["source"] == "self"
    assert meta["seed"] == 0
    assert "seed" not in other
    again, changed = run(text="self"), run(text="self", seed=1)
    np.testing.assert_array_equal(again[0][0], calibration)
    assert not rows(changed[0][0]) & rows(calibration)
    np.testing.assert_array_equal(changed[1][0], evaluation)


def test_what_is_evaluated_on_is_sampled_apart(run):
    (calibration, _), (evaluation, _) = run(text="self", evaluation_length=16, evaluation_windows=8)
    assert not rows(calibration) & rows(evaluation)


def test_sampled_and_read_text_go_together(run, project):
    calibration, evaluation = run(text="self", evaluation_text=str(project / "text.txt"))
    assert (calibration[1]["mode"], evaluation[1]["mode"]) == ("sampled", "joined")
    assert evaluation[1]["documents"] == 400
    calibration, evaluation = run(evaluation_text="self")
    assert (calibration[1]["documents"], evaluation[1]["mode"]) == (400, "sampled")


def test_a_model_that_writes_the_same_again_and_again_is_refused():
    ids = np.arange(40).reshape(4, 10)

    def drawn(rows: np.ndarray) -> Drawn:
        return Drawn(Sequences(torch.from_numpy(rows)), {"source": "self", "mode": "sampled", "part": ""}, [])

    known, partly = (drawn(rows) for rows in (ids, np.concatenate([ids[:1, :7], ids[:3, 1:8]])))
    require_disjoint([known], [drawn(ids[:, 1:] + 100)])
    with pytest.raises(SourceError, match=r"25 % of the text to evaluate on \('self'\)"):
        require_disjoint([known], [partly])
    with pytest.raises(SourceError, match="25 %"):
        require_disjoint([drawn(ids + 100), known], [drawn(ids + 200), partly])


# Several texts


@pytest.fixture
def two(project, tmp_path) -> list[str]:
    """A text of the first five words, and conversations of the next five."""
    rng = np.random.default_rng(0)
    documents = [[" ".join(rng.choice(words, 24)) for _ in range(60)] for words in (tiny.WORDS[:5], tiny.WORDS[5:10])]
    (tmp_path / "a.txt").write_text("".join(f"{line}\n" for line in documents[0]))
    chat = ({"chat": [{"role": "user", "content": line}]} for line in documents[1])
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat))
    return [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]


def of_text(row: np.ndarray) -> int:
    """The number of the text that a row is of; it has no token of another one."""
    (number,) = set(((row - 2) // 5).tolist())
    return number


def listed(two: list[str], *, written: float = 0.0) -> list[dict]:
    first = {"text": two[0], "share": 0.75 * (1 - written)}
    second = {"text": two[1], "share": 0.25 * (1 - written), "column": "chat"}
    return [first, second, *([{"text": "self", "share": written}] if written else [])]


def test_texts_and_conversations_are_mixed_by_their_shares(run, two, tokenizer):
    """In every half of the sequences, so that stages that take a part of them see all texts."""
    for (ids, meta), number in zip(run(text=listed(two), calibration_sequences=16, evaluation_windows=8), (16, 8),
                                   strict=True):  # fmt: skip
        texts = [of_text(row) for row in ids]
        assert texts.count(0) == 3 * number // 4
        assert 0 < texts[: number // 2].count(1) < number // 4 + 1
        assert meta["source"] == f"75 % {two[0]}, 25 % {two[1]}"
        assert (meta["mode"], meta["part"], meta["sequences"]) == ("mixed", "2 texts", number)
        for text, source in enumerate(meta["sources"]):
            assert (source["source"], source["share"]) == (two[text], (0.75, 0.25)[text])
            assert source["rows"] == [place for place, one in enumerate(texts) if one == text]


def test_each_of_several_texts_is_drawn_as_it_is_alone(run, two):
    """By the same seed, from the first documents of each; its last ones are set apart."""
    (ids, meta), (judged, about) = run(text=listed(two), calibration_sequences=16, evaluation_windows=8)
    for number, (name, keys) in enumerate(((two[0], {}), (two[1], {"column": "chat"}))):
        own, other = meta["sources"][number], about["sources"][number]
        sizes = {"calibration_sequences": len(own["rows"]), "evaluation_windows": len(other["rows"])}
        (alone, how), (held_out, what) = run(text=name, **keys, **sizes)
        np.testing.assert_array_equal(ids[own["rows"]], alone)
        np.testing.assert_array_equal(judged[other["rows"]], held_out)
        assert own["part"] == how["part"] == "the first 42 documents"
        assert other["part"] == what["part"] == "the last 18 documents"
        assert {key: own[key] for key in own.keys() & how.keys()} == {key: how[key] for key in own.keys() & how.keys()}


def test_the_order_of_several_texts_is_the_same_again_and_other_under_another_seed(run, two):
    sizes = {"text": listed(two), "calibration_sequences": 16, "evaluation_windows": 8}
    first, again, other = (run(**sizes, seed=seed) for seed in (0, 0, 1))
    assert first[0][1] == again[0][1]
    np.testing.assert_array_equal(first[0][0], again[0][0])
    assert first[0][1]["tokens"] != other[0][1]["tokens"]
    assert first[1][1]["tokens"] == other[1][1]["tokens"], "what is evaluated on is the same under every seed"


def test_written_text_beside_others_calibrates_and_judges_nothing(run, two):
    (ids, meta), (judged, about) = run(text=listed(two, written=0.5), calibration_sequences=16)
    assert [len(source["rows"]) for source in meta["sources"]] == [6, 2, 8]
    (alone, _), _ = run(text="self", calibration_sequences=8)
    np.testing.assert_array_equal(ids[meta["sources"][2]["rows"]], alone)
    assert [source["source"] for source in about["sources"]] == two
    assert sorted(map(of_text, judged)) == [0, 0, 0, 1]


def test_a_text_of_its_own_judges_several(run, project, two):
    (_, meta), (judged, about) = run(text=listed(two), evaluation_text=str(project / "text.txt"))
    assert [source["part"] for source in meta["sources"]] == ["all documents"] * 2
    assert (about["source"], about["sequences"], len(judged)) == (str(project / "text.txt"), 4, 4)


def test_a_list_of_one_text_is_as_the_text_alone(run, two):
    alone = run(text=two[1], column="chat")
    for (ids, meta), (expected, how) in zip(run(text=[listed(two)[1] | {"share": 1}]), alone, strict=True):
        np.testing.assert_array_equal(ids, expected)
        assert meta == how


def test_the_stage_says_what_it_drew_from_each_of_several_texts(run, two, capsys):
    run(text=listed(two))
    said = capsys.readouterr().out
    assert f"calibration: 8 windows of 16 tokens (128 tokens), from 75 % {two[0]}, 25 % {two[1]}" in said
    assert "calibration, text 1: 6 windows of 16 tokens (96 tokens), of 63 in 42 documents" in said
    assert "evaluation, text 2: 1 windows of 12 tokens" in said


def test_one_of_several_texts_that_judges_under_another_name_is_refused(run, two, tmp_path):
    copy = tmp_path / "copy.txt"
    copy.write_text(Path(two[0]).read_text())
    with pytest.raises(SourceError, match=r"100 % of the text to evaluate on .*copy.* is in the text to calibrate on"):
        run(text=listed(two), evaluation_text=str(copy))
    texts = [{"text": two[0], "share": 0.9}, {"text": str(copy), "share": 0.1}]
    copy.write_text("\n".join(reversed(Path(two[0]).read_text().splitlines())))
    with pytest.raises(SourceError, match=r"of the text to evaluate on .* is in the text to calibrate on"):
        run(text=texts)


def test_one_of_several_texts_is_not_the_one_to_evaluate_on(run, two):
    with pytest.raises(SourceError, match="the text to evaluate on is the text to calibrate on"):
        run(text=listed(two), evaluation_text=two[1], evaluation_column="chat")


def test_one_of_several_texts_that_is_too_short_is_named(run, two, tmp_path):
    (tmp_path / "short.txt").write_text("the cat\n" * 2)
    texts = [{"text": two[0], "share": 0.5}, {"text": str(tmp_path / "short.txt"), "share": 0.5}]
    with pytest.raises(SourceError, match=r"calibration of '.*short\.txt' needs 4 windows of 16 tokens"):
        run(text=texts)
