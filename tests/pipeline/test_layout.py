"""The paths of artifacts are those that dvc.yaml declares."""

from pathlib import Path

import yaml

from libprune.pipeline.layout import Layout, Place
from tests.support.closure import ROOT

PLACES = [name for name, value in vars(Layout).items() if isinstance(value, Place)]


def declared() -> set[Path]:
    """What the stages of dvc.yaml put below artifacts/."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].values()
    outs = [out if isinstance(out, str) else next(iter(out)) for stage in stages for out in stage.get("outs", [])]
    return {Path(out) for out in outs if out.startswith("artifacts/")}


def test_every_place_is_an_output_of_a_stage_or_lies_in_one_or_holds_some():
    outs = declared()
    for name in PLACES:
        place = getattr(Layout(), name)
        assert {place, *place.parents} & outs or any(place in out.parents for out in outs), name


def test_every_output_is_a_place_or_the_folder_of_places_or_lies_in_one():
    places = [getattr(Layout(), name) for name in PLACES]
    for out in declared():
        assert any(out in {place, *place.parents} or place in out.parents for place in places), out


def test_no_two_artifacts_lie_in_one_place_and_all_lie_below_the_root(tmp_path):
    places = {getattr(Layout(tmp_path), name) for name in PLACES}
    assert len(places) == len(PLACES)
    assert all(tmp_path in place.parents for place in places)
