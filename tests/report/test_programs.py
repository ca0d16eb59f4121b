"""Programs are said to take a shape only where their code says so."""

import re
from typing import Any

import pytest

from libprune.report.programs import describe_loading, final_folder, how_to_load
from tests.support.evaluated import EVALUATION, LAYOUT, changed, report_of, trained


def takers(result: dict[str, Any]) -> dict[str, str]:
    """What the report says of each program."""
    section = "\n\n".join(describe_loading(result, LAYOUT))
    assert section in report_of(result)
    rows = re.findall(r"^\| (transformers|vLLM|llama\.cpp) \| (.*?) \|", section, re.MULTILINE)
    return {program: verdict.split(",")[0] for program, verdict in rows}


UNIFORM = changed(plan={"shape": "uniform"}, kept=[{"attention": 3, "mlp": 1280}] * 2)
FEWER_HEADS = [{"attention": 2, "mlp": 1280}] * 2


def of_type(name: str, kept: list[dict[str, int]] = UNIFORM["kept"], biases: tuple[str, ...] = ()) -> dict[str, Any]:
    return UNIFORM | {"model": UNIFORM["model"] | {"type": name, "biases": list(biases)}, "kept": kept}


TAKERS = {
    "a Llama": (of_type("llama"), "yes", "yes"),
    "a Llama with fewer heads": (of_type("mistral", FEWER_HEADS), "yes", "yes"),
    "a Llama with biases": (of_type("llama", biases=("mlp",)), "yes", "yes"),
    "a Qwen2 with all heads": (of_type("qwen2"), "yes", "yes"),
    "a Qwen2 with fewer heads": (of_type("qwen2", FEWER_HEADS), "not known", "no"),
    "a Qwen3 with biases": (of_type("qwen3", FEWER_HEADS, ("attention",)), "not known", "no"),
    "a model whose code was not read": (of_type("other"), "not known", "not known"),
    "widths by layer": (changed(plan={"shape": "per_layer"}), "no", "no"),
}


@pytest.mark.parametrize("case", TAKERS)
def test_programs_are_said_to_take_a_shape_only_where_their_code_says_so(case):
    result, vllm, llama_cpp = TAKERS[case]
    assert takers(result) == {"transformers": "yes", "vLLM": vllm, "llama.cpp": llama_cpp}
    assert ("vllm serve out/pruned" in report_of(result)) is (vllm == "yes")
    assert ("convert_hf_to_gguf.py out/pruned" in report_of(result)) is (llama_cpp == "yes")


def test_widths_that_quantization_cannot_cut_into_blocks_are_said():
    assert "1200 channels do not fill" in report_of(UNIFORM | {"kept": [{"attention": 3, "mlp": 1200}] * 2})
    assert "do not fill" not in report_of(UNIFORM)


def test_the_deleted_first_layer_of_a_uniform_result_does_not_hide_the_width_of_the_others():
    result = UNIFORM | {"kept": [{"attention": 0, "mlp": 0}, {"attention": 3, "mlp": 1280}]}
    assert "9 query heads, and 3 key-value heads" in report_of(result)


def test_the_final_model_is_the_recovered_one_if_there_is_one_and_both_folders_are_named():
    before, after = ("\n".join(describe_loading(result, LAYOUT)) for result in (EVALUATION, trained()))
    assert how_to_load("out/pruned", "uniform", "causal_lm") in before
    assert how_to_load("out/recovered", "uniform", "causal_lm") in after
    assert "The model before recovery lies in `out/pruned`" in after
    assert "out/recovered" not in before
    assert final_folder(EVALUATION, LAYOUT) == LAYOUT.pruned
    assert final_folder(trained(), LAYOUT) == LAYOUT.recovered
