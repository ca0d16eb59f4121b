"""Changes of JSON files whose digest stays right, for tests of what is found out without it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from libprune.pipeline.digests import SEAL, sealed


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the content of a JSON file; a digest in it becomes that of the new content."""
    data = json.loads(path.read_text())
    known = data.pop(SEAL, None)
    change(data)
    path.write_text(json.dumps(data if known is None else sealed(data)))
