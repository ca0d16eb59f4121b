"""Zero-shot tasks: what is said without the harness, and with it a task on local data."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from libprune.engine.errors import LibpruneError
from libprune.results.tasks import zero_shot
from tests.support import tiny

QUESTIONS = 6


def test_without_the_harness_the_pip_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    message = r"^evaluate\.tasks needs lm-evaluation-harness .*; install it with: pip install 'libprune\[tasks\]'$"
    with pytest.raises(LibpruneError, match=message):
        zero_shot(*_model_and_tokenizer(None), ("piqa",), None, None, 8)


# A harness that only gives results, in the shapes of lm_eval 0.4.13.

RESULTS = {
    "results": {
        "one": {"alias": "one", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 1.0},
        "single": {"alias": "single", "acc,none": 1.0, "acc_stderr,none": "N/A"},
        "words": {"alias": "words", "exact_match,strict": 0.25, "exact_match_stderr,strict": 0.1},
        "whole": {"alias": "whole", "acc,none": 0.6, "acc_stderr,none": 0.05},
        "loose": {"alias": "loose"},
    },
    "n-samples": {
        "one": {"original": 9, "effective": 4},
        "single": {"original": 9, "effective": 1},
        "words": {"original": 9, "effective": 4},
    },
    "group_subtasks": {"whole": ["one", "single"], "loose": ["whole", "words"]},
}


@pytest.fixture
def harness(monkeypatch) -> None:
    """Stands in for lm_eval."""

    class Manager:
        all_tasks, all_tags = [*RESULTS["results"], "marked"], ["marked"]

        def __init__(self, include_path: str | None = None) -> None:
            pass

    for name, given in {
        "lm_eval": {"simple_evaluate": lambda **_: RESULTS},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": lambda **_: None},
        "lm_eval.tasks": {"TaskManager": Manager},
    }.items():
        module = ModuleType(name)
        vars(module).update(given)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("one", {"one": {"n": 4.0, "acc": 0.5, "acc_se": 0.1, "acc_norm": 1.0}}),
        ("single", {"single": {"n": 1.0, "acc": 1.0}}),
        ("whole", {"whole": {"n": 5.0, "acc": 0.6, "acc_se": 0.05}}),
        ("loose", {"whole": {"n": 5.0, "acc": 0.6, "acc_se": 0.05}}),
        ("words", {}),
    ],
)
def test_groups_and_tasks_have_the_figures_that_the_harness_gives(harness, capsys, task, expected):
    assert zero_shot(*_model_and_tokenizer(None), (task,), None, None, 8) == expected
    left_out = task in ("loose", "words")
    assert ("words has no accuracy (its metrics: exact_match) and is left out" in capsys.readouterr().out) is left_out


def test_a_tag_is_refused_before_anything_runs(harness):
    with pytest.raises(LibpruneError, match="'marked' is a tag of several tasks"):
        zero_shot(*_model_and_tokenizer(None), ("marked",), None, None, 8)


# With the harness, where it is installed. Its own warnings are not ours.

with_harness = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with its tokenizer, and a task whose right choices are spread evenly."""
    pytest.importorskip("lm_eval", exc_type=ImportError)
    folder = tmp_path_factory.mktemp("tasks")
    tiny.write_model(folder / "model")
    rows = [
        {"question": f"the {tiny.WORDS[i]} sees", "choices": ["a cat", "never", "then and"], "answer": i % 3}
        for i in range(QUESTIONS)
    ]
    data = folder / "questions.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "tiny_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(data)}, "cache_dir": str(folder / "cache")},
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in METRICS],
    }
    (folder / "tasks").mkdir()
    (folder / "tasks/tiny_choice.yaml").write_text(yaml.safe_dump(task))
    return folder


METRICS = ("acc", "acc_norm")


def _model_and_tokenizer(folder: Path | None) -> tuple:
    """The model and the tokenizer of a folder; without a folder, any, which are not used."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    if folder is None:
        from tokenizers import Tokenizer, models

        from tests.support.models import FAMILIES

        return FAMILIES["llama"](0), PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, "?"))
        )
    return AutoModelForCausalLM.from_pretrained(folder / "model"), AutoTokenizer.from_pretrained(folder / "model")


def run(folder: Path, tasks: tuple[str, ...], limit: int | None = None, batch: int = 4) -> dict:
    return zero_shot(*_model_and_tokenizer(folder), tasks, str(folder / "tasks"), limit, batch)


@with_harness
def test_a_task_on_local_data_has_an_accuracy_with_its_error_and_the_number_of_questions(folder):
    found = run(folder, ("tiny_choice",))
    assert list(found) == ["tiny_choice"]
    figures = found["tiny_choice"]
    assert figures.keys() == {"n", "acc", "acc_se", "acc_norm", "acc_norm_se"}
    assert figures["n"] == QUESTIONS
    for metric in METRICS:
        value = figures[metric]
        assert 0 <= value <= 1
        assert (value * QUESTIONS) == pytest.approx(round(value * QUESTIONS))
        assert figures[f"{metric}_se"] == pytest.approx((value * (1 - value) / (QUESTIONS - 1)) ** 0.5)


@with_harness
def test_the_accuracy_is_that_of_the_likeliest_choice(folder):
    """Against the summed log-probabilities of each choice's tokens after the question."""
    import torch

    model, tokenizer = _model_and_tokenizer(folder)
    right = 0
    for line in (folder / "questions.json").read_text().splitlines():
        row, totals = json.loads(line), []
        for choice in row["choices"]:
            start, whole = (tokenizer(text)["input_ids"] for text in (row["question"], f"{row['question']} {choice}"))
            with torch.no_grad():
                log_p = torch.log_softmax(model(input_ids=torch.tensor([whole])).logits[0].double(), -1)
            totals.append(sum(float(log_p[i - 1, whole[i]]) for i in range(len(start), len(whole))))
        right += totals.index(max(totals)) == row["answer"]
    assert run(folder, ("tiny_choice",))["tiny_choice"]["acc"] == pytest.approx(right / QUESTIONS)


@with_harness
def test_the_limit_is_the_number_of_questions(folder):
    assert run(folder, ("tiny_choice",), limit=3)["tiny_choice"]["n"] == 3


@with_harness
def test_an_unknown_task_is_refused_with_the_nearest_name(folder):
    with pytest.raises(LibpruneError, match=r"^evaluate\.tasks: no task 'tiny_choise'; did you mean 'tiny_choice'"):
        run(folder, ("tiny_choise",))


@with_harness
def test_a_task_folder_that_does_not_exist_is_refused(folder):
    missing = str(folder / "nowhere")
    with pytest.raises(LibpruneError, match=r"^evaluate\.task_folder = '.*nowhere' is not a folder$"):
        zero_shot(*_model_and_tokenizer(folder), ("tiny_choice",), missing, None, 4)
