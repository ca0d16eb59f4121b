"""The test run is offline, deterministic, on one thread, and leaves nothing behind in the user's caches.

All of libprune is checked against its annotations while it runs: modules that state shapes by jaxtyping, whose
wrapper is slow, and the others by beartype alone.
"""

import atexit
import gc
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from beartype import BeartypeConf
from beartype.claw import beartype_package
from hypothesis import settings
from jaxtyping import install_import_hook

from tests.support.preloaded import preloaded

_PACKAGE = Path(__file__).parents[1] / "libprune"
_SHAPED = [
    ".".join(path.relative_to(_PACKAGE.parent).with_suffix("").parts)
    for path in _PACKAGE.rglob("*.py")
    if "from jaxtyping" in path.read_text()
]
beartype_package("libprune", conf=BeartypeConf(claw_is_pep526=False))
install_import_hook(_SHAPED, "beartype.beartype")

_MODULES = tempfile.mkdtemp(prefix="libprune-tests-")
atexit.register(shutil.rmtree, _MODULES, ignore_errors=True)

# Set before anything imports torch or transformers, which read them once.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_MODULES_CACHE=_MODULES,
    TRANSFORMERS_VERBOSITY="error",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
)

logging.root.addHandler(logging.NullHandler())  # so that what libraries log is not written to the standard error

settings.register_profile("libprune", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("libprune")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files are shared out over the processes; those that take longest go first."""
    items.sort(key=lambda item: (item.path.stem != "test_pipeline", item.path.parent.name not in {"whole", "recovery"}))


def pytest_collection_finish() -> None:
    """Modules and cases stay to the end, so that no search for garbage needs to go through them again."""
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Random tensors of a test are the same whichever tests ran before it in the process."""
    import torch  # not above: the environment comes first

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def python(tmp_path_factory) -> Iterator[Path]:
    """A `python` whose programs need no time for the imports of torch and transformers."""
    path = tmp_path_factory.mktemp("preloaded") / "python"
    with preloaded(path, os.environ):
        yield path


@pytest.fixture
def quick_proof(monkeypatch, python) -> None:
    """The process that loads a pruned model is a fork; where not asked for, it begins from nothing."""
    monkeypatch.setattr(sys, "executable", str(python))


@pytest.fixture(scope="module")
def by_forks(python) -> Callable[[], AbstractContextManager[None]]:
    """What `quick_proof` does, as a context for the fixtures of a module."""

    @contextmanager
    def forks() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "executable", str(python))
            yield

    return forks
