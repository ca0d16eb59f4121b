"""A cache of data sets of a test's own."""

import datasets
import pytest


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch) -> None:
    """Data sets are prepared in the test's own folder; a test file that imports this has it for every test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
