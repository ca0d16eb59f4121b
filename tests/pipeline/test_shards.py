"""Shards: a layer's tensors come back with their origin, and what cannot be used is refused."""

from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from libprune.engine.errors import ArtifactError
from libprune.pipeline.atomic import writing_folder
from libprune.pipeline.shards import read_meta, read_tensor, shard_path, write_shard
from tests.support.files import tree


def test_a_layers_tensors_and_origin_come_back(tmp_path):
    turned = torch.arange(6.0).reshape(2, 3).T
    for layer in range(3):
        write_shard(tmp_path, layer, {"w": turned + layer}, {"model": "here"})
    assert torch.equal(read_tensor(tmp_path, 2, "w", "gradients"), turned + 2)
    assert read_meta(tmp_path, "gradients") == {"model": "here"}


def test_equal_content_gives_equal_bytes(tmp_path):
    tensors = {f"tensor{i}": torch.full((i + 1,), float(i)) for i in range(9)}
    backwards = dict(reversed(tensors.items()))
    metas = [{f"key{i}": i for i in order} for order in (range(9), reversed(range(9)))]
    for name, content, meta in zip(("one", "two"), (tensors, backwards), metas, strict=True):
        with writing_folder(tmp_path / name) as folder:
            write_shard(folder, 0, content, meta)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert len(tree(tmp_path / "one")) == 1


@pytest.mark.parametrize(
    "read",
    [
        partial(read_meta, stage="somestage"),
        partial(read_tensor, layer=0, name="w", stage="somestage"),
    ],
    ids=lambda read: read.func.__name__,
)
def test_a_missing_file_names_the_stage_that_makes_it(tmp_path, read):
    with pytest.raises(ArtifactError, match=r"nowhere.* does not exist; run `dvc repro somestage` first"):
        read(tmp_path / "nowhere")


def test_a_missing_tensor_is_named_with_the_nearest(tmp_path):
    write_shard(tmp_path, 0, {"q_proj.weight": torch.ones(1)}, {})
    with pytest.raises(ArtifactError, match=r"no entry 'q_prj\.weight'; it holds 1 .*did you mean 'q_proj\.weight'"):
        read_tensor(tmp_path, 0, "q_prj.weight", "gradients")


def test_a_shard_that_libprune_did_not_write_is_refused(tmp_path):
    save_file({"w": torch.ones(1)}, shard_path(tmp_path, 0))
    with pytest.raises(ArtifactError, match=r"layer-000\.safetensors carries no libprune metadata"):
        read_meta(tmp_path, "stage")


@pytest.mark.parametrize("read", [partial(read_meta, stage="s"), partial(read_tensor, layer=0, name="w", stage="s")])
def test_a_shard_that_was_cut_off_is_damaged(tmp_path, read):
    write_shard(tmp_path, 0, {"w": torch.ones(9)}, {})
    shard_path(tmp_path, 0).write_bytes(shard_path(tmp_path, 0).read_bytes()[:-7])
    with pytest.raises(ArtifactError, match=r"layer-000\.safetensors is damaged"):
        read(tmp_path)
