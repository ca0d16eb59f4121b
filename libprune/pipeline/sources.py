"""The local files and folders that models and texts are read from, and links to them, which DVC watches."""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from libprune.engine.errors import ProjectError, SourceError, cause
from libprune.pipeline.atomic import remove, writing
from libprune.pipeline.terminal import masked

_PACKAGE = "package://"
_FILES = {".gguf", ".txt", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".gz", ".bz2", ".xz", ".zst"}
_PROJECT = "DVC_ROOT"
"""The variable in which DVC tells a stage the folder of the project, also when it runs elsewhere in a copy."""


def resolve(source: str) -> Path | None:
    """The local path of a source, or None for a hub id.

    `package://NAME/path` is a file inside an installed package, found without importing it. An experiment of DVC may
    run in a copy of the project that lacks what git does not track. A relative path is then looked for in the project
    too, and a folder of which the copy has only a part is the project's.

    Raises:
        SourceError: if the package or the path does not exist, or leaves the package.
    """
    if source.startswith(_PACKAGE):
        return _package_file(source)
    try:
        given = Path(source).expanduser()
        original = _in_project(given)
        if original is not None and original.exists() and not _as_much(given, original):
            return original
        if given.exists():
            return given
    except (OSError, RuntimeError) as error:  # a name that is too long, a home folder that there is not
        raise SourceError(f"{masked(source[:200])} cannot be looked for: {cause(error)}") from error
    if source.count("/") > 1 or source.startswith((".", "/", "~")) or given.suffix in _FILES:
        raise SourceError(f"{masked(source)} does not exist (seen from {Path.cwd()})")
    return None


def _in_project(given: Path) -> Path | None:
    """A path in the project of which DVC runs a copy here; None if this is the project itself."""
    told, here = os.environ.get(_PROJECT), Path.cwd()
    if not told or given.is_absolute():
        return None
    root = next((folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir()), here)
    return None if root == Path(told).resolve() else Path(told) / here.relative_to(root) / given


def _as_much(path: Path, original: Path) -> bool:
    """Whether a path exists, and if it is a folder holds every file of another one."""
    if not path.is_dir():
        return path.exists()
    names = ({file.relative_to(folder) for file in folder.rglob("*")} for folder in (path, original))
    return next(names) >= next(names)


def _package_file(source: str) -> Path:
    name, _, inside = source.removeprefix(_PACKAGE).partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise SourceError(f"{masked(source)}: no installed package is named {masked(name)!r}; install it with pip")
    place = PurePosixPath(inside)
    if place.is_absolute() or ".." in place.parts:
        raise SourceError(f"{source} leaves the package {name!r}; name a file inside it, or a local path")
    path = Path(spec.submodule_search_locations[0]) / place
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*") if p.is_file())[:5] if path.parent.is_dir() else []
        raise SourceError(f"{source}: package {name!r} has no such file; in that folder: {', '.join(beside) or 'none'}")
    return path


def link_sources(folder: Path, sources: Mapping[str, tuple[str, str | None]]) -> dict[str, Path]:
    """Make a link to each source that is a local file or folder; for any other one write a note in its place.

    Args:
        folder: where the links are made.
        sources: by the name of a link the key of params.yaml and its value, of which None names no source.

    Returns:
        The paths that are linked to, by the names of the links.

    Raises:
        SourceError: if a path or package does not exist, or a source is a folder that holds the links.
    """
    found = {}
    for name, (key, source) in sources.items():
        try:
            path = None if source is None else resolve(source)
        except SourceError as error:
            raise SourceError(f"{key}: {error}") from error
        link = folder / name
        if path is None:
            with writing(link) as partial:
                partial.write_text(_NOTE)
            continue
        target = path.resolve()
        if target in folder.absolute().parents:
            raise SourceError(f"{key}: {masked(str(source))} is a folder that holds {folder}; name a folder inside it")
        folder.mkdir(parents=True, exist_ok=True)
        remove(link)
        link.symlink_to(target)
        found[name] = target
    return found


def require_own_code(links: Path = Path("artifacts/code")) -> None:
    """Stop where the links of a project lead to the code of another environment: DVC would take it for what runs.

    Args:
        links: the folder of the links to the installed code; a folder that is not a project of its own has none.

    Raises:
        ProjectError: naming both places, and how to go on.
    """
    link, own = links / "engine", Path(__file__).parents[1]
    if link.is_symlink() and link.resolve().parent != own.resolve():
        raise ProjectError(
            f"{links} leads to {link.resolve().parent}, but the libprune that runs lies in {own}; run "
            "`dvc repro --force --single-item code` and then `dvc repro`"
        )


_NOTE = "This source is no local file or folder.\n"
