"""Device, precision and losses of a model that is run, and what is refused."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from libprune.engine.errors import LibpruneError, StatisticsError
from libprune.models import compute
from libprune.models.compute import (
    named_dtype,
    passes_with_bar,
    per_sequence,
    require_finite,
    require_precise,
    resolve_device,
    resolve_dtype,
    sequence_losses,
)
from libprune.models.sequences import NO_TARGET, Sequences
from tests.support.models import FAMILIES, VOCAB, tokens

CPU = torch.device("cpu")

# Device and precision


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what a machine without a GPU does")
def test_auto_is_the_cpu_where_there_is_no_gpu_and_a_gpu_that_is_asked_for_is_refused():
    assert resolve_device("auto") == resolve_device("cpu") == CPU
    with pytest.raises(LibpruneError, match=r"compute\.device = 'cuda:1' cannot be used: "):
        resolve_device("cuda", local_rank=1)


@pytest.mark.parametrize("name", ["meta", "mps", "xpu:0"])
def test_a_device_of_another_kind_is_refused(name):
    with pytest.raises(LibpruneError, match=rf"compute\.device = '{name}' cannot be used: libprune runs on CPUs and"):
        resolve_device(name)


def test_a_device_that_does_not_exist_is_named():
    with pytest.raises(LibpruneError, match=r"compute\.device = 'abacus' cannot be used: "):
        resolve_device("abacus")


@pytest.mark.parametrize(
    ("flags", "device", "expected"),
    [
        ({"avx2"}, "cpu", torch.float32),
        ({"avx2", "amx_bf16"}, "cpu", torch.bfloat16),
        ({"avx512_bf16"}, "cpu", torch.bfloat16),
        (set(), "cuda", torch.bfloat16),
    ],
)
def test_auto_is_bfloat16_where_the_hardware_multiplies_it(monkeypatch, flags, device, expected):
    monkeypatch.setattr(compute, "_cpu_flags", lambda: flags)
    assert resolve_dtype("auto", torch.device(device)) == expected
    assert resolve_dtype("float16", torch.device(device)) == torch.float16


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_a_gpu_without_matrix_units_for_bfloat16_computes_in_float32(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_dtype("auto", torch.device("cuda")) == expected
    assert resolve_dtype("bfloat16", torch.device("cuda")) == torch.bfloat16


def test_a_named_dtype_is_what_it_says_unless_it_is_auto():
    assert named_dtype("bfloat16", torch.float32) == torch.bfloat16
    assert named_dtype("auto", torch.float32) == torch.float32


# Passes and losses


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.integers(1, 12))
def test_passes_hold_all_sequences_in_order_and_no_more_tokens_than_asked_for(lengths, batch_tokens):
    ids = torch.arange(len(lengths))[:, None].repeat(1, 4)
    sequences = Sequences(ids, torch.arange(len(lengths)), torch.tensor(lengths))
    passes = list(passes_with_bar(sequences, batch_tokens, CPU, "test"))
    assert torch.cat([one.targets for one in passes]).tolist() == list(range(len(lengths)))
    assert all(one.ids.numel() <= batch_tokens or len(one) == 1 for one in passes)


@pytest.mark.parametrize("shape", [(3, 4, 5), (12, 5)])
def test_inputs_are_seen_sequence_by_sequence_also_where_a_layer_joins_them(shape):
    x = torch.arange(60.0).view(3, 4, 5)
    assert torch.equal(per_sequence(x.reshape(shape), 3), x)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_loss_is_the_mean_over_the_targets_of_every_sequence(family):
    model, ids = FAMILIES[family](0), tokens(3, 9)
    targets = torch.full_like(ids, NO_TARGET)
    targets[:, [1, 4]] = torch.tensor([[0, 1], [2, 3], [4, VOCAB - 1]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        following, asked = sequence_losses(model, Sequences(ids)), sequence_losses(model, Sequences(ids, targets))
    for row in range(len(ids)):
        torch.testing.assert_close(following[row], cross_entropy(logits[row, :-1], ids[row, 1:]))
        torch.testing.assert_close(asked[row], cross_entropy(logits[row, [1, 4]], targets[row, [1, 4]]))


@pytest.mark.parametrize("size", [1, 4, 100])
def test_losses_their_gradient_and_its_derivative_do_not_depend_on_the_parts(size, monkeypatch):
    monkeypatch.setattr(compute, "rows_at_once", lambda _: size)
    sequences = Sequences(tokens(2, 5))
    logits = torch.randn(2, 5, VOCAB, generator=torch.Generator().manual_seed(0), requires_grad=True)
    direction, found = torch.randn(2, 5, VOCAB, generator=torch.Generator().manual_seed(1)), []
    whole = logits.flatten(0, 1)
    wanted = cross_entropy(whole, sequences.predicted.flatten(), ignore_index=NO_TARGET, reduction="none")
    for losses in (compute.logits_losses(logits, sequences), wanted.view(2, -1).sum(1) / sequences.counted):
        (gradient,) = torch.autograd.grad(losses.dot(torch.tensor([1.0, 2.0])), logits, create_graph=True)
        (second,) = torch.autograd.grad((gradient * direction).sum(), logits)
        found.append((losses, gradient, second))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_losses_of_a_half_precision_model_are_float32():
    model = FAMILIES["llama"](0).bfloat16()
    with torch.no_grad():
        assert sequence_losses(model, Sequences(tokens(2, 5))).dtype == torch.float32


# What is refused


@given(st.integers(0, 4), st.integers(0, 99), st.sampled_from([float("nan"), float("inf"), -float("inf")]))
def test_the_first_sequence_with_a_value_that_is_not_finite_is_named(row, first, value):
    values = torch.zeros(5, 3, 2)
    require_finite(values, first, "a thing")
    values[row:, 1] = value
    with pytest.raises(StatisticsError, match=f"a thing is not finite for calibration sequence {first + row}; try"):
        require_finite(values, first, "a thing")


def test_finite_values_whose_sum_overflows_are_no_error():
    require_finite(torch.full((2, 3), 3e38), 0, "a thing")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_in_half_precision_is_refused_by_its_first_parameter(dtype):
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2).to(dtype))
    require_precise(network[0])
    require_precise(nn.Linear(2, 2).double())
    with pytest.raises(LibpruneError, match=re.escape(f"1.weight is {str(dtype).removeprefix('torch.')}, in which")):
        require_precise(network)
