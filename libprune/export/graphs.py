"""Models as graphs with a KV cache, for ONNX Runtime and OpenVINO, by the exporters of transformers.

https://huggingface.co/docs/transformers/main/en/exporters documents the exporters and how such a folder is run.
"""

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.exporters import AutoHfExporter, ExportedModel, OnnxConfig, OpenVINOConfig
from transformers.exporters.utils import decompose_for_generation

from libprune.engine.errors import ExportError, cause
from libprune.engine.heads import writes
from libprune.export.source import Source
from libprune.models.folder import load_model

CONFIGS = {"onnx": partial(OnnxConfig, dynamic=True), "openvino": partial(OpenVINOConfig, dynamic=True, stateful=False)}
"""Formats of graphs, with the settings of transformers for any lengths and a KV cache that goes in and comes out."""
RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino"}
"""The package that runs a format."""
NAMES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}
"""What the programs that run a format are called."""


def missing(kind: str) -> str | None:
    """Why a format cannot be run here, in a sentence; None if it can."""
    if find_spec(RUNTIMES[kind]) is None:
        return f"{NAMES[kind]} was not tried, because it is not installed: pip install 'libprune[{kind}]'"
    return None


def write_graph(folder: Path, source: Source, kind: str) -> None:
    """Write a model as one graph in float32; it takes token ids, positions and a KV cache, and gives logits and cache.

    Args:
        folder: an existing, empty folder.
        source: the model.
        kind: one of `CONFIGS`.

    Raises:
        ExportError: if the model has no KV cache, or transformers cannot make the graph.
    """
    if source.head != "causal_lm":
        what = "reads images" if writes(source.head) else "predicts no next token"
        raise ExportError(f"{source.folder} {what}; libprune writes graphs of models that read and write text alone")
    model = load_model(source.folder, torch.float32, trust_remote_code=source.record.remote)
    model.generation_config.eos_token_id = None  # the exporter writes some tokens, and must not end early
    sample = torch.arange(16).reshape(2, 8) % source.config.vocab_size
    settings = CONFIGS[kind]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            asked = {"input_ids": sample, "attention_mask": torch.ones_like(sample)}
            step, inputs = decompose_for_generation(model, asked, multi_token_decode=True)["decode"]
            exported = AutoHfExporter.from_config(settings).export(step, inputs, settings)
            if source.record.remote:
                exported.config = None  # it would need the modeling file, which a graph does without
            exported.save_pretrained(folder)
        except Exception as error:  # of torch, onnx or openvino
            raise ExportError(f"transformers cannot export {source.folder} as {kind}: {cause(error)}") from error


@contextmanager
def graph(folder: Path, source: Source, kind: str, threads: int) -> Iterator["Graph"]:
    """A graph, ready to run, until the block ends.

    Args:
        folder: what `write_graph` wrote.
        source: the model that it was made of.
        kind: its format.
        threads: threads that it computes with.
    """
    options: dict[str, Any] = {}
    if kind == "onnx":
        import onnxruntime

        options["session_options"] = onnxruntime.SessionOptions()
        options["session_options"].intra_op_num_threads = threads
    else:
        options["config"] = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Graph(ExportedModel.from_pretrained(folder, device="cpu", **options), source, kind)


@dataclass(frozen=True)
class Graph:
    """A graph in its runtime.

    Attributes:
        model: the graph.
        source: the model that it was made of.
        kind: its format.
    """

    model: ExportedModel
    source: Source
    kind: str

    @property
    def version(self) -> str:
        """The runtime and its version."""
        return f"{NAMES[self.kind]} {version(RUNTIMES[self.kind])}"

    def predict(self, ids: Sequence[int], vocab: int) -> Tensor:
        """The logarithms of the probabilities of the next token after the given ones; ``[vocab]``, nats."""
        return self._step(ids, 0, self._empty()).logits[0, -1].log_softmax(-1)

    def write(self, ids: Sequence[int], number: int) -> list[int]:
        """The most probable continuation of the given tokens, token by token."""
        return self._run(ids, number)[0]

    def time(self, ids: Sequence[int], number: int) -> tuple[float, float]:
        """Seconds that the given tokens take, and that `number` further ones take one by one."""
        return self._run(ids, number)[1]

    def _run(self, ids: Sequence[int], number: int) -> tuple[list[int], tuple[float, float]]:
        start = time.perf_counter()
        output = self._step(ids, 0, self._empty())
        middle = time.perf_counter()
        written = []
        for position in range(len(ids), len(ids) + number):
            written.append(int(output.logits[0, -1].argmax()))
            output = self._step(written[-1:], position, output.past_key_values)
        return written, (middle - start, time.perf_counter() - middle)

    def _step(self, ids: Sequence[int], position: int, cache: DynamicCache) -> Any:
        positions = torch.arange(position, position + len(ids))[None]
        return self.model(input_ids=torch.tensor([list(ids)]), position_ids=positions, past_key_values=cache)

    def _empty(self) -> DynamicCache:
        cache = DynamicCache()
        for index, layer in enumerate(self.source.layers):
            # A layer without attention caches one number a token: libprune/results/modeling_pruned.py.tmpl.
            heads, size = (layer.groups, self.source.head_dim) if layer.groups else (1, 1)
            keys, values = (torch.zeros(1, heads, 0, width) for width in (size, size if layer.groups else 0))
            cache.update(keys, values, index)
        return cache
