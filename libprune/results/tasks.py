"""Zero-shot accuracy, by lm-evaluation-harness (an optional dependency)."""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from libprune.engine.errors import LibpruneError, nearest
from libprune.models.tokens import frame_of
from libprune.pipeline.sources import resolve

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
        By task `acc` and `acc_norm` where the task has them, with `<name>_se`, and the number of questions `n`.

    Raises:
        LibpruneError: if the harness is not installed, or does not know a task.
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
    begins = bool(frame_of(tokenizer).before)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=begins)
    results = simple_evaluate(
        model=harness, tasks=list(tasks), num_fewshot=0, limit=limit, task_manager=manager, log_samples=False
    )
    return {task: _figures(results, task) for task in tasks}


def _figures(results: Any, task: str) -> dict[str, float]:
    values = results["results"][task]
    figures = {"n": float(results["n-samples"][task]["effective"])}
    for metric in METRICS:
        if f"{metric},none" in values:
            figures[metric] = float(values[f"{metric},none"])
            figures[f"{metric}_se"] = float(values[f"{metric}_stderr,none"])
    return figures
