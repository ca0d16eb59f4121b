"""The foretold memory of training is that of the real tensors after one step."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import Adafactor

from libprune.pipeline.sections import Recover
from libprune.recovery.memory import checkpoint_bytes, training_bytes, working_bytes
from libprune.recovery.student import prepare, trained_parameters
from tests.support.models import FAMILIES


def stepped(model: nn.Module, params: Recover) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    """The trained parameters and the optimizer after one step of a model."""
    trained = list(trained_parameters(prepare(model, params)).values())
    optimizer = torch.optim.AdamW(trained)
    ids = torch.arange(12).reshape(2, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    return trained, optimizer


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's states, without the count of steps that it keeps beside each tensor."""
    tensors = (value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value))
    return sum(tensor.nbytes for tensor in tensors if tensor.ndim)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # said by peft of GPT-2, which it sets right itself
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt"])
def test_bytes_are_those_of_the_tensors_after_one_step(name, dtype, method):
    params = Recover(method=method, dtype=dtype, lora_rank=3)
    model = FAMILIES[name](0).to(getattr(torch, dtype))
    whole = sum(parameter.numel() for parameter in model.parameters())
    trained, optimizer = stepped(model, params)
    number = sum(parameter.numel() for parameter in trained)
    kept = sum(parameter.nbytes for parameter in trained) + state_bytes(optimizer)
    assert checkpoint_bytes(number, params) == kept
    weights = sum(parameter.nbytes for parameter in model.parameters())
    gradients = sum(parameter.grad.nbytes for parameter in trained)
    assert training_bytes(number, whole, params) == weights + gradients + state_bytes(optimizer)


def test_a_pass_of_the_training_holds_activations_and_a_few_times_the_logits():
    assert working_bytes(kept=1000, logits=10) == 1045


def test_adafactor_keeps_next_to_nothing():
    layer = nn.Linear(512, 512, bias=False)
    optimizer = Adafactor(layer.parameters(), lr=1e-3, relative_step=False, scale_parameter=False)
    layer(torch.ones(1, 512)).sum().backward()
    optimizer.step()
    params = Recover(method="full", optimizer="adafactor")
    assert checkpoint_bytes(512 * 512, params) == layer.weight.nbytes
    assert state_bytes(optimizer) < layer.weight.nbytes / 100


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_of_one_byte_take_two_bytes_a_parameter_whatever_its_type(dtype):
    none, bytes_each, whole = (
        checkpoint_bytes(1000, Recover(method="full", dtype=dtype, optimizer=name))
        for name in ("adafactor", "adamw_bnb_8bit", "adamw_torch_fused")
    )
    assert bytes_each - none == 2000
    assert whole == 3 * none


def test_the_arithmetic_needs_no_torch():
    code = "import sys, libprune.recovery.memory, libprune.recovery.idle; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
