"""The formats that a model can be exported in: how each is written, opened in its program, and how exact it is."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from libprune.engine.errors import ExportError
from libprune.export import gguf_file, graphs, llama_cpp
from libprune.export.packages import require_packages
from libprune.export.sizes import q4_k_m_bytes
from libprune.export.source import Source
from libprune.export.vocabulary import tokenized
from libprune.pipeline.sections import Export

EXACT, ROUNDED = 1e-3, 5e-2
"""Largest divergence from the model, in nats a token, of a file that stores its weights as they are or in 16 bits, and
of one that quantises them."""


@runtime_checkable
class Program(Protocol):
    """A model in another program."""

    @property
    def version(self) -> str:
        """The program and its version."""

    def predict(self, ids: Sequence[int], vocab: int) -> Tensor:
        """The logarithms of the probabilities of the next token; ``[vocab]``, nats."""

    def write(self, ids: Sequence[int], number: int) -> list[int]:
        """The most probable continuation, token by token."""

    def time(self, ids: Sequence[int], number: int) -> tuple[float, float]:
        """Seconds of prefill and of decoding."""


@dataclass(frozen=True)
class Format(ABC):
    """One file or folder that a model is exported as.

    Attributes:
        kind: type of its weights, or kind of the graph.
        threads: threads that its program computes with.
    """

    kind: str
    threads: int

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the format, and of the type of its weights."""

    @property
    @abstractmethod
    def file(self) -> str:
        """Name of the file or folder."""

    @property
    def limit(self) -> float:
        """Largest divergence from the model that is no fault, in nats a token."""
        return EXACT

    @abstractmethod
    def write(self, path: Path, source: Source) -> None:
        """Write the model."""

    @abstractmethod
    def missing(self) -> str | None:
        """Why its program cannot be run here, in a sentence; None if it can."""

    @abstractmethod
    def open(self, path: Path, source: Source, context: int) -> AbstractContextManager[Program]:
        """The written model in its program, for texts of up to `context` tokens."""

    def check(self, program: Program, source: Source, text: str) -> None:
        """Stop if the program reads a text otherwise than the model's tokenizer; graphs take token ids."""
        return

    def quantised_bytes(self, path: Path) -> int | None:
        """Bytes of the file once it is quantised to Q4_K_M; None for formats that have no such type."""
        return None

    def cautions(self, source: Source) -> list[str]:
        """What the program does otherwise than the model, in sentences."""
        return []


class GgufFile(Format):
    """A GGUF file whose matrices are of one type."""

    @property
    def name(self) -> str:
        """Name of the format, and of the type of its weights."""
        return f"gguf {self.kind}"

    @property
    def file(self) -> str:
        """Name of the file."""
        return f"model.{self.kind}.gguf"

    @property
    def limit(self) -> float:
        """Largest divergence from the model that is no fault, in nats a token."""
        return ROUNDED if self.kind == "q8_0" else EXACT

    def write(self, path: Path, source: Source) -> None:
        """Write the model."""
        gguf_file.write_gguf(path, source, self.kind)

    def missing(self) -> str | None:
        """Why llama.cpp cannot be run here, in a sentence; None if it can."""
        return llama_cpp.missing()

    def open(self, path: Path, source: Source, context: int) -> AbstractContextManager[Program]:
        """The file in llama.cpp."""
        return llama_cpp.llama_cpp(path, context, self.threads)

    def check(self, program: Program, source: Source, text: str) -> None:
        """Stop if llama.cpp reads a text as other tokens than the model's tokenizer."""
        assert isinstance(program, llama_cpp.LlamaCpp)
        read, meant = program.tokenize(text), tokenized(source.folder, text)
        if read != meant:
            pairs = enumerate(zip_longest(read, meant))
            place = next(index for index, (one, other) in pairs if one != other)
            raise ExportError(
                f"llama.cpp reads the evaluation text as other tokens than the tokenizer of {source.folder}, first at "
                f"token {place}: {read[place : place + 4]} for {meant[place : place + 4]}. Take gguf out of "
                "export.formats"
            )

    def quantised_bytes(self, path: Path) -> int:
        """Bytes of the file once `llama-quantize` of llama.cpp has made it of the type Q4_K_M."""
        return q4_k_m_bytes(path)

    def cautions(self, source: Source) -> list[str]:
        """What llama.cpp does otherwise than the model, and what stays in 16 bits, in sentences."""
        return gguf_file.cautions(source) + (gguf_file.unfilled(source) if self.kind == "q8_0" else [])


class GraphFolder(Format):
    """A folder with a graph in float32 for ONNX Runtime or OpenVINO."""

    @property
    def name(self) -> str:
        """Name of the format, and of the type of its weights."""
        return f"{self.kind} f32"

    @property
    def file(self) -> str:
        """Name of the folder."""
        return self.kind

    def write(self, path: Path, source: Source) -> None:
        """Write the model."""
        path.mkdir()
        graphs.write_graph(path, source, self.kind)

    def missing(self) -> str | None:
        """Why its runtime cannot be run here, in a sentence; None if it can."""
        return graphs.missing(self.kind)

    def open(self, path: Path, source: Source, context: int) -> AbstractContextManager[Program]:
        """The graph in its runtime."""
        return graphs.graph(path, source, self.kind, self.threads)


def asked_for(params: Export) -> list[Format]:
    """The formats of the params that another program runs, after a check that what writes them is installed.

    Raises:
        ExportError: naming a package that is missing.
    """
    threads = params.threads or torch.get_num_threads()
    made: list[Format] = []
    for name in dict.fromkeys(params.formats):
        if name == "gguf":
            made += [GgufFile(kind, threads) for kind in dict.fromkeys(params.gguf_types)]
        elif name in graphs.CONFIGS:
            require_packages(name)
            made.append(GraphFolder(name, threads))
    return made
