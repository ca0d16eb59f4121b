"""Files of networks with the masks of torch.nn.utils.prune: tensors for code of the user's own, and example inputs."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from libprune.engine.errors import ArtifactError, SourceError, cause, missing_key
from libprune.masks.files import Masked, loaded, multiplied, ties, without_masks
from libprune.models.folder import read_tensors

INPUTS = "inputs"
"""Name of the tensor in a file of inputs."""
_DRAWN = 8
"""Number of samples that are drawn where only their shape is given."""


def read_network(path: Path, factory: str) -> Masked[nn.Module]:
    """The network of a file of tensors, with its masks: as X_orig and X_mask, or as plain zeros.

    Args:
        path: a state dict as safetensors.
        factory: ``package.module:Name`` of the class, or of a function, that makes the network of no arguments. Its
            code runs; modules in the current folder are found.

    Raises:
        LibpruneError: if the file, or the factory, is none, or they do not fit each other.
    """
    tensors = read_tensors(path)
    clean = without_masks(_made_by(factory))
    known = clean.state_dict()
    state, masks = multiplied(tensors, str(path), known.keys())
    for names in ties(clean):
        there = [name for name in names if name in state]
        state |= {name: state[there[0]] for name in names if there and name not in state}
    for name in sorted(known.keys() ^ state.keys()):
        where, names_of = (factory, known) if name in state else (str(path), state)
        raise SourceError(f"{missing_key(name, names_of, where)}; name the file and the code of one network")
    for name, tensor in state.items():
        if tensor.shape != known[name].shape:
            raise SourceError(
                f"{path}: {name} has shape {list(tensor.shape)}, but {factory} makes it {list(known[name].shape)}"
            )
    return loaded(clean, state, masks, next((parameter.dtype for parameter in clean.parameters()), None))


def _made_by(factory: str) -> nn.Module:
    path, _, name = factory.partition(":")
    if not path or not name:
        raise SourceError(f"{factory!r} names no code; write package.module:Name, such as nets.lenet:LeNet")
    sys.path.insert(0, str(Path.cwd()))
    try:
        make: Callable[[], object] = getattr(importlib.import_module(path), name)
        network = make()
    except Exception as error:  # the user's code raises what it likes
        raise SourceError(f"{factory} makes no network: {cause(error)}") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    if not isinstance(network, nn.Module):
        raise SourceError(f"{factory} makes a {type(network).__name__}, not a torch.nn.Module")
    return network


def read_inputs(path: Path) -> Tensor:
    """Example inputs, ``[samples, ...]``, of a safetensors file with one tensor ``inputs``.

    Raises:
        LibpruneError: if it is none.
    """
    tensors = read_tensors(path)
    if list(tensors) != [INPUTS]:
        raise ArtifactError(f"{path} holds {', '.join(tensors) or 'nothing'}; write one tensor named {INPUTS!r}")
    return tensors[INPUTS]


def require_takes(network: nn.Module, inputs: Tensor) -> None:
    """Stop where a network does not run on inputs.

    Raises:
        LibpruneError: saying what its code says.
    """
    try:
        with torch.no_grad():
            network(inputs[:2])
    except Exception as error:  # the network's own code raises what it likes
        raise SourceError(
            f"{type(network).__name__} does not run on inputs of shape {list(inputs.shape)} and type "
            f"{str(inputs.dtype).removeprefix('torch.')}: {cause(error)}. Write inputs that it takes to a file, "
            "and name that with --inputs"
        ) from error


def drawn_inputs(shape: str) -> Tensor:
    """Inputs of a shape, normally distributed, ``[samples, *shape]``.

    Args:
        shape: of one sample, such as ``1,28,28``.

    Raises:
        LibpruneError: if it is no shape.
    """
    sizes = [size.strip() for size in shape.split(",")]
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise SourceError(f"{shape!r} is no shape of a sample; write its sizes, such as 1,28,28")
    return torch.randn(_DRAWN, *map(int, sizes), generator=torch.Generator().manual_seed(0))
