"""Which view of a unit adds something: every criterion and fusion over calibration seeds, with and without repair.

    python -m bench.views --text wiki.valid.raw --work /tmp/views            # collects, then measures
    python -m bench.views --work /tmp/views --table                          # what there is so far
    python -m bench.views --work /tmp/views --table --guide docs/methods.md  # and what follows for the choice

20 % of the decoder, the same counts in every layer, so that only the choice of units differs. Calibration on the first
half of the text: 256 x 128 tokens (gradients 128, Hessian 32 sequences), drawn anew for each seed; judged on windows of
512 tokens of the second half, the same for all. Losses of single units are measured once, on 16 further sequences of
the first seed, and serve all seeds (`lend_losses`). Rows go to WORK/views.jsonl; those that are there are not measured
again. Collecting is timed by what the stages print; of pruning the seconds are those of scoring, allocation and repair
in this process, and its memory is this process's, which holds the dense model too.
"""

import json
import math
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import yaml

from bench.least_loss import Bench, _run
from bench.rows import read_rows
from libprune.engine.errors import LibpruneError
from libprune.engine.plan import jaccard
from libprune.experiments.agreement import mean_interval, paired_factor, ratio_interval
from libprune.experiments.costs import Cost, collecting_stages, printed_costs, total
from libprune.experiments.dvc_experiments import Experiment
from libprune.experiments.file import Comparison, Setting, leaves_of, with_changes
from libprune.experiments.guide import compose_guide
from libprune.experiments.results import Gathered, Result, correlations_by_part
from libprune.experiments.summary import summarize
from libprune.experiments.table import correlation_text, interval_text
from libprune.models.tokens import read_tokens
from libprune.pipeline.artifacts import read_table, write_table
from libprune.pipeline.layout import Layout
from libprune.pipeline.params import Params, validate_params
from libprune.pipeline.sections import Allocate, Score
from libprune.report.markdown import markdown_table
from libprune.scoring.criteria import CRITERIA

VIEWS = ("weight_stats", "activation_stats", "gradient_flow", "cooperative")
IN_NATS = "taylor + unit_fisher"
ALL = " + ".join((IN_NATS, *VIEWS))
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"criterion": name} for name in CRITERIA},
    "weights + activations": {"criterion": " + ".join(VIEWS[:2]), "scaling": "rank"},
    "weights + activations + gradients": {"criterion": " + ".join(VIEWS[:3]), "scaling": "rank"},
    "four views, simple": {"criterion": " + ".join(VIEWS), "scaling": "rank", "fusion": "simple"},
    "four views, adaptive": {"criterion": " + ".join(VIEWS), "scaling": "rank", "fusion": "adaptive"},
    **{f"unit_fisher + {view}": {"criterion": f"unit_fisher + {view}", "scaling": "rank"} for view in VIEWS},
    "all six, learned": {"criterion": ALL, "fusion": "learned"},
    "all six, best": {"criterion": ALL, "fusion": "best"},
    "all six for attention, learned": {"criterion": "unit_fisher", "attention": ALL, "fusion": "learned"},
    "all six for attention, best": {"criterion": "unit_fisher", "attention": ALL, "fusion": "best"},
    "unit_fisher, obs for mlp": {"criterion": "unit_fisher", "mlp": "obs"},
    "unit_fisher, obs_fisher for mlp": {"criterion": "unit_fisher", "mlp": "obs_fisher"},
}
"""By name the params of the score section."""
ALLOCATE = {"method": "uniform", "split": "proportional", "channel_multiple": 1}
REPAIRS = {"none": {"repair": "none"}, "local": {"repair": "local", "damping": 0.01}}
"""With one ridge for all; to choose it takes three times as long."""
RATIO, REFERENCE = 0.2, "unit_fisher"
COLLECTED = ("tokenize", "gradients", "hessian", "activations")


def collect(work: Path, text: Path, seed: int) -> Path:
    """Run the collecting stages of one seed that have not run yet; the folder of its artifacts."""
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["tokenize"] |= {"text": str(text.resolve()), "evaluation_share": 0.5, "seed": seed}
    params["tokenize"] |= {"calibration_sequences": 272, "calibration_length": 128}
    params["tokenize"] |= {"evaluation_windows": 64, "evaluation_length": 512}
    params["activations"] |= {"sequences": 256}
    params["hessian"] |= {"estimator": "fisher", "sequences": 32}
    params["ablation"] |= {"units": 240, "sequences": 16}
    root = work / f"seed-{seed}"
    root.mkdir(parents=True, exist_ok=True)
    path = work / f"params-{seed}.yaml"
    path.write_text(yaml.safe_dump(params))
    _run("prepare", path, work / "dense", work / "prepare.done")
    for name in ("model", "architecture.json", "origin.json", "weights.parquet"):
        if not (root / name).exists():
            (root / name).symlink_to((work / "dense" / name).resolve())
    for stage in COLLECTED:
        _run(stage, path, root, done(work, stage, seed))
    if seed == 0:
        _run("ablation", path, root, done(work, "ablation", 0))
    elif not (root / "ablation.parquet").exists():
        lend_losses(Layout(work / "seed-0"), Layout(root))
    return root


def done(work: Path, stage: str, seed: int) -> Path:
    """The file that says that a stage is done, and what it printed."""
    return work / f"{stage}-{seed}.done"


def lend_losses(owner: Layout, other: Layout) -> None:
    """Write the losses measured on one seed's text for another, under that one's name.

    The pipeline refuses this, since the other's calibration may hold some of the sequences; drawn from one long text,
    few are the same, and measuring anew would take most of the bench's time. How many is printed.
    """
    table, meta = read_table(owner.ablation, "ablation")
    origin = json.loads(other.architecture.read_text())["fingerprint"]
    ids, found = read_tokens(other.calibration_tokens, origin)
    measured, _ = read_tokens(owner.calibration_tokens, origin)
    seen = {row.tobytes() for row in ids.ids[:256].numpy()}
    same = sum(row.tobytes() in seen for row in measured.ids[-16:].numpy())
    print(f"{same} of 16 sequences on which losses were measured are in the calibration of {other.root.name}")
    write_table(other.ablation, table, meta | {"tokens": found["tokens"]})


def measure(work: Path, root: Path, seed: int, windows: int, rows: list[dict[str, Any]]) -> None:
    """Measure the settings of one seed that are not among the rows yet."""
    known = {(row["setting"], row["seed"], row["repair"]) for row in rows}
    left = [(n, r) for r in REPAIRS for n in SETTINGS if (n, seed, r) not in known]
    if not left:
        return
    bench = Bench(work, windows, sequences=0, questions=0, root=root)
    truth, _ = read_table(bench.layout.ablation, "ablation")
    seconds: dict[str, float] = {}
    for name, repair in left:
        score = SETTINGS[name]
        start = time.perf_counter()
        try:
            bench.scores(Score(**score))
        except LibpruneError as error:  # a fusion that the measured losses do not support
            print(f"{name}, seed {seed}: {error}")
            continue
        seconds.setdefault(name, time.perf_counter() - start)  # kept by the bench for the next repair
        row = bench.measure(name, RATIO, (score, ALLOCATE, REPAIRS[repair]))
        row |= {"seed": seed, "repair": repair, "score_seconds": seconds[name]}
        plan, _ = bench.plan(Score(**score), Allocate(ratio=RATIO, **ALLOCATE))
        kept = np.packbits(np.concatenate([plan.keep[block] for block in bench.architecture.blocks()]))
        row |= {"ranks": correlations_by_part(bench.scores(Score(**score))[0], truth), "kept": kept.tobytes().hex()}
        rows.append(row)
        with (work / "views.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """One line a setting, the lowest perplexity after repair first."""
    ratios = {key: {} for key in {(row["setting"], row["repair"]) for row in rows}}
    for row in rows:
        ratios[row["setting"], row["repair"]][row["seed"]] = row["ratio"]
    body = []
    names = dict.fromkeys(row["setting"] for row in rows)
    for name in sorted(names, key=lambda name: ratio_interval(list(ratios[name, "local"].values())).mean):
        own = [row for row in rows if row["setting"] == name and row["repair"] == "none"]
        cells = [_ratio(ratios, name, repair) for repair in ("none", "local")]
        ranks = [correlation_text(mean_interval([row["ranks"][part] for row in own])) for part in own[0]["ranks"]]
        seconds = np.mean([row["score_seconds"] + row["plan_seconds"] for row in own])
        body.append((name, *cells, *ranks, _overlap(own), f"{seconds:.1f}"))
    parts = [f"ranks, {part}" for part in rows[0]["ranks"]]
    header = ("importance", "no repair", f"/ {REFERENCE}", "local", f"/ {REFERENCE}", *parts, "overlap of seeds", "s")
    flat = [(one[0], *one[1], *one[2], *one[3:]) for one in body]
    return markdown_table(flat, header)


def _ratio(ratios: dict[tuple[str, str], dict[int, float]], name: str, repair: str) -> tuple[str, str]:
    own = ratios.get((name, repair))
    if not own:
        return "", ""
    mean = ratio_interval(list(own.values()))
    beside = paired_factor(own, ratios.get((REFERENCE, repair), {}))
    return interval_text(mean), interval_text(beside) if beside and name != REFERENCE else ""


def _overlap(rows: list[dict[str, Any]]) -> str:
    """Mean Jaccard overlap of the kept sets of different seeds."""
    kept = [np.unpackbits(np.frombuffer(bytes.fromhex(row["kept"]), dtype=np.uint8)).astype(bool) for row in rows]
    pairs = [jaccard(one, other) for i, one in enumerate(kept) for other in kept[:i]]
    return f"{np.mean(pairs):.3f}" if pairs else ""


def gathered(work: Path, rows: list[dict[str, Any]], repair: str) -> Gathered:
    """The rows with one repair as the results of a comparison, for what libprune says of those."""
    data = yaml.safe_load(Path("params.yaml").read_text())
    fixed = {"allocate": ALLOCATE | {"ratio": RATIO}, "slice": REPAIRS[repair]}
    settings, results = [], {}
    for name in SETTINGS:
        own = [row for row in rows if (row["setting"], row["repair"]) == (name, repair)]
        if own:
            changes = leaves_of({"score": SETTINGS[name], **fixed})
            settings.append(Setting(name, changes, validate_params(with_changes(data, changes), name)))
            results[name] = {row["seed"]: _result(work, row, settings[-1].params) for row in own}
    title = (
        "Criteria and fusions: SmolLM2-135M-Instruct without 20 % of its decoder, the same counts everywhere, repaired"
    )
    seeds = tuple(sorted({row["seed"] for row in rows}))
    return Gathered(Comparison("views", title, tuple(settings), seeds, REFERENCE, data), results, {}, ())


def _result(work: Path, row: dict[str, Any], params: Params) -> Result:
    shown = Experiment(
        (row["setting"],), {}, row["ratio"], row["ratio_se"], row["dense"], row["removed"], prefill=math.nan, size=None
    )
    costs = {}
    for stage in collecting_stages(params):
        said = done(work, stage, 0 if stage == "ablation" else row["seed"]).read_text()
        costs |= printed_costs(f"Running stage '{stage}'\n{said}")
    seconds = row["score_seconds"] + row["plan_seconds"] + row["repair_seconds"]
    kept = np.unpackbits(np.frombuffer(bytes.fromhex(row["kept"]), dtype=np.uint8)).astype(bool)
    return Result(shown, kept, row["ranks"], total(costs.values()), Cost(seconds, row["peak_memory_bytes"]))


def main(
    text: Annotated[Path | None, typer.Option(help="Raw text, one document a line.")] = None,
    work: Path = Path("/tmp/views"),
    seeds: int = 3,
    windows: int = 8,
    table_only: Annotated[bool, typer.Option("--table")] = False,
    guide_to: Annotated[Path | None, typer.Option("--guide", help="Write a guide to the rows with repair.")] = None,
) -> None:
    """Collect, measure, print."""
    path = work / "views.jsonl"
    rows = read_rows(path)
    if not table_only:
        assert text is not None, "name a text"
        for seed in range(seeds):
            measure(work, collect(work, text, seed), seed, windows, rows)
    print(table(rows))
    if guide_to is not None:
        found = gathered(work, rows, "local")
        guide_to.write_text(compose_guide(found, summarize(found)))


if __name__ == "__main__":
    typer.run(main)
