"""Structured pruning of language models: the functions for use in Python programs, loaded when they are asked for."""

from importlib import import_module
from importlib.metadata import version
from typing import Any

__version__ = version("libprune")
__all__ = ["Work", "allocate", "collect", "evaluate", "load", "prune", "score"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("libprune.project.library"), name)
    raise AttributeError(f"module 'libprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
