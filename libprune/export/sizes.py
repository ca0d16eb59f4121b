"""How large a GGUF file of a model is, before it is written or quantised."""

from collections.abc import Mapping
from math import prod
from pathlib import Path

import gguf
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader

_SMALLER = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}
"""What llama.cpp stores instead where rows do not fill the 256 weights of a block."""


def q4_k_m_bytes(path: Path) -> int:
    """Bytes that a GGUF file will have when `llama-quantize` of llama.cpp has made it of the type Q4_K_M."""
    reader = GGUFReader(path)
    shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
    metadata = path.stat().st_size - sum(int(tensor.n_bytes) for tensor in reader.tensors)
    layers = 1 + max((int(name.split(".")[1]) for name in shapes if name.startswith("blk.")), default=0)
    return metadata + tensor_bytes_in_q4_k_m(shapes, layers)


def tensor_bytes_in_q4_k_m(shapes: Mapping[str, tuple[int, ...]], layers: int) -> int:
    """Bytes of the tensors of a file of the type Q4_K_M.

    The rules are those of `llama_tensor_get_type` in llama.cpp's src/llama-quant.cpp.

    Args:
        shapes: of all tensors, by the names of llama.cpp, the last dimension fastest.
        layers: number of layers.
    """
    tied = "output.weight" not in shapes
    return sum(tensor_bytes(shape, _q4_k_m(name, shape, layers, tied)) for name, shape in shapes.items())


def tensor_bytes(shape: tuple[int, ...], kind: Type) -> int:
    """Bytes of a tensor in a type."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return prod(shape) // block * size


def _q4_k_m(name: str, shape: tuple[int, ...], layers: int, tied: bool) -> Type:
    if len(shape) < 2 or name.startswith("position_embd"):
        return Type.F32
    kind = Type.Q4_K
    if name == ("token_embd.weight" if tied else "output.weight"):
        kind = Type.Q6_K
    elif "attn_v." in name or "ffn_down." in name:
        kind = Type.Q6_K if _more_bits(int(name.split(".")[1]), layers) else kind
    elif "attn_qkv." in name:
        kind = Type.Q5_K
    if shape[-1] % 256:
        kind = _SMALLER[kind]
    return kind if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else Type.F16


def _more_bits(layer: int, layers: int) -> bool:
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
