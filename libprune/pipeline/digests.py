"""Digests of files and of the content of artifacts, by which damage and foreign files are found out."""

import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from libprune.engine.errors import ArtifactError, LibpruneError, naming
from libprune.pipeline.atomic import write_json

SEAL = "sha256"
"""The key of the digest of an artifact's content, in JSON and in metadata."""
_DIGEST = re.compile("[0-9a-f]{48,}")
"""What is a digest, also one whose length was damaged."""
_SETTLED_NS = 2 * 10**9
"""A file that was changed less than this before it is read may change again without another time: read it anew."""


class ChangedError(ArtifactError):
    """The content of an artifact is not what was written."""


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a JSON file with its own digest under `SEAL`."""
    return {**content, SEAL: text_digest(content)}


def unsealed(path: Path, content: Any) -> Any:
    """The content of a JSON file without its digest; files of other programs need have none.

    Raises:
        ChangedError: if the digest is that of something else.
    """
    if not isinstance(content, dict):
        return content
    rest, recorded = split_seal(path, content)
    require_digest(path, recorded, text_digest(rest))
    return rest


def split_seal(path: Path, content: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """The content of an artifact without what stands under `SEAL`, and this; None if nothing does.

    Raises:
        ChangedError: if a digest stands under another key, which was damaged.
    """
    rest = {key: value for key, value in content.items() if key != SEAL}
    for key, value in rest.items():
        found = value.get("") if isinstance(value, dict) else value
        if SEAL not in content and isinstance(found, str) and _DIGEST.fullmatch(found):
            raise ChangedError(f"{path} has changed since it was written: its digest stands under {key!r}")
    return rest, content.get(SEAL)


def require_digest(path: Path, recorded: Any, found: str) -> None:
    """Stop where a recorded digest, if there is one, is not that of the content.

    Raises:
        ChangedError: naming the file.
    """
    if recorded is not None and recorded != found:
        raise ChangedError(f"{path} has changed since it was written: its content is not that of the digest in it")


def text_digest(content: Any) -> str:
    """The SHA-256 digest of what JSON can hold, whatever the order of its keys."""
    plain = json.loads(json.dumps(content))  # keys that are numbers become texts, which sort otherwise
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """The SHA-256 digest of one file, in hexadecimal."""
    digest = hashlib.sha256()
    with naming(f"{path} cannot be read", ArtifactError):
        for chunk in _chunks(path):
            digest.update(chunk)
    return digest.hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            yield chunk


class KnownDigests:
    """The digests of files that have been read before: a file is read again once its size, time or place differs.

    Args:
        store: the JSON file that keeps them, one entry for each path; None to read every file.
    """

    def __init__(self, store: Path | None = None) -> None:
        self._store = store
        self._known: dict[str, Any] = {}
        if store is not None:
            with suppress(OSError, ValueError):  # ArtifactError too: what is damaged is worked out again
                self._known = unsealed(store, json.loads(store.read_text()))

    def of(self, paths: Mapping[str, Path]) -> dict[str, str]:
        """The SHA-256 digests of files, by the names that they are given under."""
        digests, new = {}, {}
        for name, path in paths.items():
            key, state = str(path.resolve()), _state(path)
            entry = self._known.get(key)
            if entry is not None and entry["state"] == state:
                digests[name] = entry[SEAL]
                continue
            digests[name] = sha256(path)
            if state == _state(path) and time.time_ns() - state[-1] > _SETTLED_NS:
                new[key] = {"state": state, SEAL: digests[name]}
        if new and self._store is not None:
            self._known |= new
            with suppress(LibpruneError, OSError):  # without it the files are read again
                write_json(self._store, sealed(self._known))
        return digests


def _state(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
