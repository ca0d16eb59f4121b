"""Zero-shot accuracy, by lm-evaluation-harness (an optional dependency)."""

import math
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from libprune.engine.errors import LibpruneError, nearest
from libprune.models.tokens import frame_of
from libprune.pipeline.sources import resolve
from libprune.pipeline.terminal import say

METRICS = ("acc", "acc_norm")


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: tuple[str, ...],
    folder: str | None,
    limit: int | None,
    batch_size: int,
) -> dict[str, dict[str, float]]:
    """Accuracy of a model on tasks without examples.

    Args:
        model: a model that writes, on its device.
        tokenizer: the model's tokenizer.
        tasks: names that the harness knows, or that a file in `folder` gives.
        folder: YAML files of further tasks, such as ones on local data; None for none.
        limit: questions of each task, from the first; None for all.
        batch_size: questions at once.

    Returns:
        By task `acc` and `acc_norm` where the task has them, with their standard errors as `<name>_se` where the
        harness gives one, and the number of questions `n`. A group that has no accuracy of its own is given by its
        tasks. A task without an accuracy is left out, and the terminal says so.

    Raises:
        LibpruneError: if the harness is not installed, does not know a task, or knows the name as a tag.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise LibpruneError(
            f"evaluate.tasks needs lm-evaluation-harness ({error}); install it with: pip install 'libprune[tasks]'"
        ) from error
    path = None if folder is None else resolve(folder)
    if folder is not None and (path is None or not path.is_dir()):
        raise LibpruneError(f"evaluate.task_folder = {folder!r} is not a folder")
    manager = TaskManager(include_path=None if path is None else str(path))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise LibpruneError(f"evaluate.tasks: no task {unknown[0]!r}{nearest(unknown[0], manager.all_tasks)}")
    tags = [task for task in tasks if task in manager.all_tags]
    if tags:
        raise LibpruneError(
            f"evaluate.tasks: {tags[0]!r} is a tag of several tasks, which has no accuracy of its own; name its tasks"
        )
    begins = bool(frame_of(tokenizer).before)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=begins)
    results = simple_evaluate(
        model=harness, tasks=list(tasks), num_fewshot=0, limit=limit, task_manager=manager, log_samples=False
    )
    return {name: figures for task in tasks for name, figures in _answers(results, task)}


def _answers(results: Any, task: str) -> Iterator[tuple[str, dict[str, float]]]:
    """The figures of a task or of a group, and for a group without an accuracy those of its tasks."""
    values = results["results"].get(task, {})
    found = {metric: float(values[f"{metric},none"]) for metric in METRICS if f"{metric},none" in values}
    if found:
        errors = {f"{metric}_se": values.get(f"{metric}_stderr,none") for metric in found}
        known = {name: error for name, error in errors.items() if isinstance(error, float) and math.isfinite(error)}
        yield task, {"n": float(_questions(results, task)), **found, **known}
    elif members := results.get("group_subtasks", {}).get(task):
        for member in members:
            yield from _answers(results, member)
    else:
        has = ", ".join(name.partition(",")[0] for name in values if "," in name and "_stderr," not in name)
        say(f"evaluate.tasks: {task} has no accuracy (its metrics: {has or 'none'}) and is left out")


def _questions(results: Any, task: str) -> int:
    """The number of questions that were asked, those of all tasks of a group."""
    asked = results["n-samples"].get(task)
    if asked is not None:
        return int(asked["effective"])
    return sum(_questions(results, member) for member in results["group_subtasks"][task])
