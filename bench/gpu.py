"""What one GPU does: passes, collectors, every stage and the pruned model, of two shapes with random weights.

    python -m bench.gpu WORK                   one GPU of 24 GiB or more, some 10 minutes, 20 GB of disk
    python -m bench.gpu WORK --shapes llama-8b --layers 8
    python -m bench.gpu WORK --device cpu --shapes tiny,tiny-mixture     what the test runs

Nothing is downloaded: weights, words and texts are drawn at random. A shape has the sizes of the real model, but fewer
layers, as each table says. Weights are made on the device, in bfloat16. In one process it measures:

1. a forward pass and a forward and backward pass as a training step has them, and beside them the collectors;
2. every stage of the pipeline, by the functions that DVC calls;
3. prefill and decoding of pruned models beside the dense one, at widths of several multiples.

Tables are written to WORK/gpu.md as they come, and the numbers to WORK/rows.jsonl. When the minutes are over, what is
left is listed as not run. What a model or a device refuses is listed with its reason.
"""

import gc
import platform
import random
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

from bench.cost import BESIDE, kinds
from bench.rows import add_row
from libprune.engine.describe import describe
from libprune.engine.stacks import exposed
from libprune.models.compute import resolve_device
from libprune.report.markdown import markdown_table
from libprune.results.speed import compare_speed

ROOT = Path(__file__).parents[1]
MULTIPLES = (1, 64, 128, 256)
"""Multiples that the widths of pruned models are taken of."""
KEPT = 0.8
"""The share of the channels that pruned models keep, at most."""
WORDS = 2000
"""Words of the tokenizer; the embedding has the rows of the real model."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model.

    Attributes:
        config: its class.
        sizes: what the config says beside the number of layers.
        layers: of the real model.
        run: layers that are run.
        inner: the key of the width that is pruned.
    """

    config: type[PreTrainedConfig]
    sizes: dict[str, Any]
    layers: int
    run: int
    inner: str = "intermediate_size"

    def model(self, device: torch.device, **changes: Any) -> PreTrainedModel:
        """A model with random weights, made on the device in bfloat16."""
        torch.manual_seed(0)
        ids = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1}
        config = self.config(**{**self.sizes, **ids, "num_hidden_layers": self.run, **changes})
        with device:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        return model.eval()


SHAPES = {
    "llama-8b": Shape(
        LlamaConfig,
        {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False},
        layers=32,
        run=4,
    ),
    "qwen3-30b-a3b": Shape(
        Qwen3MoeConfig,
        {"vocab_size": 151_936, "hidden_size": 2048, "moe_intermediate_size": 768, "intermediate_size": 6144}
        | {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "tie_word_embeddings": False}
        | {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True},
        layers=48,
        run=2,
        inner="moe_intermediate_size",
    ),
    "tiny": Shape(
        LlamaConfig,
        {"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 320, "num_attention_heads": 4}
        | {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False},
        layers=4,
        run=2,
    ),
    "tiny-mixture": Shape(
        Qwen3MoeConfig,
        {"vocab_size": WORDS, "hidden_size": 32, "moe_intermediate_size": 320, "intermediate_size": 16}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False}
        | {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
        layers=4,
        run=2,
        inner="moe_intermediate_size",
    ),
}
"""The shapes by name; the tiny ones are for the test."""


@dataclass(frozen=True)
class Texts:
    """How much text the measurements take, in tokens; by default what one GPU does in minutes."""

    sequences: int = 32
    length: int = 512
    at_once: int = 4096
    trained: int = 16_384
    decoded: int = 32
    rounds: int = 3


class Gauge:
    """Time and memory of a device; of the CPU the memory is the most that the process has ever held."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module = module = torch.get_device_module(device)
        counts = hasattr(module, "max_memory_allocated")
        self._forget = (gc.collect, module.empty_cache, module.reset_peak_memory_stats) if counts else ()

    @property
    def name(self) -> str:
        """The name of the device, with its driver where there is one."""
        return f"{getattr(self._module, 'get_device_name', platform.machine)()}, torch {torch.__version__}"

    def now(self) -> float:
        """Seconds, after the device has finished its work."""
        self._module.synchronize()
        return time.perf_counter()

    def begin(self) -> None:
        """Forget the memory that was held so far."""
        for step in self._forget:
            step()

    def peak(self) -> int:
        """The most bytes that were held since `begin`."""
        return int(getattr(self._module, "max_memory_allocated", _held)())

    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds that work takes."""
        start = self.now()
        work()
        return self.now() - start


def _held() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass
class Bench:
    """The folder of results, the device, the texts, and the time that is left."""

    work: Path
    gauge: Gauge
    texts: Texts
    minutes: float
    start: float = field(default_factory=time.perf_counter)

    def over(self) -> bool:
        """Whether the minutes are over."""
        return time.perf_counter() - self.start > 60 * self.minutes

    def attempt(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What work gives; or why it was not done: the minutes are over, or the model or the device refuses it."""
        self.gauge.begin()
        if self.over():
            return {"not run": f"the {self.minutes:g} minutes were over"}
        try:
            return work()
        except (RuntimeError, ValueError, NotImplementedError) as error:
            return {"not run": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}

    def write(self, title: str, header: tuple[str, ...], rows: list[dict[str, Any]], keys: tuple[str, ...]) -> None:
        """Add a table to the results, and print it."""
        lines = []
        for row in rows:
            add_row(self.work / "rows.jsonl", {"table": title, **row})
            cells = [_cell(row.get(key, "")) for key in keys[1:]]
            lines.append((str(row[keys[0]]), *([row["not run"], *cells[1:]] if "not run" in row else cells)))
        text = f"{title}\n\n{markdown_table(lines, header)}\n"
        print(text, flush=True)
        with (self.work / "gpu.md").open("a") as file:
            file.write(f"{text}\n")


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:,.0f}" if value >= 100 else f"{value:,.2f}"


def passes(bench: Bench, shape: Shape) -> list[dict[str, Any]]:
    """Tokens per second of plain passes and of the collectors, with the memory of each."""
    gauge, texts = bench.gauge, bench.texts
    model = shape.model(gauge.device)
    architecture, own = describe(model), model.config._experts_implementation_internal
    exposed(model, architecture)
    shown = model.config._experts_implementation_internal
    ids = torch.randint(WORDS, (texts.at_once // texts.length, texts.length), device=gauge.device)
    rows: list[dict[str, Any]] = []
    for name, work in kinds(model, architecture, ids).items():
        if name == "hessian, hutchinson":  # second gradients, which no preset reads
            continue
        model.config._experts_implementation_internal = shown if name in BESIDE else own

        def timed(work: Callable[[], None] = work) -> dict[str, Any]:
            seconds = [gauge.seconds(work) for _ in range(texts.rounds + 1)][1:]  # the first one warms up
            return {"tokens_per_second": ids.numel() / median(seconds), "GB": gauge.peak() / 1e9}

        row = {"what": name, **bench.attempt(timed)}
        plain = next((r for r in rows if r["what"] == BESIDE.get(name)), {})
        if "tokens_per_second" in row and "tokens_per_second" in plain:
            row["beside"] = f"{plain['tokens_per_second'] / row['tokens_per_second']:.2f} × {plain['what']}"
        rows.append(row)
    return rows


def write_project(folder: Path, shape: Shape, bench: Bench) -> None:
    """A model folder, and a text of random words."""
    shape.model(bench.gauge.device).save_pretrained(folder / "model")
    bench.gauge.begin()
    write_words(folder, 4 * bench.texts.sequences * bench.texts.length + 2 * bench.texts.trained)


def write_words(folder: Path, tokens: int) -> None:
    """The tokenizer of a model folder, and a text of so many random words, or more."""
    words = [f"w{number}" for number in range(WORDS - 2)]
    known = {word: number for number, word in enumerate(["<unk>", "<eos>", *words])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    made.save_pretrained(folder / "model")
    drawn = random.Random(0)
    documents = (" ".join(drawn.choices(words, k=100)) for _ in range(tokens // 100 + 100))
    (folder / "text.txt").write_text("\n".join(documents) + "\n")


def settings(folder: Path, bench: Bench) -> dict[str, dict[str, Any]]:
    """The params of all stages, but for what single stages need to have work."""
    texts, few = bench.texts, max(2, bench.texts.sequences // 8)
    given: dict[str, dict[str, Any]] = {
        "prepare": {"model": str(folder / "model")},
        "tokenize": {
            "text": str(folder / "text.txt"),
            "calibration_sequences": texts.sequences,
            "calibration_length": texts.length,
            "evaluation_windows": few,
            "evaluation_length": texts.length,
        },
        "compute": {"device": str(bench.gauge.device), "dtype": "bfloat16", "batch_tokens": texts.at_once},
        "gradients": {"sequences": texts.sequences},
        "hessian": {"estimator": "fisher", "sequences": few},
        "ablation": {"units": 4, "sequences": few},
        **{stage: {"sequences": few} for stage in ("sensitivity", "depth", "levels", "width")},
        "latency": {"tokens": texts.length, "rounds": texts.rounds, "widths": 2},
        "recover": {
            "method": "lora",
            "length": texts.length,
            "tokens": texts.trained,
            "held_out": 2,
            "checks": 1,
            "batch_tokens": texts.at_once,
            "dtype": "bfloat16",
        },
        "evaluate": {"prompt_tokens": texts.length, "decode_tokens": texts.decoded, "rounds": texts.rounds}
        | {"continuations": 1, "continuation_tokens": 4},
    }
    given["levels"] |= {"number": 2}
    given["width"] |= {"widths": 1}
    written: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
    return {name: {**own, **given.get(name, {})} if isinstance(own, dict) else own for name, own in written.items()}


NEEDS: dict[str, dict[str, Any]] = {
    "sensitivity": {"method": "hgsp"},
    "depth": {"depth": "joint"},
    "levels": {"method": "search"},
    "width": {"width": "auto", "method": "search"},
    "latency": {"objective": "latency", "method": "global"},
}
"""Keys of `allocate` without which a stage has nothing to do."""
STAGES = (
    *("prepare", "tokenize", "gradients", "hessian", "activations", "ablation", "score", "sensitivity", "depth"),
    *("levels", "width", "latency", "allocate", "slice", "teacher", "recover", "evaluate"),
)
"""The stages that a device matters to, in the order in which they run."""
_MEASURES = {"allocate", "slice", "recover", "evaluate"}
"""Stages that write metrics."""


def stages(bench: Bench, folder: Path) -> Iterator[dict[str, Any]]:
    """Seconds and memory of every stage, each from its files to its files."""
    params = settings(folder, bench)
    for stage in STAGES:
        own = {**params, "allocate": params["allocate"] | NEEDS.get(stage, {})}
        (folder / "params.yaml").write_text(yaml.safe_dump(own, sort_keys=False))
        main = import_module(f"stages.{stage}").main
        places = [folder / "params.yaml", folder / "artifacts", *([folder / "metrics"] if stage in _MEASURES else [])]

        def timed(main: Callable[..., None] = main, places: list[Path] = places) -> dict[str, Any]:
            return {"seconds": bench.gauge.seconds(lambda: main(*places)), "GB": bench.gauge.peak() / 1e9}

        yield {"what": stage, **bench.attempt(timed)}


def speeds(bench: Bench, shape: Shape) -> Iterator[dict[str, Any]]:
    """Prefill and decoding of pruned models beside the dense one, at widths of several multiples."""
    gauge, texts, whole = bench.gauge, bench.texts, shape.sizes[shape.inner]
    dense = shape.model(gauge.device)
    prompt = torch.randint(WORDS, (1, texts.length), device=gauge.device)
    for multiple in MULTIPLES:
        width = int(KEPT * whole) // multiple * multiple
        width += multiple == 1 and width % 2 == 0  # odd, so that it is a multiple of nothing that a kernel likes

        def timed(width: int = width) -> dict[str, Any]:
            pruned = shape.model(gauge.device, **{shape.inner: width})
            found = compare_speed(dense, pruned, prompt, texts.decoded, texts.rounds)
            return {
                "prefill": found.pruned.prefill,
                "decode": found.pruned.decode,
                "prefill_ratio": f"× {found.prefill_ratio:.2f}",
                "decode_ratio": f"× {found.decode_ratio:.2f}",
            }

        yield {"what": f"{width:,} of {whole:,} (multiple of {multiple})", **bench.attempt(timed)}


def measure(bench: Bench, name: str) -> None:
    """All measurements of a shape, and their tables."""
    shape, texts = SHAPES[name], bench.texts
    of = f"{name}, {shape.run} of {shape.layers} layers, bfloat16, random weights, {bench.gauge.name}"
    rows = passes(bench, shape)
    header = ("passes", "tokens/s", "time beside", "peak, GB")
    bench.write(
        f"{of}; passes of {texts.at_once:,} tokens", header, rows, ("what", "tokens_per_second", "beside", "GB")
    )
    folder = bench.work / name
    write_project(folder, shape, bench)
    rows = list(stages(bench, folder))
    rows.append({"what": "all", "seconds": sum(row.get("seconds", 0.0) for row in rows)})
    text = f"{texts.sequences} sequences of {texts.length} tokens, {texts.trained:,} tokens of training by lora"
    bench.write(f"{of}; {text}", ("stage", "seconds", "peak, GB"), rows, ("what", "seconds", "GB"))
    columns = ("channels", "prefill, tokens/s", "to dense", "decode, tokens/s", "to dense")
    keys = ("what", "prefill", "prefill_ratio", "decode", "decode_ratio")
    bench.write(f"{of}; a prompt of {texts.length} tokens, one sequence", columns, list(speeds(bench, shape)), keys)


def main(
    work: Annotated[Path, typer.Argument(help="A new folder for models, artifacts and tables.")],
    shapes: Annotated[str, typer.Option(help="By comma: " + ", ".join(SHAPES))] = "llama-8b,qwen3-30b-a3b",
    device: str = "cuda",
    minutes: Annotated[float, typer.Option(help="After which nothing new begins.")] = 10.0,
    layers: Annotated[int, typer.Option(help="Layers that are run; 0: as many as the shape says.")] = 0,
) -> None:
    """Measure the shapes one after the other."""
    work.mkdir(parents=True)
    bench = Bench(work, Gauge(resolve_device(device)), Texts(), minutes)
    for name in shapes.split(","):
        if layers:
            SHAPES[name] = Shape(**{**vars(SHAPES[name]), "run": layers})
        measure(bench, name)


if __name__ == "__main__":
    typer.run(main)
