"""Proofs of folders: a fresh process computes a model's logits, and everything else is refused with its reason."""

import json
import math
from pathlib import Path

import pytest
import torch

from libprune.engine.errors import LibpruneError
from libprune.results import proof
from libprune.results.proof import agrees, reference_logits, reload, verify_folder
from tests.support.models import FAMILIES, tokens

IDS = tokens(2, 8)


@pytest.fixture
def saved(tmp_path) -> tuple[Path, torch.nn.Module]:
    """A folder with a model that writes, and the model."""
    model = FAMILIES["llama"](0)
    model.save_pretrained(tmp_path)
    return tmp_path, model


@pytest.mark.parametrize(("family", "head"), [("gpt2", "causal_lm"), ("bert_classifier", "sequence_classification")])
def test_a_fresh_process_computes_the_models_own_logits(tmp_path, quick_proof, family, head):
    model = FAMILIES[family](0)
    model.save_pretrained(tmp_path)
    expected = reference_logits(model, IDS)
    result = verify_folder(tmp_path, IDS, expected, remote=False, head=head)
    assert result.scale == float(expected.abs().max())
    assert result.difference <= 1e-6 * result.scale


@pytest.mark.parametrize(
    ("difference", "scale", "agree"),
    [
        (1e-4, 1.0, True),
        (1.1e-4, 1.0, False),
        (0.0, 0.0, True),
        (math.inf, math.inf, False),
        (0.0, math.inf, False),
        (math.nan, 1.0, False),
        (0.0, math.nan, False),
    ],
)
def test_only_finite_outputs_within_the_tolerance_agree(difference, scale, agree):
    assert agrees(difference, scale) == agree


def test_a_model_that_writes_is_run_in_one_pass_and_with_the_cache_and_generates(saved, quick_proof):
    folder, model = saved
    computed = reload(folder, IDS, remote=False, head="causal_lm")
    assert int(computed["parameters"]) == sum(parameter.numel() for parameter in model.parameters())
    torch.testing.assert_close(computed["logits"], reference_logits(model, IDS))
    torch.testing.assert_close(computed["cached"], computed["logits"], rtol=0, atol=1e-5)
    expected = model.generate(IDS[:1, :4], attention_mask=torch.ones(1, 4), max_new_tokens=4, do_sample=False)
    assert torch.equal(computed["generated"], expected[:, 4:])


def test_other_logits_are_refused_with_the_difference(saved, quick_proof):
    folder, model = saved
    expected = reference_logits(model, IDS)
    other = expected + 1e-3 * expected.abs().max()
    for wrong, message in ((other, r"something else: logits differ by \d.*a defect"), (expected * torch.nan, "by nan")):
        with pytest.raises(LibpruneError, match=message):
            verify_folder(folder, IDS, wrong, remote=False, head="causal_lm")


@pytest.mark.parametrize("name", ["logits", "cached"])
def test_an_output_that_is_not_finite_is_refused_in_whatever_way_it_was_computed(saved, monkeypatch, name):
    folder, model = saved
    expected = reference_logits(model, IDS)
    computed = {"logits": expected, "cached": expected} | {name: expected * torch.nan}
    monkeypatch.setattr(proof, "reload", lambda *args: computed)
    with pytest.raises(LibpruneError, match="something else: logits differ by nan"):
        verify_folder(folder, IDS, expected, remote=False, head="causal_lm")


def test_a_folder_that_does_not_load_is_refused_with_the_last_line_of_its_error(tmp_path, quick_proof):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such type"}))
    with pytest.raises(LibpruneError, match=r"does not load in a fresh process: [^\n]+$") as caught:
        reload(tmp_path, IDS, remote=False, head="causal_lm")
    assert str(tmp_path) in str(caught.value)


def test_code_in_a_folder_cannot_import_libprune(tmp_path, quick_proof):
    """A modeling file that needs libprune would not load where libprune is not installed."""
    FAMILIES["llama"](0).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    own = {"AutoModelForCausalLM": "modeling_own.Own", "AutoConfig": "modeling_own.OwnConfig"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": own}))
    (tmp_path / "modeling_own.py").write_text(
        "import libprune.engine.axes\n"
        "from transformers import LlamaConfig as OwnConfig\n"
        "from transformers import LlamaForCausalLM as Own\n"
    )
    with pytest.raises(LibpruneError, match=r"does not load in a fresh process: .*libprune"):
        reload(tmp_path, IDS, remote=True, head="causal_lm")
