"""Made-up experiments as DVC would list them, for tables and pictures of sweeps."""

from dataclasses import replace

from libprune.experiments.dvc_experiments import Experiment, Recovered


def recovered(ratio: float, error: float = 0.005) -> Recovered:
    """What a training came to, with this ratio."""
    return Recovered(ratio, error, tokens=40_960, seconds=90.0, parameters=113_274)


def row(
    name: str,
    ratio: float = 1.2,
    error: float = 0.01,
    dense: float = 20.0,
    after: float | None = None,
    **params: object,
) -> Experiment:
    """An experiment with these params; two underscores in a name stand for the dot.

    Args:
        name: its name.
        ratio: before recovery.
        error: of the ratio.
        dense: the dense model's perplexity.
        after: the ratio after recovery, if it was trained.
        params: its params.
    """
    named = {key.replace("__", "."): value for key, value in params.items()}
    made = Experiment((name,), named, ratio, error, dense, removed=0.2, prefill=1.1, size=1_000_000)
    return made if after is None else replace(made, recovered=recovered(after))


def swept(numbers: int, words: int = 0) -> list[Experiment]:
    """Three experiments that differ in these numbers of numeric params and of params whose values are words."""
    return [
        row(
            f"e{i}",
            1 + 0.1 * i,
            **{f"n__{j}": i + j for j in range(numbers)},
            **{f"w__{j}": "abc"[i] for j in range(words)},
        )
        for i in range(3)
    ]
