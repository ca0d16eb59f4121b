"""Models with the masks of torch.nn.utils.prune: in memory, in folders, beside them.

`X_orig` and `X_mask` stand for the parameter X = X_orig · X_mask, as the state dict of a pruned module has them.
"""

import copy
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Bool
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from libprune.engine.describe import describe, without_weights
from libprune.engine.errors import LibpruneError, SourceError, missing_key, naming
from libprune.engine.heads import head_of
from libprune.masks.decision import of_dense
from libprune.models.folder import WeightFiles, load_config, open_tensors, require_own_files
from libprune.models.source import untied
from libprune.pipeline.artifacts import read_json
from libprune.pipeline.atomic import scratch_folder

_ORIG, _MASK = "_orig", "_mask"


Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Masked(Generic[Model]):
    """A model whose masks are multiplied into its weights.

    Attributes:
        model: float32, on the CPU, in evaluation mode, a copy without torch.nn.utils.prune.
        dtype: that its weights were stored in.
        masks: by masked parameter which of its entries stay; none where zeroed weights are all there is.
    """

    model: Model
    dtype: torch.dtype
    masks: Mapping[str, Bool[Tensor, "..."]]

    @cached_property
    def _named(self) -> bool:
        """Whether there are masks, by the names of the model's parameters; published checkpoints may have others."""
        return bool(self.masks) and self.masks.keys() <= {name for name, _ in self.model.named_parameters()}

    def cut(self, name: str) -> Bool[Tensor, "..."]:
        """Which entries of a parameter are masked; where that cannot be known, which are zero."""
        if not self._named:
            return self.model.get_parameter(name).detach() == 0
        return ~self.masks[name] if name in self.masks else torch.zeros_like(self.model.get_parameter(name)).bool()


def of_model(model: Model, language: bool) -> Masked[Model]:
    """A copy of a model in memory, on the CPU, its masks multiplied in; the model itself stays as it is.

    Args:
        model: with masks of torch.nn.utils.prune, or without.
        language: whether it is a language model whose config makes it again; else the module itself is copied.

    Raises:
        LibpruneError: if a mask is none, tied weights have different masks, or a weight is not finite.
    """
    clean = fresh(type(model), model.config) if language else without_masks(model)
    state, masks = multiplied(model.state_dict(), type(model).__name__, clean.state_dict().keys())
    dtype = next((parameter.dtype for parameter in model.parameters()), None)
    return loaded(clean, state, masks, dtype)


def loaded(
    clean: Model, state: Mapping[str, Tensor], masks: Mapping[str, Tensor], dtype: torch.dtype | None
) -> Masked[Model]:
    """A model without masks that takes on masked weights, in float32 where it is of fewer bits.

    Args:
        clean: on any device; it is changed.
        state: what it is to store, masks multiplied in.
        masks: of its parameters and of others.
        dtype: that its weights are stored in; None where there are none.

    Raises:
        LibpruneError: if there are none, tied weights differ, or a weight is not finite.
    """
    require_equal_ties(clean, state)
    clean.load_state_dict(state)
    if dtype is None:
        raise LibpruneError(f"{type(clean).__name__} has no parameters")
    clean = (clean.float() if dtype in (torch.float16, torch.bfloat16) else clean).cpu().eval()
    names = {name for name, _ in clean.named_parameters()}
    return finite(Masked(clean, dtype, {name: mask for name, mask in masks.items() if name in names}))


def without_masks(model: Model) -> Model:
    """A copy of a model without torch.nn.utils.prune."""
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and value.grad_fn is not None  # which deepcopy refuses
    }
    clean = copy.deepcopy(model, computed)
    for module in clean.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)
    return clean


def fresh(model_class: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """A model of a class in float32 whose weights are still to be set."""
    with no_init_weights():
        model = model_class(copy.deepcopy(config)).float().eval()
    model.tie_weights()
    return model


def read_masked(folder: Path, masks: Path | None = None) -> Masked:
    """The model of a Hugging Face folder with its masks: in its own files, in a file beside it, or as plain zeros.

    Args:
        folder: holds config.json and safetensors files, with `X` or with `X_orig` and `X_mask` for each parameter.
        masks: a safetensors file with `X_mask` and, if the weights differ from the folder's, `X_orig`, X named as in
            the model's own state dict.

    Raises:
        LibpruneError: if the folder is no model's, or a mask has no parameter, another shape or other values than 0, 1.
    """
    if not (folder / "config.json").is_file():
        raise SourceError(f"{folder} holds no config.json; name the folder of a Hugging Face model")
    require_own_files(folder)
    _require_described(folder)
    files = WeightFiles(folder)
    pairs = [name for name in files if name.endswith((_ORIG, _MASK))]
    if pairs and masks is not None:
        raise LibpruneError(f"{folder} has masks of its own ({pairs[0]}); leave out {masks}")
    dtype = next((files[name].dtype for name in files if not name.endswith(_MASK)), torch.float32)
    if pairs:
        state, names = multiplied(files, str(folder))
        return finite(Masked(_loaded_from(folder, state), dtype, names))
    model = _load(folder, files)
    return finite(Masked(model, dtype, _multiply(model, masks) if masks else {}))


def _require_described(folder: Path) -> None:
    """Refuse by its config what no family describes, or is no dense model, before any weight is read."""
    config = load_config(folder)
    of_dense(describe(without_weights(config), accept=tuple(config.to_dict())))


def multiplied(
    state: Mapping[str, Tensor], where: str, own: Collection[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state dict with X in the place of X_orig and X_mask, and by X the masks, true where an entry stays.

    Args:
        state: of a pruned model.
        where: it comes from, for messages.
        own: names that the model has without masks, too, such as a buffer ``causal_mask``.

    Raises:
        LibpruneError: if one of the two is missing, or the mask is none.
    """
    made = [name for name in state if name.endswith((_ORIG, _MASK)) and name not in own]
    masks = [name.removesuffix(_MASK) for name in made if name.endswith(_MASK)]
    alone = {name.removesuffix(_ORIG) for name in made if name.endswith(_ORIG)} ^ set(masks)
    if alone:
        name = min(alone)
        has, lacks = (_ORIG, _MASK) if name + _ORIG in state else (_MASK, _ORIG)
        raise LibpruneError(f"{where} holds {name}{has} without {name}{lacks}; torch.nn.utils.prune makes both")
    result = {name: state[name] for name in state if name not in made}
    stay: dict[str, Tensor] = {}
    for name in masks:
        result[name], stay[name] = _product(name, state[name + _ORIG], state[name + _MASK], where)
    return result, stay


def _product(name: str, weight: Tensor, mask: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """The masked weight, and where the mask is one."""
    if mask.shape != weight.shape:
        raise LibpruneError(f"{where}: {name}{_MASK} has shape {list(mask.shape)}, but {name} has {list(weight.shape)}")
    ones = mask != 0
    if not torch.equal(ones.to(mask.dtype), mask):
        raise LibpruneError(f"{where}: {name}{_MASK} holds values other than 0 and 1; a mask says which entries stay")
    return weight.detach() * ones.to(weight.device, weight.dtype), ones.cpu()


def _loaded_from(folder: Path, state: dict[str, Tensor]) -> PreTrainedModel:
    """The model of a folder with other weights, by whatever names transformers reads."""
    with scratch_folder() as scratch:
        shutil.copyfile(folder / "config.json", Path(scratch, "config.json"))
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, Path(scratch, "model.safetensors"))
        model = _load(Path(scratch), state)
    return model


def _load(folder: Path, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """The model of a folder in float32, if its files hold every weight and no other.

    Args:
        folder: holds config.json and safetensors files.
        state: what the files hold.
    """
    loader = head_of(read_json(folder / "config.json", "prepare").get("architectures")).loader
    with naming(f"{folder} cannot be loaded"):
        model, info = loader.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    for what, names in (("lack", info["missing_keys"]), ("hold, for no parameter,", info["unexpected_keys"])):
        if names:
            raise SourceError(f"the weights of {folder} {what} {len(names)} tensors, the first {min(names)}")
    if fault := untied(model):
        raise SourceError(f"{folder} {fault}")
    require_equal_ties(model, state)
    loaded: PreTrainedModel = model.eval()
    return loaded


def _multiply(model: PreTrainedModel, path: Path) -> dict[str, Tensor]:
    """Multiply a file of masks into a model; by parameter the mask, true where an entry stays."""
    masks: dict[str, Tensor] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = {name for group in ties(model) for name in group}
    for key, tensor, orig in _masks_in(path):
        if key not in parameters:
            raise LibpruneError(missing_key(key, parameters, f"{path} has {key}{_MASK}, but the model"))
        weight = parameters[key].data if orig is None else orig.float()
        if weight.shape != parameters[key].shape:
            expected = list(parameters[key].shape)
            raise LibpruneError(f"{path}: {key}{_ORIG} has shape {list(weight.shape)}, but {key} has {expected}")
        if key in tied:
            raise LibpruneError(f"{path} masks {key}, which the model shares with another module; untie them first")
        parameters[key].data, masks[key] = _product(key, weight, tensor, str(path))
    if not masks:
        raise LibpruneError(
            f"{path} holds no mask; masks are tensors named like model.layers.0.mlp.up_proj.weight_mask"
        )
    return masks


def _masks_in(path: Path) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Name, mask and, where there is one, own weight of every entry of a file of masks."""
    with open_tensors(path) as file:
        names = list(file.keys())
        for name in names:
            if not name.endswith((_ORIG, _MASK)) or name.removesuffix(_ORIG) + _MASK not in {*names, name + _MASK}:
                raise LibpruneError(f"{path} holds {name}; only X_mask, and X_orig beside it, are masks of X")
        for key in (name.removesuffix(_MASK) for name in names if name.endswith(_MASK)):
            orig = file.get_tensor(key + _ORIG) if key + _ORIG in names else None
            yield key, file.get_tensor(key + _MASK), orig


def ties(model: nn.Module) -> list[list[str]]:
    """Names that share one parameter, group by group."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def require_equal_ties(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Stop where names that share one parameter have different weights.

    Raises:
        LibpruneError: naming two of them.
    """
    for names in ties(model):
        first, *others = [name for name in names if name in state] or names[:1]
        for other in others:
            if not torch.equal(state[first], state[other]):
                raise LibpruneError(
                    f"{first} and {other} are one weight in this model, but only one of them is masked; untie them "
                    "first (of a language model by tie_word_embeddings: false), or mask both alike"
                )


def finite(masked: Masked[Model]) -> Masked[Model]:
    """The masked model that is given, if its weights are finite.

    Raises:
        LibpruneError: naming the first that is not.
    """
    for name, parameter in masked.model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise LibpruneError(f"{name} holds values that are not finite, masked ones included (0 · NaN is NaN)")
    return masked
