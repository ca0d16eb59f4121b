"""Stages run in this process, in the folder that it is in."""

from importlib import import_module

from libprune.pipeline.story import STEPS

STAGES = tuple(STEPS)
"""All stages but `sources`, in their order."""


def run(*stages: str) -> None:
    """Run stages by name."""
    for stage in stages:
        import_module(f"stages.{stage}").main()
