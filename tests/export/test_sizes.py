"""The sizes of GGUF files against those that llama.cpp wrote."""

import gguf
import numpy as np
import pytest

from libprune.export.sizes import q4_k_m_bytes, tensor_bytes, tensor_bytes_in_q4_k_m

WIDTH, KEYS, LAYERS, VOCAB = 576, 192, 30, 49152
METADATA = 1_800_000
"""Bytes of names, merges and tokens in a file of this model, to within 0.1 MB."""


def shapes_of(channels: int) -> dict[str, tuple[int, ...]]:
    """All tensors of SmolLM2-135M with another number of channels."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, WIDTH), "output_norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        own = {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH), "attn_k": (KEYS, WIDTH)}
        own |= {"attn_v": (KEYS, WIDTH), "attn_output": (WIDTH, WIDTH), "ffn_gate": (channels, WIDTH)}
        own |= {"ffn_up": (channels, WIDTH), "ffn_down": (WIDTH, channels)}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in own.items()}
    return shapes


@pytest.mark.parametrize(
    ("channels", "megabytes"), [(1536, 105.5), (1126, 116.5), (1152, 95.4), (1280, 96.4), (1024, 87.2)]
)
def test_sizes_are_those_that_llama_quantize_wrote(channels, megabytes):
    """Files that libllama of release v0.5.0 quantised, November 2026."""
    expected = tensor_bytes_in_q4_k_m(shapes_of(channels), LAYERS) + METADATA
    assert expected / 1e6 == pytest.approx(megabytes, abs=0.1)


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.Q8_0])
def test_a_tensor_has_the_bytes_that_the_package_gguf_makes_of_it(kind):
    values = np.zeros((6, 64), dtype=np.float32)
    assert tensor_bytes(values.shape, kind) == gguf.quantize(values, kind).nbytes


def test_metadata_of_a_file_are_counted(tmp_path):
    """Of a file whose only matrix stays in float16 there is nothing to win but the difference to float32."""
    path = tmp_path / "odd.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.name", "x" * 1000)
    writer.add_tensor("blk.0.ffn_down.weight", np.zeros((3, 33), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert q4_k_m_bytes(path) == path.stat().st_size - 3 * 33 * 2
