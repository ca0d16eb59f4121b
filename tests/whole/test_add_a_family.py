"""`docs/add-a-family.md`, tried: the family of the page prunes after nothing was added but its YAML."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import GraniteConfig, PreTrainedModel

from libprune.engine import family
from libprune.engine.describe import describe
from libprune.engine.errors import FamilyError
from libprune.engine.surgery import masked
from tests.support.models import FFN, heads, prune, random_plan, tiny_model, tokens, write_dense

PAGE = Path(__file__).parents[2] / "docs/add-a-family.md"


def granite() -> PreTrainedModel:
    return tiny_model(GraniteConfig, **FFN, **heads(36, 3, 2), attention_bias=True, residual_multiplier=0.5)(0)


@pytest.fixture
def added(tmp_path, monkeypatch):
    """The families that ship with libprune, and the one of the page."""
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(text.splitlines()) < 30
    shutil.copytree(family.FOLDER, tmp_path / "families")
    (tmp_path / "families/granite.yaml").write_text(text)
    monkeypatch.setattr(family, "FOLDER", tmp_path / "families")
    family.families.cache_clear()
    yield
    family.families.cache_clear()


def test_before_it_is_refused_with_what_to_write():
    with pytest.raises(
        FamilyError,
        match=r"'granite'; known: bert, gemma2, gemma3, gemma3_text, gpt2, .*libprune/families/granite\.yaml",
    ):
        describe(granite())


@pytest.mark.parametrize("kind", ["uniform", "per_layer", "holes"])
def test_the_family_of_the_page_is_sliced_as_masked(added, tmp_path, kind):
    dense = write_dense(granite(), tmp_path / "dense")
    plan = random_plan(dense.architecture, kind)
    (tmp_path / "pruned").mkdir()
    pruned = prune(dense, plan, kind != "uniform", tmp_path / "pruned")
    with torch.no_grad(), masked(dense.model, dense.architecture, plan):
        expected = dense.model(tokens()).logits
    found = pruned.model(tokens()).logits.detach()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
