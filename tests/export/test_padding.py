"""Channels of zeros change no logit, in any family and any shape."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from libprune.engine.axes import parse_expr
from libprune.engine.errors import ExportError
from libprune.export.padding import padded, wider, write_padded
from libprune.models.folder import load_model
from tests.support.exported import texts, write_pruned


@given(channels=st.integers(0, 5000), multiple=st.integers(1, 512))
def test_the_next_multiple(channels, multiple):
    result = wider(channels, multiple)
    assert result % multiple == 0 and channels <= result < channels + multiple


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama", "uniform"), ("llama", "holes"), ("phi3", "uniform"), ("gpt2", "per_layer"), ("gemma2", "per_layer")],
)
@pytest.mark.parametrize("multiple", [1, 8])
def test_the_padded_model_computes_the_same(tmp_path, name, kind, multiple):
    _, source = write_pruned(tmp_path, name, kind)
    folder = tmp_path / "padded"
    folder.mkdir()
    wide = write_padded(source, multiple, folder)
    assert [layer.channels for layer in wide.layers] == [wider(one.channels, multiple) for one in source.layers]
    assert [layer.heads for layer in wide.layers] == [layer.heads for layer in source.layers]
    models = [load_model(one.folder, torch.float32, trust_remote_code=one.record.remote) for one in (source, wide)]
    with torch.no_grad():
        before, after = (model(input_ids=texts()).logits for model in models)
    assert torch.allclose(before, after, atol=1e-5 * float(before.abs().max()), rtol=0)
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not (folder / "libprune.json").exists()


def test_new_channels_lie_behind_the_old_ones_in_every_block_of_a_fused_map(tmp_path):
    _, source = write_pruned(tmp_path, "phi3", "uniform")
    architecture = source.record.architecture
    fused = next(one for one in architecture.parameters if one.name.endswith("gate_up_proj.weight"))
    assert fused.dims[0] == parse_expr("ffn + ffn")
    old = source.layers[0].channels
    values = torch.arange(1.0, 2 * old + 1)[:, None].expand(-1, architecture.sizes["model"])
    wide = padded(values, architecture, fused, old, old + 3)[:, 0]
    gap = [0.0] * 3
    first, second = values[:old, 0].tolist(), values[old:, 0].tolist()
    assert wide.tolist() == [*first, *gap, *second, *gap]


def test_a_part_whose_channels_a_norm_couples_is_refused(tmp_path):
    _, source = write_pruned(tmp_path, "llama", "uniform")
    architecture = source.record.architecture
    parts = {**architecture.parts, "mlp": replace(architecture.parts["mlp"], coupled=("mlp.norm",))}
    source.record.__dict__["architecture"] = replace(architecture, parts=parts)
    with pytest.raises(ExportError, match=r"set export\.pad_channels to 1"):
        write_padded(source, 8, tmp_path)
