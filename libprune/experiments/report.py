"""The report of a comparison, which `libprune compare` writes and prints: tables, pictures, sentences and a guide."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from libprune.engine.errors import LibpruneError
from libprune.experiments.costs import read_costs
from libprune.experiments.dvc_experiments import gather, read_lock, show
from libprune.experiments.file import Comparison
from libprune.experiments.guide import compose_guide
from libprune.experiments.pictures import draw_overlaps, draw_ratios
from libprune.experiments.results import Gathered, cache_folder, gather_results
from libprune.experiments.sentences import explain_results
from libprune.experiments.summary import Summary, overlap_by_chance, overlap_matrix, reference_of, summarize
from libprune.experiments.table import explain_columns, overlaps_csv, runs_csv, settings_csv, tabulate_settings
from libprune.pipeline.atomic import writing
from libprune.pipeline.terminal import text_table
from libprune.report.canvas import png
from libprune.report.markdown import code, escaped_table, markdown_table, prose

COSTS = "costs.json"
"""The file that records what stages cost, beside the folders of all comparisons."""


def gather_now(
    comparison: Comparison, out: Path, all_commits: bool = False, failed: Mapping[str, str] | None = None
) -> Gathered:
    """Gather the results of a comparison that the current folder's project has.

    Args:
        comparison: the comparison whose results are wanted.
        out: the folder of all comparisons.
        all_commits: experiments of every commit, not only of HEAD.
        failed: by experiment, why it has just failed, which DVC does not keep.

    Raises:
        LibpruneError: if there are none, or this is no project.
    """
    rows, left_out = gather(show(all_commits), read_lock)
    return gather_results(
        comparison, rows, {**left_out, **(failed or {})}, read_lock, cache_folder(), read_costs(out / COSTS)
    )


def write_comparison(gathered: Gathered, out: Path, guide_to: Path | None) -> str:
    """Write tables, pictures and the text, and the guide if one is asked for.

    Args:
        gathered: the results.
        out: the folder of all comparisons.
        guide_to: the file for the guide.

    Returns:
        What to print.

    Raises:
        LibpruneError: if the folder is a file.
    """
    summaries = summarize(gathered)
    folder = out / gathered.comparison.name
    if folder.exists() and not folder.is_dir():
        raise LibpruneError(f"{folder} is a file; move it, or name another folder by --out")
    pictures = _pictures(gathered, summaries)
    texts = {
        "comparison.md": _markdown(gathered, summaries, pictures),
        "settings.csv": settings_csv(gathered, summaries),
        "runs.csv": runs_csv(gathered),
        "overlaps.csv": overlaps_csv(gathered, summaries),
    }
    contents = {folder / name: text.encode() for name, text in texts.items()}
    contents |= {folder / name: content for name, content in pictures.items()}
    if guide_to is not None:
        contents[guide_to] = compose_guide(gathered, summaries).encode()
    for path, content in contents.items():
        with writing(path) as partial:
            partial.write_bytes(content)
    table = text_table(*tabulate_settings(gathered, summaries))
    return "\n".join([table, "", *explain_results(gathered, summaries), "", _written(contents)])


def _written(paths: Iterable[Path]) -> str:
    return "written: " + ", ".join(map(str, paths))


def _pictures(gathered: Gathered, summaries: list[Summary]) -> dict[str, bytes]:
    """The pictures of a comparison as PNG, by file name; without that of the overlaps if none is known."""
    pictures = {"perplexity.png": png(draw_ratios(summaries, reference_of(gathered, summaries)))}
    matrix, chance = overlap_matrix(gathered, summaries), overlap_by_chance(gathered)
    if chance is not None and np.isfinite(matrix).any():
        pictures["overlaps.png"] = png(draw_overlaps(matrix, [one.name for one in summaries], chance))
    return pictures


_ALT = {"perplexity.png": "Perplexity by setting", "overlaps.png": "Overlaps of the kept sets"}


def _markdown(gathered: Gathered, summaries: list[Summary], pictures: Iterable[str]) -> str:
    comparison = gathered.comparison
    changes = [
        (prose(one.name), ", ".join(code(f"{key}: {value}") for key, value in one.changes.items()) or "nothing")
        for one in comparison.settings
    ]
    parts = [
        f"# {prose(comparison.title)}",
        *map(prose, explain_results(gathered, summaries)),
        escaped_table(*tabulate_settings(gathered, summaries)),
        explain_columns(summaries),
        *(f"![{_ALT[name]}]({name})" for name in pictures),
        "## Settings",
        markdown_table(changes, ("setting", "changes to params.yaml")),
    ]
    return "\n\n".join(parts) + "\n"
