"""What is given and lies here: models, texts, folders of tasks. Of texts the beginning is read, of models no weight."""

import json
import re
from collections.abc import Callable, Container, Generator, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from libprune.engine.errors import FamilyError, LibpruneError, SourceError, naming
from libprune.engine.family import Family, described_by, family_of
from libprune.engine.heads import EMBEDDING, head_of
from libprune.foresight.settings import refused, whole_layers
from libprune.models.families import use_families
from libprune.models.given import require_content, require_dequantised, require_model, require_safetensors
from libprune.pipeline.faults import Fault, name_of
from libprune.pipeline.methods import METHODS
from libprune.pipeline.params import Params
from libprune.pipeline.sections import Prepare, Recover, Tokenize, Vocabulary
from libprune.pipeline.sources import resolve
from libprune.texts.chosen import (
    SELF,
    TextSource,
    calibration_source,
    evaluation_source,
    require_other_text,
    vocabulary_source,
)
from libprune.texts.local import read_rows, text_files
from libprune.texts.shares import Named, judging, keys_of, parts_of, several, shares_of

ROWS = 10_000
"""Rows of a text that are looked at for a column; where more follow, a column may still come."""
WHOLE = 1 << 25
"""Bytes of a file that is only read as a whole, and is looked at."""
_UNTOLD = (None, type(None))
_NOTHING = {"none", "null", "nil", "~"}


def given_faults(params: Params) -> Iterator[Fault]:
    """Everything that is known of models and texts that lie here; of those of the hub nothing is said."""
    if nothing := list(_nothing(params)):
        yield from nothing
        return
    if own := list(refused(("prepare", "families"), use_families, params.prepare.families)):
        yield from own
        return
    config = yield from _model("prepare.model", params.prepare.model, params.prepare.trust_remote_code)
    yield from _revision(params.prepare)
    if params.recover.method != "none" and params.recover.teacher is not None:
        yield from _model("recover.teacher", params.recover.teacher, False)
    if config is not None:
        yield from _fits(params, config)
    yield from _texts(params, None if config is None else _ending(config))
    if params.prepare.vocabulary is not None:
        yield from _vocabulary(params.prepare.vocabulary)
    if params.evaluate.task_folder is not None:
        yield from _refused("evaluate.task_folder", _require_folder, params.evaluate.task_folder)


def _refused(key: str, check: Callable[..., object], *args: object) -> Iterator[Fault]:
    """The fault that a check raises, under the name of its key."""
    for fault in refused(tuple(key.split(".")), check, *args):
        yield Fault(f"{key}: {fault.text}", fault.place)


def _require_folder(folder: str) -> None:
    path = resolve(folder)
    if path is None or not path.is_dir():
        raise SourceError(f"{folder!r} is not a folder")


def _nothing(params: Params) -> Iterator[Fault]:
    """Words for nothing, which YAML reads as the name of a source."""
    given = {
        ("prepare", "model"): params.prepare.model,
        ("prepare", "families"): params.prepare.families,
        ("prepare", "vocabulary"): None if params.prepare.vocabulary is None else params.prepare.vocabulary.text,
        ("tokenize", "text"): params.tokenize.text,
        ("tokenize", "evaluation_text"): params.tokenize.evaluation_text,
        ("recover", "teacher"): params.recover.teacher,
        ("recover", "text"): params.recover.text,
        ("evaluate", "task_folder"): params.evaluate.task_folder,
    }
    for (section, key), value in given.items():
        if isinstance(value, str) and value.lower() in _NOTHING and not Path(value).exists():
            instead = "name one" if key in {"model", "text"} and section != "recover" else "write null"
            yield Fault(f"{section}.{key} = {value!r} is the name of no source; {instead}", (section, key))


Config = dict[str, Any]
"""The content of a config.json."""


def _model(key: str, model: str, trusted: bool) -> Generator[Fault, None, Config | None]:
    """The faults of a model; returns the content of its config.json, None where it is not known or not understood."""
    try:
        return _read_model(model, trusted)
    except LibpruneError as error:
        told = str(error) if "prepare.model" in str(error) else f"prepare.model: {error}"
        yield Fault(told.replace("prepare.model", key), tuple(key.split(".")))
        return None


def _revision(given: Prepare) -> Iterator[Fault]:
    """A revision of a model that has none."""
    with suppress(SourceError):  # which is told of the model
        if given.revision is not None and resolve(given.model) is not None:
            yield Fault(
                f"prepare.revision is for models of the hub, and prepare.model = {given.model!r} lies here; set it to "
                "null",
                ("prepare", "revision"),
            )


def _read_model(model: str, trusted: bool) -> Config | None:
    """The content of the config.json of a model; None of the hub, of a GGUF file, and where code decides what it means.

    Raises:
        SourceError: if there is no model, of an unknown family, quantized, or without weights that may be read.
    """
    path = resolve(model)
    if path is None:
        return None
    require_model(model, path)
    if path.is_file():
        return None
    with naming(f"{path / 'config.json'} cannot be read"):
        config: Config = dict(json.loads((path / "config.json").read_text(encoding="utf-8")))
    require_safetensors(model, path)
    if config.get("auto_map") and trusted:
        return None
    if isinstance(kind := config.get("model_type"), str):
        family_of(kind, config)
    if isinstance(told := config.get("quantization_config"), dict):
        require_dequantised(model, told.get("quant_method"))
    return config


def _ending(config: Config) -> str:
    """The name of the class that the model was saved from."""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def _fits(params: Params, config: Config) -> Iterator[Fault]:
    """Settings that this model cannot take, by its config alone."""
    family = described_by(str(config.get("model_type")))
    if family is None:
        return
    yield from _positions(params, family, config)
    name = _ending(config)
    with suppress(FamilyError):  # which is told of the model
        if head_of(config.get("architectures")) is EMBEDDING and params.recover.method != "none":
            yield from (Fault(said, ("recover", key)) for key, said in params.recover.of_predictions.items())
    writes = not name.endswith(("ForMaskedLM", "ForSequenceClassification"))
    if params.evaluate.tasks and not writes:
        yield Fault(
            "evaluate.tasks are questions to models that write; set it to [] for this one", ("evaluate", "tasks")
        )
    if "gguf" in params.export.formats and (family.gguf is None or not writes):
        yield Fault(
            f"export.formats has gguf, and libprune writes no GGUF file of a {config['model_type']} model"
            f"{'' if writes else f' that is a {name}'}; take it out",
            ("export", "formats"),
        )
    if name.endswith("ForSequenceClassification"):
        yield from _several(params)
    layers = family.sized(config).get(family.config.layers) if _nested(family, config) else None
    frozen = params.allocate.freeze_first + params.allocate.freeze_last
    if isinstance(layers, int) and frozen >= layers:
        yield Fault(
            f"allocate.freeze_first: {params.allocate.freeze_first} and allocate.freeze_last: "
            f"{params.allocate.freeze_last} keep all {layers} layers of this model whole, so that nothing can go",
            ("allocate", "freeze_first" if params.allocate.freeze_first else "freeze_last"),
        )
    yield from whole_layers(params, family.family, family.why_layers_stay or "")
    shares = any(part.sharing for part in family.parts.values()) and config.get("num_kv_shared_layers")
    if family.tower is not None or shares:
        yield from _alike(params, family)
    if family.tower is not None:
        yield from _of_a_tower(params, family)


def _several(params: Params) -> Iterator[Fault]:
    """Lists of texts for a model that takes one."""
    given = {"tokenize": params.tokenize.text}
    given |= {"recover": params.recover.text} if params.recover.method != "none" and params.recover.text else {}
    for section, text in given.items():
        if len(shares_of(text)) > 1:
            yield Fault(several(section), (section, "text"))


def _nested(family: Family, config: Config) -> bool:
    """Whether a config holds the nested one that its family speaks of, if it speaks of one."""
    return family.tower is None or isinstance(config.get(family.tower.config), dict)


def _alike(params: Params, family: Family) -> Iterator[Fault]:
    """Settings that need layers of different widths, for a model that has no code for them."""
    allocate = params.allocate
    alike = f"and the layers of a {family.family} model can only be written all alike"
    method = METHODS[allocate.method]
    if not method.alike and not (method.improves and allocate.shape == "uniform"):
        yield Fault(
            f"allocate.method: {allocate.method} decides each layer's own width, {alike}; choose allocate.method: "
            "uniform",
            ("allocate", "method"),
        )
    if allocate.shape == "per_layer":
        yield Fault(
            f"allocate.shape: per_layer gives layers widths of their own, {alike}; set it to auto",
            ("allocate", "shape"),
        )
    if allocate.ordered and params.depth.of == "parts":
        yield Fault(f"depth.of: parts leaves layers that differ, {alike}; set allocate.depth to none", ("depth", "of"))
    for key in ("freeze_first", "freeze_last"):
        if getattr(allocate, key):
            yield Fault(f"allocate.{key} keeps layers wider than the others, {alike}; set it to 0", ("allocate", key))


def _of_a_tower(params: Params, family: Family) -> Iterator[Fault]:
    """Programs that run no language model inside another model."""
    for kind in params.export.formats:
        if kind in {"onnx", "openvino"}:
            yield Fault(
                f"export.formats has {kind}, and libprune writes no graph of a {family.family} model; take it out",
                ("export", "formats"),
            )


def _positions(params: Params, family: Family, config: Config) -> Iterator[Fault]:
    """Lengths beyond the positions of a model that has learned them; other models have no limit."""
    learned = any("positions" in text for text in family.outside.values())
    limits = [config[key] for key in ("max_position_embeddings", "n_positions") if isinstance(config.get(key), int)]
    if not learned or not limits:
        return
    keys = ("calibration_length", "repair_length", "evaluation_length")
    lengths = {f"tokenize.{key}": getattr(params.tokenize, key) or 0 for key in keys}
    if family.cache is not None:
        text = params.tokenize.evaluation_windows * params.tokenize.evaluation_length
        timed = min(params.evaluate.prompt_tokens, text) + params.evaluate.decode_tokens
        lengths["evaluate.prompt_tokens + evaluate.decode_tokens"] = timed
    if params.recover.method != "none":
        lengths["recover.length"] = params.recover.length
    if params.allocate.times:
        lengths["latency.tokens"] = params.latency.tokens
    for what, length in lengths.items():
        if length > (limit := max(limits)):
            section, _, key = what.split(" ")[0].partition(".")
            yield Fault(
                f"{what} = {length}, but this {config['model_type']} model has learned positions for {limit} "
                f"tokens; lower it to {limit} or less",
                (section, key),
            )


def _texts(params: Params, kind: str | None) -> Iterator[Fault]:
    """The faults of the texts.

    Args:
        kind: the name of the model's class; None if it is not known.
    """
    settings = params.tokenize
    label = None
    if kind is not None and kind.endswith("ForSequenceClassification"):
        label = settings.label_column or "label"
    faults: list[Fault] = []
    sources = [calibration_source(part, label) for part in parts_of(settings) if part.text != SELF]
    if isinstance(settings.text, tuple):
        faults += _listed("tokenize", settings.text, settings, label)
    elif sources:
        keys = [*_HUB_KEYS]
        keys += ["evaluation_config", "evaluation_split"] if settings.evaluation_text is None else []
        faults += _text(("tokenize", ""), sources[0], settings, keys)
    other = None
    if settings.evaluation_text not in (None, SELF):
        other = evaluation_source(judging(settings), label)
    if other is not None:
        faults += _text(("tokenize", "evaluation_"), other, settings, ["config", "split"])
    if other is not None and not faults:
        for source in sources:
            faults += refused(("tokenize", "evaluation_text"), require_other_text, source, other)
    yield from faults
    if params.recover.method != "none":
        yield from _training(params.recover, settings, label)


def _vocabulary(given: Vocabulary) -> Iterator[Fault]:
    """The faults of the text whose tokens stay."""
    place = ("prepare", "vocabulary", "text")
    if faults := list(refused(place, vocabulary_source, given)):
        yield from faults
        return
    keys = given.model_dump(include={"text", "config", "revision", "split", "column"})
    for fault in _text(("prepare.vocabulary", ""), vocabulary_source(given), Tokenize.model_validate(keys), _HUB_KEYS):
        yield Fault(fault.text, place)


def _training(recover: Recover, settings: Tokenize, label: str | None) -> Iterator[Fault]:
    """The faults of the texts to train on."""
    if recover.text is not None:
        yield from _listed("recover", recover.text, settings, label, {part.text for part in parts_of(settings)})


def _listed(
    section: str, text: Named, settings: Tokenize, label: str | None, known: Container[object] = ()
) -> Iterator[Fault]:
    """The faults of texts with shares, or of one without; a text that is looked at under another key is known."""
    for number, share in enumerate(shares_of(text)):
        if share.text == SELF or share.text in known:
            continue
        own = settings.model_copy(update=keys_of(share))
        place = (section, "text", number) if isinstance(text, tuple) else (section, "text")
        keys = _HUB_KEYS if isinstance(text, tuple) else ()
        for fault in _text((section, ""), calibration_source(own, label), own, keys):
            said = re.sub(rf"^{section}\.({'|'.join(('column', *_HUB_KEYS))})\b", rf"{name_of(place)}.\1", fault.text)
            yield Fault(said, place)


_HUB_KEYS = ("config", "revision", "split")
"""Keys of a text that only a data set of the hub has."""


def _text(where: tuple[str, str], source: TextSource, settings: Tokenize, hub_keys: Iterable[str]) -> Iterator[Fault]:
    """The faults of one text that lies here.

    Args:
        where: the section of its key, and what the names of its keys begin with.
        source: the text.
        settings: hold its keys.
        hub_keys: the keys that only a data set of the hub has.
    """
    section, prefix = where
    key = f"{prefix}text"
    try:
        path = source.path
        files = [] if path is None else [str(file) for file in text_files(path)]
    except LibpruneError as error:
        yield Fault(f"{section}.{key}: {error}", (section, key))
        return
    if not files:
        return
    for name in hub_keys:
        if getattr(settings, prefix + name) is not None:
            yield Fault(
                f"{section}.{prefix}{name} is for data sets of the hub, and {section}.{key} = {source.name!r} lies "
                "here; set it to null, and name the files that are to be read",
                (section, prefix + name),
            )
    column = f"{prefix}column" if getattr(settings, f"{prefix}column") else key
    yield from _refused(f"{section}.{column}", _require_columns, source, files)


def _require_columns(source: TextSource, files: list[str]) -> None:
    """Stop if a text has no rows, or certainly lacks a column, or holds no text in it."""
    if source.label == source.column:
        raise SourceError(
            f"column {source.column!r} of text {source.name!r} holds the documents; name another tokenize.label_column"
        )
    wanted = [column for column in (source.column, source.label) if column is not None]
    columns, whole = _columns(files, wanted)
    if whole and not columns:
        raise SourceError(f"text {source.name!r} holds no document")
    for column in wanted:
        if whole and column not in columns:
            raise SourceError(f"text {source.name!r} has no column {column!r}; it has {', '.join(map(str, columns))}")
    if (kind := columns.get(source.column)) not in (*_UNTOLD, str, list):
        raise SourceError(f"column {source.column!r} of text {source.name!r} holds {kind.__name__}, not text")


def _columns(files: list[str], wanted: list[str]) -> tuple[dict[str, type | None], bool]:
    """The columns of a text with the type of their first values, and whether there can be no others."""
    if files[0].endswith(".parquet"):
        names: list[str] = []
        for file in files:
            require_content(Path(file))
            with naming(f"{file} cannot be read as parquet"):
                names += pq.read_schema(file).names
        return dict.fromkeys(names), True
    if any(file.endswith(".json") and Path(file).stat().st_size > WHOLE for file in files):
        return {}, False
    found: dict[str, type | None] = {}
    rows = read_rows(files)
    for row in islice(rows, ROWS):
        for name, value in row.items():
            if found.get(name) in _UNTOLD:
                found[name] = type(value)
        if all(found.get(name) not in _UNTOLD for name in wanted):
            return found, True
    return found, next(rows, None) is None
