"""Speed: it is finite and positive, and a slower model is seen to be slower."""

import math

import torch

from libprune.results.speed import compare_speed
from tests.support.models import FAMILIES, tokens


def test_speeds_are_finite_and_positive_and_ratios_lie_in_their_spread():
    dense, pruned = FAMILIES["llama_mha"](0), FAMILIES["mistral"](0)
    found = compare_speed(dense, pruned, tokens(1, 16), decode_tokens=3, rounds=3)
    numbers = [found.dense.prefill, found.dense.decode, found.pruned.prefill, found.pruned.decode]
    assert all(0 < number < math.inf for number in numbers)
    for ratio, (low, high) in (
        (found.prefill_ratio, found.prefill_spread),
        (found.decode_ratio, found.decode_spread),
    ):
        assert 0 < low <= ratio <= high < math.inf


def test_a_slower_model_is_seen_to_be_slower():
    """Sixteen times the layers against one: the ratio is dense time over pruned time."""
    dense, pruned = FAMILIES["llama_mha"](0), FAMILIES["llama_mha"](0)
    dense.model.layers = torch.nn.ModuleList([*dense.model.layers])
    pruned.model.layers = torch.nn.ModuleList([pruned.model.layers[0]])
    pruned.config.num_hidden_layers = 1
    found = compare_speed(dense, pruned, tokens(1, 16), decode_tokens=4, rounds=5)
    assert found.prefill_ratio > 1.2
    assert found.decode_ratio > 1.2
    assert found.pruned.decode > found.dense.decode
