"""What sentence-transformers writes beside a model: how its states become an embedding, and files that stay with it."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from libprune.engine.errors import SourceError, naming
from libprune.engine.heads import Pooling

MODULES = "modules.json"
"""The file that names the modules of a model of sentence-transformers."""
_BESIDE = (
    "config_sentence_transformers.json",
    *(f"sentence_{kind}_config.json" for kind in ("bert", "roberta", "xlm-roberta", "distilbert")),
)
_OF_A_MODULE = ("config.json", "model.safetensors")
_KNOWN = {"Transformer", "Pooling", "Normalize"}
"""Modules whose result libprune compares: a model, the pooling of its states, and their division by the norm."""
_MODE = "pooling_mode_"
_MODES: dict[str, Pooling] = {"mean_tokens": "mean", "mean": "mean", "cls_token": "cls", "cls": "cls"}


def sentence_files(model: str | Path, **where: Any) -> dict[str, Path]:
    """The files of sentence-transformers beside a model, by their path in its folder; none if it has none.

    Args:
        model: a folder, or a hub id.
        where: further arguments for finding a file on the hub, such as `revision`.

    Raises:
        SourceError: if `modules.json` cannot be read.
    """
    found = dict(_found(model, (MODULES,), where))
    if not found:
        return {}
    modules = (path for path, _ in _modules(found[MODULES]) if path)
    names = [*_BESIDE, *(f"{path}/{name}" for path in modules for name in _OF_A_MODULE)]
    return found | dict(_found(model, names, where))


def _found(model: str | Path, names: Any, where: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    for name in names:
        path = cached_file(model, name, _raise_exceptions_for_missing_entries=False, **where)
        if path is not None:
            yield name, Path(path)


def _modules(path: Path) -> list[tuple[str, str]]:
    """Path and class of each module, in their order."""
    with naming(f"{path} cannot be read"):
        return [(module["path"], module["type"].rpartition(".")[2]) for module in json.loads(path.read_text())]


def pooling_of(files: Mapping[str, Path], asked: Pooling | None) -> tuple[Pooling, str]:
    """How the states of a model become its embedding, and a sentence on who says so.

    Args:
        files: of `sentence_files`.
        asked: as the params have it; None for what the files say, or else the mean.

    Raises:
        SourceError: if the files name another pooling or a further module.
    """
    if asked is not None:
        return asked, f"embeddings are pooled by {asked}, as prepare.pooling says"
    if not files:
        return "mean", f"embeddings are pooled by mean, since the model has no {MODULES}; prepare.pooling can say else"
    modules = _modules(files[MODULES])
    others = [kind for _, kind in modules if kind not in _KNOWN]
    if others:
        raise SourceError(
            f"{files[MODULES]} names the module {others[0]}, which libprune does not know; set prepare.pooling to mean "
            "or cls, by which the states before it are compared"
        )
    name = next((f"{path}/config.json" for path, kind in modules if kind == "Pooling"), "")
    if name not in files:
        raise SourceError(f"{files[MODULES]} names no pooling with a config.json; set prepare.pooling to mean or cls")
    with naming(f"{files[name]} cannot be read"):
        said = _modes(json.loads(files[name].read_text()))
    pooling = _MODES.get(said[0]) if len(said) == 1 else None
    if pooling is None:
        raise SourceError(
            f"{files[name]} asks for the pooling {' and '.join(said) or 'of nothing'}; libprune knows mean and cls, so "
            "set prepare.pooling to one of them"
        )
    return pooling, f"embeddings are pooled by {pooling}, as {name} says"


def _modes(config: Mapping[str, Any]) -> list[str]:
    """The poolings that a config asks for; it has one key with a truth value for each, or one key with the name."""
    if isinstance(mode := config.get("pooling_mode"), str):
        return [mode]
    return [key.removeprefix(_MODE) for key, on in config.items() if key.startswith(_MODE) and on]


def copy_sentence_files(files: Mapping[str, Path], folder: Path) -> None:
    """Copy the files of `sentence_files` into a folder, at the same paths."""
    for name, path in files.items():
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
