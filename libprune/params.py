"""params.yaml, typed: one section a stage, validated as a whole before any stage works.

Every stage validates the whole file, so that a typing error in a late section does not surface
after minutes of collecting.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from libprune.errors import ParamsError, nearest

Count = Annotated[int, Field(ge=1)]
Floor = Annotated[int, Field(ge=0)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Prepare(_Section):
    """Where the dense model comes from."""

    model: str
    """`package://NAME/path/file.gguf`, a local folder, a local GGUF file, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit, for a hub id."""
    dtype: Dtype = "auto"
    """Storage type of the dense model; `auto` keeps the source's."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    accept_config: tuple[str, ...] = Field(default=(), strict=False)
    """Config keys that the family file does not know and that no size depends on."""


class Tokenize(_Section):
    """What the statistics are collected on, and what the models are judged on."""

    text: str
    """`package://NAME/path`, a local file or folder (txt, jsonl, csv, parquet), or a hub data set id."""
    config: str | None = None
    """Configuration of a hub data set."""
    split: str = "train"
    """Split of a hub data set."""
    column: str = "text"
    """Column that holds the text."""
    evaluation_text: str | None = None
    """Another text for evaluation, same forms; without it the last documents of `text` are set apart."""
    evaluation_split: str = "test"
    """Split of `evaluation_text`, if that is a hub data set."""
    evaluation_share: float = Field(default=0.3, gt=0, lt=1)
    """Share of the documents set apart for evaluation when there is no `evaluation_text`."""
    calibration_sequences: Count = 256
    calibration_length: Annotated[int, Field(ge=2)] = 128
    """Tokens of a calibration sequence."""
    evaluation_windows: Annotated[int, Field(ge=2)] = 16
    """At least two, for a standard error."""
    evaluation_length: Annotated[int, Field(ge=2)] = 512
    """Tokens of an evaluation window."""
    seed: int = 0
    """Which calibration sequences are drawn."""


class Compute(_Section):
    """How the stages that run the model run it."""

    device: str = "auto"
    """`auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`, ..."""
    dtype: Dtype = "auto"
    """`auto`: bfloat16 on GPUs and on CPUs with bf16 matrix units, float32 elsewhere."""
    batch_tokens: Count = 1024
    """Tokens in one pass, rounded down to whole sequences (at least one)."""
    gradient_checkpointing: bool = False
    """Keep one block's activations for backward instead of all blocks', for one more forward pass."""
    offload: Literal["none", "cpu"] = "none"
    """`cpu`: the linear maps' weights stay in host memory and visit the device one at a time."""
    sums: Literal["auto", "memory", "disk"] = "auto"
    """Where running sums are kept; `auto`: mapped from disk where they would take half of the free memory."""


class Gradients(_Section):
    """The mean gradient and per-unit first-order statistics."""

    sequences: Count | None = 128
    """Calibration sequences used, from the first; null: all."""
    batch_sequences: Count = 8
    """Sequences of one row of the per-batch layer statistics; passes are cut to `compute.batch_tokens`."""
    second_moments: Literal["diagonal", "full"] = "diagonal"
    """Of the gradients at the maps' outputs and the consumers' inputs; `full`: whole matrices at consumers."""
    storage_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Storage type of the mean gradients."""


class Hessian(_Section):
    """The diagonal of the Hessian."""

    estimator: Literal["fisher", "fisher_sample", "hutchinson", "none"] = "none"
    """`none`: collect nothing, since no preset reads it; `fisher`: n_tok mean_i g_i^2; `fisher_sample`: mean_i g_i^2;
    `hutchinson`: mean of v (H v) over random signs v."""
    sequences: Count | None = 128
    """Calibration sequences used, from the first; null: all."""
    probes: Count = 1
    """Random probes for every batch of `compute.batch_tokens`, for `hutchinson`."""
    seed: Floor = 0
    """Of the probes."""
    storage_dtype: Literal["float32", "bfloat16"] = "bfloat16"


class Activations(_Section):
    """Forward-only statistics."""

    sequences: Count | None = None
    """Calibration sequences used, from the first; null: all."""
    storage_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage type of the Gram matrices; bfloat16 halves them, but is not enough for `slice.repair`."""


class Ablation(_Section):
    """The measured loss increase of masking single units."""

    units: Floor = 0
    """Units measured, spread over layers and parts; 0: the stage does nothing."""
    sequences: Count | None = 32
    """Calibration sequences used, from the last; null: all."""
    seed: Floor = 0
    """Which units are drawn."""


class Score(_Section):
    """How much the loss of a unit matters."""

    criterion: str = "unit_fisher"
    """A name from `libprune.criteria.CRITERIA`."""
    scaling: Literal["none", "zscore", "minmax", "rank"] = "none"
    """Per layer and type; lets a criterion that is only comparable there enter `global`."""
    magnitude_norm: Literal["l1", "l2"] = "l1"
    """Sum of absolute or of squared weights."""
    wanda_norm: Literal["l1", "l2", "mean", "max"] = "l2"
    """Norm of each input feature over the calibration tokens."""
    fisher_over: Literal["sequence", "token"] = "sequence"
    """What `unit_fisher` squares the mask gradient over."""
    obs_rounds: Count = 32
    """Rounds in which the criteria of `obs` remove a block's units; 1 judges all of them in the dense model."""
    obs_damping: Annotated[float, Field(gt=0)] = 0.01
    """Ridge of `obs`, relative to the mean diagonal of the Gram matrix."""
    seed: int = 0
    """For `random`."""


class Levels(_Section):
    """The measured divergence of the model when one block alone is taken to a level; for `allocate.method: search`."""

    sequences: Count | None = 8
    """Calibration sequences used, from the last; null: all."""
    number: Count = 8
    """Levels of every block, at even distances up to all of its units."""


class Latency(_Section):
    """The measured time of a layer by its width; for `allocate.objective: latency`."""

    tokens: Count = 256
    """Tokens of each sequence in one forward pass; 1: a step of decoding, without the attention to a past."""
    batch: Count = 1
    """Sequences at once."""
    widths: Annotated[int, Field(ge=2)] = 5
    """Widths measured of each part, up to all of its units."""
    rounds: Count = 9
    """Timed rounds over all widths; the median counts."""


class Allocate(_Section):
    """How much goes where."""

    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share to remove."""
    ratio_of: Literal["decoder", "total"] = "decoder"
    """Of what lies inside the blocks, or of all."""
    objective: Literal["parameters", "macs", "cache", "latency"] = "parameters"
    """What the ratio is of: parameters (and so bytes), multiply-accumulates a token, bytes of the KV cache, or
    time of a forward pass on this machine (the latency stage)."""
    method: Literal["uniform", "global", "functional", "search"] = "uniform"
    """`uniform`: the same counts in every layer; `global`: the lowest scores anywhere; `functional`: layers that
    change their input less lose more; `search`: least measured divergence (the levels stage)."""
    shape: Literal["auto", "uniform", "per_layer"] = "auto"
    """`uniform` loads everywhere and is refused where the plan differs by layer; `auto` takes it where it can."""
    split: Literal["auto", "proportional", "importance"] = "auto"
    """How `uniform` divides the budget: near-equal shares of each part, or least summed importance;
    `auto`: the latter where the scores compare between parts."""
    rank_by: Literal["score", "importance"] = "score"
    """Importance per parameter (or of what else the objective counts), or importance."""
    min_groups: Floor = 1
    """Attention groups that each layer keeps; 0 lets a whole attention go."""
    min_channels: Floor = 1
    """MLP channels that each layer keeps; 0 lets a whole MLP go."""
    channel_multiple: Count = 1
    """The kept channels of a pruned MLP are a multiple of this."""
    freeze_first: Floor = 0
    """Layers at the input that keep everything."""
    freeze_last: Floor = 0
    """Layers at the output that keep everything."""
    allow_layer_removal: bool = False
    """Whether a layer may lose both its attention and its MLP."""
    evaluations: Floor = 0
    """Whole plans that `search` measures to improve on the first one."""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Time after which `search` ends even so; null: none, which alone gives the same result everywhere."""
    seed: Floor = 0
    """Of the changes that `search` tries."""


class Slice(_Section):
    """How the pruned model is made."""

    repair: Literal["none", "bias", "local", "sequential"] = "sequential"
    """`bias`: the removed inputs' mean; `local`: least squares on the consumers' weights from the cached Gram
    matrices; `sequential`: layer by layer on what the pruned layers before hand on (two forward passes)."""
    damping: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Ridge of the repair, relative to each input's mean square; `auto`: the one that does best on
    calibration sequences that the fit does not see, for each map."""
    fisher_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How far the Gram matrices of `local` are weighted by the gradients at the inputs."""
    drift: Annotated[float, Field(ge=0)] = 1.0
    """How much of the drift of the residual stream each map of `sequential` takes back."""
    drift_cap: Annotated[float, Field(gt=0)] | None = 2.0
    """The longest drift of a token that counts, in medians over its sequence; null: no limit."""
    sequences: Count | None = None
    """Calibration sequences of `sequential`, from the first; null: all."""
    dtype: Dtype = "auto"
    """Storage type of the pruned model; `auto` keeps the dense model's."""


class Evaluate(_Section):
    """What is measured on both models."""

    prompt_tokens: Count = 256
    """Length of the prompt for prefill speed."""
    decode_tokens: Count = 16
    """Tokens generated for decode speed."""
    rounds: Count = 5
    """Timed rounds; dense and pruned alternate in each."""
    tasks: tuple[str, ...] = Field(default=(), strict=False)
    """Zero-shot tasks of lm-evaluation-harness, such as `piqa`; needs `pip install 'libprune[tasks]'`."""
    task_folder: str | None = None
    """YAML files of further tasks, such as ones on local data."""
    task_limit: Count | None = None
    """Questions of each task, from the first; null: all."""
    task_batch: Count = 8
    """Questions at once."""


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "fast": {
        "score": {"criterion": "unit_fisher"},
        "allocate": {"method": "uniform", "evaluations": 0},
        "slice": {"repair": "local"},
    },
    "balanced": {
        "score": {"criterion": "unit_fisher"},
        "allocate": {"method": "uniform", "evaluations": 0},
        "slice": {"repair": "sequential"},
    },
    "best": {
        "score": {"criterion": "unit_fisher"},
        "allocate": {"method": "search", "evaluations": 0},
        "slice": {"repair": "sequential"},
    },
}
"""What `auto` means for these keys. Only stages after the collecting ones are named, so that no preset makes those
run again."""


class Params(_Section):
    """The whole of params.yaml."""

    preset: Literal["fast", "balanced", "best"] = "balanced"
    """What the keys that say `auto` mean; a key with a value of its own keeps it."""
    prepare: Prepare
    tokenize: Tokenize
    compute: Compute = Compute()
    gradients: Gradients = Gradients()
    hessian: Hessian = Hessian()
    activations: Activations = Activations()
    ablation: Ablation = Ablation()
    score: Score = Score()
    levels: Levels = Levels()
    latency: Latency = Latency()
    allocate: Allocate = Allocate()
    slice: Slice = Slice()
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="before")
    @classmethod
    def _fill_in_the_preset(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        chosen = PRESETS.get(str(data.get("preset", "balanced")), {})
        filled = dict(data)
        for section, values in chosen.items():
            if isinstance(found := filled.get(section), dict):
                filled[section] = found | {key: value for key, value in values.items() if found.get(key) == "auto"}
        return filled

    @model_validator(mode="after")
    def _repair_has_what_it_needs(self) -> "Params":
        repair = self.slice.repair
        if self.slice.fisher_share and self.slice.repair != "local":
            raise ValueError(f"slice.fisher_share weights the Gram matrices of slice.repair: local, not {repair}")
        if self.slice.drift != 1 and self.slice.repair != "sequential":
            raise ValueError(f"slice.drift belongs to slice.repair: sequential, not {repair}")
        if self.slice.drift_cap != Slice().drift_cap and repair != "sequential":
            raise ValueError(f"slice.drift_cap belongs to slice.repair: sequential, not {repair}")
        uses = {
            "slice.repair: local": repair == "local",
            "allocate.method: search": self.allocate.method == "search",
            f"score.criterion: {self.score.criterion}": "obs" in self.score.criterion,
        }
        using = [what for what, used in uses.items() if used]
        if using and self.activations.storage_dtype == "bfloat16":
            raise ValueError(
                f"{using[0]} needs activations.storage_dtype: float32; "
                "Gram matrices rounded to bfloat16 are not positive definite in some layers"
            )
        return self


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and validate a params file.

    Raises:
        ParamsError: naming the key, what is wrong with it, and the nearest known key.
    """
    try:
        data = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise ParamsError(f"{path} does not exist; run from the project folder or pass --params") from error
    except yaml.YAMLError as error:
        raise ParamsError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    try:
        return Params.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(_explain(e["loc"], e["type"], e["msg"]) for e in error.errors())
        raise ParamsError(f"{path}: {problems}") from error


def _explain(loc: tuple[int | str, ...], kind: str, message: str) -> str:
    place = ".".join(map(str, loc[:2]))  # what follows says which of a key's types was tried
    if kind != "extra_forbidden":
        return f"{place}: {message}" if place else message.removeprefix("Value error, ")
    known = _fields(loc[:-1])
    return f"unknown key {place!r}{nearest(str(loc[-1]), known)} (known: {', '.join(known)})"


def _fields(loc: tuple[int | str, ...]) -> list[str]:
    section: type[BaseModel] = Params
    for name in loc:
        section = cast(type[BaseModel], section.model_fields[str(name)].annotation)
    return list(section.model_fields)
