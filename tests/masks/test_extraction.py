"""The smaller model of a masked one, on disk: it is proved, and in the type of the given one."""

import torch
from safetensors.torch import load_file

from libprune.masks.extraction import extraction
from libprune.masks.files import read_masked
from libprune.results.record import read_provenance
from tests.support.masked_models import GATE, UP, V, run, zero
from tests.support.models import FAMILIES

WEIGHTS = "model.safetensors"


FOLD = {V: slice(8, 16), GATE: 4, UP: 4}


def test_bias_folds_in_bfloat16_are_proved_in_two_steps(tmp_path, quick_proof):
    model = FAMILIES["llama"](0)
    zero(model, FOLD)
    model.bfloat16().save_pretrained(tmp_path / "model")
    done = run("extract", tmp_path / "model", tmp_path / "out")
    assert done.exit_code == 0, done.output
    made = read_provenance(tmp_path / "out")
    assert len(made["masks"]["folded"]) == 2
    assert len(extraction(read_masked(tmp_path / "model")).decision.folds) == 2
    assert made["slice"] == {"repair": "masks", "dtype": "bfloat16"}
    assert made["proof"]["removal_difference"] < 1e-5 * made["proof"]["logit_scale"]
    assert {t.dtype for t in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.bfloat16}
