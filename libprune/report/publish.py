"""The files of the report, made from the artifacts: pictures, Markdown and HTML."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from libprune.engine.tables import Columns
from libprune.pipeline.artifacts import damage, read_json, read_table, same_origin
from libprune.pipeline.atomic import writing
from libprune.pipeline.layout import Layout
from libprune.report.gallery import cut_gallery, gradient_gallery, recovery_gallery, sensitivity_gallery, write_gallery
from libprune.report.markdown import Picture
from libprune.report.page import html_page
from libprune.report.provenance import gather_provenance, gather_seen
from libprune.report.report import PICTURES, compose_report, report_title
from libprune.statistics.gradient_health import gradient_ratio


def publish_report(
    layout: Layout, folder: Path, project: Path, beside: Sequence[str] = (), drawn: Sequence[Picture] = ()
) -> None:
    """Write `report.md`, `report.html` and the folder of pictures, each whole or not at all.

    Args:
        layout: holds the artifacts.
        folder: the folder of the report; other files in it stay.
        project: a folder of the project, whose commit the report names.
        beside: a section on how the result stands beside others, in paragraphs of Markdown.
        drawn: the pictures that this section shows.

    Raises:
        ArtifactError: if an artifact is missing, damaged, or was made from another model, text or plan.
    """
    result = read_json(layout.evaluation, "evaluate")
    meta = result["plan"]
    plan, plan_meta = read_table(layout.plan, "allocate")
    same_origin(layout.evaluation, meta, plan_meta)
    origin = {"model": meta["model"], "tokens": result["pruning"]["tokens"]}
    result = result | _exported(layout, plan_meta, result["protocol"]["tokens"])
    result |= {"depth": _depth(layout, origin, plan), "seen": gather_seen(layout, origin, result)}
    rows, gradients = read_table(layout.gradients / "layers.parquet", "gradients")
    same_origin(layout.gradients, gradients, origin)
    provenance = gather_provenance(layout, origin, project)
    measured = _sensitivity(layout, origin)
    pictures = gradient_gallery(rows) + measured + cut_gallery(plan, plan_meta)
    pictures += recovery_gallery(result.get("recovery")) + list(drawn)
    ratio = gradient_ratio(rows) if len(rows["layer_idx"]) else None
    text = compose_report(result, layout, provenance, pictures, ratio, beside)
    elements = {f"{PICTURES}/{picture.file}": picture.svg for picture in pictures}
    page = html_page(text, report_title(result, provenance), elements)
    write_gallery(folder / PICTURES, pictures, rows, meta.get("diagnosis", {}))
    for name, content in (("report.md", text), ("report.html", page)):
        with writing(folder / name) as partial:
            partial.write_text(content, encoding="utf-8")


def _exported(layout: Layout, plan: Mapping[str, Any], tokens: str) -> dict[str, Any]:
    """The files for other programs and what is to be known of them; none if nothing was exported."""
    outcome = read_json(layout.export, "export")
    with damage(layout.export, "export"):
        if outcome["files"]:
            same_origin(layout.export, outcome["plan"], plan)
            same_origin(layout.export, outcome, {"tokens": tokens})
        return {"exported": outcome["files"], "export_notes": outcome.get("notes", [])}


def _depth(layout: Layout, origin: Mapping[str, str], plan: Columns) -> list[dict[str, Any]]:
    """The steps of the order of whole layers or parts, each with whether the plan has removed it; none without one."""
    table, meta = read_table(layout.depth, "depth")
    if not len(table["step"]):
        same_origin(layout.depth, meta, {"model": origin["model"]})
        return []
    same_origin(layout.depth, meta, origin)
    steps = []
    for step, layer, removed, *values in zip(*(table[name].tolist() for name in table), strict=True):
        own = (plan["layer_idx"] == layer) & ((plan["group_type"] == removed) | (removed == "layer"))
        named = dict(zip(list(table)[3:], values, strict=True))
        steps.append(
            {"step": step, "layer": layer, "removed": removed, "gone": not bool(plan["keep"][own].any())} | named
        )
    return steps


def _sensitivity(layout: Layout, origin: Mapping[str, str]) -> list[Picture]:
    table, meta = read_table(layout.sensitivity, "sensitivity")
    measured = len(table["layer_idx"])  # on no text where nothing was
    same_origin(layout.sensitivity, meta, origin if measured else {"model": origin["model"]})
    return sensitivity_gallery(table)
