"""The model card of a pruned folder: what it is, how it was made and proved, and how to load it; as hubs show it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from libprune.engine.architecture import Experts, Heads
from libprune.engine.errors import ArtifactError
from libprune.engine.heads import CAUSAL_LM, EMBEDDING, IMAGE_TEXT_TO_TEXT, MASKED_LM, SEQUENCE_CLASSIFICATION, head_of
from libprune.models.dialect import STOP
from libprune.models.folder import PROCESSOR_FILES
from libprune.models.origin import CARD, Origin
from libprune.results.record import PROVENANCE, Record, read_provenance, read_record

_TASKS = {
    CAUSAL_LM.name: "text-generation",
    IMAGE_TEXT_TO_TEXT.name: "image-text-to-text",
    MASKED_LM.name: "fill-mask",
    SEQUENCE_CLASSIFICATION.name: "text-classification",
    EMBEDDING.name: "feature-extraction",
}
"""The names of hubs for what a model does, by its head."""
_HEADS: dict[Heads, str] = {
    "groups": "attention groups, each a key-value head with its query heads",
    "queries": "query heads, as many in each group that stays, and whole groups with their key-value head",
}
_EXPERTS: dict[Experts, str] = {"whole": "whole experts", "channels": "channels of experts, the same in all of a layer"}
"""What the units of parts are called; those of attentions and mixtures by the units that a plan is of."""
_FOLDERS = re.compile(r"(?<![^\s(])(?:package://|[~.]*/)(?:\S*/)?(?=\S)")
"""The folders in the path of a local file."""


def origin_of(folder: Path) -> Origin:
    """The origin of a pruned or recovered model, from the record in its folder.

    Raises:
        ArtifactError: if the folder was not written by libprune, or by a version that did not record it.
    """
    provenance = read_provenance(folder)
    if "origin" not in provenance:
        raise ArtifactError(f"{folder / PROVENANCE} says nothing of the model's origin; run `dvc repro slice`")
    return Origin.from_json(provenance["origin"])


def write_card(folder: Path) -> None:
    """Write the model card into a pruned or recovered folder, which has its record already.

    The record has no digest of it, so that its text may be changed.
    """
    (folder / CARD).write_text(card_text(folder))


def card_text(folder: Path, evaluation: Mapping[str, Any] | None = None) -> str:
    """The model card of a pruned or recovered folder, in Markdown with the head that hubs read.

    Args:
        folder: the folder, with its record.
        evaluation: the content of `artifacts/evaluation.json`, for a section with its figures.

    Raises:
        ArtifactError: if the record is missing or damaged, or an older version wrote it.
    """
    record, origin = read_record(folder), origin_of(folder)
    sections = [*_opening(record, origin), *_loading(record), *_making(record), *_proof(record)]
    sections += _figures(evaluation) if evaluation else []
    return "\n\n".join([*sections, *_license(origin)]) + "\n"


def _opening(record: Record, origin: Origin) -> Iterator[str]:
    head = {
        "base_model": origin.base_model,
        "library_name": "transformers",
        "license": origin.license,
        "pipeline_tag": _TASKS[head_of(record.config["architectures"]).name],
        "tags": ["libprune", "pruning"],
    }
    known = {key: value for key, value in head.items() if value is not None}
    yield f"---\n{yaml.safe_dump(known, sort_keys=False, allow_unicode=True)}---"
    yield f"# {origin.name}, pruned" + (" and trained" if record.recovery and record.recovery["step"] else "")
    dense, pruned = (record.provenance["parameters"][name] for name in ("dense", "pruned"))
    removed = "; ".join(_removed(record)) or "none"
    share = 1 - pruned["decoder"] / (origin.decoder or dense["decoder"])
    how = "The last cut" if origin.cuts else "Structured pruning"
    yield (
        f"This is `{origin.base_model or origin.name}` without {100 * share:.1f} % of the parameters of its layers. "
        f"{how} removed whole units: {removed}. So the matrices are smaller; none is sparse."
    )
    if origin.cuts:
        yield (
            f"It had been pruned before, in {origin.cuts} {'cut' if origin.cuts == 1 else 'cuts'}. All that follows is "
            "about the last cut: there, *dense* is the model that this cut began with."
        )
    rows = [
        ("parameters", f"{dense['all']:,}", f"{pruned['all']:,}"),
        ("parameters of the layers", f"{dense['decoder']:,}", f"{pruned['decoder']:,}"),
        ("layers", f"{len({layer for layer, _ in record.plan.keep}):,}", f"{len(record.plan.layers):,}"),
    ]
    if (columns := record.provenance.get("columns")) is not None:
        rows.append(("columns of the residual stream", f"{columns['before']:,}", f"{columns['after']:,}"))
    for part in dict.fromkeys(part for _, part in record.plan.keep):
        counts = sorted(set(record.plan.counts(part))) or [0]
        units = next(len(keep) for (_, of), keep in record.plan.keep.items() if of == part)
        kept = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
        rows.append((f"{part} units in a layer", f"{units:,}", kept))
    yield _table(rows, ("", "dense", "pruned"))
    if (trimmed := record.provenance.get("vocabulary")) is not None:
        rows = trimmed["rows"]
        yield (
            f"The vocabulary was made smaller first: of {rows['before']:,} rows for tokens {rows['after']:,} stay, and "
            f"{trimmed['parameters_removed']:,} parameters of the embedding and the head went with the others. The "
            "dense model of these tables has the smaller vocabulary too. Text that was not thought of is cut into more "
            "tokens than by the tokenizer of the given model."
        )
    if head_of(record.config["architectures"]) is IMAGE_TEXT_TO_TEXT:
        yield (
            "Only the language model was pruned, and only text was read for it. The part that reads images is that of "
            "the dense model."
        )


def _removed(record: Record) -> Iterator[str]:
    """What was removed: whole layers, columns, and the units of each part that lost some in the layers that stay."""
    layers, left = len({layer for layer, _ in record.plan.keep}), len(record.plan.layers)
    if left < layers:
        yield f"{layers - left:,} of {layers:,} layers"
    if (columns := record.provenance.get("columns")) is not None:
        yield f"{columns['before'] - columns['after']:,} of {columns['before']:,} columns of the residual stream"
    names = {"mlp": "MLP channels", "experts": _EXPERTS[record.experts], "attention": _HEADS[record.heads]}
    for part in dict.fromkeys(part for (_, part), keep in record.left.keep.items() if not keep.all()):
        yield names.get(part, f"units of the part `{part}`")


def _loading(record: Record) -> Iterator[str]:
    loader = head_of(record.config["architectures"]).auto_class
    remote = ", trust_remote_code=True" if record.remote else ""
    sees = any((record.folder / name).is_file() for name in PROCESSOR_FILES)
    reader, kind = ("AutoProcessor", "processor") if sees else ("AutoTokenizer", "tokenizer")
    yield "## How to load"
    yield (
        f"```python\nfrom transformers import {loader}, {reader}\n\n"
        'name = "."  # this folder, or its name on the hub\n'
        f"model = {loader}.from_pretrained(name{remote})\n"
        f"{kind} = {reader}.from_pretrained(name{remote})\n```"
    )
    if record.remote:
        yield (
            "Each layer has widths of its own. `modeling_pruned.py` in this folder builds it from transformers' own "
            "layers. It needs transformers 5.15 or newer."
        )
    else:
        versions = "5" if STOP.keys() & record.config.keys() else "4.57 and 5"
        yield f"All layers are alike, and the config is a stock one; transformers {versions} read it."
        if record.config.get("attn_logit_softcapping") is not None:
            yield (
                'Pass `attn_implementation="eager"` in transformers 4, whose default leaves out the soft cap of the '
                "attention."
            )


def _making(record: Record) -> Iterator[str]:
    made, plan, recovery = record.provenance, record.provenance["plan"], record.recovery
    lines = [
        f"- units ranked by the criterion `{plan['criterion']}`",
        f"- shares of layers and parts by the allocation `{plan['method']}`",
        f"- remaining weights fitted by the repair `{made['slice']['repair']}`",
    ]
    if recovery:
        teacher = _without_folders(recovery["params"]["teacher"] or "the dense model")
        kept = "" if recovery["step"] else "; no step lowered it, so the weights are those before the training"
        lines.append(
            f"- trained afterwards by the method `{recovery['params']['method']}` on {recovery['tokens']:,} tokens of "
            f"{_without_folders(recovery['text'])}, to predict what {teacher} predicts; the loss on held-out sequences "
            f"was {recovery['held_out_before']:.4f} before and {recovery['held_out_after']:.4f} after{kept}"
        )
    yield "## How it was made"
    yield "\n".join(lines)
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    yield f"All settings are in `{PROVENANCE}`, the units that were kept in `plan.parquet`. Made with {versions}."


def _proof(record: Record) -> Iterator[str]:
    proof, recovery = record.provenance["proof"], record.recovery
    outputs = head_of(record.config["architectures"]).outputs
    other = "the dense model with the fitted weights, in which the removed units are masked"
    if recovery:
        proof, other = recovery["proof"], "the pruned model with the trained weights in memory"
    yield "## How it was proved"
    yield (
        "The folder was loaded in a fresh process without libprune, and computed in float32 what is computed by "
        f"{other}: {outputs} differ by at most {proof['logit_difference']:.1e} of {proof['logit_scale']:.1f}. "
        "`libprune check` shows whether its files are still the same."
    )


def _figures(evaluation: Mapping[str, Any]) -> Iterator[str]:
    names = {"dense": "dense", "pruned": "pruned", "recovered": "pruned and trained"}
    models = {title: evaluation[name] for name, title in names.items() if evaluation[name]}
    protocol = evaluation["protocol"]
    measures = {"perplexity": ("perplexity", 2)}
    if evaluation["model"]["head"] == EMBEDDING.name:
        models.pop(names["dense"])
        measures = {
            "cosine": ("cosine to the dense embedding", 4),
            "rank_correlation": ("rank correlation of similarities", 4),
        }
    rows = [
        (name, *(f"{one[key]:.{digits}f} ± {one[f'{key}_se']:.{digits}f}" for key, (_, digits) in measures.items()))
        for name, one in models.items()
    ]
    yield "## Figures"
    yield _table(rows, ("model", *(title for title, _ in measures.values())))
    yield (
        f"On {protocol['windows']:,} windows of {protocol['length']:,} tokens of "
        f"{_without_folders(protocol['text'])}, in {protocol['dtype']}, ± one standard error."
    )


def _license(origin: Origin) -> Iterator[str]:
    yield "## Licence"
    known = f", which is `{origin.license}`" if origin.license else ""
    yield f"This model is derived from `{origin.base_model or origin.name}`, whose licence applies to it{known}."


def _without_folders(text: str) -> str:
    """A text with the names of local files in place of their paths."""
    return _FOLDERS.sub("", text)


def _table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in [header, *rows]]
    return "\n".join([lines[0], "|---" + "|---:" * (len(header) - 1) + "|", *lines[1:]])
