"""What stages took: read from what they print, and found again by what they ran with."""

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from libprune.engine.errors import LibpruneError
from libprune.experiments.costs import (
    Cost,
    collecting_stages,
    cost_of,
    costs_of,
    lock_digest,
    lock_stages,
    printed_costs,
    pruning_stages,
    read_costs,
    recovering_stages,
    total,
    write_costs,
)
from libprune.pipeline import stage
from libprune.pipeline.params import PRESETS, validate_params
from tests.support.params import untrained

DATA = untrained()
LOCK = yaml.safe_dump({"stages": {name: {"cmd": name} for name in ("gradients", "score", "slice")}})
LOG = """\
Stage 'prepare' didn't change, skipping
Running stage 'gradients':
> python -m stages.gradients
gradients: 12.5 s, peak memory 1,234 MB
Running stage 'score':
score: 0.5 s, peak memory 300 MB
Running stage 'slice':
continues from a saved state
slice: 0.1 s, peak memory 200 MB
Running stage 'report':
score: 9.9 s, peak memory 1 MB
"""


def test_stages_that_ran_whole_are_read_with_their_own_lines():
    assert printed_costs(LOG) == {"gradients": Cost(12.5, 1_234_000_000), "score": Cost(0.5, 300_000_000)}


def test_what_a_stage_prints_at_its_end_is_what_is_read(capsys):
    """The line comes from the stage's own code."""

    def main() -> None:
        """Do nothing."""

    main.__module__ = "stages.score"
    with pytest.raises(SystemExit) as ended:
        stage.app(main)([])
    assert ended.value.code == 0
    printed = printed_costs("Running stage 'score':\n" + capsys.readouterr().out)
    assert printed["score"].peak_memory_bytes == pytest.approx(stage.peak_memory(), rel=0.2)


def test_a_cached_stage_costs_what_it_cost_where_it_ran():
    costs = costs_of(LOG, LOCK)
    assert cost_of(("gradients", "score"), LOCK, costs) == Cost(13.0, 1_234_000_000)
    changed = yaml.safe_dump({"stages": lock_stages(LOCK) | {"score": {"cmd": "score", "params": {"seed": 1}}}})
    assert cost_of(("gradients",), changed, costs) == Cost(12.5, 1_234_000_000)
    assert cost_of(("gradients", "score"), changed, costs) is None
    assert cost_of(("gradients",), None, costs) is None
    assert cost_of((), LOCK, costs) == Cost(0.0, 0)


stage_costs = st.builds(Cost, st.floats(0, 1e6), st.integers(0, 10**12))


@given(st.lists(stage_costs))
def test_times_add_up_and_the_largest_memory_counts(costs):
    found = total(costs)
    assert found.seconds == pytest.approx(sum(cost.seconds for cost in costs))
    assert found.peak_memory_bytes == max([0, *(cost.peak_memory_bytes for cost in costs)])


@given(st.dictionaries(st.from_regex(r"[0-9a-f]{16}", fullmatch=True), stage_costs, max_size=4))
def test_a_record_reads_back_as_it_was_written(tmp_path_factory, costs):
    path = tmp_path_factory.mktemp("costs") / "costs.json"
    assert read_costs(path) == {}
    write_costs(path, costs)
    assert read_costs(path) == costs


@pytest.mark.parametrize("text", ["{", '{"a": {"minutes": 1}}', '{"a": 1}'])
def test_a_record_that_is_damaged_is_named(tmp_path, text):
    path = tmp_path / "costs.json"
    path.write_text(text)
    with pytest.raises(LibpruneError, match=r"costs\.json is no record of costs .*delete it"):
        read_costs(path)


def test_a_digest_changes_with_anything_in_the_entry():
    entry = {"cmd": "a", "params": {"x": 1}}
    assert lock_digest(entry) == lock_digest(json.loads(json.dumps(entry)))
    assert lock_digest(entry) != lock_digest({"cmd": "a", "params": {"x": 2}})


def params(**sections):
    return validate_params({k: {**v, **sections.get(k, {})} if isinstance(v, dict) else v for k, v in DATA.items()}, "")


@pytest.mark.parametrize(
    ("sections", "read"),
    [
        ({"score": {"criterion": "magnitude"}, "slice": {"repair": "none"}}, ()),
        ({"score": {"criterion": "wanda"}}, ("activations",)),
        ({"score": {"criterion": "taylor_2nd"}}, ("gradients", "hessian")),
        ({"score": {"criterion": "magnitude"}, "slice": {"repair": "local"}}, ("activations",)),
        (
            {"score": {"criterion": "magnitude"}, "slice": {"repair": "local", "fisher_share": 0.5}},
            ("gradients", "activations"),
        ),
        ({"score": {"criterion": "magnitude"}, "allocate": {"method": "functional"}}, ("activations",)),
        ({"score": {"criterion": "magnitude"}, "allocate": {"depth": "joint"}}, ("activations",)),
    ],
)
def test_what_a_setting_reads_follows_from_its_criterion_allocation_and_repair(sections, read):
    assert collecting_stages(params(**sections)) == read


@pytest.mark.parametrize("preset", PRESETS)
def test_only_stages_that_measure_for_the_method_are_counted(preset):
    settings = validate_params(DATA | {"preset": preset}, "")
    expected = {"search": ["levels"], "hgsp": ["sensitivity"]}.get(settings.allocate.method, [])
    assert pruning_stages(settings) == ("score", *expected, "allocate", "slice")


def test_the_order_of_whole_layers_is_counted():
    assert "depth" in pruning_stages(params(allocate={"depth": "cosine"}))


def test_only_settings_that_train_have_stages_of_recovery():
    assert recovering_stages(params()) == ()
    for method in ("lora", "full"):
        assert recovering_stages(params(recover={"method": method})) == ("teacher", "recover")
