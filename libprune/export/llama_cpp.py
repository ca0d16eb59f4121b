"""llama.cpp, run on a GGUF file in a process of its own and asked through the API of its server.

The package xllamacpp brings a server of llama.cpp; https://github.com/ggml-org/llama.cpp/tree/master/tools/server
documents what it answers.
"""

import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import torch
from torch import Tensor

from libprune.engine.errors import ExportError
from libprune.pipeline.processes import isolated

PACKAGE = "xllamacpp"
"""The package that brings llama.cpp."""
_SERVE = """
import sys
import xllamacpp
path, context, threads = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path = path
params.n_ctx = params.n_batch = int(context)
params.n_parallel = 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
params.verbosity = 1
server = xllamacpp.Server(params)
print("listening", server.listening_address, flush=True)
sys.stdin.read()
"""
_SECONDS = 600


def missing() -> str | None:
    """Why llama.cpp cannot be run here, in a sentence; None if it can."""
    if find_spec(PACKAGE) is None:
        return "llama.cpp was not tried, because its package is not installed: pip install 'libprune[gguf]'"
    return None


@contextmanager
def llama_cpp(path: Path, context: int, threads: int) -> Iterator["LlamaCpp"]:
    """A server of llama.cpp with the model of a GGUF file, until the block ends.

    Args:
        path: the file.
        context: tokens that a text and its continuation have at most.
        threads: threads that it computes with.

    Raises:
        ExportError: if llama.cpp does not load the file, with what it says.
    """
    command = isolated(_SERVE, str(path.resolve()), str(context), str(threads))
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, text=True, errors="replace", **pipes) as process:
        assert process.stdin is not None and process.stdout is not None
        said: list[str] = []
        try:
            for line in process.stdout:
                if line.startswith("listening "):
                    break
                said.append(line.strip())
            else:
                told = [line for line in said if "rror" in line or "failed" in line] or said or ["nothing"]
                raise ExportError(f"llama.cpp does not load {path.name}: it says {told[0]!r}")
            yield LlamaCpp(line.split()[1])
        finally:
            process.kill()


_PROBABILITIES = "completion_probabilities"
_CERTAIN = 1e4
"""Added to the logit of the token that is to be written; what the server says of probabilities is without it."""


@dataclass(frozen=True)
class LlamaCpp:
    """A running server of llama.cpp.

    Attributes:
        address: where it listens, on this machine.
    """

    address: str

    @property
    def version(self) -> str:
        """The version of the package that brings llama.cpp."""
        return f"llama.cpp ({PACKAGE} {version(PACKAGE)})"

    def predict(self, ids: Sequence[int], vocab: int) -> Tensor:
        """The logarithms of the probabilities of the next token after the given ones; ``[vocab]``, nats."""
        answer = self._complete(ids, 1, n_probs=vocab)
        if _PROBABILITIES not in answer:  # the token is a part of a character; the server would wait for its rest
            answer = self._complete(ids, 1, n_probs=vocab, logit_bias=[[self.tokenize("a")[-1], _CERTAIN]])
        result = torch.full((vocab,), -torch.inf)
        for entry in answer[_PROBABILITIES][0]["top_logprobs"]:
            result[entry["id"]] = entry["logprob"]
        return result.log_softmax(-1)  # the server's own sum differs from 1 by 1e-4

    def write(self, ids: Sequence[int], number: int) -> list[int]:
        """The most probable continuation of the given tokens, token by token."""
        tokens: list[int] = self._complete(ids, number)["tokens"]
        return tokens

    def time(self, ids: Sequence[int], number: int) -> tuple[float, float]:
        """Seconds that the given tokens take, and that `number` further ones take one by one."""
        timings = self._complete(ids, number)["timings"]
        return timings["prompt_ms"] / 1000, timings["predicted_ms"] / 1000

    def tokenize(self, text: str) -> list[int]:
        """The token ids of a text, without special tokens around it."""
        tokens: list[int] = self._ask("/tokenize", {"content": text, "add_special": False})["tokens"]
        return tokens

    def _complete(self, ids: Sequence[int], number: int, **more: Any) -> dict[str, Any]:
        asked = {"prompt": list(ids), "n_predict": number, "temperature": 0, "return_tokens": True}
        return self._ask("/completion", {**asked, "cache_prompt": False, "ignore_eos": True, **more})

    def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = Request(self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=_SECONDS) as answer:
                result: dict[str, Any] = json.load(answer)
        except TimeoutError as error:
            raise ExportError(f"llama.cpp has not answered {path} within {_SECONDS} seconds") from error
        except (OSError, HTTPException, ValueError) as error:  # ValueError: half an answer
            raise ExportError(f"llama.cpp stopped while it was asked for {path}: {error}") from error
        return result
