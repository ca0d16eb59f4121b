"""What a config says to transformers 4, beside what it says to transformers 5.

Version 5 keeps what it knows of rotary positions under `rope_parameters`, of which version 4 reads nothing: it would
compute with its default base, without a word. Version 5 still understands the keys of version 4. So whether a
spelling is that of a model is asked of its config class of version 5, which must read the same out of it.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig

Rope = dict[str, Any]
"""The value of `rope_parameters`: of the whole model, or by the type of attention."""

_NAMES = (("rope_theta", "partial_rotary_factor"), ("rotary_emb_base", "rotary_pct"))
"""How version 4 calls the base and the rotated share of a head."""
_NESTED = ("full_attention", "sliding_attention")
STOP: dict[str, Any] = {"pruned_heads": {"this config can only be read by transformers 5 or newer": []}}
"""A key that version 5 does not know, and whose entries version 4 takes for numbers: there this text is an error."""

OPEN = "layers differ in width: load this folder by an Auto class of transformers, with trust_remote_code=True"
"""What a stock config class says of a folder with a modeling file: it stands where this class wants a number."""
_UNUSED = ("initializer_range", "init_std")
"""Keys of the spread of random weights, of which each config class has one; a model that is loaded has none."""

_OF_THE_READER = {"name_or_path", "is_local", "local_files_only"}
"""What transformers notes down of how a tokenizer was read, not of the tokenizer."""


def only_with_code(config: PreTrainedConfig) -> dict[str, str]:
    """The key by which the stock class of a config refuses to read it, with what to do; the folder's own leaves it out.

    The class of transformers that reads configs of unknown types for their tokenizers has no such key.
    """
    return {key: OPEN for key in _UNUSED if hasattr(config, key)}


def version_4(config: PreTrainedConfig) -> dict[str, Any]:
    """The keys by which transformers 4 computes the rotary positions that a config of version 5 says.

    Returns:
        The keys, to stand beside `rope_parameters`: none where the model has no rotary positions, and `STOP` where
        version 4 has no words for them.
    """
    rope: Rope | None = getattr(config, "rope_parameters", None)
    if not rope:
        return {}
    rest = {key: value for key, value in config.to_dict().items() if key != "rope_parameters"}
    # The bases are doubled, so that the right ones cannot come from the defaults of the class.
    for said, probe in zip(_spellings(rope), _spellings(_doubled(rope)), strict=True):
        if _plain(_read(config, rest | probe)) == _plain(_doubled(rope)):
            return copy.deepcopy(said)
    return STOP


def _read(config: PreTrainedConfig, data: dict[str, Any]) -> Rope:
    """The rotary positions that the class of a config reads out of other keys; none where it refuses them."""
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of keys that it no longer knows
        try:
            return type(config).from_dict(copy.deepcopy(data)).rope_parameters or {}
        except KeyError:  # where it takes some of them for the whole
            return {}


def _spellings(rope: Rope) -> Iterator[dict[str, Any]]:
    """All ways to say it in version 4. Some of its models refuse `rope_type`, for which others know no older name."""
    for kind in ("type", "rope_type"):
        if rope.keys() == set(_NESTED):
            everywhere, nearby = (rope[name] for name in _NESTED)
            if nearby["rope_type"] == "default":
                yield _flat(everywhere, kind, *_NAMES[0]) | {"rope_local_base_freq": nearby["rope_theta"]}
        elif "rope_theta" in rope:
            yield from (_flat(rope, kind, *names) for names in _NAMES)


def _flat(rope: Rope, kind: str, theta: str, share: str) -> dict[str, Any]:
    said = {theta: rope["rope_theta"]}
    if "partial_rotary_factor" in rope:
        said[share] = rope["partial_rotary_factor"]
    own = {"rope_theta", "partial_rotary_factor", "rope_type", "type"}
    scaling = {key: value for key, value in rope.items() if key not in own and value is not None}
    if rope["rope_type"] == "default" and not scaling:  # but for the sections of positions in an image
        return said
    if rope["rope_type"] == "longrope":
        said["original_max_position_embeddings"] = scaling.pop("original_max_position_embeddings")
    return said | {"rope_scaling": {kind: rope["rope_type"]} | scaling}


def _doubled(rope: Rope) -> Rope:
    return {
        key: _doubled(value) if isinstance(value, dict) else 2 * value if key == "rope_theta" else value
        for key, value in rope.items()
    }


def _plain(rope: Mapping[str, Any]) -> Rope:
    """What remains without the keys that say nothing: those of no value, and the older name of `rope_type`."""
    return {
        key: _plain(value) if isinstance(value, Mapping) else value
        for key, value in rope.items()
        if value is not None and key != "type"
    }


def tokenizer_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `tokenizer_config.json` in words that transformers 4 and 5 read alike.

    Args:
        settings: as transformers 5 writes them. The generic class gets the name that both versions know, other classes
            keep theirs, and further special tokens lie where version 4 looks for them. How the tokenizer was read is
            left out.
    """
    said = {key: value for key, value in settings.items() if key not in _OF_THE_READER}
    if said.get("tokenizer_class") == "TokenizersBackend":
        said["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(said.get("extra_special_tokens"), list):
        said["additional_special_tokens"] = said.pop("extra_special_tokens")
    return said
