"""Writing a pruned model as a Hugging Face folder that loads elsewhere.

Two shapes of result: `uniform`, every layer alike, in a stock config that everything loads; and
`per_layer`, any width in any layer, with a modeling file of a few lines beside the weights.
"""

import copy
import json
import shutil
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import GENERATION_CONFIG_NAME

from libprune.engine.architecture import Architecture
from libprune.engine.axes import LinearMap, parse_expr
from libprune.engine.describe import without_weights
from libprune.engine.errors import NotExpressibleError, SourceError, cause
from libprune.engine.family import Family, Part, families
from libprune.engine.heads import EMBEDDING, HEADS, Head
from libprune.engine.plan import Plan
from libprune.engine.stock_config import new_config
from libprune.models.dialect import OPEN, STOP, only_with_code, tokenizer_settings, version_4
from libprune.models.folder import PROCESSOR_FILES, load_config
from libprune.models.given import OWN_TYPE
from libprune.models.sentences import copy_sentence_files, sentence_files

MODELING_FILE = "modeling_pruned.py"
_TEMPLATE = Path(__file__).with_name("modeling_pruned.py.tmpl")
_WITH_HEAD = """

class Pruned{0}(OfUnevenLayers, {0}):
    \"\"\"The model with its head.\"\"\"
"""
_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""By these files a folder shows that it has a tokenizer."""


def write_pruned(
    folder: Path,
    dense: Path,
    architecture: Architecture,
    plan: Plan,
    shape: str,
    state: Mapping[str, Tensor],
    config: PreTrainedConfig | None = None,
) -> None:
    """Write a pruned model as a Hugging Face folder.

    Args:
        folder: an existing, empty folder.
        dense: the dense model's folder; tokenizer, chat templates, processor and generation config come from
            it.
        shape: `uniform` or `per_layer`.
        state: the pruned parameters by their new names (`libprune.engine.surgery.slice_state`).
        config: of the dense shape; the dense folder's if None.

    Raises:
        NotExpressibleError: if the family's config cannot hold the shape.
        SourceError: if the folder's tokenizer cannot be loaded.
    """
    family, architecture = families()[architecture.family], architecture.narrowed(plan.width)
    config = config or load_config(dense)
    dtype = next(iter(state.values())).dtype
    pruned = pruned_config(family, config, architecture, plan, shape)
    pruned["dtype"] = pruned["torch_dtype"] = str(dtype).removeprefix("torch.")  # before and since version 4.56
    if shape == "per_layer":
        (folder / MODELING_FILE).write_text(_modeling_code(family, config, HEADS[architecture.head]))
    stock = None if shape == "per_layer" else without_weights(type(config).from_dict(copy.deepcopy(pruned)))
    save_weights(folder, stock, state)
    (folder / "config.json").write_text(json.dumps(pruned, indent=2, sort_keys=True) + "\n")
    if any((dense / name).is_file() for name in _TOKENIZER_FILES):
        _save_tokenizer(dense, folder)
    if architecture.head == EMBEDDING.name:
        copy_sentence_files(sentence_files(dense, local_files_only=True), folder)
    for name in (GENERATION_CONFIG_NAME, *PROCESSOR_FILES):
        if (dense / name).is_file():
            shutil.copyfile(dense / name, folder / name)


def _save_tokenizer(dense: Path, folder: Path) -> None:
    """Let transformers save the tokenizer of a folder into another one: these files and no others, chat templates too.

    Raises:
        SourceError: if it cannot be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(dense, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizer classes raise types of their own
        raise SourceError(f"the tokenizer in {dense} cannot be loaded: {cause(error)}") from error
    tokenizer.save_pretrained(folder)
    path = folder / TOKENIZER_CONFIG_FILE
    settings = tokenizer_settings(json.loads(path.read_text()))
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def save_weights(folder: Path, stock: PreTrainedModel | None, state: Mapping[str, Tensor]) -> None:
    """Save tensors under the names of published checkpoints, or under their own names for a modeling file.

    Args:
        folder: an existing folder.
        stock: a model of the stock config, which need have no weights; None for a folder with a modeling file.
        state: the parameters by name.
    """
    if stock is None:
        save_torch_state_dict(dict(state), folder, safe_serialization=True)
    else:
        stock.save_pretrained(folder, state_dict=dict(state))


def pruned_config(
    family: Family, config: PreTrainedConfig, architecture: Architecture, plan: Plan, shape: str
) -> dict[str, Any]:
    """The content of config.json for the shape that a plan leaves.

    It does not say where the dense model lay. A uniform one speaks to transformers 4 as well.

    Raises:
        NotExpressibleError: if the family's config cannot hold the shape.
    """
    if architecture.alike and shape != "uniform":
        raise NotExpressibleError(
            f"the layers of a {family.family} model can only be written all alike, under a stock config; this plan "
            "gives them widths of their own"
        )
    architecture = architecture.narrowed(plan.width)
    sizes = dict(architecture.sizes)
    if shape == "uniform":  # each part in a layer that has it
        sizes |= {axis: size for layer in plan.layers for axis, size in plan.sizes(architecture, layer, 1).items()}
    new = new_config(family, config, sizes, plan.layers)
    data = {key: value for key, value in new.to_dict().items() if not key.endswith("name_or_path")}
    data[family.config.layers] = len(plan.layers)  # which some classes count themselves and leave out
    if shape == "uniform":
        data["architectures"] = config.architectures
        sized = family.sized(data)
        sized.update({other: sized[key] for key, other in family.config.also.items()})
        said = version_4(family.sized(new))
        if family.tower is not None:  # where version 4 looks for it
            family.sized(data)["tie_word_embeddings"] = new.tie_word_embeddings
        (data if said == STOP else family.sized(data)).update(said)
        return data
    head = HEADS[architecture.head]
    stock = _stock_classes(family, config, head)
    classes = {"AutoConfig": "config_class", "AutoModel": "base_class", head.auto_class: "model_class"}
    data |= STOP | only_with_code(config)
    data |= {"model_type": OWN_TYPE + data["model_type"], "architectures": [f"Pruned{stock['model_class']}"]}
    data["num_hidden_layers"] = len(plan.layers)  # by this name, where the tokenizer's loader knows no family
    data["auto_map"] = {auto: f"{Path(MODELING_FILE).stem}.Pruned{stock[name]}" for auto, name in classes.items()}
    data["per_layer_config"] = {
        str(index): _layer_overrides(family, architecture, plan, layer) for index, layer in enumerate(plan.layers)
    }
    return data


def _layer_sizes(architecture: Architecture, plan: Plan, layer: int) -> dict[str, int]:
    """Axis sizes in one layer.

    A part that is gone is written with one unit. It is skipped, not built; but stock code, which does
    not know `skip`, must see a width of its own and refuse the folder, not fill the part with random weights.
    """
    return {**architecture.sizes, **plan.sizes(architecture, layer, 1)}


def _layer_overrides(family: Family, architecture: Architecture, plan: Plan, layer: int) -> dict[str, Any]:
    sizes = _layer_sizes(architecture, plan, layer)
    pruned_axes = frozenset[str]().union(*(shape.axes for shape in architecture.parts.values()))
    overrides: dict[str, Any] = {
        key: expressions[0].size(sizes)
        for key, expressions in family.config.expressions.items()
        if expressions[0].names & pruned_axes
    }
    if unsaid := _unsaid_parts(family):
        overrides["shapes"] = {
            path: [entry.input.size(sizes), entry.output.size(sizes)]
            for part in unsaid
            for path, entry in part.parsed.items()
            if isinstance(entry, LinearMap)
        }
        overrides["attributes"] = {
            path: parse_expr(text).size(sizes) for part in unsaid for path, text in part.attributes.items()
        }
    skip = [part for part in architecture.parts_of(layer) if plan.gone(layer, part)]
    return {**overrides, "skip": skip} if skip else overrides


def _stock_classes(family: Family, config: PreTrainedConfig, head: Head) -> dict[str, str]:
    """The names in transformers' code of a config, its model with and without the head, a layer, and their package; and
    what a layer is made from.
    """
    model = without_weights(config)
    layer = type(model.base_model.get_submodule(_layers_of_base(family))[0])
    numbered = "layer_idx" in signature(layer).parameters
    return {
        "package": type(config).__module__.split(".")[-2],
        "config_class": type(config).__name__,
        "model_class": head.model_class(config),
        "base_class": type(model.base_model).__name__,
        "layer_class": layer.__name__,
        "layer_arguments": "config, layer_idx" if numbered else "config",
    }


def _layers_of_base(family: Family) -> str:
    """Path of the list of layers in the model without its head."""
    return family.layers.partition(".")[2]


def _modeling_code(family: Family, config: PreTrainedConfig, head: Head) -> str:
    parts = {
        name: (part.module, [path for path in part.modules if not f"{path}.".startswith(f"{part.module}.")])
        for name, part in family.parts.items()
    }
    classes = _stock_classes(family, config, head)
    names = {classes[name] for name in ("base_class", "layer_class", "model_class")}
    return Template(_TEMPLATE.read_text()).substitute(
        **classes,
        imported=", ".join(sorted(names, key=lambda name: (name.lower(), name))),
        with_head=_WITH_HEAD.format(classes["model_class"]) if head is not EMBEDDING else "",
        auto_class=head.auto_class,
        own_type=OWN_TYPE + config.model_type,
        open=repr(OPEN),
        layers=_layers_of_base(family),
        parts=repr(parts),
        per_layer_lists=repr(family.config.per_layer_lists),
        built_with=repr({key: getattr(config, key) for key in _unsaid_keys(family)}),
    )


def _unsaid_parts(family: Family) -> list[Part]:
    """The parts whose width has no key of its own in the stock config."""
    return [part for part in family.parts.values() if family.config.unsaid(part.axis)]


def _unsaid_keys(family: Family) -> list[str]:
    """The config keys that say the width of a part in `_unsaid_parts`, and something else as well."""
    axes = {part.axis for part in _unsaid_parts(family)}
    return [key for key, found in family.config.expressions.items() if found[0].names & axes]
