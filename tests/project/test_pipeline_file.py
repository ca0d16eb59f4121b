"""The pipeline of a project is that of the repository, on installed code."""

import yaml

from libprune.project.pipeline_file import CODE, PACKAGE, code_paths, is_current, is_untouched, pipeline_text
from tests.support.closure import ROOT

OWN = yaml.safe_load((ROOT / "dvc.yaml").read_text())
PROJECT = yaml.safe_load(pipeline_text())


def test_stages_differ_in_nothing_but_where_their_code_lies():
    assert [*PROJECT["stages"]] == ["code", *OWN["stages"]]
    assert PROJECT["plots"] == OWN["plots"]
    for name, stage in OWN["stages"].items():
        ours = PROJECT["stages"][name]
        assert ours["cmd"] == stage["cmd"].replace(f"stages.{name}", f"libprune.stages.{name}")
        assert len(ours["deps"]) == len(stage["deps"])
        for here, there in zip(ours["deps"], stage["deps"], strict=True):
            code = there.startswith(("libprune/", "stages/"))
            assert here.startswith(f"{CODE}/") if code else here == there
        assert {**ours, "cmd": 0, "deps": 0} == {**stage, "cmd": 0, "deps": 0}


def test_every_link_is_made_by_the_first_stage_and_leads_to_the_code_that_the_repository_declares():
    made = {next(iter(out)): next(iter(out.values())) for out in PROJECT["stages"]["code"]["outs"]}
    assert all(kind == {"cache": False, "persist": True} for kind in made.values())
    used = {dep for stage in PROJECT["stages"].values() for dep in stage.get("deps", ()) if dep.startswith(CODE)}
    assert used == made.keys() == {f"{CODE}/{name}" for name in code_paths()}
    declared = {ROOT / dep for stage in OWN["stages"].values() for dep in stage["deps"]}
    assert set(code_paths().values()) <= declared
    assert all(path.exists() for path in code_paths().values())


def test_dvc_finds_one_pipeline_in_the_repository():
    """It would run any dvc.yaml that lies in a folder below."""
    assert list(PACKAGE.rglob("dvc.yaml")) == []


def test_a_pipeline_knows_its_version_and_whether_somebody_has_changed_it():
    text = pipeline_text()
    assert is_current(text)
    assert is_untouched(text)
    assert is_current(text + "# mine\n")
    assert not is_untouched(text + "# mine\n")
    older = text.replace("Pipeline ", "Pipeline 0", 1)
    assert not is_current(older)
    assert not is_untouched(older)
