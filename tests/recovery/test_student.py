import sys

import pytest
import torch
from safetensors.torch import save_file

from libprune.engine.errors import LibpruneError
from libprune.recovery.student import WEIGHTS, finished_weights, load_student, prepare, read_weights, trained_parameters
from libprune.results.record import read_record
from tests.support.models import tokens
from tests.support.recovering import short, write_pruned_layout


@pytest.fixture(scope="module", params=[("llama", "uniform"), ("gpt2", "holes")], ids=str)
def record(request, tmp_path_factory, by_forks):
    """Tied and stock, and with layers of several widths and a modeling file."""
    with by_forks():
        layout = write_pruned_layout(tmp_path_factory.mktemp("pruned"), *request.param)
    return read_record(layout.pruned)


def write_checkpoint(folder, model, scale: float = 0.1) -> None:
    """Trained parameters that differ from the present ones."""
    random = torch.Generator().manual_seed(0)
    folder.mkdir(exist_ok=True)
    changed = {
        name: parameter.detach() + scale * torch.randn(parameter.shape, generator=random)
        for name, parameter in trained_parameters(model).items()
    }
    save_file(changed, folder / WEIGHTS)


def test_all_parameters_are_trained_and_shared_ones_once(record):
    student = load_student(record, short())
    names = dict(student.named_parameters())
    assert trained_parameters(prepare(student, short())).keys() == names.keys()


def test_a_student_has_the_type_that_is_asked_for(record):
    assert {p.dtype for p in load_student(record, short(dtype="bfloat16")).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_finished_weights_compute_what_the_trained_model_does(record, tmp_path, method):
    params, ids = short(method=method), tokens()
    trained = prepare(load_student(record, params), params).eval()
    write_checkpoint(tmp_path, trained)
    read_weights(trained, tmp_path)
    with torch.no_grad():
        before, expected = load_student(record, params)(ids).logits, trained(input_ids=ids).logits
    weights = finished_weights(record, params, tmp_path)
    student = load_student(record, params)
    assert weights.keys() == dict(student.named_parameters()).keys()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(weights[name])
        torch.testing.assert_close(student(ids).logits, expected, rtol=1e-3, atol=1e-4)
    assert (expected - before).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_a_checkpoint_the_weights_stay(record, dtype):
    """Whatever type they would have been trained in; bfloat16 rounded them."""
    own = dict(load_student(record, short()).named_parameters())
    weights = finished_weights(record, short(dtype=dtype), None)
    assert all(torch.equal(weights[name], parameter) for name, parameter in own.items())


def test_matrices_are_added_to_the_weights_as_they_are_stored(record, tmp_path):
    """What no matrix stands beside keeps its bits, and the others are not rounded to the type of the training."""
    params = short(method="lora", dtype="bfloat16")
    trained = prepare(load_student(record, params), params)
    write_checkpoint(tmp_path, trained, scale=1e-3)
    own = dict(load_student(record, short()).named_parameters())
    weights = finished_weights(record, params, tmp_path)
    maps = {name.partition(".lora_")[0].removeprefix("base_model.model.") for name in trained_parameters(trained)}
    for name, parameter in own.items():
        if name.removesuffix(".weight") in maps:
            assert not torch.equal(weights[name], weights[name].bfloat16().float())
        else:
            assert torch.equal(weights[name], parameter)


def test_lora_trains_matrices_beside_the_maps_that_are_named(record):
    maps = [name for name, module in load_student(record, short()).named_modules() if name.endswith("_proj")]
    ending = maps[0].rpartition(".")[2] if maps else "c_proj"
    params = short(method="lora", lora_targets=[ending], lora_rank=2)
    names = trained_parameters(prepare(load_student(record, params), params))
    assert names
    assert all(f".{ending}.lora_" in name for name in names)
    assert {parameter.shape["lora_B" in name] for name, parameter in names.items()} == {2}


@pytest.mark.parametrize("place", [0, 1])
def test_matrices_beside_a_head_that_is_the_embedding_are_refused(record, place):
    student = load_student(record, short())
    both = [
        name for name, module in student.named_modules() if getattr(module, "weight", None) is student.lm_head.weight
    ]
    named, other = both[place], both[1 - place]
    with pytest.raises(LibpruneError, match=rf"^recover\.lora_targets names {named}, whose weight is that of {other} "):
        prepare(student, short(method="lora", lora_targets=[named.rpartition(".")[2]]))


def test_a_vision_part_is_not_trained_and_stays_as_it_is_stored(tmp_path, quick_proof):
    record = read_record(write_pruned_layout(tmp_path, "qwen3_vl", "uniform").pruned)
    student, lora = load_student(record, short()), short(method="lora")
    vision = {name for name, _ in student.named_parameters() if name.startswith("model.visual.")}
    assert len(vision) > 20
    assert trained_parameters(prepare(student, short())).keys() == dict(student.named_parameters()).keys() - vision
    beside = trained_parameters(prepare(load_student(record, lora), lora))
    assert not any("visual" in name for name in beside)
    assert len([name for name in beside if "language_model" in name and "lora_B" in name]) == 4 * 7
    rough = short(dtype="bfloat16")  # in which the weights of the vision part are others
    weights, stored = finished_weights(record, rough, None), dict(load_student(record, short()).named_parameters())
    assert all(torch.equal(weights[name], stored[name]) for name in vision)


def test_a_map_that_does_not_exist_is_named(record):
    params = short(method="lora", lora_targets=["no_such_map"])
    with pytest.raises(LibpruneError, match=r"recover\.lora_targets: .*no_such_map"):
        prepare(load_student(record, params), params)


def test_a_checkpoint_of_other_parameters_is_refused(record, tmp_path):
    params = short(method="lora")
    write_checkpoint(tmp_path, prepare(load_student(record, short()), short()))
    with pytest.raises(LibpruneError, match="does not fit the model that is trained"):
        read_weights(prepare(load_student(record, params), params), tmp_path)


def test_lora_without_its_package_says_how_to_install_it(record, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(LibpruneError, match=r"pip install 'libprune\[lora\]'"):
        prepare(load_student(record, short()), short(method="lora"))
