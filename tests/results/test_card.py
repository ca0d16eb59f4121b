"""The model card: a head that hubs read, lines that load the model, and what was measured; no place on this machine."""

import json
import os
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from libprune.engine.errors import ArtifactError
from libprune.engine.plan import Plan
from libprune.models.folder import load_model
from libprune.models.origin import CARD, Origin
from libprune.pipeline.artifacts import read_architecture
from libprune.pipeline.atomic import write_json
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Compute, Slice
from libprune.results.card import card_text, origin_of, write_card
from libprune.results.prune import prune
from libprune.results.record import PLAN, PROVENANCE, read_provenance
from tests.support import evaluated, tiny
from tests.support.models import tokens
from tests.support.sliced import write_collected, write_plan, write_trained

HUB = Origin("SmolLM2-135M", "apache-2.0", "HuggingFaceTB/SmolLM2-135M")
LOCAL = Origin("My-Model", None, None)
SHAPES = {"uniform": ("llama", "uniform"), "per_layer": ("llama", "holes"), "encoder": ("bert", "uniform")}


def sliced(root: Path, shape: str, origin: Origin = HUB) -> Layout:
    """A pruned folder with a tokenizer and an origin."""
    layout, _ = write_collected(root, *SHAPES[shape], tiny.write_tokenizer)
    write_json(layout.origin, vars(origin) | {"model": read_architecture(layout).fingerprint})
    layout.pruned.mkdir()
    prune(layout, layout.pruned, Compute(device="cpu", dtype="float32"), Slice(repair="none"))
    return layout


@pytest.fixture(params=SHAPES)
def layout(request, tmp_path, quick_proof) -> Layout:
    return sliced(tmp_path, request.param)


def head_of_card(text: str) -> dict[str, Any]:
    head, _, rest = text.removeprefix("---\n").partition("\n---\n")
    assert rest.lstrip().startswith("# ")
    return yaml.safe_load(head)


def test_its_head_says_what_hubs_ask_for(layout):
    encoder = "mlm" if "bert" in (layout.pruned / "config.json").read_text() else ""
    assert head_of_card((layout.pruned / CARD).read_text()) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "fill-mask" if encoder else "text-generation",
        "tags": ["libprune", "pruning"],
    }


def test_its_lines_load_the_model_and_the_tokenizer(layout, monkeypatch):
    text = (layout.pruned / CARD).read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(layout.pruned)
    names: dict[str, Any] = {}
    exec(program, names)
    remote = "trust_remote_code" in program
    assert remote is (layout.pruned / "modeling_pruned.py").exists()
    expected = load_model(layout.pruned, torch.float32, trust_remote_code=remote)
    with torch.no_grad():
        assert torch.equal(names["model"](tokens()).logits, expected(tokens()).logits)
    assert names["tokenizer"]("the cat").input_ids == [2, 4]


def test_it_says_what_is_left_of_what(layout):
    text, made = (layout.pruned / CARD).read_text(), read_provenance(layout.pruned)
    remote = made["plan"]["shape"] == "per_layer"
    model = load_model(layout.pruned, torch.float32, trust_remote_code=remote)
    everything = sum(parameter.numel() for parameter in model.parameters())
    dense = sum(parameter.numel() for parameter in load_model(layout.model, torch.float32).parameters())
    assert f"| parameters | {dense:,} | {everything:,} |" in text
    sizes = made["parameters"]
    assert (sizes["dense"]["all"], sizes["pruned"]["all"]) == (dense, everything)
    assert f"{100 * (1 - sizes['pruned']['decoder'] / sizes['dense']['decoder']):.1f} % of the parameters" in text
    assert f"at most {made['proof']['logit_difference']:.1e} of {made['proof']['logit_scale']:.1f}" in text


def test_a_model_that_is_pruned_again_says_what_is_gone_of_the_first_one(tmp_path, quick_proof):
    layout = sliced(tmp_path, "uniform")
    made = read_provenance(layout.pruned)
    left = made["parameters"]["pruned"]["decoder"]
    assert "pruned before" not in card_text(layout.pruned)
    for cuts, told in ((1, "1 cut."), (2, "2 cuts.")):
        origin = vars(HUB) | {"cuts": cuts, "decoder": 4 * left}
        write_json(layout.pruned / PROVENANCE, made | {"origin": origin})
        text = card_text(layout.pruned)
        assert "without 75.0 % of the parameters of its layers. The last cut removed whole units: " in text
        assert f"It had been pruned before, in {told} All that follows is about the last cut" in text


def test_it_names_what_was_removed_and_nothing_else(tmp_path, quick_proof):
    """All sixteen sets of layers, columns, groups and channels."""
    layout = sliced(tmp_path, "uniform")
    path, made = layout.pruned / PLAN, read_provenance(layout.pruned)
    architecture = read_architecture(layout)
    phrases = {
        "layers": "1 of 4 layers",
        "columns": "8 of 32 columns of the residual stream",
        "attention": "attention groups, each a key-value head with its query heads",
        "mlp": "MLP channels",
    }
    for chosen in (set(some) for number in range(5) for some in combinations(phrases, number)):
        keep = {block: units.copy() for block, units in Plan.dense(architecture).keep.items()}
        for (layer, part), units in keep.items():
            units[: 1 if part in chosen and layer == 0 else 0] = False
            units[:] &= not ("layers" in chosen and layer == 2)
        write_plan(path, architecture, Plan(keep), "uniform")
        columns = {"columns": {"before": 32, "after": 24}} if "columns" in chosen else {}
        write_json(layout.pruned / PROVENANCE, made | columns)
        said = card_text(layout.pruned).partition("removed whole units: ")[2].partition(". So the matrices")[0]
        assert said.split("; ") == ([phrases[name] for name in phrases if name in chosen] or ["none"])


def test_what_is_not_known_of_the_base_model_is_left_out(tmp_path, quick_proof):
    layout = sliced(tmp_path, "uniform", LOCAL)
    text = (layout.pruned / CARD).read_text()
    assert not head_of_card(text).keys() & {"license", "base_model"}
    assert "derived from `My-Model`, whose licence applies to it." in text
    assert origin_of(layout.pruned) == LOCAL


def test_no_file_of_a_folder_names_a_place_on_the_machine_that_made_it(tmp_path, quick_proof):
    layout = sliced(tmp_path, "uniform")
    for path in layout.pruned.iterdir():
        if path.suffix != ".py":
            assert os.fsencode(tmp_path) not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/texts/mine.txt", "mine.txt"),
        ("~/mine.txt (50 %), ./data/other.txt (50 %)", "mine.txt (50 %), other.txt (50 %)"),
        ("package://some_package/texts/mine.txt", "mine.txt"),
        ("HuggingFaceFW/fineweb-edu", "HuggingFaceFW/fineweb-edu"),
        ("wikitext2", "wikitext2"),
    ],
)
def test_a_trained_model_says_so_without_the_place_of_its_text(tmp_path, quick_proof, text, shown):
    layout = sliced(tmp_path, "uniform")
    write_trained(layout.pruned, layout.recovered)
    data = read_provenance(layout.recovered)
    data["recovery"] |= {"text": text}
    (layout.recovered / PROVENANCE).write_text(json.dumps(data))
    write_card(layout.recovered)
    card = (layout.recovered / CARD).read_text()
    assert "# SmolLM2-135M, pruned and trained" in card
    assert f"`full` on 40,960 tokens of {shown}, to predict what the dense model predicts" in card
    assert "0.5000 before and 0.4000 after" in card
    assert "pruned model with the trained weights in memory" in card
    assert head_of_card(card) == head_of_card((layout.pruned / CARD).read_text())
    assert "no step lowered it" not in card


def test_a_training_that_lowered_no_loss_is_told_so(tmp_path, quick_proof):
    layout = sliced(tmp_path, "uniform")
    write_trained(layout.pruned, layout.recovered)
    data = read_provenance(layout.recovered)
    data["recovery"] |= {"step": 0}
    (layout.recovered / PROVENANCE).write_text(json.dumps(data))
    card = card_text(layout.recovered)
    assert "# SmolLM2-135M, pruned\n" in card
    assert "no step lowered it, so the weights are those before the training" in card


def test_figures_come_with_their_text_and_tokens(tmp_path, quick_proof):
    layout = sliced(tmp_path, "uniform")
    text = card_text(layout.pruned, evaluated.changed(protocol={"text": "/home/me/mine.txt"}))
    assert "| dense | 20.74 ± 0.31 |\n| pruned | 26.37 ± 0.41 |\n\n" in text
    assert "On 24 windows of 1,024 tokens of mine.txt, in bfloat16, ± one standard error." in text
    assert "| pruned and trained | 23.46 ± 0.33 |" in card_text(layout.pruned, evaluated.trained())
    assert "## Figures" not in (layout.pruned / CARD).read_text()


def test_a_folder_of_an_older_version_is_refused(tmp_path):
    write_json(tmp_path / PROVENANCE, {"plan": {"shape": "uniform", "model": "m"}, "slice": {"repair": "none"}})
    with pytest.raises(ArtifactError, match="says nothing of the model's origin; run `dvc repro slice`"):
        origin_of(tmp_path)
