"""What a run is told to take: it grows with the work, follows earlier runs, and came near to a measured run."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig

from libprune.cli import forecast as forecasting
from libprune.cli.footprint import footprints
from libprune.cli.forecast import forecast, lines, main, measured_rate, memory, works
from libprune.collection.offload import consumer_inputs
from libprune.engine.architecture import Architecture, Map, Trimmed
from libprune.engine.describe import describe, without_weights
from libprune.pipeline.params import Params
from libprune.pipeline.sections import Vocabulary
from libprune.pipeline.story import STEPS, working
from tests.support import tiny
from tests.support.models import FAMILIES
from tests.support.params import SHIPPED, load_params

SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
    architectures=["LlamaForCausalLM"],
)
"""The config of the demo's model."""
DEMO_RATE = 130e9
"""Operations a second of the measured product in bfloat16, on the two cores that the times below were measured on."""
DEMO_SECONDS = {"prepare": 29, "gradients": 82, "slice": 34, "recover": 357, "evaluate": 108}
"""Seconds of stages of the demo that no other work disturbed much."""
DEMO_MEMORY = {
    "prepare": 1.69e9,
    "gradients": 3.24e9,
    "activations": 1.83e9,
    "slice": 1.85e9,
    "recover": 4.54e9,
    "evaluate": 2.97e9,
}
"""Peak memory of stages of the demo, in bytes."""


@pytest.fixture(scope="module")
def demo():
    """The description of the demo's model, and the params that ship with the project, in bfloat16."""
    params = load_params(SHIPPED)
    compute = params.compute.model_copy(update={"dtype": "bfloat16", "device": "cpu", "offload": "none"})
    return describe(without_weights(SMOLLM2)), params.model_copy(update={"compute": compute})


def test_the_demo_takes_about_what_was_measured(demo):
    found = forecast(*demo, torch.float32, working(demo[1]), {}, DEMO_RATE)
    for stage, seconds in DEMO_SECONDS.items():
        assert found.seconds[stage] == pytest.approx(seconds, rel=0.35), stage
    assert 10 * 60 < sum(found.seconds.values()) < 17 * 60, "13 minutes were measured"
    assert 5e9 < found.disk < 8e9
    assert found.memory[1] == "recover"


def test_the_memory_of_each_stage_of_the_demo_is_about_what_was_measured(demo):
    found = memory(*demo, torch.float32, footprints(*demo, torch.float32))
    for stage, size in DEMO_MEMORY.items():
        assert found[stage] == pytest.approx(size, rel=0.15), stage


def test_a_larger_model_to_learn_from_takes_its_own_time_and_memory(demo, tmp_path, monkeypatch):
    architecture, params = demo
    large = LlamaConfig(**SMOLLM2.to_dict() | {"num_hidden_layers": 90})
    large.save_pretrained(tmp_path)
    asked = with_changes(with_changes(params, "recover", teacher=str(tmp_path)), "compute", offload="auto")
    weights = 2 * describe(without_weights(large)).total_parameters
    ours = with_changes(params, "compute", offload="auto")
    monkeypatch.setattr("libprune.collection.offload.free_memory", lambda: 10**12)
    roomy = [memory(architecture, p, torch.float32, footprints(architecture, p, torch.float32)) for p in (ours, asked)]
    assert roomy[1]["recover"] - roomy[0]["recover"] == weights - 2 * architecture.total_parameters
    assert {stage for stage in roomy[0] if roomy[0][stage] != roomy[1][stage]} == {"recover"}
    monkeypatch.setattr("libprune.collection.offload.free_memory", lambda: 5 * 10**9)
    narrow = memory(architecture, asked, torch.float32, footprints(architecture, asked, torch.float32))
    assert roomy[1]["recover"] - narrow["recover"] == weights, "read from disk, where the training takes the memory"
    assert works(architecture, asked)["recover"] > 1.3 * works(architecture, ours)["recover"]


def with_changes(params: Params, section: str, **values: object) -> Params:
    return params.model_copy(update={section: getattr(params, section).model_copy(update=values)})


GROWS = [
    ("gradients", "gradients", {"sequences": 32}, {"sequences": 64}),
    ("activations", "activations", {"sequences": 32}, {"sequences": 64}),
    ("hessian", "hessian", {"estimator": "hutchinson", "probes": 1}, {"estimator": "hutchinson", "probes": 4}),
    ("ablation", "ablation", {"units": 10}, {"units": 20}),
    ("depth", "allocate", {"depth": "none"}, {"depth": "cosine"}),
    ("depth", "allocate", {"depth": "cosine"}, {"depth": "joint"}),
    ("levels", "levels", {"number": 2}, {"number": 8}),
    ("allocate", "allocate", {"evaluations": 0}, {"evaluations": 8}),
    ("slice", "slice", {"repair": "none"}, {"repair": "local"}),
    ("slice", "slice", {"repair": "local"}, {"repair": "sequential"}),
    ("teacher", "recover", {"top_k": None}, {"top_k": 8}),
    ("recover", "recover", {"top_k": 8}, {"top_k": None}),
    ("recover", "recover", {"cross_entropy": 1.0}, {"cross_entropy": 0.5}),
    ("recover", "recover", {"tokens": 1000}, {"tokens": 9000}),
    ("evaluate", "evaluate", {"rounds": 2}, {"rounds": 9}),
]


@pytest.mark.parametrize(("stage", "section", "less", "more"), GROWS)
def test_the_work_grows_with_what_is_asked_for(demo, stage, section, less, more):
    architecture, params = demo
    small, large = (works(architecture, with_changes(params, section, **values)) for values in (less, more))
    assert small[stage] < large[stage]
    others = {name for name in small if small[name] != large[name]} - {stage}
    assert others <= {"levels", "allocate", "slice", "teacher", "recover"}


def test_every_stage_but_the_export_has_its_work_for_every_family(demo):
    for make in FAMILIES.values():
        found = works(describe(make(0)), demo[1])
        assert found.keys() == STEPS.keys() - {"export"}
        assert all(amount >= 0 for amount in found.values())


def test_a_stage_that_has_run_here_takes_as_long_again_in_proportion_to_its_work(demo):
    architecture, params = demo
    work = works(architecture, params)["gradients"]
    costs = {"gradients": {"seconds": 50.0, "work": work / 2, "memory": 1}, "prepare": {}, "score": {"seconds": 1}}
    found = forecast(architecture, params, torch.float32, ["gradients", "prepare", "score"], costs, 1e11)
    assert found.seconds["gradients"] == pytest.approx(100.0)
    assert found.recorded == {"gradients"}
    assert found.seconds.keys() == {"gradients", "prepare", "score"}


def test_sums_that_are_mapped_from_disk_take_disk_and_no_memory(demo, monkeypatch):
    architecture, params = demo

    def expected(sums: str, fits: bool) -> tuple[int, int]:
        monkeypatch.setattr(forecasting, "fits_in_memory", lambda size: fits)
        changed = with_changes(params, "compute", sums=sums)
        found = forecast(architecture, changed, torch.float32, ["gradients"], {}, 1e11)
        return found.memory[0], found.disk

    sums = next(one.sums for one in footprints(architecture, params, torch.float32) if one.stage == "gradients")
    memory, disk = expected("memory", False)
    assert expected("auto", True) == (memory, disk)
    assert expected("disk", True) == expected("auto", False) == (memory - sums, disk + sums)


def test_the_lines_say_what_will_happen_and_that_it_is_an_estimate(demo, tmp_path):
    architecture, params = demo
    stages = working(with_changes(params, "export", formats=("gguf",)))
    found = forecast(architecture, params, torch.float32, stages, {}, DEMO_RATE)
    said = lines(architecture, params, found, stages, tmp_path)
    assert "134.5 million parameters; 20 % of the parameters of the decoder will go" in said[0]
    assert said[1] == f"{len(stages)} stages will run: {', '.join(stages)}"
    assert "minutes, an estimate from a small layer that was timed; the export comes on top" in said[2]
    assert [line.partition(":")[0] for line in said[2:]] == ["time", "memory", "disk"]


def test_a_vocabulary_that_is_not_cut_yet_is_said_to_be_counted(demo, tmp_path):
    architecture, params = demo
    given = with_changes(params, "prepare", vocabulary=Vocabulary(text="news.txt"))
    found = forecast(architecture, given, torch.float32, ["prepare"], {}, DEMO_RATE)
    assert (
        "rows of the vocabulary will go, which are still counted here, and 20 %"
        in lines(architecture, given, found, ["prepare"], tmp_path)[0]
    )
    cut = replace(architecture, trimmed=Trimmed(tokens=60_000, rows=60_000, parameters=10**7, macs=10**7))
    assert "still counted" not in lines(cut, given, found, ["prepare"], tmp_path)[0]


def test_the_program_answers_for_a_model_before_and_after_prepare(tmp_path, capsys):
    tiny.write_project(tmp_path, [])
    words = [str(tmp_path / name) for name in ("params.yaml", "artifacts", "costs.json")]
    main([*words, "prepare", "gradients"])
    before = json.loads(capsys.readouterr().out)
    assert before["work"].keys() == {"prepare", "gradients"}
    tiny.run_stages(tmp_path, ["prepare"])
    capsys.readouterr()
    main([*words, "gradients"])
    assert json.loads(capsys.readouterr().out)["work"] == {"gradients": before["work"]["gradients"]}


def test_a_model_that_is_not_there_is_one_line(tmp_path, capsys):
    path = tiny.write_params(tmp_path / "params.yaml", str(tmp_path / "gone"), "text")
    with pytest.raises(SystemExit) as end:
        main([str(path), str(tmp_path), "costs.json", "prepare"])
    assert end.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_the_rate_is_that_of_this_machine(demo):
    assert 1e8 < measured_rate(demo[0], with_changes(demo[1], "compute", dtype="float32")) < 1e15


def test_experts_count_one_by_one():
    """A token meets some experts, and each has a Gram matrix and fits of its own."""
    architecture = describe(FAMILIES["qwen3_moe"](0))
    stacks = [entry for entry in architecture.maps if entry.stack and entry in consumers_of(architecture)]
    found = {one for one in consumer_inputs(architecture) if one[2] > 1}
    assert found == {(e.each_input(architecture.sizes), e.active, e.copies(architecture.sizes)) for e in stacks}
    assert all(met < copies for _, met, copies in found)


def consumers_of(architecture: Architecture) -> list[Map]:
    return [one for block in architecture.blocks() for one in architecture.consumers(*block)]


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_the_joint_fit_of_a_layers_experts_is_part_of_the_memory(demo, offload):
    config = MixtralConfig(num_hidden_layers=2, vocab_size=100, architectures=["MixtralForCausalLM"])
    architecture, params = describe(without_weights(config)), with_changes(demo[1], "compute", offload=offload)

    def held(experts: str, repair: str) -> int:
        changed = with_changes(with_changes(params, "prepare", experts=experts), "slice", repair=repair)
        return memory(architecture, changed, torch.bfloat16, footprints(architecture, changed, torch.bfloat16))["slice"]

    copies, model, width = 8, 4096, 14336
    fit = 4 * copies * (10 * model * width + 3 * width**2)
    assert fit < held("whole", "local") < 2 * fit
    assert held("channels", "local") == held("whole", "none") < fit
