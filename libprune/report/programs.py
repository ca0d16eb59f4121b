"""Where the final model lies, how to load it, and what other programs make of it.

What a program is said to do was tried: in this run, by the export stage, or by bench/serving.py on results of the
demo's model, with the versions that stand in `TRIED` and in docs/serving.md.
"""

from pathlib import Path

from libprune.engine.family import family_of
from libprune.engine.heads import HEADS, HeadName, writes
from libprune.pipeline.layout import Layout
from libprune.pipeline.story import Earlier, earlier_result
from libprune.pipeline.terminal import Rows, text_table
from libprune.report.headline import HEADER, PERPLEXITY, SIMILARITY, Metrics, embeds, final_figures, headline_rows
from libprune.report.markdown import code, markdown_table

TRIED = {"vLLM": "0.32.0", "llama.cpp": "xllamacpp 2026.10.11549", "ONNX Runtime": "1.32.0"}
"""Versions that results of the demo's model were tried in."""
_IN_VLLM = ("llama", "mistral")
"""Values of `model_type` that were tried in vLLM."""
_Row = tuple[str, str, str]


def final_folder(result: Metrics, layout: Layout) -> Path:
    """Where the final model lies: the recovered one, or the pruned one if nothing was recovered.

    Args:
        result: the content of `artifacts/evaluation.json`.
        layout: holds both models.
    """
    return layout.recovered if result.get("recovered") else layout.pruned


def how_to_load(folder: str, shape: str, head: HeadName) -> str:
    """The line of Python that loads a pruned model.

    Args:
        folder: where the model lies.
        shape: `uniform` or `per_layer`.
        head: of the model.
    """
    remote = "" if shape == "uniform" else ", trust_remote_code=True"
    return f'{HEADS[head].auto_class}.from_pretrained("{folder}"{remote})'


def figures(result: Metrics) -> dict[str, float]:
    """The figures that results are compared by: the final model's perplexity, size and speed over the dense model's.

    Args:
        result: the content of `artifacts/evaluation.json`.
    """
    dense, pruned, speed = result["dense"], result["pruned"], result["speed"]
    found = {
        **_quality(result),
        "decoder parameters": pruned["decoder_parameters"] / dense["decoder_parameters"],
        "prefill": speed["prefill_ratio"],
        "decode": speed["decode_ratio"],
    }
    return {name: value for name, value in found.items() if value is not None}


def _quality(result: Metrics) -> dict[str, float]:
    if embeds(result):
        return {name: final_figures(result)[key] for key, name in SIMILARITY.items()}
    final = result.get("recovered") or result
    return {PERPLEXITY[result["model"]["head"]]: final["perplexity_ratio"]["value"]}


def closing(result: Metrics, layout: Layout, report: Path, keep: bool = False) -> list[str]:
    """What is shown of a result: the headline table, what changed, where everything lies, and what to do next.

    Args:
        result: the content of `artifacts/evaluation.json`.
        layout: holds the models.
        report: the folder of the report.
        keep: remember the result, so that a later one is compared with it.
    """
    folder, plan, earlier = final_folder(result, layout), result["plan"], earlier_result(figures(result), keep=keep)
    ratio = min(0.9, (plan["ratio"] or 0.2) + 0.1)
    repository = any((place / ".git").exists() for place in (Path.cwd(), *Path.cwd().parents))
    again = f"dvc exp run -S allocate.ratio={ratio:.2g}" if repository else "dvc repro, with another allocate.ratio"
    again = "dvc repro, with other allocate.budgets" if plan["ratio"] is None else again
    lines = ["", *text_table(headline_rows(result), HEADER).split("\n"), ""]
    if earlier is not None:
        lines += [*changes(figures(result), earlier), ""]
    lines.append(f"model:  {folder}")
    if folder != layout.pruned:
        lines.append(f"before: {layout.pruned} (before recovery; sizes and speed were measured on it)")
    return [
        *lines,
        f"load:   {how_to_load(str(folder), plan['shape'], result['model']['head'])}",
        f"report: {report / 'report.html'}",
        f"next:   {again} (what was measured is kept)",
    ]


_SHOWN = 4
"""Params whose change is named."""


def changes(now: dict[str, float], earlier: Earlier) -> list[str]:
    """What changed since the last result, in two lines: the params, then the figures over the dense model's.

    Args:
        now: the figures of the present result.
        earlier: the last result.
    """
    named = [f"{key} {then} → {after}" for key, (then, after) in earlier.changed.items()]
    more = f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
    params = f"{', '.join(named[:_SHOWN])}{more}" if named else "same params"
    moved = [f"{name} × {then:.3f} → {now[name]:.3f}" for name, then in earlier.figures.items() if name in now]
    return [f"since the last result ({params}):", f"  {', '.join(moved)}"]


def describe_loading(result: Metrics, layout: Layout) -> list[str]:
    """The section of the report on how to load the final model, and in which programs; paragraphs of Markdown.

    Args:
        result: the content of `artifacts/evaluation.json`, and under `exported` that of `artifacts/export.json`.
        layout: holds the pruned model, and the recovered one if there is one.
    """
    shape, folder = result["plan"]["shape"], str(final_folder(result, layout))
    head = result["model"]["head"]
    line, written = how_to_load(folder, shape, head), writes(head)
    kind = {
        "uniform": "all layers alike, under a stock config and without code of its own",
        "per_layer": "layers of different widths, with a modeling file of a few lines inside",
    }[shape]
    takers = [_transformers(result), *((_vllm(result), _llama_cpp(result), _onnx(result)) if written else ())]
    return [
        "## How to load it",
        f"{code(folder)} has the shape `{shape}`: {kind}.",
        f"```python\nfrom transformers import {line.partition('.')[0]}\nmodel = {line}\n```",
        _proof(result, layout, ", and it generates" if written else ""),
        markdown_table(takers, ("program", "takes this shape", "remarks")).replace("---:", "---"),
        *_commands(folder, shape, [program for program, verdict, _ in takers if verdict.startswith("yes")]),
        *_exported(result, layout),
    ]


def _proof(result: Metrics, layout: Layout, generates: str) -> str:
    """How it was shown that the model loads, and where the model before recovery lies."""
    proof = result["pruning"]["proof"]
    differ = f"{proof['logit_difference']:.1e} of {proof['logit_scale']:.1f}"
    outputs = HEADS[result["model"]["head"]].outputs
    if not result.get("recovered"):
        return (
            f"A fresh process without libprune loaded it; its {outputs} differ from the masked dense model's by "
            f"{differ}{generates}."
        )
    return (
        f"A fresh process without libprune loaded it and computed what its trained weights say{generates}. The model "
        f"before recovery lies in {code(str(layout.pruned))} and loads alike; its {outputs} differ from the masked "
        f"dense model's by {differ}."
    )


def _commands(folder: str, shape: str, programs: list[str]) -> list[str]:
    remote = "" if shape == "uniform" else " --trust-remote-code"
    return [f"```\nvllm serve {folder}{remote}\n```"] if "vLLM" in programs else []


def _transformers(result: Metrics) -> _Row:
    version = result["pruning"]["versions"]["transformers"]
    if result["plan"]["shape"] == "uniform":
        more = "; KV cache and `generate` included" if writes(result["model"]["head"]) else ""
        return "transformers", "yes, tried", f"with {code(version)}{more}; its config says the same to versions 4 and 5"
    return "transformers", "yes, tried", f"with {code(version)}, 5.15 or later; only with `trust_remote_code=True`"


def _vllm(result: Metrics) -> _Row:
    kind, shape = result["model"]["type"], result["plan"]["shape"]
    if shape != "uniform" and any(layer.get("attention") == 0 < layer.get("mlp", 0) for layer in result["kept"]):
        return "vLLM", "no", "it does not run layers without attention; set `allocate.min_groups` to 1"
    if kind not in _IN_VLLM:
        return "vLLM", "not tried", f"results of type {code(kind)} were not tried in it"
    tried = f"such results were tried in {TRIED['vLLM']}"
    if shape != "uniform":
        return "vLLM", "yes", f"through its transformers backend, with `--trust-remote-code`; {tried}"
    return "vLLM", "yes", f"{tried}{_devices(result)}"


def _devices(result: Metrics) -> str:
    """Over how many devices heads and channels can be divided, if the plan says it."""
    sizes = result["plan"].get("tensor_parallel")
    if sizes == [1]:
        return "; tensor parallelism cannot divide its heads and channels"
    return f"; tensor parallelism over {' or '.join(map(str, sizes))} devices" if sizes else ""


def _llama_cpp(result: Metrics) -> _Row:
    if tried := _agreement(result, "gguf"):
        return "llama.cpp", "yes, tried", tried
    told = family_of(result["model"]["type"]).gguf
    if told is None:
        return "llama.cpp", "not tried", "libprune writes no GGUF file of this family; llama.cpp's own converter may"
    if result["plan"]["shape"] != "uniform" and told.per_layer is None:
        return "llama.cpp", "no", f"its architecture {code(told.architecture)} has one width for all layers"
    name = told.architecture if result["plan"]["shape"] == "uniform" else told.per_layer
    return (
        "llama.cpp",
        "yes",
        f"as architecture {code(str(name))}: `export.formats: [gguf]` writes the file and tries it; tiny models of the "
        f"family were tried in {TRIED['llama.cpp']}",
    )


def _onnx(result: Metrics) -> _Row:
    if tried := _agreement(result, "onnx"):
        return "ONNX Runtime", "yes, tried", tried
    if result["model"]["head"] != "causal_lm":
        return "ONNX Runtime", "not tried", "libprune writes no graph of a model that reads images"
    return "ONNX Runtime", "not tried", "`export.formats: [onnx]` writes the graph with a KV cache and tries it"


def _agreement(result: Metrics, name: str) -> str | None:
    """How near a program came to the model, if the export stage ran it."""
    rows = [row for row in result.get("exported", ()) if row["format"].startswith(f"{name} ") and row["agreement"]]
    if not rows:
        return None
    near = " and ".join(
        f"{row['format'].partition(' ')[2]} diverges by {row['agreement']['divergence']:.1e} nats a token"
        for row in rows
    )
    return f"in {code(rows[0]['program'])}: {near}"


def _exported(result: Metrics, layout: Layout) -> list[str]:
    """The files for other programs, with size, agreement and speed beside the dense model."""
    rows: Rows = [_file(row) for row in result.get("exported", ())]
    if not rows:
        return []
    header = ("file", "MB", "of dense", "as Q4_K_M, MB", "of dense", "same tokens", "prefill", "decode")
    skipped = dict.fromkeys(row["not_tried"] for row in result["exported"] if row["not_tried"])
    return [
        f"{code(str(layout.exported))} holds the model for other programs. Speeds are those of the pruned model over "
        "the dense model's in the same program, timed alternately. `llama-quantize` of llama.cpp makes Q4_K_M from "
        "f16; its size is computed.",
        markdown_table(rows, header),
        *skipped,
        *(f"Note: {note}" for note in result.get("export_notes", ())),
    ]


def _file(row: Metrics) -> tuple[str, ...]:
    agreement, speed = row["agreement"], row["speed"]
    return (
        code(row["file"]),
        *_size(row["bytes"], row["dense_bytes"]),
        *_size(row["quantised_bytes"], row["dense_quantised_bytes"]),
        f"{agreement['same_written']} of {agreement['written']}" if agreement else "",
        *(f"× {speed[f'{name}_ratio']:.2f}" if speed else "" for name in ("prefill", "decode")),
    )


def _size(pruned: int | None, dense: int | None) -> tuple[str, str]:
    return f"{pruned / 1e6:,.1f}" if pruned else "", f"× {pruned / dense:.3f}" if pruned and dense else ""
