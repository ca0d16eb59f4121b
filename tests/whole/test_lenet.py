"""The LeNet example: what it trains, prunes, prints, saves and draws, on a short training."""

import subprocess

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from examples import lenet
from examples.lenet_picture import filters
from libprune.engine import cost
from libprune.engine.errors import LibpruneError
from libprune.engine.plan import Plan
from libprune.engine.surgery import masked
from libprune.networks import Network, load
from libprune.scoring.criteria import CRITERIA
from tests.support.closure import ROOT

EVERYWHERE = [name for name, criterion in CRITERIA.items() if criterion.only is None]
"""The criteria that are not about experts alone."""

CHANCE = 0.1


@pytest.fixture(scope="module")
def digits():
    """The parts of the digits, with 192 that are trained on."""
    found = lenet.load_digits(0)
    return lenet.Digits(found.train[:192], found.judge[:100], found.test[:200])


@pytest.fixture(scope="module")
def dense(digits):
    return lenet.train(digits.train, 0, epochs=8)


@pytest.fixture(scope="module")
def network(digits, dense, tmp_path_factory):
    return Network(dense, lenet.FAMILY, digits.calibration[:64], tmp_path_factory.mktemp("lenet"))


@pytest.fixture(scope="module")
def results(network):
    """What every criterion leaves of the network."""
    return [lenet.prune_by(network, criterion, 0.5) for criterion in EVERYWHERE]


def every(results):
    return [(result.criterion, repair, pruned) for result in results for repair, pruned in result.pruned.items()]


def test_the_parts_of_the_digits_are_disjoint_and_the_calibration_is_of_what_was_trained_on():
    found = lenet.load_digits(3)
    parts = [{image.numpy().tobytes() for image in part.inputs} for part in (found.train, found.judge, found.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 1797
    assert {image.numpy().tobytes() for image in found.calibration.inputs} <= parts[0]


def test_every_seed_orders_the_digits_in_its_own_way_and_in_the_same_again():
    first, again, other = (lenet.load_digits(seed).train.inputs for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_short_training_and_what_repair_leaves_of_it_are_better_than_chance(dense, digits, results):
    assert lenet.accuracy(dense, digits.test) > 5 * CHANCE
    for criterion, repair, pruned in every(results):
        if repair != "none":
            assert lenet.accuracy(pruned.network, digits.test) > 2 * CHANCE, (criterion, repair)


def test_every_network_is_as_large_as_was_asked_for_and_computes_what_the_masked_one_does(dense, digits, results):
    whole = sum(parameter.numel() for parameter in dense.parameters())
    for criterion, repair, pruned in every(results):
        actual = sum(parameter.numel() for parameter in pruned.network.parameters())
        largest = max(cost.unit_parameters(pruned.dense, *block) for block in pruned.dense.blocks())
        assert pruned.parameters == actual, criterion
        assert 0 <= actual - whole / 2 < largest, criterion
        if repair == "none":
            with masked(dense, pruned.dense, pruned.plan), torch.no_grad():
                expected = dense(digits.test.inputs)
            torch.testing.assert_close(pruned.network(digits.test.inputs), expected, rtol=1e-4, atol=1e-4)


def test_the_table_has_a_line_for_the_dense_network_and_one_for_every_criterion(results, dense, digits):
    _, _, *lines = lenet.table(results, dense, digits.test).splitlines()
    assert [line.split()[0] for line in lines] == ["dense", *EVERYWHERE]
    assert lines[0].split()[1] == f"{lenet.accuracy(dense, digits.test):.3f}"
    for line, result in zip(lines[1:], results, strict=True):
        assert result.kept in line
        assert f"{result.pruned['local'].parameters:,}" in line


def test_the_best_network_has_the_least_loss_on_the_digits_that_judge(results, digits):
    best, repair = lenet.best_of(results, digits.judge)
    losses = [lenet.mean_loss(pruned.network, digits.judge) for _, _, pruned in every(results)]
    assert lenet.mean_loss(best.pruned[repair].network, digits.judge) == min(losses)


def test_a_saved_network_loads_in_a_fresh_process_with_the_same_outputs(results, digits, python, tmp_path):
    pruned = results[0].pruned["sequential"]
    loaded = lenet.save(pruned, tmp_path / "saved", digits.test)
    assert loaded == lenet.accuracy(pruned.network, digits.test)
    torch.save(digits.test.inputs, tmp_path / "inputs.pt")
    arguments = [str(ROOT), *(str(tmp_path / name) for name in ("saved", "inputs.pt", "outputs.pt"))]
    subprocess.run([str(python), "-I", "-c", LOADING, *arguments], check=True, cwd=tmp_path)
    assert torch.equal(torch.load(tmp_path / "outputs.pt"), pruned.network(digits.test.inputs).detach())


LOADING = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from examples.lenet import LeNet
from libprune.networks import load
torch.set_num_threads(1)
network = load(Path(sys.argv[2]), LeNet())
torch.save(network(torch.load(sys.argv[3])).detach(), sys.argv[4])
"""


def test_the_picture_marks_as_many_filters_as_each_criterion_keeps(dense, network):
    generator = np.random.default_rng(0)
    plans = {}
    for name in ("one", "two", "three"):
        plan = Plan.dense(network.architecture)
        for keep in plan.keep.values():
            keep[:] = generator.random(len(keep)) < 0.5
        plans[name] = plan
    figure = filters(dense.conv1.weight, dense.conv2.weight, plans)
    assert len(figure.axes) == 2 * len(plans)
    for number, axes in enumerate(figure.axes):
        row, column = divmod(number, len(plans))
        keep = list(list(plans.values())[column].keep.values())[row]
        solid = [frame.get_linestyle() == "-" for frame in axes.patches]
        assert solid == keep.tolist()
        assert len(axes.images) == len(keep)
        assert axes.get_title("left").endswith(f"{keep.sum()} of {len(keep)}")


@pytest.mark.parametrize("ratio", ["0", "1", "-0.1", "1.5", "nan"])
def test_a_ratio_that_is_no_share_is_refused_before_any_work(ratio, tmp_path):
    with pytest.raises(LibpruneError, match="above 0 and below 1"):
        lenet.demo(tmp_path / "out", float(ratio), 0, 1)
    assert not (tmp_path / "out").exists()


def test_the_command_says_in_one_line_what_is_wrong_with_a_ratio(tmp_path):
    app = lenet.typer.Typer()
    app.command()(lenet.main)
    found = CliRunner().invoke(app, ["--ratio", "1.5", "--out", str(tmp_path / "out")])
    assert found.exit_code == 1
    assert found.stderr == "error: --ratio 1.5 is no share; give a number above 0 and below 1, such as 0.5\n"


def test_collecting_the_statistics_of_a_small_network_prints_nothing(network, dense, digits, tmp_path, capfd):
    again = Network(dense, lenet.FAMILY, digits.calibration[:16], tmp_path / "again")
    lenet.prune_by(again, "obs_fisher", 0.3)
    found = capfd.readouterr()
    assert found.out + found.err == ""


def test_folders_and_family_files_may_be_named_by_texts(dense, digits, tmp_path):
    network = Network(dense, str(lenet.FAMILY), digits.calibration[:16], str(tmp_path / "work"))
    pruned = lenet.prune_by(network, "magnitude", 0.3).pruned["none"]
    pruned.save(str(tmp_path / "saved"))
    loaded = load(str(tmp_path / "saved"), lenet.LeNet())
    assert torch.equal(loaded(digits.test.inputs), pruned.network(digits.test.inputs))
