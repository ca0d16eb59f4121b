"""Programs are said to take a shape only where their code says so."""

import re
from typing import Any

import pytest

from libprune.report.programs import TRIED, describe_loading, final_folder, how_to_load
from tests.support.closure import ROOT
from tests.support.evaluated import EVALUATION, LAYOUT, changed, report_of, trained


def takers(result: dict[str, Any]) -> dict[str, str]:
    """What the report says of each program."""
    section = "\n\n".join(describe_loading(result, LAYOUT))
    assert section in report_of(result)
    rows = re.findall(r"^\| (transformers|vLLM|llama\.cpp|ONNX Runtime) \| (.*?) \|", section, re.MULTILINE)
    return {program: verdict.split(",")[0] for program, verdict in rows}


UNIFORM = changed(plan={"shape": "uniform", "tensor_parallel": [1, 3]}, kept=[{"attention": 3, "mlp": 1280}] * 2)
PER_LAYER = changed(plan={"shape": "per_layer"}, kept=[{"attention": 3, "mlp": 1280}, {"attention": 1, "mlp": 0}])
HOLE = PER_LAYER | {"kept": [{"attention": 3, "mlp": 1280}, {"attention": 0, "mlp": 7}]}


def of_type(name: str, result: dict[str, Any]) -> dict[str, Any]:
    return result | {"model": result["model"] | {"type": name}}


TAKERS = {
    "a Llama": (of_type("llama", UNIFORM), "yes", "yes"),
    "a Llama with layers of their own widths": (of_type("llama", PER_LAYER), "yes", "yes"),
    "a Llama with a layer without attention": (of_type("llama", HOLE), "no", "yes"),
    "a Qwen2": (of_type("qwen2", UNIFORM), "not tried", "yes"),
    "a Qwen2 with layers of their own widths": (of_type("qwen2", PER_LAYER), "not tried", "no"),
    "a family without a GGUF file": (of_type("phi3", UNIFORM), "not tried", "not tried"),
}


@pytest.mark.parametrize("case", TAKERS)
def test_programs_are_said_to_take_what_was_tried(case):
    result, vllm, llama_cpp = TAKERS[case]
    said = {"transformers": "yes", "vLLM": vllm, "llama.cpp": llama_cpp, "ONNX Runtime": "not tried"}
    assert takers(result) == said
    remote = " --trust-remote-code" if result["plan"]["shape"] == "per_layer" else ""
    assert (f"vllm serve out/pruned{remote}\n" in report_of(result)) is (vllm == "yes")


def test_devices_that_heads_and_channels_divide_over_are_said():
    assert "tensor parallelism over 1 or 3 devices" in report_of(of_type("llama", UNIFORM))
    alone = UNIFORM | {"plan": UNIFORM["plan"] | {"tensor_parallel": [1]}}
    assert "tensor parallelism cannot divide its heads and channels" in report_of(of_type("llama", alone))


def test_an_encoder_has_no_programs_that_write():
    encoder = UNIFORM | {"model": UNIFORM["model"] | {"type": "bert", "head": "masked_lm"}, "continuations": []}
    assert takers(encoder) == {"transformers": "yes"}


def test_versions_that_were_tried_are_in_the_document():
    text = (ROOT / "docs/serving.md").read_text()
    for program, version in TRIED.items():
        assert program in text and version in text


def test_exported_files_stand_with_size_agreement_and_speed():
    result = of_type("llama", UNIFORM) | {"exported": [F16, ONNX], "export_notes": ["Zeros fill channels."]}
    text = report_of(result)
    assert takers(result)["llama.cpp"] == "yes"
    assert takers(result)["ONNX Runtime"] == "not tried"
    assert "f16 diverges by 1.0e-05 nats a token" in text
    row = "| `model.f16.gguf` | 228.0 | × 0.841 | 94.0 | × 0.891 | 24 of 24 | × 1.20 | × 1.30 |"
    assert row in re.sub(r" +", " ", text)
    assert "ONNX Runtime was not tried, because it is not installed" in text
    assert "Note: Zeros fill channels." in text


NO_PROGRAM = {"program": None, "agreement": None, "speed": None, "dense_bytes": None, "dense_quantised_bytes": None}
ONNX = NO_PROGRAM | {
    "format": "onnx f32",
    "file": "onnx",
    "bytes": 453_000_000,
    "quantised_bytes": None,
    "not_tried": "ONNX Runtime was not tried, because it is not installed",
}
F16 = {
    "format": "gguf f16",
    "file": "model.f16.gguf",
    "bytes": 228_000_000,
    "quantised_bytes": 94_000_000,
    "dense_bytes": 271_000_000,
    "dense_quantised_bytes": 105_500_000,
    "program": "llama.cpp 1",
    "not_tried": None,
    "agreement": {"divergence": 1e-5, "written": 24, "same_written": 24},
    "speed": {"prefill_ratio": 1.2, "decode_ratio": 1.3},
}


def test_the_final_model_is_the_recovered_one_if_there_is_one_and_both_folders_are_named():
    before, after = ("\n".join(describe_loading(result, LAYOUT)) for result in (EVALUATION, trained()))
    assert how_to_load("out/pruned", "uniform", "causal_lm") in before
    assert how_to_load("out/recovered", "uniform", "causal_lm") in after
    assert "The model before recovery lies in `out/pruned`" in after
    assert "out/recovered" not in before
    assert final_folder(EVALUATION, LAYOUT) == LAYOUT.pruned
    assert final_folder(trained(), LAYOUT) == LAYOUT.recovered
