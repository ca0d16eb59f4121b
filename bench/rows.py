"""What a bench has measured, a line of JSON for each row, so that an interrupted one goes on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, in the order in which they were added; none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def add_row(path: Path, row: Mapping[str, Any]) -> None:
    """Write a row behind the others at once, before the next one is measured."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
