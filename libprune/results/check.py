"""Whether a pruned or recovered folder is what it says: files as recorded, weights as planned, a model that runs.

The record is `libprune.json` and `plan.parquet`, which slice and recover write into the folder. The model itself is
run as everyone else will run it: in a fresh process that cannot import libprune and has no network.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from libprune.engine import cost
from libprune.engine.architecture import RESIDUAL
from libprune.engine.describe import describe
from libprune.engine.errors import ArtifactError, LibpruneError, naming
from libprune.engine.family import family_of
from libprune.engine.heads import HEADS
from libprune.engine.plan import Plan
from libprune.engine.stacks import exposed
from libprune.engine.stock_config import keys_of
from libprune.engine.surgery import masked
from libprune.models.folder import fingerprint, load_model
from libprune.models.origin import CARD
from libprune.pipeline.digests import KnownDigests
from libprune.results.folder import MODELING_FILE, pruned_config
from libprune.results.proof import TOLERANCE, agrees, reference_logits, reload
from libprune.results.record import PLAN, PROVENANCE, Record, changed_files, files_in, read_record

_SEQUENCES, _LENGTH, _SHOWN = 2, 32, 5


@dataclass(frozen=True)
class Finding:
    """The outcome of one check: `ok`, a `fault`, or a `note` on what a check cannot decide."""

    kind: Literal["ok", "fault", "note"]
    about: str
    text: str


def check_folder(folder: Path, trust_remote_code: bool = False, dense: Path | None = None) -> Iterator[Finding]:
    """Check a pruned folder, the cheap checks first; a model whose files are at fault is not run.

    Args:
        folder: what slice or recover wrote.
        trust_remote_code: run the folder's modeling file, which a model of the shape `per_layer` needs.
        dense: the dense model's folder, to compare the logits with those under the mask.

    Yields:
        The findings as they are made.
    """
    try:
        with naming(f"{folder} cannot be checked", ArtifactError):
            yield from _checks(folder, trust_remote_code, dense)
    except LibpruneError as error:
        yield Finding("fault", "folder", str(error))


def _checks(folder: Path, trust_remote_code: bool, dense: Path | None) -> Iterator[Finding]:
    record = read_record(folder)
    yield from _recovery(record)
    faulty = False
    for step in (_files, _content):
        for finding in step(record):
            yield finding
            faulty = faulty or finding.kind == "fault"
    if not faulty:
        yield from _model(record, trust_remote_code, dense)


def _recovery(record: Record) -> Iterator[Finding]:
    """Say how a recovered model was trained."""
    made = record.recovery
    if made is not None:
        how = f"trained ({made['params']['method']}) on {made['tokens']:,} tokens of {made['text']}"
        loss = f"held-out loss {made['held_out_before']:.4f} before, {made['held_out_after']:.4f} after"
        yield Finding("note", "recovery", f"{how}; the weights are those of step {made['step']:,}, {loss}")


def _files(record: Record) -> Iterator[Finding]:
    """Check that every file that was written is there, with the recorded size and digest."""
    folder = record.folder
    if not record.files:
        yield Finding("note", "files", f"{PROVENANCE} records no digests; whether the files have changed is not known")
        if record.remote and not (folder / MODELING_FILE).is_file():
            yield Finding("fault", "files", f"{folder / MODELING_FILE} does not exist; its layers differ in width")
        return
    faults = list(changed_files(record, KnownDigests()))
    yield from (Finding("fault", "files", fault) for fault in faults)
    if not faults:
        yield Finding("ok", "files", f"{len(record.files)} files as {PROVENANCE} records them")
    further = [name for name in files_in(folder) if name not in {*record.files, PROVENANCE, CARD}]
    if further:
        shown = ", ".join(further[:_SHOWN]) + (", ..." if len(further) > _SHOWN else "")
        yield Finding("note", "files", f"{len(further)} files that {PROVENANCE} does not record: {shown}")


def _content(record: Record) -> Iterator[Finding]:
    """Check that the config is that of the plan and, if it is, that the weights are those of both."""
    findings = list(_config(record))
    yield from findings
    if all(finding.kind == "ok" for finding in findings):
        yield from _weights(record)


def _config(record: Record) -> Iterator[Finding]:
    """Check that the config says the widths that the plan leaves."""
    path, architecture, layers = record.folder / "config.json", record.architecture, len(record.left.layers)
    family = family_of(record.stock_config.model_type)
    if architecture.layers != layers:
        number = f"{family.config.layers} = {architecture.layers}, but {PLAN} leaves {layers} layers"
        yield Finding("fault", "config", f"{path} says {number}")
        return
    described, planned = ({part for _, part in blocks} for blocks in (architecture.blocks(), record.left.keep))
    if described != planned:
        names = [", ".join(sorted(parts)) for parts in (described, planned)]
        yield Finding("fault", "config", f"{path} has the parts {names[0]}, what {PLAN} keeps asks for {names[1]}")
        return
    if (width := record.plan.width) not in {None, architecture.sizes.get(RESIDUAL)}:
        number = f"{architecture.sizes[RESIDUAL]} columns of the residual stream, but {PLAN} leaves {width}"
        yield Finding("fault", "config", f"{path} says {number}")
        return
    expected = family.sized(pruned_config(family, record.stock_config, architecture, record.left, record.shape))
    said = family.sized(record.config)
    wrong = [
        difference
        for key in [*family.config.expressions, "per_layer_config"]
        for difference in _differences(key, said.get(key), expected.get(key))
    ]
    for where, stated, wanted in wrong:
        yield Finding("fault", "config", f"{path} says {where} = {stated!r}, what {PLAN} keeps asks for {wanted!r}")
    if not wrong:
        counts = ", ".join(f"{_span(record.left, part)} {part} units" for part in architecture.parts)
        counts += "" if record.plan.width is None else f", {record.plan.width} columns of the residual stream"
        yield Finding("ok", "config", f"shape {record.shape}, {layers} layers of {counts}, as {PLAN} keeps")


def _differences(key: str, stated: Any, expected: Any) -> Iterator[tuple[str, Any, Any]]:
    """Each entry that differs, by its path, as the config says it and as it should be."""
    if isinstance(stated, dict) and isinstance(expected, dict):
        for inner in {**expected, **stated}:
            yield from _differences(f"{key}.{inner}", stated.get(inner), expected.get(inner))
    elif stated != expected:
        yield key, stated, expected


def _span(plan: Plan, part: str) -> str:
    counts = plan.counts(part) or [0]
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"


def _weights(record: Record) -> Iterator[Finding]:
    """Check that the safetensors files hold the tensors that config and plan ask for, in their shapes; none is read."""
    shapes = {
        parameter.name: list(cost.shape_after(record.architecture, record.left, parameter))
        for parameter in (*record.architecture.parameters, *record.architecture.buffers)
        if parameter.layer is None or record.architecture.home(parameter) not in record.left.removed
    }
    expected = record.stored(shapes)
    present: dict[str, list[int]] = {}
    faults = []
    for path in sorted(record.folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                here = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            yield Finding("fault", "weights", f"{path} cannot be read: {error}")
            return
        present |= here
        faults += [
            f"{path}: {name} is {shape}, expected {expected.get(name, 'no such tensor')}"
            for name, shape in here.items()
            if shape != expected.get(name)
        ]
    missing = [name for name in expected if name not in present]
    if missing:
        first = f"{len(missing)} of {len(expected)} tensors, the first {missing[0]}"
        faults.append(f"the .safetensors files in {record.folder} lack {first}")
    yield from (Finding("fault", "weights", fault) for fault in faults)
    if not faults:
        number = _parameters(record)
        yield Finding("ok", "weights", f"{len(present)} tensors of the expected shapes, {number:,} parameters")


def _parameters(record: Record) -> int:
    return cost.size(record.architecture, record.left).total


def _model(record: Record, trust_remote_code: bool, dense: Path | None) -> Iterator[Finding]:
    """Run the model, if its code may run, and check what it computes."""
    if record.remote and not trust_remote_code:
        code = f"the code in {record.folder / MODELING_FILE} must run; read it, then pass --trust-remote-code"
        yield Finding("note", "loads", f"not tried: its layers differ in width, so that {code}")
        return
    vocab, seed = record.architecture.sizes["vocab"], torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (_SEQUENCES, _LENGTH), generator=seed)
    computed = reload(record.folder, ids, record.remote, record.architecture.head)
    yield from _run(record, computed)
    if dense is not None:
        yield _against_dense(record, dense, ids, computed["logits"])


def _run(record: Record, computed: dict[str, Tensor]) -> Iterator[Finding]:
    """Check that the model is loaded whole and its logits are finite.

    A model that writes must compute the same logits with the KV cache, and generate.
    """
    how = f"with the code in {MODELING_FILE}" if record.remote else "with transformers' own code"
    loaded, expected = int(computed["parameters"]), _parameters(record)
    if loaded == expected:
        yield Finding("ok", "loads", f"in a fresh process without libprune, {how}")
    else:
        yield Finding("fault", "loads", f"{record.folder} loads {loaded:,} parameters, expected {expected:,}")
    logits, outputs = computed["logits"], HEADS[record.architecture.head].outputs
    scale, difference = float(logits.abs().max()), float((computed.get("cached", logits) - logits).abs().max())
    if not torch.isfinite(logits).all():
        broken = int((~torch.isfinite(logits)).sum())
        yield Finding(
            "fault", outputs, f"{record.folder} computes {broken:,} of {logits.numel():,} {outputs} not finite"
        )
    elif not agrees(difference, scale):
        differ = f"differ by {difference:.3g} of {scale:.3g}, expected at most {TOLERANCE * scale:.3g}"
        yield Finding("fault", outputs, f"{record.folder}: with and without the KV cache they {differ}")
    else:
        same = f"; with and without the KV cache they differ by {difference:.1e} of {scale:.1f}"
        yield Finding("ok", outputs, f"finite{same if 'cached' in computed else ''}")
    if "generated" not in computed:
        return
    number = computed["generated"].shape[1]
    kind: Literal["ok", "fault"] = "ok" if number else "fault"
    yield Finding(kind, "generates", f"{number} tokens")


def _changers(record: Record) -> list[str]:
    """The params by which weights of the folder are others than those of the dense model."""
    repair, made = record.provenance["slice"]["repair"], record.recovery
    changers = [] if repair == "none" else [f"slice.repair: {repair}"]
    if record.provenance.get("rescale", {}).get("factors"):
        changers.append("slice.rescale: auto")
    if record.plan.width is not None:
        changers.append(f"allocate.width: {record.plan.width}")
    if made is not None and made["step"]:
        changers.append(f"training (recover.method: {made['params']['method']})")
    return changers


def _against_dense(
    record: Record,
    dense: Path,
    ids: Int[Tensor, "batch length"],
    logits: Float[Tensor, "..."],
) -> Finding:
    """Check that the logits are those of the masked dense model, if its weights are as they were."""
    if changers := _changers(record):
        changed = f"{' and '.join(changers)} changed weights of {record.folder}"
        return Finding("note", "dense", f"not compared with {dense}: {changed}")
    if not (dense / "config.json").is_file():
        return Finding("fault", "dense", f"{dense} holds no config.json; name the dense model's folder")
    given, expected = fingerprint(dense), record.provenance["plan"]["model"]
    if given != expected:
        return Finding("fault", "dense", f"{dense} is the model {given}, {record.folder} was pruned from {expected}")
    model = load_model(dense, torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(record.dtype).float()
    accept = keys_of(model.config.to_dict())
    architecture = describe(model, accept=accept, experts=record.experts, heads=record.heads)
    exposed(model, architecture)
    with masked(model, architecture, record.plan):
        wanted = reference_logits(model, ids)
    scale, difference = float(wanted.abs().max()), float((logits - wanted).abs().max())
    differ = f"{HEADS[architecture.head].outputs} differ by {difference:.1e} of {scale:.1f}"
    text = f"{differ} from those of {dense} under the plan's mask"
    return Finding("ok" if agrees(difference, scale) else "fault", "dense", text)
