"""What a user does next with a pruned folder: adapters, training, compiling; docs/fine-tune.md shows it.

Generation with every cache, attention implementations and saving again are in tests/contracts/test_families.py.
"""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from libprune.models.folder import load_model
from tests.support.models import FAMILIES, Pruned, prune, random_plan, tokens, write_dense

CHANGE = 1e-2
"""Of the largest logit: a training changes them by more."""


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def family(request, tmp_path_factory):
    return write_dense(FAMILIES[request.param](0), tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module", params=["uniform", "holes"])
def pruned(request, family, tmp_path_factory) -> Pruned:
    """A result with a stock config, or one with layers without attention, without an MLP, and of different widths."""
    plan = random_plan(family.architecture, request.param)
    return prune(family, plan, request.param == "holes", tmp_path_factory.mktemp("pruned"))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens()).logits


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def assert_changed(found: Tensor, before: Tensor) -> None:
    assert float((found - before).abs().max()) > CHANGE * float(before.abs().max())


def loaded(folder: Path, pruned: Pruned) -> PreTrainedModel:
    return load_model(folder, torch.float32, trust_remote_code=pruned.custom)


def train(model: nn.Module, folder: Path, **given: object) -> Trainer:
    """Two steps of the Trainer."""
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens(batch=4)]
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments(str(folder), max_steps=2, per_device_train_batch_size=2, **quiet, **given)
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    return trainer


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # said by peft of GPT-2, which it sets right itself
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # which peft asks of transformers
def test_matrices_of_lora_are_trained_stored_and_merged_into_a_folder_that_loads(pruned, tmp_path):
    model = get_peft_model(pruned.reload(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    train(model, tmp_path, learning_rate=0.1)
    trained = logits(model)
    assert_changed(trained, logits(pruned.model))
    model.save_pretrained(tmp_path / "adapter")
    assert_close(logits(PeftModel.from_pretrained(pruned.reload(), tmp_path / "adapter")), trained)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert_close(logits(loaded(tmp_path / "merged", pruned)), trained)


def test_the_trainer_trains_with_checkpointing_as_without_and_saves_a_folder_that_loads(pruned, tmp_path):
    found = []
    for again in (False, True):
        trainer = train(pruned.reload(), tmp_path / f"{again}", learning_rate=1e-2, activation_checkpointing=again)
        trainer.save_model()
        found.append(logits(trainer.model))
        assert_close(logits(loaded(tmp_path / f"{again}", pruned)), found[-1])
    assert_changed(found[0], logits(pruned.model))
    assert_close(found[1], found[0])


def test_a_compiled_model_computes_the_same(pruned):
    compiled = torch.compile(pruned.reload(), backend="eager")
    assert_close(logits(compiled), logits(pruned.model))
