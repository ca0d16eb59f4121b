"""Made-up experiments as DVC would list them, for tables and pictures of sweeps."""

from libprune.experiments.dvc_experiments import Experiment


def row(name: str, ratio: float = 1.2, error: float = 0.01, dense: float = 20.0, **params: object) -> Experiment:
    """An experiment with these params; two underscores in a name stand for the dot."""
    named = {key.replace("__", "."): value for key, value in params.items()}
    return Experiment((name,), named, ratio, error, dense, removed=0.2, prefill=1.1, size=1_000_000)


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
