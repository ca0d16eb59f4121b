"""The plans that a search starts from."""

from hypothesis import given, settings
from hypothesis import strategies as st

from libprune.allocation.ladders import plan_of, spent
from libprune.allocation.methods import Depth
from libprune.allocation.search import rival_starts
from libprune.pipeline.methods import RIVALS
from libprune.pipeline.sections import Allocate
from tests.support.searching import SHAPE, CountingJudge, asked, cases, search, start_of


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
