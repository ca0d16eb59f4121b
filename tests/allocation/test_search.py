"""The search over whole plans with made-up judges, and the real judge on a tiny model against a direct computation."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from libprune.allocation.ladders import plan_of, spent
from libprune.allocation.methods import Depth
from libprune.allocation.search import Judge, Refined, rival_starts
from libprune.engine.architecture import Architecture
from libprune.engine.describe import describe
from libprune.engine.plan import Plan
from libprune.engine.surgery import masked
from libprune.engine.tables import split_blocks
from libprune.models.sequences import Sequences
from libprune.pipeline.methods import RIVALS
from libprune.pipeline.sections import Allocate
from libprune.pipeline.shards import GRAM
from libprune.repair.least_squares import Inputs, new_parameters, repair_local
from tests.support.collected import activations, assert_untouched
from tests.support.models import FAMILIES, random_plan, tokens
from tests.support.searching import SHAPE, CountingJudge, asked, cases, search, start_of
from tests.support.shapes import removed_parameters


@settings(max_examples=25)
@given(cases, st.integers(0, 99), st.booleans())
def test_the_result_is_never_worse_than_the_start_and_is_the_best_plan_that_was_measured(case, seed, interacting):
    params, judge = asked(**case), CountingJudge(SHAPE, seed, interacting)
    ladders, depth, _ = start_of(SHAPE, params, seed)
    found = search(judge, params, seed)
    assert found.starts["search"] == judge.value(plan_of(SHAPE.architecture(), ladders, depth))
    assert found.divergence == judge.value(plan_of(SHAPE.architecture(), ladders, found.depth))
    assert found.divergence == min(map(judge.value, judge.seen)) <= found.starts["search"]


@settings(max_examples=25)
@given(cases, st.integers(0, 99))
def test_no_plan_that_is_measured_passes_the_target_or_the_limits(case, seed):
    params, judge = asked(**case), CountingJudge(SHAPE, seed, interacting=True)
    target = start_of(SHAPE, params, seed)[2]
    rng = np.random.default_rng(seed)
    scores = SHAPE.table(1.0 + rng.permutation(len(SHAPE.unit_costs())))
    search(judge, params, seed)
    for plan in judge.seen:
        assert removed_parameters(SHAPE, plan) <= target
        assert params.may_empty or plan.layers == tuple(range(SHAPE.layers))
        for (layer, part), score in split_blocks(SHAPE.architecture(), scores["score"]):
            keep = plan.keep[layer, part]
            if layer not in SHAPE.unfrozen(params):
                assert keep.all()
            assert keep.sum() >= (params.min_groups if part == "attention" else params.min_channels)
            assert part == "attention" or keep.all() or keep.sum() % params.channel_multiple == 0
            assert keep.all() or not keep.any() or score[~keep].max() < score[keep].min()


@pytest.mark.parametrize("interacting", [False, True])
def test_what_the_judge_says_is_followed_where_the_curves_were_wrong(interacting):
    """The curves were made up apart from the judge, so a search that listens to it finds much better plans."""
    found = [search(CountingJudge(SHAPE, seed, interacting), asked(evaluations=200), seed) for seed in range(4)]
    assert all(one.divergence < one.starts["search"] for one in found)
    assert sum(one.divergence for one in found) < 0.9 * sum(one.starts["search"] for one in found)


def test_the_same_seed_gives_the_same_search_and_another_one_another():
    judges = [CountingJudge(SHAPE, 0) for _ in range(3)]
    found = [search(judge, asked(seed=seed)) for judge, seed in zip(judges, (0, 0, 1), strict=True)]
    assert found[0] == found[1]
    assert judges[0].keys == judges[1].keys != judges[2].keys


@pytest.mark.parametrize("evaluations", [0, 1, 17])
def test_trials_are_counted_and_no_plan_is_measured_twice(evaluations):
    judge = CountingJudge(SHAPE, 0)
    found = search(judge, asked(evaluations=evaluations))
    assert found.evaluations == evaluations
    assert len(judge.keys) == len(set(judge.keys)) <= 1 + evaluations


def test_where_nothing_can_move_the_start_is_measured_once():
    judge = CountingJudge(SHAPE, 0)
    found = search(judge, asked(min_groups=4, min_channels=8, ratio=0.99))
    assert (len(judge.seen), found.evaluations, found.divergence) == (1, 30, found.starts["search"])


# Time and interruptions


def test_time_ends_the_search(monkeypatch):
    """A clock that says 10 s more at each look: the end is set at 0 s, looks at 10 to 50 s are within the minute."""
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr("libprune.allocation.search.time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    assert search(CountingJudge(SHAPE, 0), asked(evaluations=100, minutes=1.0)).evaluations == 5


def test_without_minutes_no_time_ends_it(monkeypatch):
    clock = iter(range(0, 10**9, 10**6))
    monkeypatch.setattr("libprune.allocation.search.time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    assert search(CountingJudge(SHAPE, 0), asked(evaluations=20)).evaluations == 20


def interrupted(record: Path, stop: int) -> CountingJudge:
    """The judge of a run that stopped after so many plans of its own."""
    judge = CountingJudge(SHAPE, 0, interacting=True, stop=stop)
    with pytest.raises(KeyboardInterrupt):
        search(judge, asked(), record=record)
    return judge


def uninterrupted() -> tuple[CountingJudge, Refined]:
    judge = CountingJudge(SHAPE, 0, interacting=True)
    return judge, search(judge, asked())


@pytest.mark.parametrize("stop", [0, 1, 7, 12])
def test_an_interrupted_search_goes_on_and_measures_nothing_again(tmp_path, stop):
    whole, expected = uninterrupted()
    record = tmp_path / "record.jsonl"
    before, after = interrupted(record, stop), CountingJudge(SHAPE, 0, interacting=True)
    assert search(after, asked(), record=record) == expected
    assert before.keys + after.keys == whole.keys
    again = CountingJudge(SHAPE, 0, interacting=True)
    assert search(again, asked(), record=record) == expected
    assert not again.seen


@pytest.mark.parametrize("cut", [1, 2, 20, 50])
def test_a_record_whose_last_line_was_cut_off_serves_but_for_that_line(tmp_path, cut):
    whole, expected = uninterrupted()
    record = tmp_path / "record.jsonl"
    interrupted(record, 7)
    text = record.read_text()
    assert len(text.splitlines()) == 7
    record.write_text(text[:-cut])
    after = CountingJudge(SHAPE, 0, interacting=True)
    assert search(after, asked(), record=record) == expected
    lost = 0 if cut == 1 else 1
    assert after.keys == whole.keys[7 - lost :]


def test_what_is_measured_after_a_cut_line_is_kept_as_well(tmp_path):
    record = tmp_path / "record.jsonl"
    interrupted(record, 7)
    record.write_text(record.read_text()[:-20])
    search(CountingJudge(SHAPE, 0, interacting=True), asked(), record=record)
    again = CountingJudge(SHAPE, 0, interacting=True)
    search(again, asked(), record=record)
    assert not again.seen


def test_the_record_holds_a_line_for_every_plan(tmp_path):
    record = tmp_path / "record.jsonl"
    judge = CountingJudge(SHAPE, 0)
    search(judge, asked(), record=record)
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [line["divergence"] for line in lines] == [judge.value(plan) for plan in judge.seen]
    assert len({line["plan"] for line in lines}) == len(lines)


# The judge


@pytest.fixture(scope="module")
def llama() -> SimpleNamespace:
    """A tiny model, its description, token ids, and the local repair of any plan from the model's own statistics."""
    model, ids = FAMILIES["llama"](0), tokens(5, 12)
    with torch.no_grad():
        model.model.norm.weight.mul_(20)  # predictions sure enough for divergences far above rounding
    architecture = describe(model)
    return SimpleNamespace(model=model, architecture=architecture, ids=ids, repair=repair_of(model, architecture, ids))


def repair_of(model: torch.nn.Module, architecture: Architecture, ids: Tensor) -> Callable[[Plan], dict[str, Tensor]]:
    sums, dense = activations(model, ids=ids), {k: v.clone() for k, v in model.state_dict().items()}
    layers = [sums.finish(layer) for layer in range(architecture.layers)]

    def repair(plan: Plan) -> dict[str, Tensor]:
        inputs = lambda consumer: Inputs(layers[consumer.layer][consumer.module + GRAM])  # noqa: E731
        return new_parameters(repair_local(architecture, plan, dense.__getitem__, inputs, 0.01))

    return repair


def judge_of(llama: SimpleNamespace, at_once: int = 2) -> Judge:
    return Judge(llama.model, llama.architecture, Sequences(llama.ids), at_once, llama.repair)


def direct(llama: SimpleNamespace, plan: Plan) -> float:
    """KL of the next-token distributions, mean over all positions, from the logits of a repaired and masked copy."""
    changed = deepcopy(llama.model)
    changed.load_state_dict(changed.state_dict() | llama.repair(plan))
    with torch.no_grad(), masked(changed, llama.architecture, plan):
        log_p, log_q = (
            torch.log_softmax(model(input_ids=llama.ids, use_cache=False).logits.double(), -1)
            for model in (llama.model, changed)
        )
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def test_the_dense_plan_does_not_diverge(llama):
    assert judge_of(llama)(Plan.dense(llama.architecture)) == pytest.approx(0, abs=1e-6)


def test_a_plan_is_judged_by_the_divergence_of_the_masked_and_repaired_model(llama):
    judge = judge_of(llama)
    for seed, kind in enumerate(("uniform", "per_layer", "holes", "shallow", "per_layer")):
        plan = random_plan(llama.architecture, kind, seed)
        expected = direct(llama, plan)
        assert expected > 1e-4
        assert judge(plan) == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_a_plan_has_the_same_divergence_whatever_was_judged_before_and_however_many_sequences_run_at_once(llama):
    plans = [random_plan(llama.architecture, "per_layer", seed) for seed in range(3)]
    judge = judge_of(llama)
    for plan in (*plans, *plans[::-1]):
        assert judge(plan) == pytest.approx(judge_of(llama, at_once=5)(plan), rel=1e-3, abs=1e-6)


def test_the_repair_lowers_the_divergence(llama):
    plan = random_plan(llama.architecture, "uniform", 0)
    bare = Judge(llama.model, llama.architecture, Sequences(llama.ids), 2, lambda plan: {})
    assert judge_of(llama)(plan) < bare(plan)


def test_blocks_that_stay_as_they_were_are_not_repaired_again(llama):
    asked_for = []

    def repair(plan: Plan) -> dict[str, Tensor]:
        asked_for.append(plan)
        return llama.repair(plan)

    judge = Judge(llama.model, llama.architecture, Sequences(llama.ids), 2, repair)
    plan = random_plan(llama.architecture, "per_layer", 0)
    judge(plan)
    number = len(asked_for)
    fewer = plan.keep[1, "mlp"].copy()
    fewer[np.flatnonzero(fewer)[0]] = False
    judge(Plan({**plan.keep, (1, "mlp"): fewer}))
    assert len(asked_for) == number + 1


def test_the_model_is_afterwards_as_it_was(llama):
    before = {name: tensor.clone() for name, tensor in llama.model.state_dict().items()}
    judge = judge_of(llama)
    judge(random_plan(llama.architecture, "holes", 0))
    assert_untouched(llama.model)
    for name, tensor in llama.model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_model_is_as_it_was_after_a_stop_in_the_middle_too(llama, monkeypatch):
    before = {name: tensor.clone() for name, tensor in llama.model.state_dict().items()}
    judge = judge_of(llama)

    def stop(self, plan):
        assert any(not torch.equal(tensor, before[name]) for name, tensor in llama.model.state_dict().items())
        raise KeyboardInterrupt

    monkeypatch.setattr("libprune.statistics.losses.Prefix.losses_of", stop)
    with pytest.raises(KeyboardInterrupt):
        judge(random_plan(llama.architecture, "per_layer", 0))
    assert_untouched(llama.model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.model.state_dict().items())


def rivals_of(params: Allocate, seed: int) -> dict[str, Depth]:
    """Of the methods that need nothing measured, for the same target."""
    ladders, _, target = start_of(SHAPE, params, seed)
    evidence = SHAPE.evidence("search", seed) | SHAPE.evidence("functional", seed)
    return rival_starts(SHAPE.architecture(), ladders, target, params, evidence, RIVALS)


@settings(max_examples=25)
@given(cases, st.integers(0, 99))
def test_the_plans_of_other_methods_come_first_and_the_search_goes_on_from_the_best(case, seed):
    params, judge = asked(**case), CountingJudge(SHAPE, seed, interacting=True)
    ladders, depth, target = start_of(SHAPE, params, seed)
    rivals = rivals_of(params, seed)
    assert all(spent(ladders, rival) <= target for rival in rivals.values())
    found = search(judge, params, seed, rivals=rivals)
    value = {
        name: judge.value(plan_of(SHAPE.architecture(), ladders, d)) for name, d in {"search": depth, **rivals}.items()
    }
    tried = ["search", *RIVALS][: 1 + params.evaluations]
    assert found.starts == {name: value[name] for name in tried}
    assert found.divergence <= min(found.starts.values())
    if params.evaluations <= len(RIVALS):
        assert found.divergence == min(found.starts.values())


def test_a_rival_is_filled_up_to_the_target_as_far_as_the_plan_of_the_programme_is():
    for seed in range(5):
        params = asked()
        ladders, depth, target = start_of(SHAPE, params, seed)
        assert {target - spent(ladders, rival) for rival in rivals_of(params, seed).values()} == {
            target - spent(ladders, depth)
        }
