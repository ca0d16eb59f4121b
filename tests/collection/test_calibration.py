"""A model on its device and its calibration sequences: which are chosen, what is held out, what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from libprune.collection.calibration import (
    HELD_OUT_EVERY,
    Calibration,
    held_out,
    place,
    require_equal_passes,
    require_own_weights,
    set_up,
)
from libprune.engine.describe import describe
from libprune.engine.errors import LibpruneError, SourceError
from libprune.models.parallel import World
from libprune.models.sequences import Sequences
from libprune.models.tokens import write_tokens
from libprune.pipeline.artifacts import read_architecture
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Compute
from tests.support.measured import LENGTH, SEQUENCES, write_project
from tests.support.models import FAMILIES, tokens

CPU = Compute(device="cpu", dtype="float32", batch_tokens=3 * LENGTH, offload="none")


@pytest.fixture(scope="module")
def layout(tmp_path_factory) -> Layout:
    return Layout(write_project(FAMILIES["llama"](0), tmp_path_factory.mktemp("project")) / "artifacts")


@pytest.fixture(scope="module")
def run(layout) -> Calibration:
    return set_up(layout, CPU, 4)


@given(st.integers(0, 50), st.integers(0, 30))
def test_every_eighth_sequence_is_held_out_wherever_a_batch_begins(first, number):
    flags = held_out(first, number)
    assert flags.tolist() == [(first + i) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 for i in range(number)]


def test_the_first_or_the_last_sequences_are_chosen(layout, run):
    ids = tokens(SEQUENCES, LENGTH)
    last, every = set_up(layout, CPU, 4, last=True), set_up(layout, CPU, None)
    assert torch.equal(run.sequences.ids, ids[:4])
    assert torch.equal(last.sequences.ids, ids[-4:])
    assert torch.equal(every.sequences.ids, ids)
    assert (last.first, every.first, last.available) == (SEQUENCES - 4, 0, SEQUENCES)
    with pytest.raises(SourceError, match="99 calibration sequences are asked for"):
        set_up(layout, CPU, 99)


def test_the_metadata_say_whose_sums_these_are(layout, run):
    assert run.meta["model"] == run.architecture.fingerprint
    assert (run.meta["sequences"], run.meta["length"], run.meta["compute_dtype"]) == (4, LENGTH, "float32")
    half = set_up(layout, CPU.model_copy(update={"dtype": "bfloat16"}), 4)
    assert half.meta == run.meta | {"compute_dtype": "bfloat16"}
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    assert half.weights["model.norm.weight"].dtype == torch.float32, "the weights are those of the files"


def test_a_pass_has_as_many_sequences_as_the_tokens_allow_and_at_least_one(layout, run):
    assert (run.at_once, run.n_tok, run.unit, run.patience) == (3, LENGTH - 1, "tok", 0.0)
    assert set_up(layout, CPU.model_copy(update={"batch_tokens": 1}), 4).at_once == 1
    assert run.work == layout.root.parent / ".work"


def test_labelled_sequences_run_in_the_order_of_their_lengths(tmp_path):
    layout = Layout(write_project(FAMILIES["bert_classifier"](0), tmp_path) / "artifacts")
    lengths = torch.tensor([5, 3, 9, 3, 4, 2])
    labelled = Sequences(tokens(SEQUENCES, LENGTH), torch.arange(6) % 3, lengths)
    write_tokens(layout.calibration_tokens, labelled, {"model": read_architecture(layout).fingerprint})
    run = set_up(layout, CPU, 4)
    assert run.sequences.lengths.tolist() == [3, 3, 5, 9], "of the first four, as they are asked for"
    with pytest.raises(LibpruneError, match="LIBPRUNE_SHARD needs as many passes in every process"):
        require_equal_passes(run.sequences, World(0, 2, sharded=True))
    require_equal_passes(run.sequences, World(0, 2))
    require_equal_passes(Sequences(tokens()), World(0, 2, sharded=True))


def test_work_that_changes_weights_needs_them_whole_on_the_device(run):
    require_own_weights(run)
    for changed in (
        replace(run, world=World(0, 2, sharded=True)),
        replace(run, compute=CPU.model_copy(update={"offload": "cpu"})),
    ):
        with pytest.raises(LibpruneError, match=r"must lie whole on the device; unset LIBPRUNE_SHARD"):
            require_own_weights(changed)


@pytest.mark.parametrize("setting", [{}, {"offload": "cpu"}, {"gradient_checkpointing": True}])
def test_wherever_a_model_is_placed_it_computes_the_same(run, setting):
    model = FAMILIES["llama"](0)
    compute = CPU.model_copy(update=setting)
    with torch.no_grad():
        expected = model(tokens()).logits
        placed = place(model, describe(model), compute, World(), torch.device("cpu"))
        assert torch.equal(placed(tokens()).logits, expected)
    assert replace(run, compute=compute).recompute == bool(setting)


def test_a_missing_model_is_named(layout, tmp_path):
    (tmp_path / "artifacts").mkdir()
    for path in layout.root.iterdir():
        if path.name != "model":
            (tmp_path / "artifacts" / path.name).symlink_to(path)
    with pytest.raises(LibpruneError, match="model"):
        set_up(Layout(Path(tmp_path / "artifacts")), CPU, 4)
