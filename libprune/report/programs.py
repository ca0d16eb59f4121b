"""Where the final model lies, how to load it, and which programs take its shape.

Transformers is tried whenever a model is made. What is said of the others is read from their code and their issues of
November 2026, and not tried:

- vLLM, vllm/model_executor/models: `llama.py` (Mistral too) and `qwen3.py` read `head_dim` from the config, `qwen2.py`
  has long divided the hidden size by the heads; `o_proj` and `down_proj` have biases only in `llama.py`. Each builds
  all layers in the widths of one config; the devices of tensor parallelism must divide the query heads, and divide the
  key-value heads or be a multiple of them. Widths by layer: issue 31454, pull request 36512.
- llama.cpp, src/models: `llama.cpp` and `qwen3.cpp` shape the attention by heads times head size, `qwen2.cpp` by the
  hidden size; biases of `o_proj` and `down_proj` only in `llama.cpp`. GGUF has `feed_forward_length`,
  `attention.head_count` and `attention.head_count_kv` as one number or one a layer, but these three take the first
  layer's for all; `deci.cpp` does not, and conversion/deci.py writes it from its own kind of config.
  src/llama-quant.cpp: k-quants cut rows into blocks of 256.
"""

from pathlib import Path

from libprune.engine.heads import HEADS, HeadName
from libprune.pipeline.layout import Layout
from libprune.report.headline import Metrics
from libprune.report.markdown import code, markdown_table

_KNOWN = ("llama", "mistral", "qwen2", "qwen3")
"""Values of `model_type` whose code in vLLM and in llama.cpp was read."""
_BLOCK = 256
"""Number of weights in a block of llama.cpp's k-quants."""


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


def describe_loading(result: Metrics, layout: Layout) -> list[str]:
    """The section of the report on how to load the final model, and in which programs; paragraphs of Markdown.

    Args:
        result: the content of `artifacts/evaluation.json`.
        layout: holds the pruned model, and the recovered one if there is one.
    """
    shape, folder = result["plan"]["shape"], str(final_folder(result, layout))
    head = result["model"]["head"]
    line, writes = how_to_load(folder, shape, head), head == "causal_lm"
    kind = {
        "uniform": "all layers alike, under a stock config and without code of its own",
        "per_layer": "layers of different widths, with a modeling file of a few lines inside",
    }[shape]
    takers = [_transformers(result), _vllm(result), _llama_cpp(result)]
    return [
        "## How to load it",
        f"{code(folder)} has the shape `{shape}`: {kind}.",
        f"```python\nfrom transformers import {line.partition('.')[0]}\nmodel = {line}\n```",
        _proof(result, layout, ", and it generates" if writes else ""),
        markdown_table(takers, ("program", "takes this shape", "remarks")).replace("---:", "---"),
        *_commands(folder, [program for program, verdict, _ in takers if verdict == _BY_CODE]),
    ]


def _proof(result: Metrics, layout: Layout, generates: str) -> str:
    """How it was shown that the model loads, and where the model before recovery lies."""
    proof = result["pruning"]["proof"]
    differ = f"{proof['logit_difference']:.1e} of {proof['logit_scale']:.1f}"
    if not result.get("recovered"):
        return (
            "A fresh process without libprune loaded it; its logits differ from the masked dense model's by "
            f"{differ}{generates}."
        )
    return (
        f"A fresh process without libprune loaded it and computed what its trained weights say{generates}. The model "
        f"before recovery lies in {code(str(layout.pruned))} and loads alike; its logits differ from the masked dense "
        f"model's by {differ}."
    )


_BY_CODE = "yes, by its code; not tried"
_COMMANDS = {"vLLM": "vllm serve {0}", "llama.cpp": "python convert_hf_to_gguf.py {0} --outfile pruned.gguf"}


def _commands(folder: str, programs: list[str]) -> list[str]:
    lines = [_COMMANDS[program].format(folder) for program in programs]
    return ["```\n" + "\n".join(lines) + "\n```"] if lines else []


def _transformers(result: Metrics) -> tuple[str, str, str]:
    version = result["pruning"]["versions"]["transformers"]
    if result["plan"]["shape"] == "uniform":
        more = "; KV cache and `generate` included" if result["model"]["head"] == "causal_lm" else ""
        return "transformers", "yes, tried", f"with {code(version)}{more}"
    return "transformers", "yes, tried", f"with {code(version)}, 5.15 or later; only with `trust_remote_code=True`"


def _vllm(result: Metrics) -> tuple[str, str, str]:
    heads, groups, fits = _attention(result)
    if result["plan"]["shape"] != "uniform":
        return "vLLM", "no", "one width for all layers (issue 31454); use `allocate.shape: uniform`"
    if result["model"]["type"] not in _KNOWN:
        return "vLLM", "not known", _unread(result)
    if result["model"]["type"] == "qwen2" and not fits:
        return (
            "vLLM",
            "not known",
            "older versions take the size of a head as hidden size / heads, which is not so here",
        )
    if result["model"]["biases"] and result["model"]["type"] != "llama":
        return "vLLM", "not known", f"its code has no biases on the outputs of {_biased(result)}"
    remark = (
        f"tensor parallelism must divide {heads} query heads, and {groups} key-value heads or be a multiple of them"
    )
    return "vLLM", _BY_CODE, remark


def _llama_cpp(result: Metrics) -> tuple[str, str, str]:
    kind, (_, _, fits) = result["model"]["type"], _attention(result)
    if result["plan"]["shape"] != "uniform":
        return "llama.cpp", "no", f"architecture {code(kind)} has one width for all layers"
    if kind not in _KNOWN:
        return "llama.cpp", "not known", _unread(result)
    if kind == "qwen2" and not fits:
        return "llama.cpp", "no", "its Qwen2 wants as many numbers in all heads as in the hidden state"
    if result["model"]["biases"] and kind != "llama":
        return "llama.cpp", "no", f"its code has no biases on the outputs of {_biased(result)}"
    channels = _kept(result, "mlp")
    if channels % _BLOCK:
        remark = (
            f"k-quants cut rows into blocks of {_BLOCK}, which {channels} channels do not fill: `down_proj` is then "
            f"stored in a larger type; `allocate.channel_multiple: {_BLOCK}` avoids that"
        )
        return "llama.cpp", _BY_CODE, remark
    return "llama.cpp", _BY_CODE, f"{channels} channels fill the blocks of k-quants"


def _attention(result: Metrics) -> tuple[int, int, bool]:
    """Query heads, key-value heads, and whether all heads together are as wide as the hidden state."""
    sizes, groups = result["model"]["sizes"], _kept(result, "attention")
    heads = groups * sizes.get("q", 1)
    return heads, groups, heads * sizes.get("d", 0) == sizes.get("model")


def _kept(result: Metrics, part: str) -> int:
    """Units of a part that each remaining layer of a uniform result keeps."""
    return max(layer.get(part, 0) for layer in result["kept"])


def _biased(result: Metrics) -> str:
    return " and ".join(result["model"]["biases"])


def _unread(result: Metrics) -> str:
    return f"its code for {code(result['model']['type'])} was not read; the config is a stock one"
