"""`docs/add-a-family.md`, tried: the family of the page prunes after its YAML was named, and nothing else was added."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import GlmConfig, PreTrainedModel

from libprune.cli.inspection import inspect_model
from libprune.engine.architecture import OWN_FAMILIES
from libprune.engine.describe import describe
from libprune.engine.errors import FamilyError
from libprune.engine.surgery import masked
from libprune.models.families import use_families
from libprune.pipeline.params import load_params
from libprune.results.record import read_record
from tests.support.models import FFN, heads, prune, random_plan, tiny_model, tokens, write_dense
from tests.support.tiny import VOCABULARY, run_stages, write_params, write_text, write_tokenizer

PAGE = Path(__file__).parents[2] / "docs/add-a-family.md"


def glm() -> PreTrainedModel:
    return tiny_model(GlmConfig, **FFN, **heads(26, 3, 3, 4))(0)


@pytest.fixture
def file(tmp_path) -> Path:
    """The file of the page; in the end its family is forgotten."""
    (text,) = re.findall(r"```yaml\n(family:.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(text.splitlines()) < 30
    path = tmp_path / "glm.yaml"
    path.write_text(text)
    yield path
    OWN_FAMILIES.clear()


def test_before_it_is_refused_with_what_to_do():
    message = r"'glm'; known: apertus, arcee, bert, .*write a family file .* name it in prepare\.families"
    with pytest.raises(FamilyError, match=message):
        describe(glm())


@pytest.mark.parametrize("kind", ["uniform", "per_layer", "holes"])
def test_the_family_of_the_page_is_sliced_as_masked(file, tmp_path, kind):
    use_families(str(file))
    dense = write_dense(glm(), tmp_path / "dense")
    plan = random_plan(dense.architecture, kind)
    (tmp_path / "pruned").mkdir()
    pruned = prune(dense, plan, kind != "uniform", tmp_path / "pruned")
    with torch.no_grad(), masked(dense.model, dense.architecture, plan):
        expected = dense.model(tokens()).logits
    found = pruned.model(tokens()).logits.detach()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_the_stages_behind_prepare_take_the_family_from_what_was_written(file, tmp_path, quick_proof):
    """Each as in a process of its own, that has read no file, and the file is gone."""
    settings = {**FFN, **heads(26, 3, 3, 4), "num_hidden_layers": 2, "vocab_size": len(VOCABULARY)}
    tiny = GlmConfig(**settings, bos_token_id=None, eos_token_id=1, pad_token_id=1)
    model = tmp_path / "dense"
    type(glm())(tiny).save_pretrained(model)
    write_tokenizer(model)
    text = str(write_text(tmp_path / "text.txt", documents=120))
    changes = {
        "prepare": {"model": str(model), "families": str(file)},
        "score": {"criterion": "magnitude"},
        "allocate": {"ratio": 0.2, "method": "uniform", "split": "proportional", "channel_multiple": 1},
        "slice": {"repair": "sequential"},
    }
    params = write_params(tmp_path / "params.yaml", str(model), text, **changes)
    assert inspect_model(load_params(params)).architecture.family == "glm"
    run_stages(tmp_path, ["sources", "prepare"])
    assert (tmp_path / "artifacts/sources/families").resolve() == file.resolve()
    file.unlink()
    for stage in ("tokenize", "gradients", "score", "allocate", "slice", "recover", "export"):
        OWN_FAMILIES.clear()
        run_stages(tmp_path, [stage])
    OWN_FAMILIES.clear()
    pruned = tmp_path / "artifacts/pruned"
    assert json.loads((pruned / "libprune.json").read_text())["own_family"]["model_types"] == ["glm"]
    OWN_FAMILIES.clear()
    assert read_record(pruned).architecture.family == "glm"
