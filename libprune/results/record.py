"""The record of a pruned folder: how it was made, its config, and which units of the dense model it keeps."""

import copy
import json
import platform
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
from pydantic import BaseModel, ValidationError
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from libprune.engine.architecture import Architecture, Experts, Heads, know_family
from libprune.engine.describe import describe, without_weights
from libprune.engine.errors import ArtifactError, LibpruneError, naming
from libprune.engine.family import family_of
from libprune.engine.plan import Plan
from libprune.engine.stock_config import keys_of
from libprune.engine.tables import layers_and_parts
from libprune.models.dialect import OPEN, STOP
from libprune.models.given import OWN_TYPE, require_files
from libprune.models.origin import CARD
from libprune.pipeline.artifacts import read_json, read_table, require, same_origin
from libprune.pipeline.digests import KnownDigests, sealed, sha256
from libprune.pipeline.layout import NOTE, Layout

PLAN = "plan.parquet"
"""The file of a pruned folder that says which units are kept."""
_OWN_CODE = {"per_layer_config", "auto_map"}
"""Keys of a config that belong to the folder's own modeling file."""


@dataclass(frozen=True)
class Record:
    """The record of a pruned folder.

    Attributes:
        folder: the folder.
        provenance: the content of `libprune.json`.
    """

    folder: Path
    provenance: dict[str, Any]

    @property
    def shape(self) -> str:
        """The shape of the result: `uniform` or `per_layer`."""
        return str(self.provenance["plan"]["shape"])

    @property
    def remote(self) -> bool:
        """Whether the model needs the folder's own modeling file, because its layers differ in width."""
        return self.shape == "per_layer"

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of `config.json`.

        Raises:
            ArtifactError: if it is missing or damaged.
        """
        path = self.folder / "config.json"
        with naming(f"{path} cannot be read", ArtifactError):
            config: dict[str, Any] = json.loads(path.read_text())
        return config

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Size and digest of every file but the model card, by its path in the folder; none in old records."""
        files: dict[str, dict[str, Any]] = self.provenance.get("files", {})
        return files

    @property
    def recovery(self) -> dict[str, Any] | None:
        """What the training of the model came to; None if it was not trained."""
        recovery: dict[str, Any] | None = self.provenance.get("recovery")
        return recovery

    @property
    def dtype(self) -> torch.dtype:
        """The type that the weights are stored in."""
        stored: torch.dtype = getattr(torch, self.config["dtype"])
        return stored

    @cached_property
    def plan(self) -> Plan:
        """Which units of the dense model are kept.

        Raises:
            ArtifactError: if `plan.parquet` is missing, damaged, or of another model.
        """
        path, model = self.folder / PLAN, self.provenance["plan"]["model"]
        table, meta = read_table(path, "slice")
        if meta["model"] != model:
            raise ArtifactError(f"{path} is of the model {meta['model']}, {PROVENANCE} says {model}")
        keep = {
            (int(table["layer_idx"][rows[0]]), table["group_type"][rows[0]]): table["keep"][rows]
            for rows in layers_and_parts(table)
        }
        return Plan(keep, meta.get("width"))

    @cached_property
    def left(self) -> Plan:
        """The plan of the remaining layers, by their index in the pruned model, whose width is its own."""
        layers = self.plan.layers
        kept = {(layers.index(layer), part): keep for (layer, part), keep in self.plan.keep.items() if layer in layers}
        return Plan(kept)

    @cached_property
    def stock_config(self) -> PreTrainedConfig:
        """The config without what only the folder's own code reads."""
        own = {*STOP, *(_OWN_CODE if self.shape == "per_layer" else ())}
        data = {key: value for key, value in copy.deepcopy(self.config).items() if key not in own and value != OPEN}
        data["model_type"] = str(data.get("model_type")).removeprefix(OWN_TYPE)
        family_of(data["model_type"], data)
        return CONFIG_MAPPING[data["model_type"]].from_dict(data)

    @cached_property
    def stock_model(self) -> PreTrainedModel:
        """A model of the stock config without weights.

        Raises:
            ArtifactError: if the config is no model's.
        """
        try:
            model = without_weights(self.stock_config)
        except LibpruneError:
            raise
        except Exception as error:  # the config and model classes raise types of their own
            last = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
            raise ArtifactError(f"{self.folder / 'config.json'} describes no model: {last}") from error
        return model

    @cached_property
    def architecture(self) -> Architecture:
        """The architecture of the remaining layers, as wide as the stock config says."""
        grouped: Mapping[str, int] = self.provenance["plan"].get("heads") or {}
        own = describe(self.stock_model, accept=keys_of(self.config), experts=self.experts, heads=self.heads)
        of_dense = {part: replace(own.parts[part], groups=number) for part, number in grouped.items()}
        return replace(own, parts={**own.parts, **of_dense})  # as the plan counts them

    @property
    def heads(self) -> Heads:
        """The units of an attention that the plan is of."""
        return "queries" if self.provenance["plan"].get("heads") else "groups"

    @property
    def experts(self) -> Experts:
        """The units of a mixture of experts that the plan is of; of no matter to a dense model."""
        return self.provenance.get("experts", "whole")

    def stored(self, shapes: Mapping[str, list[int]]) -> dict[str, list[int]]:
        """Shapes of parameters by the names that the weight files use.

        These are the names in published checkpoints, or the model's own if the folder has a modeling file.
        """
        if self.remote:
            return dict(shapes)
        tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        return {name: list(t.shape) for name, t in revert_weight_conversion(self.stock_model, tensors).items()}


class _Plan(BaseModel):
    shape: Literal["uniform", "per_layer"]
    model: str


class _Slice(BaseModel):
    repair: str


class _Written(BaseModel):
    bytes: int
    sha256: str


class _Training(BaseModel):
    class _Params(BaseModel):
        method: str

    params: _Params
    text: str
    tokens: int
    step: int
    held_out_before: float
    held_out_after: float


class _Provenance(BaseModel):
    """What is read of the record of a pruned folder; it holds more."""

    plan: _Plan
    tokens: str | None = None
    slice: _Slice
    files: dict[str, _Written] = {}
    recovery: _Training | None = None


def read_record(folder: Path) -> Record:
    """Read the record of a pruned folder.

    Raises:
        ArtifactError: if neither slice nor recover has written a model into the folder, or the record is damaged.
    """
    path = folder / PROVENANCE
    if (folder / NOTE).is_file():
        pruned = folder.with_name("pruned")
        raise ArtifactError(f"{folder} holds no model: recover.method is none; the pruned model lies in {pruned}")
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist: this is no folder that the slice stage has written")
    require_files(folder)
    provenance = read_provenance(folder)
    know_family(provenance.get("own_family"))
    try:
        known = _Provenance.model_validate(provenance, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ArtifactError(
            f"{path}: {where or 'it'} is not as slice writes it ({first['msg']}); run `dvc repro slice`"
        ) from error
    outside = [name for name in known.files if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    if outside:
        raise ArtifactError(f"{path} records the file {outside[0]!r}, which does not lie in {folder}")
    return Record(folder, provenance)


PROVENANCE = "libprune.json"
"""The file of a pruned folder that says how it was made."""


def write_provenance(folder: Path, made: Mapping[str, Any]) -> None:
    """Write how a pruned model was made, with size and digest of every file in its folder but the model card."""
    paths = {name: path for name, path in files_in(folder).items() if name != CARD}
    files = {name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for name, path in paths.items()}
    (folder / PROVENANCE).write_text(json.dumps(sealed({**made, "files": files}), indent=2) + "\n")


def files_in(folder: Path) -> dict[str, Path]:
    """Everything in a folder and its folders that is no folder, by its path from there, sorted."""
    found = (path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    return {path.relative_to(folder).as_posix(): path for path in sorted(found)}


def changed_files(record: Record, known: KnownDigests) -> Iterator[str]:
    """Sentences on the files of a pruned folder that are not there, or not as they were written."""
    for name, written in record.files.items():
        path = record.folder / name
        if not path.is_file():
            yield f"{path} does not exist; {PROVENANCE} records it"
        elif path.stat().st_size != written["bytes"]:
            yield f"{path} has {path.stat().st_size:,} bytes, {PROVENANCE} records {written['bytes']:,}"
        elif (digest := known.of({name: path})[name]) != written["sha256"]:
            yield f"{path} has changed: sha256 {digest[:16]}…, {PROVENANCE} records {written['sha256'][:16]}…"


def read_whole(folder: Path, layout: Layout, plan: Mapping[str, Any]) -> Record:
    """Read the record of a pruned folder that a stage goes on with, and check that all of its files belong to it.

    Args:
        folder: the pruned or the recovered folder of the layout.
        layout: keeps the digests of files that were read before.
        plan: the metadata that the plan of the folder must have, or some of them.

    Raises:
        ArtifactError: if it is missing, was made of another model or by another plan, or a file has changed.
    """
    stage = "slice" if folder == layout.pruned else "recover"
    record = read_record(require(folder, stage))
    same_origin(folder, record.provenance["plan"], plan)
    fault = next(changed_files(record, KnownDigests(layout.digests)), None)
    if fault:
        raise ArtifactError(f"{fault}; run `dvc repro {stage}`")
    return record


def copy_files(record: Record, folder: Path, without: Collection[str] = ()) -> None:
    """Copy the files of a pruned folder into another one: those that were recorded, but not the model's weights.

    Args:
        record: the record of the pruned folder.
        folder: an existing folder.
        without: names of files that are not copied.
    """
    for name in record.files:
        if name not in without and ("/" in name or ".safetensors" not in name):
            target = folder / name
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(record.folder / name, target)


def read_provenance(folder: Path) -> dict[str, Any]:
    """Read how a pruned model was made, as libprune wrote it into its folder.

    Raises:
        ArtifactError: if the folder was not written by libprune.
    """
    return read_json(folder / PROVENANCE, "slice")


def read_recovered(layout: Layout, pruned: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read how a recovered model was made; None if nothing was recovered.

    Args:
        layout: holds what recover wrote.
        pruned: how the pruned model was made.

    Raises:
        ArtifactError: if the folder is missing, a file in it has changed, or its model was recovered from another
            pruned model.
    """
    folder = layout.recovered
    if (require(folder, "recover") / NOTE).is_file():
        return None
    made = read_whole(folder, layout, pruned["plan"]).provenance
    for section in ("slice", "proof"):
        same_origin(folder, made.get(section, {}), pruned[section])
    same_origin(folder, made, {"tokens": pruned["tokens"]})
    return made


def versions() -> dict[str, Any]:
    """The versions of what made a pruned folder, for its record."""
    names = ("libprune", "torch", "transformers")
    return {"versions": {name: version(name) for name in names} | {"python": platform.python_version()}}
