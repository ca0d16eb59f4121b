"""The test run is offline, deterministic, on one thread, and leaves nothing behind in the user's caches."""

import atexit
import os
import shutil
import tempfile

from hypothesis import settings

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

settings.register_profile("libprune", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("libprune")
