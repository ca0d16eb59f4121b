"""Writes docs/reference/ from the code: `python -m docs.make_reference`. A test holds the pages to it."""

import ast
import inspect
import json
import tempfile
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from libprune.cli.footprint import footprints
from libprune.cli.forecast import memory, works
from libprune.cli.inspection import dense_architecture
from libprune.cli.main import app
from libprune.pipeline import sections
from libprune.pipeline.layout import Layout
from libprune.pipeline.params import PRESETS, Params, validate_params

FOLDER = Path(__file__).parent / "reference"
_WIDTH = 108
_GENERATED = "This page is written from the code by `make reference`."


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(" ".join(text.split()), _WIDTH, subsequent_indent=indent, break_on_hyphens=False)


# --- params


def params_page() -> str:
    """All keys of params.yaml, with what each may hold, its default and its docstring."""
    told = _docstrings()
    schema = Params.model_json_schema()
    lines = [
        "# The keys of params.yaml",
        _wrapped(
            "After reading an entry of this page you can set a key of `params.yaml`: what it does, what it may hold, "
            f"and what it is if you leave it out. {_GENERATED} Keys that say *by the preset* are set by `preset`, "
            "unless you give them a value; `auto` (for `allocate.gradient_fix`: `preset`) leaves them to it as well. "
            "`libprune params` checks a file."
        ),
        "## preset",
        _entry("preset", schema["properties"]["preset"], told["Params", "preset"], {}),
        *_preset_table(),
    ]
    for section, model in _sections():
        lines += [f"## {section}", _wrapped(inspect.cleandoc(model.__doc__ or ""))]
        owned = model.model_json_schema()
        for key, value in owned["properties"].items():
            lines += [f"### {section}.{key}", _entry(f"{section}.{key}", value, told[model.__name__, key], owned)]
    return "\n\n".join(lines) + "\n"


def _sections() -> Iterator[tuple[str, type[sections.Section]]]:
    for name, field in Params.model_fields.items():
        if inspect.isclass(field.annotation) and issubclass(field.annotation, sections.Section):
            yield name, field.annotation


def _docstrings() -> dict[tuple[str, str], str]:
    """The string that stands below each field, by class and field; Python does not keep them."""
    found = {}
    for module in (sections, inspect.getmodule(Params)):
        for one in ast.parse(inspect.getsource(module)).body:  # type: ignore[arg-type]
            for field, below in zip(getattr(one, "body", []), getattr(one, "body", [])[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                    assert isinstance(one, ast.ClassDef) and isinstance(field.target, ast.Name)
                    found[one.name, field.target.id] = ast.literal_eval(below.value)
    return found


def _entry(key: str, value: Mapping[str, Any], told: str, owner: Mapping[str, Any]) -> str:
    section, _, name = key.partition(".")
    if any(name in chosen.get(section, {}) for chosen in PRESETS.values()):
        default = "by the preset"
    elif "default" in value:
        default = _value(value["default"])
    else:
        default = "none, it must be given"
    return _wrapped(f"*{_kind(value, owner)}; default: {default}*") + "\n\n" + _wrapped(told)


def _value(value: Any) -> str:
    text = json.dumps(value).replace('"', "")
    return f"`{text}`"


def _kind(value: Mapping[str, Any], owner: Mapping[str, Any]) -> str:
    """What a key may hold, in words, from its JSON schema."""
    for several in ("anyOf", "oneOf"):
        if several in value:
            return " or ".join(dict.fromkeys(_kind(one, owner) for one in value[several]))
    if "$ref" in value:
        referred = owner["$defs"][value["$ref"].rpartition("/")[2]]
        return f"a section with the keys {', '.join(f'`{key}`' for key in referred['properties'])}"
    if "enum" in value or "const" in value:
        return ", ".join(_value(one) for one in value.get("enum", [value.get("const")]))
    words = {"integer": "whole number", "string": "text", "boolean": "`true` or `false`", "null": "`null`"}
    if value["type"] == "array":
        return f"list of: {_kind(value['items'], owner)}"
    limits = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    return " ".join(
        [words.get(value["type"], value["type"]), *(f"{word} {value[k]:g}" for k, word in limits.items() if k in value)]
    )


def _preset_table() -> list[str]:
    keys = sorted({f"{section}.{key}" for one in PRESETS.values() for section in one for key in one[section]})
    rows = [f"| key | {' | '.join(f'`{name}`' for name in PRESETS)} |", "|---" * (len(PRESETS) + 1) + "|"]
    for key in keys:
        section, _, name = key.partition(".")
        rows.append(f"| `{key}` | {' | '.join(_value(one[section][name]) for one in PRESETS.values())} |")
    return ["\n".join(rows)]


# --- commands


def cli_page() -> str:
    """All commands of libprune with their arguments and options, as `--help` prints them."""
    lines = [
        "# The commands",
        _wrapped(
            "After reading an entry of this page you can call a command of `libprune`: its arguments, its options and "
            f"what it does. {_GENERATED} `libprune COMMAND --help` prints the same. Stages have help too, for "
            "example `python -m stages.score --help`."
        ),
    ]
    for name, command in commands():
        context = typer.Context(command, info_name=name)
        usage = " ".join([name, *command.collect_usage_pieces(context)])
        lines += [f"## {name}", f"```\n{usage}\n```"]
        lines += [_wrapped(paragraph) for paragraph in inspect.cleandoc(command.help or "").split("\n\n")]
        records = [param.get_help_record(context) for param in command.get_params(context)]
        options = [_wrapped(f"- `{' '.join(one[0].split())}`: {one[1]}", "  ") for one in records if one]
        lines.append("\n".join(options))
    return "\n\n".join(lines) + "\n"


def commands(name: str = "libprune", command: Any = None) -> Iterator[tuple[str, Any]]:
    """A command and all below it by their names, as objects of click; by default all of libprune."""
    command = command or typer.main.get_command(app)
    yield name, command
    for below, one in getattr(command, "commands", {}).items():
        yield from commands(f"{name} {below}", one)


# --- sizes

_LLAMA = {
    **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "vocab_size": 128256},
    **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    **{"num_key_value_heads": 8, "max_position_embeddings": 131072, "tie_word_embeddings": False},
}
MODELS = {
    "1B (Llama 3.2 1B)": _LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    "8B (Llama 3.1 8B)": _LLAMA,
    "70B (Llama 3.1 70B)": _LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
"""The widths of published models; what no size depends on is left out."""
SETTINGS = {
    "`fast`": {"preset": "fast"},
    "`fast`, `recover.method: lora`": {"preset": "fast", "recover.method": "lora"},
    "`fast`, `recover.method: full`": {"preset": "fast", "recover.method": "full"},
    "`balanced`": {"preset": "balanced"},
    "`best`": {"preset": "best"},
}
_OWN = {"recover.method": "none", "compute.dtype": "bfloat16", "compute.device": "cpu"}
_LARGE = {"prepare": "dense model", "gradients": "gradients", "activations": "activations", "slice": "pruned model"}
_STAGES = ("gradients", "activations", "levels", "allocate", "slice", "recover", "evaluate")


def sizes_page() -> str:
    """Operations, memory and disk of models of several sizes, by the arithmetic of `libprune inspect`."""
    lines = [
        "# Sizes of models, computed",
        _wrapped(
            "After reading this page you can look up how many operations, how much memory and how much disk libprune "
            "is expected to take for models of three sizes. [hardware.md](../hardware.md) says what that means in "
            f"hours and machines. {_GENERATED}"
        ),
        _wrapped(
            "Nothing here was measured. The figures are those that `libprune inspect` and the first stage of a run "
            "compute from the shapes, for the default settings and 20 % of the decoder, with weights and passes in "
            "bfloat16. The formulas, and how near they came to the demo, are in [inspect.md](../inspect.md)."
        ),
        "A PFLOP is 10¹⁵ floating point operations, a GB 10⁹ bytes. *All stages* has those that are not shown, too.",
    ]
    return "\n\n".join([*lines, *(model_sizes(name) for name in MODELS)]) + "\n"


def model_sizes(name: str) -> str:
    """The section of one of the `MODELS`."""
    with tempfile.TemporaryDirectory() as folder:
        return "\n\n".join([f"## {name}", *_sizes(Path(folder), MODELS[name])])


def _params(model: Path, changes: Mapping[str, Any]) -> Params:
    flat = {"prepare.model": str(model), "tokenize.text": "text.txt", **_OWN, **changes}
    given: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, name = key.rpartition(".")
        (given.setdefault(section, {}) if section else given)[name] = value
    return validate_params(given, "docs/make_reference.py")


def _sizes(folder: Path, config: Mapping[str, Any]) -> Iterator[str]:
    (folder / "config.json").write_text(json.dumps(config))
    architecture, stored = dense_architecture(_params(folder, {}), Layout(folder / "artifacts"), described=False)
    yield f"{architecture.total_parameters:,} parameters, stored as {str(stored).removeprefix('torch.')}."
    work, held = [], []
    for name, changes in SETTINGS.items():
        params = _params(folder, changes)
        written = footprints(architecture, params, stored)
        ran = _ran(params)
        operations = works(architecture, params)
        most = memory(architecture, params, stored, written)
        stage = max(ran & most.keys(), key=most.__getitem__)
        kept = sum(one.written for one in written if one.stage in ran)
        scratch = max(max(2 * one.sums, one.checkpoints) for one in written if one.stage in ran)
        cells = [_peta(operations[one]) if one in ran else "" for one in _STAGES]
        work.append([name, *cells, _peta(sum(operations[one] for one in ran))])
        parts = [_giga(one.written) for one in written if one.stage in _LARGE]
        held.append([name, f"{_giga(most[stage])} in {stage}", *parts, _giga(kept), _giga(scratch)])
    yield _table(["PFLOP", *_STAGES, "all stages"], work)
    yield _table(["GB", "memory at most", *_LARGE.values(), "kept in all", "scratch at most"], held)
    sums = {one.stage: _giga(one.sums) for one in footprints(architecture, _params(folder, {}), stored)}
    yield _wrapped(
        f"Of the memory, running sums take {sums['gradients']} GB in gradients and {sums['activations']} GB in "
        "activations. They are mapped from disk where they would take half of the free memory."
    )


def _ran(params: Params) -> set[str]:
    """The stages that have something to do."""
    always = {"prepare", "tokenize", "gradients", "activations", "score", "allocate", "slice", "evaluate", "report"}
    levels = {"levels"} if params.allocate.method == "search" else set()
    return always | levels | ({"teacher", "recover"} if params.recover.method != "none" else set())


def _peta(operations: float) -> str:
    if operations < 1e10:  # stages that take next to none
        return ""
    return f"{operations / 1e15:,.3g}" if operations < 1e18 else f"{operations / 1e15:,.0f}"


def _giga(size: int) -> str:
    return f"{size / 1e9:.0f}" if size > 1e10 else f"{size / 1e9:.1f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    rule = "|---|" + "---:|" * (len(head) - 1)
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)])


PAGES = {"params.md": params_page, "cli.md": cli_page, "sizes.md": sizes_page}
"""What writes each page of docs/reference."""


def main() -> None:
    """Write all pages."""
    FOLDER.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page())


if __name__ == "__main__":
    main()
