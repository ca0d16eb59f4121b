"""Which quantising programs take a pruned folder on a CPU, and what they change: a table in Markdown.

    pip install torch==2.13.0 transformers==5.23.0 torchao bitsandbytes
    python bench/use.py artifacts/pruned ANOTHER_FOLDER --text README.md

It imports no libprune. Each folder is loaded in bfloat16 by transformers with the settings of a row, saved, and loaded
again. A program may leave maps as they are without a word, so those that it quantised are counted.
"""

import argparse
import logging
import re
import tempfile
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TorchAoConfig
from transformers.utils import logging as said

HEADER = ("folder", "program", "settings", "maps quantised", "change of logits", "same token", "nats", "saved again")
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}


class Heard(logging.Handler):
    """Keeps what transformers says, since it says there why a conversion failed."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage() + "\n"


HEARD = Heard()


def in_torchao(name: str, *given: Any, home: str = "torchao.quantization", **named: Any) -> Callable[[], TorchAoConfig]:
    """What makes the settings for torchao."""
    return lambda: TorchAoConfig(getattr(import_module(home), name)(*given, **named))


def rows() -> list[tuple[str, str, Callable[[], Any]]]:
    """The program, the settings in words, and what makes them."""
    int4: torch.dtype = vars(torch)["int4"]  # which the annotations of torch do not know
    own, groups = "torchao.prototype.quantization.int4", import_module("torchao.quantization").PerGroup
    return [
        ("torchao", "Int8WeightOnlyConfig", in_torchao("Int8WeightOnlyConfig")),
        ("torchao", "Int8WeightOnlyConfig, PerGroup(32)", in_torchao("Int8WeightOnlyConfig", granularity=groups(32))),
        (
            "torchao",
            "IntxWeightOnlyConfig, int4, PerGroup(32)",
            in_torchao("IntxWeightOnlyConfig", int4, groups(32)),
        ),
        ("torchao", "PrototypeInt4WeightOnlyConfig, 32", in_torchao("PrototypeInt4WeightOnlyConfig", 32, home=own)),
        ("torchao", "Int4WeightOnlyConfig, 32", in_torchao("Int4WeightOnlyConfig", 32)),
        ("bitsandbytes", "int8", lambda: BitsAndBytesConfig(load_in_8bit=True)),
        ("bitsandbytes", "nf4", lambda: BitsAndBytesConfig(**NF4)),
    ]


def load(folder: Path, dtype: torch.dtype, **given: Any) -> Any:
    """The model of a folder, in evaluation mode."""
    options = {"trust_remote_code": True, "local_files_only": True, "device_map": "cpu"}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options, **given).eval()


def is_quantised(one: nn.Linear) -> bool:
    return type(one.weight) is not nn.Parameter or not one.weight.dtype.is_floating_point


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return found


def loss(found: Tensor, ids: Tensor) -> float:
    """Mean negative log-likelihood of the next tokens, nats."""
    return float(nn.functional.cross_entropy(found[0, :-1], ids[0, 1:]))


def measure(folder: Path, make: Callable[[], Any], ids: Tensor, expected: Tensor) -> tuple[str, ...]:
    """The cells of a row behind its settings, beside the logits of the same folder in float32.

    The quantised model is saved before it runs: on a CPU, bitsandbytes packs 4-bit weights anew at their first use, and
    saves them packed, which loads as other weights.
    """
    model = load(folder, torch.bfloat16, quantization_config=make())
    linear = [one for name, one in model.named_modules() if isinstance(one, nn.Linear) and name != "lm_head"]
    quantised = f"{sum(map(is_quantised, linear))} of {len(linear)}"
    with tempfile.TemporaryDirectory() as scratch:
        saved = save(model, Path(scratch))
        found = logits(model, ids)
        if not saved.startswith("fails"):
            differ = float((logits(load(Path(scratch), torch.bfloat16), ids) - found).abs().max())
            saved += f", differs by {differ:.2g}" if differ else ", the same"
    return (
        quantised,
        f"{float((found - expected).abs().max()):.2f} of {float(expected.abs().max()):.0f}",
        f"{100 * float((found.argmax(-1) == expected.argmax(-1)).double().mean()):.1f} %",
        f"{loss(expected, ids):.3f} to {loss(found, ids):.3f}",
        saved,
    )


def save(model: Any, folder: Path) -> str:
    """Save a quantised model; the size of its weights, or why it cannot be saved."""
    try:
        model.save_pretrained(folder)
    except Exception as error:  # what a program raises is what the table tells
        return failure(error)
    return f"{sum(path.stat().st_size for path in folder.glob('*.safetensors')) / 1e6:.0f} MB"


def failure(error: Exception) -> str:
    """The cause of an error in few words."""
    causes = re.findall(r"^\w+Error: (.*)$", HEARD.text, re.MULTILINE)
    text = causes[-1] if causes else (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"fails: {text[:120]}".replace("|", "\\|")


def main() -> None:
    """Measure all folders and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, default=Path("README.md"))
    parser.add_argument("--tokens", type=int, default=512)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    said.disable_default_handler()
    said.disable_progress_bar()
    said.add_handler(HEARD)
    print(f"torch {version('torch')}, transformers {version('transformers')}, {given.tokens} tokens of {given.text}\n")
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    for folder in given.folders:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=True)
        ids = tokenizer(given.text.read_text(), return_tensors="pt").input_ids[:, : given.tokens]
        expected = logits(load(folder, torch.float32), ids)
        for program, settings, make in rows():
            HEARD.text = ""
            try:
                cells = measure(folder, make, ids, expected)
            except Exception as error:  # what a program raises is what the table tells
                cells = (failure(error), "", "", "", "")
            print(f"| {' | '.join((str(folder), f'{program} {version(program)}', settings, *cells))} |", flush=True)


if __name__ == "__main__":
    main()
