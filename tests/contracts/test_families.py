"""The contract that every family passes: sliced equals masked, described equals Hugging Face.

A family joins by one entry in `tests/support/models.py`.
"""

import json
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from libprune.engine import cost
from libprune.engine.architecture import Architecture
from libprune.engine.describe import describe, stored_tensors, without_weights
from libprune.engine.errors import LibpruneError, NotExpressibleError
from libprune.engine.family import families
from libprune.engine.heads import HEADS, writes
from libprune.engine.plan import Plan
from libprune.engine.surgery import masked, slice_state
from libprune.models.folder import WeightFiles, load_model
from libprune.results.folder import write_pruned
from libprune.vocabulary.rows import named_ids, trim_rows
from tests.support.models import (
    MODELS,
    OF_ONE_FILE,
    PLANS,
    WINDOW,
    Dense,
    Pruned,
    outputs,
    plan_of,
    prune,
    random_plan,
    some_counts,
    tokens,
    write_dense,
)

STOCK = ["uniform", "shallow"]
CUSTOM = ["per_layer", "holes"]
TOLERANCE = 1e-5
"""Of the largest logit."""


@pytest.fixture(scope="module", params=MODELS)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def dense(family, tmp_path_factory) -> Dense:
    return write_dense(MODELS[family](0), tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module", params=PLANS)
def pruned(request, family, dense, tmp_path_factory) -> Pruned:
    if family in OF_ONE_FILE and request.param not in {"uniform", "holes"}:
        pytest.skip("other plans show nothing new of this family")
    if request.param == "shallow" and dense.architecture.layers_stay:
        pytest.skip("no layer of this family can be deleted")
    if request.param in CUSTOM and dense.architecture.alike:
        pytest.skip("the layers of this family can only be written all alike")
    plan = random_plan(dense.architecture, request.param)
    custom = request.param in CUSTOM
    assert plan.uniform is not custom
    return prune(dense, plan, custom, tmp_path_factory.mktemp("pruned"))


@pytest.fixture
def causal(dense) -> None:
    if not writes(dense.architecture.head):
        pytest.skip("reads all tokens at once: no cache, no generation")


stock_only = pytest.mark.parametrize("pruned", STOCK, indirect=True)
custom_only = pytest.mark.parametrize("pruned", CUSTOM, indirect=True)


def logits(model: nn.Module, ids: Tensor, **options) -> Tensor:
    with torch.no_grad():
        return outputs(model, ids, **options)


def masked_logits(dense: Dense, plan: Plan, ids: Tensor, **options) -> Tensor:
    with masked(dense.model, dense.architecture, plan):
        return logits(dense.model, ids, **options)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


# The description


def test_every_parameter_is_described_with_its_shape(dense):
    keep_all = Plan.dense(dense.architecture)
    described = {p.name: cost.shape_after(dense.architecture, keep_all, p) for p in dense.architecture.parameters}
    assert described == {name: tuple(p.shape) for name, p in dense.model.named_parameters()}


def test_the_tensor_parallel_plan_of_transformers_agrees(dense):
    """Column-wise: the output carries the prunable axis and the input does not; row-wise: the other way round."""
    stock = dense.model.config.get_text_config().base_model_tp_plan
    if stock is None:
        pytest.skip("transformers has no such plan for this family")
    ways = {path: how.removeprefix("packed_").partition("_")[0] for path, how in stock.items() if "gather" not in how}
    described = {}
    for entry in dense.architecture.maps:
        axis = dense.architecture.parts[entry.part].axis
        carries = (axis in entry.input.names, axis in entry.output.names)
        name = entry.weight if entry.stack else entry.module
        path = re.sub(r"^.*layers\.\d+\.", "layers.*.", name)
        described[path] = {(False, True): "colwise", (True, False): "rowwise"}.get(carries)
    said = {path: how for path, how in ways.items() if how in {"colwise", "rowwise"} and path in described}
    assert said
    assert said == {path: described[path] for path in said}


def test_units_and_overhead_add_up(dense):
    architecture = dense.architecture
    total = 0
    for layer, part in architecture.blocks():
        overhead = cost.part_overhead(architecture, layer, part)
        axis = architecture.parts[part].axis
        coupled = tuple(f".{module}.weight" for module in architecture.parts[part].coupled)
        without = {**architecture.sizes, axis: 0}
        own = architecture.parameters_of(layer, part)
        assert overhead == sum(architecture.numel(p, None if p.name.endswith(coupled) else without) for p in own)
        total += cost.unit_parameters(architecture, layer, part) * architecture.units(part) + overhead
    inside = [p for p in architecture.parameters if p.layer is not None]
    norms = sum(architecture.numel(p) for p in inside if p.part not in architecture.parts)
    assert total + norms == architecture.decoder_parameters == count(decoder(dense.model, architecture))


def decoder(model: nn.Module, architecture: Architecture) -> nn.Module:
    return model.get_submodule(architecture.layers_path)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_description_survives_json(dense):
    assert Architecture.from_json(dense.architecture.to_json()) == dense.architecture


# Slicing


def test_sliced_equals_masked(pruned):
    ids = tokens()
    expected = masked_logits(pruned.dense, pruned.plan, ids)
    assert_close(logits(pruned.model, ids), expected)
    assert (expected - logits(pruned.dense.model, ids)).abs().max() > 0.01, "the plan changes nothing that could show"


def test_sliced_equals_masked_behind_padding(pruned):
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    expected = masked_logits(pruned.dense, pruned.plan, ids, attention_mask=mask)
    seen = mask.bool() if expected.ndim == 3 else ...
    assert_close(logits(pruned.model, ids, attention_mask=mask)[seen], expected[seen])


def counts_of(architecture: Architecture, part: str) -> list[int]:
    """How many units a block of the part may keep."""
    can_go = [] if architecture.parts[part].least else [0]
    return [*can_go, *some_counts(architecture, part)]


@settings(max_examples=6)
@given(data=st.data())
def test_any_plan_is_sliced_as_masked(family, dense, tmp_path_factory, data):
    """Any count anywhere: whole parts, whole layers and the whole decoder gone included.

    In float64, since a norm behind a part that gives nearly nothing enlarges what float32 rounds.
    """
    if family in OF_ONE_FILE:
        pytest.skip("other plans show nothing new of this family")
    blocks, parts_of = list(dense.architecture.blocks()), dense.architecture.parts_of
    counts = {
        block: data.draw(st.sampled_from(counts_of(dense.architecture, block[1])), str(block)) for block in blocks
    }
    plan = plan_of(dense.architecture, lambda *block: counts[block], data.draw(st.integers(0, 99), "seed"))
    assume(not plan.uniform)
    if dense.architecture.layers_stay and len(plan.layers) < dense.architecture.layers:
        with pytest.raises(LibpruneError, match="something of every layer must stay"):
            prune(dense, plan, True, tmp_path_factory.mktemp("any"))
        return
    if dense.architecture.state and plan.layers and not any("attention" in parts_of(layer) for layer in plan.layers):
        with pytest.raises(LibpruneError, match="transformers counts the tokens of a cache"):
            prune(dense, plan, True, tmp_path_factory.mktemp("any"))
        return
    if dense.architecture.alike:
        with pytest.raises(NotExpressibleError, match="can only be written all alike"):
            prune(dense, plan, True, tmp_path_factory.mktemp("any"))
        return
    pruned = prune(dense, plan, True, tmp_path_factory.mktemp("any"))
    for module in pruned.model.modules():  # grouped kernels take no float64
        if hasattr(module, "has_gate"):
            module.config._experts_implementation_internal = "eager"
    exact = replace(dense, model=deepcopy(dense.model).double())
    for module in pruned.model.modules():
        if hasattr(module, "config"):  # the grouped kernels of PyTorch have no float64
            module.config._experts_implementation_internal = "eager"
    assert_close(logits(pruned.model.double(), tokens()), masked_logits(exact, plan, tokens()))
    assert cost.size(dense.architecture, plan).total == count(pruned.model)


def test_the_stored_type_is_kept(dense, tmp_path):
    half, folder = tmp_path / "half", tmp_path / "pruned"
    state = {k: v.bfloat16() for k, v in dense.model.state_dict().items()}
    dense.model.save_pretrained(half, state_dict=state, save_original_format=False)
    folder.mkdir()
    plan = random_plan(dense.architecture, "uniform")
    write_pruned(
        folder, half, dense.architecture, plan, "uniform", slice_state(WeightFiles(half), dense.architecture, plan)
    )
    assert {tensor.dtype for tensor in WeightFiles(folder).values()} == {torch.bfloat16}
    assert HEADS[dense.architecture.head].loader.from_pretrained(folder).dtype == torch.bfloat16


# What it costs


def predicted_size(pruned: Pruned) -> cost.Size:
    return cost.size(pruned.dense.architecture, pruned.plan)


def test_predicted_size_is_the_actual_size(pruned):
    size = predicted_size(pruned)
    assert size.total == count(pruned.model)
    assert size.decoder == count(decoder(pruned.model, pruned.dense.architecture))
    once_a_sequence = pruned.dense.architecture.head in ("sequence_classification", "embedding")
    every_token = decoder(pruned.model, pruned.dense.architecture) if once_a_sequence else pruned.model
    family = families()[pruned.dense.architecture.family]
    read = {name: m for name, m in every_token.named_modules() if not family.untouched(name)}
    assert size.macs == sum(map(products, read.values()))


def products(module: nn.Module) -> int:
    """Multiply-accumulates of a token in a module itself: linear layers, routers, convolutions, chosen experts."""
    if isinstance(module, nn.Linear | Conv1D | nn.Conv1d) or "Router" in type(module).__name__:
        return module.weight.numel()
    if not hasattr(module, "has_gate"):
        return 0
    of_all = sum(p.numel() for name, p in module.named_parameters() if not name.endswith("bias"))
    return of_all * module.config.num_experts_per_tok // module.num_experts


def test_predicted_cache_is_the_actual_cache(pruned, causal):
    """Fewer tokens than the window, so that sliding layers still hold all of them."""
    ids = tokens(batch=2, length=WINDOW - 2)
    with torch.no_grad():
        cache = pruned.model(ids, past_key_values=DynamicCache(config=pruned.model.config)).past_key_values
    gone = [pruned.plan.keep.get((layer, "attention"), np.ones(1)).sum() == 0 for layer in pruned.plan.layers]
    held = [sum(kept.numel() for kept in keys_and_values(layer)) / ids.numel() for layer in cache.layers]
    assert sum(h for h, g in zip(held, gone, strict=True) if not g) == predicted_size(pruned).cache
    assert all(h <= 1 for h, g in zip(held, gone, strict=True) if g), "a removed attention only counts its tokens"
    states = sum(state.numel() for layer in cache.layers for state in states_of(layer))
    assert states / len(ids) == predicted_size(pruned).state


def keys_and_values(layer: Any) -> list[Tensor]:
    """What a layer of a cache holds of its tokens."""
    return [kept for kept in (getattr(layer, "keys", None), getattr(layer, "values", None)) if kept is not None]


def states_of(layer: Any) -> list[Tensor]:
    """What a layer of a cache holds of the whole sequence."""
    kept = (getattr(layer, name, {}).values() for name in ("conv_states", "recurrent_states"))
    return [state for states in kept for state in states if state is not None]


# Where it loads


@stock_only
def test_a_uniform_result_is_a_stock_model(pruned):
    """Without remote code; so is a model of which only whole layers were removed."""
    assert type(pruned.model) is type(pruned.dense.model)
    assert not list(pruned.folder.glob("*.py"))
    config = json.loads((pruned.folder / "config.json").read_text())
    assert "auto_map" not in config
    assert not config.get("per_layer_config")
    family = families()[pruned.dense.architecture.family]
    assert family.sized(config)[family.config.layers] == len(pruned.plan.layers)


def test_the_config_names_the_class_that_is_loaded(pruned):
    config = json.loads((pruned.folder / "config.json").read_text())
    assert config["architectures"] == [type(pruned.model).__name__]


@custom_only
def test_a_per_layer_result_is_refused_without_its_own_code(pruned):
    with pytest.raises(ValueError, match="contains custom code"):
        load_model(pruned.folder, torch.float32)


@custom_only
def test_the_model_without_its_head_loads_by_itself(pruned):
    base = AutoModel.from_pretrained(pruned.folder, dtype=torch.float32, trust_remote_code=True).eval()
    with torch.no_grad():
        expected = pruned.model(tokens(), output_hidden_states=True).hidden_states
        found = base(tokens(), output_hidden_states=True)
    assert torch.equal(found.last_hidden_state, expected[-1])
    assert all(map(torch.equal, found.hidden_states, expected))
    empty = AutoModel.from_config(base.config, trust_remote_code=True)
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (base, empty)]
    assert shapes[0] == shapes[1]
    assert type(pruned.model.base_model).__name__ in {cls.__name__ for cls in type(base).__mro__}


def test_a_missing_part_is_refused_by_stock_code_too(dense, tmp_path):
    """With only whole parts gone, stock code could build the model and fill them with random weights."""
    architecture = dense.architecture
    if architecture.alike:
        pytest.skip("the layers of this family can only be written all alike")
    gone = {(0, architecture.parts_of(0)[0]), (1, architecture.parts_of(1)[-1])}
    gone = {block for block in gone if not architecture.parts[block[1]].least}
    plan = plan_of(architecture, lambda layer, part: 0 if (layer, part) in gone else architecture.units(part))
    pruned = prune(dense, plan, True, tmp_path)
    with pytest.raises(ValueError, match="contains custom code"):
        load_model(pruned.folder, torch.float32)


def test_tied_weights_stay_tied_and_are_stored_once(pruned):
    if head := pruned.model.get_output_embeddings():
        tied = pruned.dense.model.config.tie_word_embeddings
        assert (pruned.model.get_input_embeddings().weight is head.weight) is tied
    stored = sum(tensor.numel() for tensor in WeightFiles(pruned.folder).values())
    assert stored == sum(tensor.numel() for tensor in stored_tensors(pruned.model).values())


@contextmanager
def attention(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """The model with another implementation of attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {implementation}
        yield
    finally:
        model.set_attn_implementation(before)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_implementation_can_be_chosen(pruned, implementation):
    dense = pruned.dense.model
    if implementation == "sdpa" and not dense._supports_sdpa:
        pytest.skip("transformers has no such attention for this family")
    with attention(dense, implementation), attention(pruned.model, implementation):
        assert_close(logits(pruned.model, tokens()), masked_logits(pruned.dense, pruned.plan, tokens()))


def test_two_cached_steps_compute_what_one_pass_does(pruned, causal):
    ids = tokens()
    cache = DynamicCache(config=pruned.model.config)
    first = logits(pruned.model, ids[:, :7], past_key_values=cache)
    second = logits(pruned.model, ids[:, 7:], past_key_values=cache)
    assert cache.get_seq_length() == ids.shape[1]
    assert_close(torch.cat([first, second], dim=1), logits(pruned.model, ids, use_cache=False))


def greedy(model: PreTrainedModel, **options) -> Tensor:
    """Ten tokens after a left-padded batch of prompts."""
    ids = tokens(length=8)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False, pad_token_id=0, **options)


def test_generation_is_the_same_with_and_without_the_cache(pruned, causal):
    text = greedy(pruned.model, use_cache=False)
    assert text.shape == (2, 18)
    assert torch.equal(greedy(pruned.model), text)


@custom_only
def test_generation_is_the_same_with_a_static_cache(pruned, causal):
    assert torch.equal(greedy(pruned.model, cache_implementation="static"), greedy(pruned.model))


def test_what_is_saved_again_loads_again(pruned, tmp_path):
    pruned.model.save_pretrained(tmp_path)
    again = load_model(tmp_path, torch.float32, trust_remote_code=pruned.custom)
    assert_close(logits(again, tokens()), logits(pruned.model, tokens()))


def test_gradients_reach_every_parameter(pruned):
    model, head = deepcopy(pruned.model).train(), pruned.dense.architecture.head
    if head == "embedding":
        sum(given.square().sum() for given in model(tokens(), return_dict=True).to_tuple()).backward()
    else:
        labels = torch.tensor([0, 2]) if head == "sequence_classification" else tokens()
        model(tokens(), labels=labels).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    family = families()[pruned.dense.architecture.family]
    assert without == [name for name, _ in model.named_parameters() if family.untouched(name)]


FRESH_PROCESS = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
sys.modules["libprune"] = None
folder, result = sys.argv[1:]
ids = load_file(result)["ids"]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
model.set_attn_implementation("eager")
assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {"eager"}
model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
with torch.no_grad():
    save_file({"logits": model(ids).logits}, result)
"""


@pytest.mark.parametrize(("family", "pruned"), [("llama", "holes")], indirect=True)
def test_a_fresh_process_computes_the_same_and_says_nothing(pruned, tmp_path):
    """What classes and modules this process has already loaded hides defects of the modeling file."""
    result = tmp_path / "result.safetensors"
    save_file({"ids": tokens()}, result)
    quiet_by_itself = {**os.environ, "TRANSFORMERS_VERBOSITY": "warning", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-W", "always", "-c", FRESH_PROCESS, str(pruned.folder), str(result)]
    done = subprocess.run(command, env=quiet_by_itself, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert_close(load_file(result)["logits"], logits(pruned.model, tokens()))


class Heard(logging.Handler):
    """Keeps the messages at WARNING or above."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def complaints():
    """Everything that is logged at WARNING or above, by transformers too, even what it says only once."""
    known = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    heard, loggers = Heard(), [logging.root, *(logger for logger in known if not logger.propagate)]
    verbosity = transformers.logging.get_verbosity()
    logging.Logger.warning_once.cache_clear()
    transformers.logging.set_verbosity_warning()
    for logger in loggers:
        logger.addHandler(heard)
    logging.getLogger("transformers").warning("heard")
    assert heard.messages == ["heard"]
    heard.messages.clear()
    yield lambda: list(heard.messages)
    for logger in loggers:
        logger.removeHandler(heard)
    transformers.logging.set_verbosity(verbosity)


def test_loading_and_generating_say_nothing(pruned, complaints: Callable[[], list[str]]):
    """Nothing but what transformers says of any model of the family, as of an activation without a kernel."""
    without_weights(pruned.dense.model.config)
    of_any = complaints()
    logging.Logger.warning_once.cache_clear()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        again = pruned.reload()
        greedy(again) if again.can_generate() else logits(again, tokens())
    said = [str(warning.message) for warning in warned] + complaints()[len(of_any) :]
    assert [text for text in said if text not in of_any and not text.endswith(OF_KERNELS)] == []


OF_KERNELS = "for the optimized kernel."
"""How the sentence ends that transformers says of any model with recurrent parts, where a package of kernels lacks."""


def test_without_the_rows_of_some_tokens_the_logits_of_the_others_are_the_same(dense, tmp_path):
    model, architecture = load_model(dense.folder, torch.float32), dense.architecture
    size = architecture.sizes["vocab"]
    kept = sorted({*range(0, size, 3), 1, *(index for index in named_ids(model) if 0 <= index < size)})
    picked = torch.randint(len(kept), (2, 9), generator=torch.Generator().manual_seed(0))
    expected = logits(model, torch.tensor(kept)[picked])
    if architecture.head not in {"sequence_classification", "embedding"}:
        expected = expected[..., kept]
    trim_rows(model, architecture, kept, {old: new for new, old in enumerate(kept)})
    model.save_pretrained(tmp_path, save_original_format=False)
    smaller = load_model(tmp_path, torch.float32)
    assert describe(smaller).sizes["vocab"] == len(kept) < size
    assert torch.allclose(logits(smaller, picked), expected, atol=TOLERANCE * float(expected.abs().max()), rtol=0)
