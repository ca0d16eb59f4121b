"""Language models inside models that read images: text alone is read, and the vision part stays whole."""

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from libprune.engine import cost
from libprune.engine.family import families
from libprune.engine.surgery import masked
from libprune.models.dialect import STOP
from libprune.models.folder import WeightFiles, load_config
from libprune.results.check import check_folder
from tests.support import tiny
from tests.support.models import TOWERS, VOCAB, Dense, Pruned, prune, random_plan, tokens, write_dense

IMAGE = VOCAB - 1
"""The token that stands for a piece of an image."""
QWEN = ("qwen3_vl", "qwen2_5_vl")


@pytest.fixture(scope="module", params=TOWERS)
def dense(request, tmp_path_factory) -> Dense:
    return write_dense(TOWERS[request.param](0), tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module", params=["uniform", "shallow"])
def pruned(request, dense, tmp_path_factory) -> Pruned:
    if request.param == "shallow" and dense.architecture.layers_stay:
        pytest.skip("no layer of this family can be deleted")
    plan = random_plan(dense.architecture, request.param)
    return prune(dense, plan, False, tmp_path_factory.mktemp("pruned"))


def picture(model: nn.Module) -> dict[str, Tensor]:
    """A random image of 4 by 4 pixels between words, as the processor of the model's type gives it."""
    pixels = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    kind, pieces = model.config.model_type, 1
    if kind in QWEN:  # 2 by 2 patches, each of two frames of 2 by 2 pixels
        given = {"pixel_values": pixels.repeat(1, 2, 1, 1).view(4, 24), "image_grid_thw": torch.tensor([[1, 2, 2]])}
    elif kind in {"idefics3", "smolvlm"}:
        given = {"pixel_values": pixels[None]}
    elif kind == "mistral3":
        given, pieces = {"pixel_values": pixels.repeat(1, 1, 2, 1), "image_sizes": torch.tensor([[8, 4]])}, 2
    else:
        given, pieces = {"pixel_values": pixels}, 4 if kind == "llava" else 1
    ids = torch.tensor([[3, 5, *[IMAGE] * pieces, 7, 4, 9, 2]])
    if kind in {*QWEN, "gemma3"}:
        given["mm_token_type_ids" if kind in QWEN else "token_type_ids"] = (ids == IMAGE).long()
    return {"input_ids": ids, **given}


def seen(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The logits of a pass with an image, and everything that the modules that stay whole gave in it."""
    gave: list[Tensor] = []
    handles = [
        model.get_submodule(path).register_forward_hook(lambda module, args, output: gave.extend(tensors(output)))
        for path in families_of(model).tower.untouched
    ]
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # weights read from a file lie anywhere, and sums are rounded by that
    try:
        with torch.no_grad():
            return model(**inputs).logits, gave
    finally:
        for handle in handles:
            handle.remove()


def families_of(model: nn.Module):
    (family,) = [f for f in families().values() if model.config.model_type in f.model_types]
    return family


def tensors(output: object) -> Iterator[Tensor]:
    """The tensors in what a module returns."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict | list | tuple):
        for inner in output.values() if isinstance(output, dict) else output:
            yield from tensors(inner)


def test_with_an_image_sliced_equals_masked_and_the_vision_part_gives_the_same_bytes(pruned):
    inputs = picture(pruned.model)
    with masked(pruned.dense.model, pruned.dense.architecture, pruned.plan):
        expected, whole = seen(pruned.dense.model, inputs)
    found, same = seen(pruned.model, inputs)
    assert len(same) == len(whole) >= len(families_of(pruned.model).tower.untouched)
    assert all(map(torch.equal, same, whole))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    blind = {**inputs, "pixel_values": 1 - inputs["pixel_values"]}
    assert not torch.allclose(seen(pruned.model, blind)[0], found, atol=1e-3), "the image says nothing"


def test_the_vision_part_and_all_of_its_config_are_as_they_were(pruned):
    before, after = WeightFiles(pruned.dense.folder), dict(pruned.model.named_parameters())
    family = families()[pruned.dense.architecture.family]
    whole = [name for name in before if family.untouched(name)]
    assert len(whole) > 20
    assert all(torch.equal(after[name], before[name]) for name in whole)
    dense, config = load_config(pruned.dense.folder).to_dict(), load_config(pruned.folder).to_dict()
    nested = family.tower.config
    assert {key for key in dense if config[key] != dense[key]} <= {nested, "_name_or_path"}
    sized = {*family.config.sizes, *family.config.per_layer_lists, family.config.layers}
    sized |= {"rope_parameters", "tie_word_embeddings"}  # which are said in two ways
    assert {key for key in dense[nested] if config[nested][key] != dense[nested][key]} <= sized
    assert config[nested]["hidden_size"] == dense[nested]["hidden_size"]


def test_it_is_as_large_as_predicted_and_writes_on_text_alone(pruned):
    size, ids = cost.size(pruned.dense.architecture, pruned.plan), tokens(length=8)
    assert size.total == sum(p.numel() for p in pruned.model.parameters())
    whole = sum(p.numel() for p in pruned.dense.model.parameters())
    assert whole - size.total == pruned.dense.architecture.decoder_parameters - size.decoder > 0
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    text = pruned.model.generate(ids, **options)
    assert text.shape == (2, 13)
    assert torch.equal(pruned.model.generate(ids, use_cache=False, **options), text)


def test_the_nested_config_says_to_transformers_4_what_the_whole_one_says_to_5(pruned):
    written = json.loads((pruned.folder / "config.json").read_text())
    nested = written["text_config"]
    assert nested["tie_word_embeddings"] is written["tie_word_embeddings"]
    assert nested["rope_theta"] > 0
    assert not written.keys() & STOP.keys()
    assert not nested.keys() & STOP.keys()
    if pruned.model.config.model_type in QWEN:
        assert nested["rope_scaling"]["mrope_section"] == nested["rope_parameters"]["mrope_section"]


# The whole pipeline

STAGES = ("prepare", "tokenize", "gradients", "hessian", "activations", "ablation", "latency", "score", "sensitivity")
STAGES += ("levels", "allocate", "slice", "teacher", "recover", "export", "evaluate")
"""All but the report, which reads no model."""
PROCESSOR = {"preprocessor_config.json": '{"size": 4}\n', "processor_config.json": "{ }\n", "chat_template.json": "{}"}


def write_source(folder: Path, name: str) -> Path:
    """The folder of a tiny model, with a tokenizer and files of a processor."""
    TOWERS[name](0).save_pretrained(folder)
    tiny.write_tokenizer(folder)
    for file, text in PROCESSOR.items():
        (folder / file).write_text(text)
    return folder


def test_every_stage_runs_on_text_and_the_vision_part_comes_out_as_it_went_in(tmp_path, monkeypatch, quick_proof):
    """In training too, whose weight decay and type of weights would otherwise change it."""
    monkeypatch.chdir(tmp_path)
    source, text = write_source(tmp_path / "source", "gemma3_vision"), tiny.write_text(tmp_path / "text.txt", 120)
    tiny.write_params(
        tmp_path / "params.yaml",
        str(source),
        str(text),
        allocate={"ratio": 0.2, "method": "uniform"},
        slice={"repair": "sequential"},
        recover={"method": "full", "dtype": "bfloat16", "weight_decay": 0.1, "learning_rate": 1e-3},
        export={"formats": ["transformers"], "pad_channels": 8},
        ablation={"units": 2, "sequences": 4},
    )
    for stage in STAGES:
        import_module(f"stages.{stage}").main()
    dense = WeightFiles(source)
    vision = [name for name in dense if name.startswith(("vision_tower", "multi_modal_projector"))]
    assert len(vision) > 20
    for folder in (Path("artifacts/pruned"), Path("artifacts/recovered"), Path("artifacts/exported/transformers")):
        written = WeightFiles(folder)
        assert all(torch.equal(written[name], dense[name]) for name in vision), folder
        assert all((folder / file).read_text() == content for file, content in PROCESSOR.items())
    pruned, recovered = (WeightFiles(Path("artifacts", name)) for name in ("pruned", "recovered"))
    down = "language_model.model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(pruned[down], recovered[down])
    assert {one.kind for one in check_folder(Path("artifacts/pruned"), dense=Path("artifacts/model"))} == {"ok", "note"}
    found = json.loads(Path("artifacts/evaluation.json").read_text())
    assert found["model"] | {"head": "image_text_to_text", "type": "gemma3"} == found["model"]
    assert found["pruned"]["decode"] is not None
    assert found["pruned"]["draft"] is not None
    card = Path("artifacts/recovered/README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    assert "processor = AutoProcessor.from_pretrained(name)" in card
    assert "The part that reads images is that of the dense model." in card
