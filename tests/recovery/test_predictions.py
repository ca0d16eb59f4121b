import pytest
import torch

from libprune.engine.errors import ArtifactError
from libprune.models.sequences import Sequences
from libprune.recovery.losses import TopPredictions
from libprune.recovery.predictions import (
    LiveTeacher,
    StoredTeacher,
    attention_mask,
    describe_teacher,
    model_inputs,
    sequences_at_once,
    shard_path,
    top_predictions,
    write_predictions,
)
from tests.support.models import FAMILIES, VOCAB, tokens

ORIGIN = {"model": "here", "tokens": "these", "top_k": 4, "temperature": 2.0}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The dense model's logits on seven sequences, and a folder with the largest of them, two sequences a file."""
    folder, model, ids = tmp_path_factory.mktemp("teacher"), FAMILIES["llama"](0), tokens(7, 5)
    with torch.no_grad():
        logits = model(ids).logits
    for number in range(4):
        part = logits[2 * number : 2 * number + 2]
        write_predictions(shard_path(folder, number), [top_predictions(row[None], 4, 2.0) for row in part], ORIGIN)
    describe_teacher(folder, ORIGIN, 2)
    return folder, logits


def test_stored_predictions_are_those_of_the_sequences_asked_for(stored):
    folder, logits = stored
    index = torch.tensor([6, 0, 3])
    said = StoredTeacher(folder, ORIGIN).predict(index, {}).predictions
    wanted = (logits[index] / 2).log_softmax(-1).topk(4)
    assert isinstance(said, TopPredictions)
    torch.testing.assert_close(said.log_probabilities.float(), wanted.values, rtol=1e-3, atol=1e-3)
    assert torch.equal(said.ids.long(), wanted.indices)


@pytest.mark.parametrize("key", ORIGIN)
def test_predictions_of_another_origin_are_refused(stored, key):
    with pytest.raises(ArtifactError, match=f"belongs to {key}"):
        StoredTeacher(stored[0], {**ORIGIN, key: "other"})


def test_a_damaged_file_is_named(stored, tmp_path):
    for path in stored[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = shard_path(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ArtifactError, match=r"predictions-00001.* is damaged .* run `dvc repro teacher`"):
        StoredTeacher(tmp_path, ORIGIN).predict(torch.tensor([2]), {})
    path.unlink()
    with pytest.raises(ArtifactError, match="run `dvc repro teacher` first"):
        StoredTeacher(tmp_path, ORIGIN).predict(torch.tensor([2]), {})


def test_a_file_of_another_text_is_refused(stored, tmp_path):
    for path in stored[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    rows = [top_predictions(torch.randn(2, 5, VOCAB), 4, 2.0)]
    write_predictions(shard_path(tmp_path, 0), rows, ORIGIN | {"tokens": "others"})
    with pytest.raises(ArtifactError, match="belongs to tokens 'others'"):
        StoredTeacher(tmp_path, ORIGIN).predict(torch.tensor([0]), {})


def test_more_predictions_than_there_are_tokens_are_all():
    top = top_predictions(torch.randn(2, 3), 64, 1.0)
    assert top.ids.sort(-1).values.tolist() == [[0, 1, 2], [0, 1, 2]]


def test_files_hold_about_as_many_bytes_and_at_least_one_sequence():
    assert sequences_at_once(1 << 20, 1 << 10) == 1
    assert 0.9 < sequences_at_once(256, 64) * 256 * 64 * 6 / (1 << 26) <= 1


def test_a_live_teacher_says_what_the_model_does_and_hidden_states_if_asked():
    model, ids = FAMILIES["llama"](0), tokens(2, 5)
    said = LiveTeacher(model, hidden=True).predict(torch.tensor([0, 1]), model_inputs(ids, None))
    with torch.no_grad():
        wanted = model(ids, output_hidden_states=True)
    assert torch.equal(said.predictions, wanted.logits)
    assert all(map(torch.equal, said.hidden, wanted.hidden_states))
    assert LiveTeacher(model, hidden=False).predict(torch.tensor([0, 1]), model_inputs(ids, None)).hidden == ()


def test_a_live_teacher_holds_its_weights_unless_they_lie_on_disk():
    model = FAMILIES["llama"](0)
    assert LiveTeacher(model, hidden=False).held() == sum(parameter.nbytes for parameter in model.parameters())
    assert LiveTeacher(model, hidden=False, on_disk=True).held() == 0


def test_a_live_teacher_runs_once_over_held_out_sequences():
    model, ids, calls = FAMILIES["llama"](0), tokens(4, 5), []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    teacher, found = LiveTeacher(model, hidden=False, held_out=2), []
    for rows in ([0, 1], [2, 3], [2, 3], [0, 1], [3, 1]):
        found.append(teacher.predict(torch.tensor(rows), model_inputs(ids[rows], None)).predictions)
    handle.remove()
    assert len(calls) == 4
    assert torch.equal(found[1], found[2])
    assert torch.equal(found[0], found[3])


def test_a_mask_covers_the_tokens_of_each_sequence():
    ids = torch.zeros(2, 4, dtype=torch.long)
    assert attention_mask(Sequences(ids)) is None
    mask = attention_mask(Sequences(ids, torch.tensor([0, 1]), torch.tensor([2, 4])))
    assert mask is not None
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
