"""The memory and the disk space that training takes, by arithmetic."""

from libprune.pipeline.sections import Recover

_BYTES = {"float32": 4, "bfloat16": 2}
CHECKPOINTS = 3
"""Most checkpoints on the disk at once: the best, the last, and the one that is being written."""


def training_bytes(trained: int, whole: int, params: Recover) -> int:
    """Bytes of the weights, of the gradients and of the optimizer states; without activations and the dense model.

    Args:
        trained: number of trained parameters.
        whole: number of all parameters of the pruned model, without the matrices of `lora`.
        params: method, type and optimizer.
    """
    tensors = 2 if params.method == "lora" else 1  # the matrices of `lora` stand beside the weights, then gradients
    return _BYTES[params.dtype] * whole + tensors * _trained_bytes(params) * trained + _states(trained, params)


def working_bytes(kept: int, logits: int) -> int:
    """Bytes that a pass of the trained model takes beside its weights.

    Args:
        kept: bytes of what backward keeps of the layers.
        logits: bytes of the logits in float32.
    """
    return kept + round(_LOGITS * logits)


_LOGITS = 4.5
"""Measured: how many times the logits of a pass are held, in float32, with those of the model to learn from."""


def checkpoint_bytes(trained: int, params: Recover) -> int:
    """Bytes of a checkpoint: the trained parameters and the optimizer states."""
    return _trained_bytes(params) * trained + _states(trained, params)


def _trained_bytes(params: Recover) -> int:
    """Bytes of a trained parameter and so of its gradient; peft keeps the matrices of `lora` in float32."""
    return 4 if params.method == "lora" else _BYTES[params.dtype]


def _states(trained: int, params: Recover) -> int:
    """Bytes of the two moments of each trained parameter: in its own type, or a byte each for `adamw_bnb_8bit`.

    Adafactor keeps sums of rows and columns instead, which are few.
    """
    if params.optimizer == "adafactor":
        return 0
    return 2 * trained * (1 if params.optimizer == "adamw_bnb_8bit" else _trained_bytes(params))
