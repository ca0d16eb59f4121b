"""The axes of a residual stream: what they keep, what mends the readers, and how they are stored."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from libprune.collection.stream import read_stream
from libprune.collection.stream_axes import (
    DAMPINGS,
    Narrowed,
    choose_kind,
    find_axes,
    lost,
    read_axes,
    turn_model,
    write_axes,
)
from libprune.engine.architecture import RESIDUAL
from libprune.engine.describe import describe, stored_tensors
from libprune.engine.errors import ArtifactError, LibpruneError
from libprune.pipeline.atomic import writing_folder
from tests.support.models import FAMILIES, outputs, tokens
from tests.support.widths import made_axes


def llama(name: str, kind: str):
    model = FAMILIES[name](0)
    architecture = describe(model)
    return model, architecture, made_axes(model, architecture, kind)


def moments(width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(4 * width, width, generator=generator, dtype=torch.float64)
    states = states @ torch.randn(width, width, generator=generator, dtype=torch.float64)
    return states.T @ states / len(states)


@settings(max_examples=20)
@given(st.integers(2, 9), st.integers(0, 2**31))
def test_both_kinds_of_axes_keep_most_first_and_principal_ones_most_of_all(width, seed):
    gram = moments(width, seed)
    order, _, none = find_axes("selected", gram, {"norm": torch.ones(width)})
    _, turn, gains = find_axes("principal", gram, {"norm": torch.ones(width)})
    assert none == {} and gains.keys() == {"norm"}
    selected, principal = gram.diagonal()[order], ((turn.T.double() @ gram) * turn.T).sum(1)
    for kept in (selected, principal):
        assert (kept.diff() <= 1e-4 * gram.trace()).all()
        assert kept.sum() == pytest.approx(float(gram.trace()), rel=1e-4)
    assert (principal.cumsum(0) >= selected.cumsum(0) - 1e-4 * gram.trace()).all()


@pytest.mark.parametrize(("name", "kind"), [("llama", "selected"), ("mistral", "principal")])
def test_the_matrix_of_a_norm_never_loses_more_than_none_where_it_is_fitted(name, kind):
    _, architecture, axes = llama(name, kind)
    width = architecture.sizes[RESIDUAL] - 7
    for norm in set(axes.stream.readers.values()):
        matrix, ridge = axes.matrix(norm, width)
        assert ridge in DAMPINGS
        gram = axes.grams[norm].double()
        plain = torch.eye(len(gram), dtype=torch.float64)[:, :width]
        assert lost(gram, matrix.double()) <= lost(gram, plain) * (1 + 1e-6), (
            "mending is never worse where it is fitted"
        )


def test_the_whole_width_changes_nothing():
    model, architecture, axes = llama("mistral", "principal")
    whole, ids = architecture.sizes[RESIDUAL], tokens()
    for ratio in axes.ratios.values():
        ratio[-1] = 1.0
    dense = {name: p.detach().clone() for name, p in stored_tensors(model).items()}
    weights = Narrowed(dense, architecture, axes, whole, repair=True)
    with torch.no_grad():
        before = outputs(model, ids)
        for parameter in architecture.parameters:
            model.get_parameter(parameter.name).copy_(weights[parameter.name])
        after = outputs(model, ids)
    torch.testing.assert_close(after, before, atol=2e-5 * float(before.abs().max()), rtol=0)


def test_axes_are_read_as_they_were_written(tmp_path):
    for name, kind in (("llama", "selected"), ("qwen3_next", "principal")):
        _, architecture, axes = llama(name, kind)
        with writing_folder(tmp_path / name) as folder:
            write_axes(folder, axes, {"model": architecture.fingerprint})
        found = read_axes(tmp_path / name, {"model": architecture.fingerprint})
        assert (found.stream, found.digest, found.kind) == (axes.stream, axes.digest, kind)
        for table in ("gains", "ratios", "grams", "held_out"):
            one, other = getattr(found, table), getattr(axes, table)
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(ArtifactError, match="dvc repro width"):
        read_axes(tmp_path / "none", {"model": architecture.fingerprint})


@pytest.mark.parametrize(
    ("name", "why"),
    [("llama", "output head of this model is its embedding"), ("glm4", "writes into the residual stream")],
)
def test_principal_axes_are_refused_by_name_where_a_rotation_would_change_the_model(name, why):
    model = FAMILIES[name](0)
    stream = read_stream(model, describe(model))
    assert choose_kind("auto", stream) == "selected"
    with pytest.raises(LibpruneError, match=f"width.axes is principal, but .*{why}"):
        choose_kind("principal", stream)


def test_a_turned_layer_norm_would_be_another_one():
    model = FAMILIES["starcoder2"](0)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(LibpruneError, match="takes the mean of the columns away"):
        choose_kind("principal", read_stream(model, describe(model)))


def test_turning_a_model_back_and_forth_leaves_it(tmp_path):
    model, architecture, axes = llama("llama", "selected")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    turn_model(model, architecture, axes)
    assert not torch.equal(model.model.embed_tokens.weight, before["model.embed_tokens.weight"])
    back = axes.order.argsort()
    for name, parameter in model.named_parameters():
        for dim, size in enumerate(parameter.shape):
            if size == len(back) and "model" in str(architecture.parameters[_index(architecture, name)].dims[dim]):
                parameter.data = parameter.data.index_select(dim, back)
        assert torch.equal(parameter, before[name])


def _index(architecture, name: str) -> int:
    return [p.name for p in architecture.parameters].index(name)
