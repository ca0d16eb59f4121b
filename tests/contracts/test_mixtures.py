"""What holds for every mixture of experts beside the contract of families: channels as units, and published names."""

import re

import pytest
import torch
from safetensors import safe_open

from libprune.engine import cost
from libprune.engine.surgery import masked
from tests.support.models import FAMILIES, MIXTURES, Dense, prune, random_plan, tokens, write_dense


@pytest.fixture(scope="module", params=[name for name in MIXTURES if name != "nemotron_h"])
def dense(request, tmp_path_factory) -> Dense:
    """A mixture whose units are the channels of all experts alike; Nemotron-H has layers of one part each."""
    return write_dense(FAMILIES[request.param](0), tmp_path_factory.mktemp("dense"), experts="channels")


@pytest.mark.parametrize("kind", ["uniform", "per_layer", "shallow"])
def test_without_channels_of_its_experts_sliced_equals_masked(dense, kind, tmp_path):
    plan = random_plan(dense.architecture, kind)
    pruned = prune(dense, plan, kind == "per_layer", tmp_path)
    with torch.no_grad(), masked(dense.model, dense.architecture, plan):
        expected = dense.model(tokens()).logits
    with torch.no_grad():
        found = pruned.model(tokens()).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert cost.size(dense.architecture, plan).total == sum(p.numel() for p in pruned.model.parameters())


def test_channels_are_units_of_one_part_and_of_all_its_experts(dense):
    architecture = dense.architecture
    shape = architecture.parts["experts"]
    assert (shape.units, shape.axis, shape.router, shape.least) == ("channels", "inner", "", 1)
    layer = architecture.with_part("experts")[0]
    carrying = {name.rpartition("mlp.")[2] for p, _, _ in architecture.carriers(layer, "experts") for name in [p.name]}
    assert {"experts.gate_up_proj", "experts.down_proj"} <= carrying
    assert not any("router" in name or name == "gate.weight" for name in carrying)
    assert architecture.multiple("experts") == 8


PUBLISHED = {
    "mixtral": {"block_sparse_moe.gate.weight"}
    | {f"block_sparse_moe.experts.0.{name}.weight" for name in ("w1", "w2", "w3")},
    "minimax_m2": {"block_sparse_moe.gate.weight", "block_sparse_moe.e_score_correction_bias"}
    | {f"block_sparse_moe.experts.0.{name}.weight" for name in ("w1", "w2", "w3")},
    "gpt_oss": {"mlp.router.weight", "mlp.router.bias"}
    | {f"mlp.experts.{name}" for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")},
}
"""Names of the mixture of a layer in published checkpoints, of the first expert; of the others those of Qwen."""
_USUAL = {"mlp.gate.weight"} | {f"mlp.experts.0.{name}_proj.weight" for name in ("gate", "up", "down")}
_BIASED = {"glm4_moe", "deepseek_v3", "glm4_moe_lite"}
_SHARED = {f"mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")}
for _name in ("glm4_moe", "deepseek_v3", "deepseek_v2", "glm4_moe_lite"):
    PUBLISHED[_name] = _USUAL | _SHARED | ({"mlp.gate.e_score_correction_bias"} if _name in _BIASED else set())
for _name in ("qwen2_moe", "qwen3_next", "qwen3_5_moe"):
    PUBLISHED[_name] = _USUAL | {"mlp.shared_expert_gate.weight"} | {n.replace("experts", "expert") for n in _SHARED}


def test_a_stock_folder_names_its_experts_as_published_checkpoints_do(dense, tmp_path):
    pruned = prune(dense, random_plan(dense.architecture, "uniform"), False, tmp_path)
    with safe_open(pruned.folder / "model.safetensors", "pt") as file:
        names = {name.removeprefix("model.layers.3.") for name in file.keys() if name.startswith("model.layers.3.")}  # noqa: SIM118
    mixture = {name for name in names if name.startswith(("mlp.", "block_sparse_moe."))}
    first = {name for name in mixture if not re.search(r"experts\.[1-9]", name)}
    assert first == PUBLISHED.get(dense.architecture.family, _USUAL)
