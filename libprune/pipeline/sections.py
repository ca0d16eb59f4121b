"""The sections of params.yaml, one a stage: every key with its type, its default and what it does."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from libprune.pipeline.faults import conflicts
from libprune.pipeline.terminal import masked

Count = Annotated[int, Field(ge=1)]
Floor = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def _threshold(value: float | str) -> float | str:
    if isinstance(value, str) and value not in {"blockwise", "layerwise"}:
        kind, _, share = value.partition(":")
        if kind != "percentile" or not share.replace(".", "", 1).isdigit() or float(share) > 100:
            raise ValueError(f"{value!r} is neither a number of nats, nor blockwise, layerwise or percentile:0 to 100")
    return value


MOST_TEXTS = 8
"""The most texts that a key lists; dvc.yaml has a link for each."""


def _source(value: str) -> str:
    if not value.strip():
        raise ValueError("names no source; null is none, and the folder that libprune runs in is ./")
    scheme, found, _ = value.partition("://")
    if found and scheme != "package":
        raise ValueError(f"{masked(value)} is an address; download it, and name the local file or folder")
    return value


Source = Annotated[str, AfterValidator(_source)]


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        lacks = "; Apple's GPUs have no float64, in which sums are kept" if value.partition(":")[0] == "mps" else ""
        raise ValueError(f"{value!r} is no device that libprune runs on{lacks}; write auto, cpu, cuda or cuda:0")
    return value


Device = Annotated[str, AfterValidator(_device)]


Threshold = Annotated[float | str, AfterValidator(_threshold)]


class Section(BaseModel):
    """The base of all sections: unknown keys and values of a wrong type are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Vocabulary(Section):
    """The text whose tokens stay in the vocabulary; rows of all others go."""

    text: Source
    """A text in one of the forms of `tokenize.text` but `self`."""
    config: str | None = None
    """Configuration of a hub data set."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    split: str | None = None
    """Split of a hub data set; null: the preset's, or `train`."""
    column: str | None = None
    """Column that holds the text or the conversation; null: the preset's, or `text`."""
    documents: Count | None = None
    """Documents that are read, from the first; null: all."""
    minimum: Count = 1
    """How often the text must use a token for it to stay; above 1 the text itself is cut into other tokens."""
    multiple: Count = 64
    """The rows that stay are a multiple of this, for the kernels of GPUs; filled up with further tokens."""
    keep: tuple[str, ...] = Field(default=(), strict=False)
    """Further words or texts whose tokens stay."""


class Prepare(Section):
    """The source of the dense model."""

    model: Source
    """`package://NAME/path/file.gguf`, a local folder, a local GGUF file, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit, for a hub id."""
    dtype: Dtype = "auto"
    """Storage type of the dense model; `auto` keeps the source's."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    accept_config: tuple[str, ...] = Field(default=(), strict=False)
    """Config keys that the family file does not know and that no size depends on."""
    experts: Literal["whole", "channels"] = "whole"
    """Units of a mixture of experts: `whole` experts, or `channels` inside of them, alike in every expert of a layer.
    A run cuts one kind; its result can be the model of a run that cuts the other."""
    heads: Literal["groups", "queries"] = "groups"
    """Units of an attention whose query heads share key-value heads: `groups` cuts a key-value head together with its
    query heads; `queries` also cuts single query heads, the same number in every group that stays."""
    families: Source | None = None
    """File, or folder of YAML files, that describe model types which libprune ships no family for; null: none."""
    pooling: Literal["mean", "cls"] | None = None
    """How a model without a head makes the embedding of a text: by the mean of its last hidden states over the tokens,
    or by that of the first token; null: as the files of sentence-transformers beside it say, or `mean`."""
    vocabulary: Vocabulary | None = None
    """The text whose tokens stay; all others are removed from the embedding, the head and the tokenizer. A mapping
    with the keys `text`, `minimum`, `multiple`, `keep`, `documents`, `config`, `revision`, `split` and `column`; null:
    all tokens stay."""


class Share(Section):
    """One of several texts, and its share of the sequences."""

    text: Source
    """A text in one of the forms of a single `tokenize.text`."""
    share: Annotated[float, Field(gt=0, le=1)]
    """Share of all sequences that are drawn from this text; the shares of all texts make 1."""
    config: str | None = None
    """Configuration of a hub data set."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    split: str | None = None
    """Split of a hub data set; null: the preset's, or `train`."""
    column: str | None = None
    """Column that holds the text or the conversation; null: the preset's, or `text`."""
    streaming: bool | None = None
    """Read only as many documents as are needed."""


def _kind(value: Any) -> str | None:
    """Which form of a text or texts a value has, so that an error speaks of this form alone."""
    if isinstance(value, str):
        return "name"
    return "list" if isinstance(value, list | tuple) else None


Texts = Annotated[
    Annotated[Source, Tag("name")]
    | Annotated[tuple[Share, ...], Field(strict=False, max_length=MOST_TEXTS), Tag("list")],
    Discriminator(
        _kind,
        custom_error_type="text",
        custom_error_message="Input should be a text, or a list of texts, each with the keys text and share",
    ),
]
"""One text, or several with shares."""


def _share_faults(key: str, given: str | tuple[Share, ...] | None) -> Iterator[str]:
    """What is wrong with the shares of a list of texts; nothing of one text, or of a list of none."""
    if not isinstance(given, tuple) or not given:
        return
    if abs(sum(one.share for one in given) - 1) > 1e-6:
        yield f"the shares of {key} make {sum(one.share for one in given):g}, not 1"
    known = [one.model_copy(update={"share": 1.0}) for one in given]
    for one in dict.fromkeys(one.text for place, one in enumerate(known) if one in known[:place]):
        yield f"{key} lists the text {masked(one)} twice; list it once, with the sum of its shares"


class Tokenize(Section):
    """The texts that statistics are collected on, and those that the models are evaluated on."""

    text: Texts
    """`package://NAME/path`, a local file or folder (txt, json, jsonl, csv, tsv, parquet), a hub data set id, one of
    the presets `wikitext2`, `ptb`, `c4`, `fineweb-edu`, or `self`: sampled from the dense model. Or a list of such
    texts with shares, in the form of `recover.text`."""
    config: str | None = None
    """Configuration of a hub data set; null: the preset's, or the only one."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set; null: the newest."""
    split: str | None = None
    """Split of a hub data set; null: the preset's, or `train`."""
    column: str | None = None
    """Column that holds the text; null: the preset's, or `text`."""
    streaming: bool | None = None
    """Read only as many documents as the windows need; null: only of `c4` and `fineweb-edu`."""
    documents: Literal["joined", "apart"] = "joined"
    """`joined`: an empty line joins documents, and windows cross their borders; `apart`: every window lies within one
    document."""
    evaluation_text: Source | None = None
    """Another text for evaluation, in the forms of `text`; null: the held-out split of `text`, or a share of it."""
    evaluation_config: str | None = None
    """Configuration of the evaluation text; null: the preset's, or that of `text` if it is the same data set."""
    evaluation_split: str | None = None
    """Held-out split of a hub data set; null: the preset's, or `test` of another `evaluation_text`."""
    evaluation_column: str | None = None
    """Column of the evaluation text; null: the preset's, or `column`."""
    evaluation_share: float = Field(default=0.3, gt=0, lt=1)
    """Share of the documents held out for evaluation where `text` has no held-out split and is not streamed."""
    calibration_sequences: Count = 256
    """Number of calibration sequences."""
    calibration_length: Annotated[int, Field(ge=2)] = 128
    """Tokens of a calibration sequence."""
    repair_sequences: Count | None = None
    """Number of sequences that `slice.repair: sequential` or `block` is fitted to; null: as many as
    `calibration_sequences`. They come from the same documents, drawn with the same seed. With null for both, these are
    the calibration sequences."""
    repair_length: Annotated[int, Field(ge=2)] | None = None
    """Tokens of each of these sequences; null: as `calibration_length`."""
    evaluation_windows: Annotated[int, Field(ge=2)] = 16
    """Number of evaluation windows; at least two, for a standard error."""
    evaluation_length: Annotated[int, Field(ge=2)] = 512
    """Tokens of an evaluation window."""
    label_column: str | None = None
    """Column of the labels, for a sequence classification model; null: `label`."""
    seed: Floor = 0
    """Seed of the calibration sequences, and of the tokens that are masked for a model of masked tokens."""

    @model_validator(mode="after")
    def _parts_fit(self) -> "Tokenize":
        conflicts(self._conflicts())
        return self

    @property
    def repaired_on(self) -> tuple[int, int]:
        """Number and length of the sequences that the sequential repair is fitted to."""
        return self.repair_sequences or self.calibration_sequences, self.repair_length or self.calibration_length

    def _conflicts(self) -> Iterator[str]:
        if isinstance(self.text, str):
            return
        if not self.text:
            yield "tokenize.text lists no text; name one"
        yield from _share_faults("tokenize.text", self.text)
        for key in ("config", "revision", "split", "column", "streaming"):
            if getattr(self, key) is not None:
                yield f"tokenize.{key} is of a single text; with a list, write {key} into the entries of tokenize.text"
        for key in ("config", "split", "column"):
            if self.evaluation_text is None and getattr(self, f"evaluation_{key}") is not None:
                yield (
                    f"tokenize.evaluation_{key} is of a single text, and tokenize.text is a list; name a "
                    "tokenize.evaluation_text, or set it to null"
                )


class Compute(Section):
    """Device, number type and memory of the stages that run the model."""

    device: Device = "auto"
    """`auto` (a GPU if PyTorch finds one as `cuda`), `cpu`, `cuda`, `cuda:1`, ... Apple's GPUs (`mps`) are refused."""
    dtype: Dtype = "auto"
    """`auto`: bfloat16 on GPUs and CPUs with bf16 matrix units (of NVIDIA from Ampere on), float32 elsewhere."""
    batch_tokens: Count = 1024
    """Tokens in one pass, rounded down to whole sequences (at least one)."""
    gradient_checkpointing: bool = False
    """Keep one layer's activations for backward instead of all layers', for one more forward pass."""
    offload: Literal["auto", "none", "cpu", "disk"] = "auto"
    """Where the weights of the dense model are while it runs. `none`: on the device; `cpu`: in host memory, and those
    of linear maps visit a GPU one at a time; `disk`: in files, read as they are needed; `auto`: `none` if they fit, or
    else one of the other two."""
    sums: Literal["auto", "memory", "disk"] = "auto"
    """Where running sums are kept; `auto`: on the GPU if they take less than a third of its free memory, else in
    memory, or mapped from disk if they would take half of the free memory."""


class Gradients(Section):
    """The mean gradient and per-unit first-order statistics."""

    sequences: Count | None = 128
    """Calibration sequences used, from the first; null: all."""
    batch_sequences: Count = 8
    """Sequences of one row of the per-batch layer statistics; passes are cut to `compute.batch_tokens`."""
    second_moments: Literal["diagonal", "full"] = "diagonal"
    """Second moments of the gradients at the maps' outputs and the consumers' inputs; `full`: whole matrices at the
    consumers' inputs."""
    storage_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Storage type of the mean gradients."""


class Hessian(Section):
    """The diagonal of the Hessian."""

    estimator: Literal["fisher", "fisher_sample", "hutchinson", "none"] = "none"
    """`none`: collect nothing, since no preset reads it; `fisher`: n_tok mean_i g_i^2; `fisher_sample`: mean_i g_i^2;
    `hutchinson`: mean of v (H v) over random signs v."""
    sequences: Count | None = 128
    """Calibration sequences used, from the first; null: all."""
    probes: Count = 1
    """Random probes for every batch of `compute.batch_tokens`, for `hutchinson`."""
    seed: Floor = 0
    """Seed of the probes."""
    storage_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Storage type of the diagonals."""


class Activations(Section):
    """Activation statistics, from forward passes alone."""

    sequences: Count | None = None
    """Calibration sequences used, from the first; null: all."""
    storage_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage type of the Gram matrices; bfloat16 halves them, but is not enough for `slice.repair`."""


class Ablation(Section):
    """The measured loss increase of masking single units."""

    units: Floor = 0
    """Units measured, spread over layers and parts; 0: the stage does nothing."""
    sequences: Count | None = 32
    """Calibration sequences used, from the last; null: all."""
    seed: Floor = 0
    """Seed of the draw of units."""


class Mixture(Section):
    """Weights of the parts of one criterion: none below 0, and not all 0.

    Every part is a share, 0 to 1, so that its weight is the most that it can add to the importance.
    """

    @model_validator(mode="after")
    def _something_counts(self) -> "Mixture":
        if not any(self.model_dump().values()):
            raise ValueError("all weights are 0, which leaves nothing to rank by; set one above 0")
        return self


class WeightStats(Mixture):
    """Weights of the parts of the criterion `weight_stats`, which reads the weights alone."""

    l2: Weight = 0.3
    variance: Weight = 0.2
    nonzero: Weight = 0.2
    entropy: Weight = 0.2
    effective_rank: Weight = 0.1


class ActivationStats(Mixture):
    """Weights of the parts of the criterion `activation_stats`, which reads the activations of a unit."""

    frequency: Weight = 0.2
    magnitude: Weight = 0.3
    variance: Weight = 0.2
    entropy: Weight = 0.2
    range: Weight = 0.1


class GradientFlow(Mixture):
    """Weights of the parts of the criterion `gradient_flow`, which reads how large and steady gradients are."""

    magnitude: Weight = 0.4
    stability: Weight = 0.2
    snr: Weight = 0.2
    sign_consistency: Weight = 0.2


class Cooperative(Mixture):
    """Weights of the parts of the criterion `cooperative`, which reads the correlations between units."""

    connection: Weight = 0.3
    uniqueness: Weight = 0.3
    centrality: Weight = 0.2
    cooperation: Weight = 0.2


class Score(Section):
    """The importance of units: by which criteria, and in which scaling."""

    criterion: str = "unit_fisher"
    """A name from `libprune.scoring.criteria.CRITERIA`, or several to fuse, as in `0.7*taylor + 0.3*wanda`."""
    attention: str | None = None
    """Criteria for attention; null: those of `criterion`."""
    mlp: str | None = None
    """Criteria for the MLP; null: those of `criterion`."""
    experts: str | None = None
    """Criteria for whole experts of a mixture, such as `reap`; null: those of `criterion`."""
    fusion: Literal["weighted", "simple", "adaptive", "learned", "best"] = "weighted"
    """How several criteria become one. `weighted`: their mean, with the weights before them, or 1; `simple`: their mean
    without weights; `adaptive`: their mean, each weighted by how far it distinguishes the units of a block; `learned`:
    with weights fitted to the measured losses of the ablation stage; `best`: for each part the criterion that ranks
    these losses best."""
    scaling: Literal["none", "zscore", "minmax", "rank"] = "none"
    """Scaling of each criterion inside a block, before fusion. It lets `allocate.method: global` use a criterion that
    compares only inside a block."""
    magnitude_norm: Literal["l1", "l2"] = "l1"
    """Norm of `magnitude`: the sum of absolute or of squared weights."""
    wanda_norm: Literal["l1", "l2", "mean", "max"] = "l2"
    """Norm that `wanda` takes of each input feature over the calibration tokens."""
    fisher_over: Literal["sequence", "token"] = "sequence"
    """Sum of mask gradients that `unit_fisher` squares: over a sequence, or of each token alone."""
    obs_rounds: Count = 32
    """Rounds in which the criteria of `obs` remove a block's units; 1 judges all of them in the dense model."""
    obs_damping: Annotated[float, Field(gt=0)] = 0.01
    """Ridge of `obs`, relative to the mean diagonal of the Gram matrix."""
    weight_stats: WeightStats = WeightStats()
    """Weights of the parts of the criterion `weight_stats`."""
    activation_stats: ActivationStats = ActivationStats()
    """Weights of the parts of the criterion `activation_stats`."""
    gradient_flow: GradientFlow = GradientFlow()
    """Weights of the parts of the criterion `gradient_flow`."""
    cooperative: Cooperative = Cooperative()
    """Weights of the parts of the criterion `cooperative`."""
    cooperative_threshold: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Correlation above which `cooperative` counts two units as connected."""
    seed: int = 0
    """Seed of the criterion `random`."""

    @property
    def expressions(self) -> dict[str, str]:
        """Criteria by the key that names them; without keys that are null, or whose criteria apply to no part."""
        own = {key: text for key in ("attention", "mlp", "experts") if (text := getattr(self, key)) is not None}
        return own if {"attention", "mlp"} <= own.keys() else {"criterion": self.criterion} | own


class Sensitivity(Section):
    """The measured loss increase of removing layers and blocks; for `allocate.method: hgsp`, `worth: sensitivity`."""

    sequences: Count | None = 8
    """Calibration sequences used, from the last; null: all."""


class Depth(Section):
    """The order in which whole layers or parts are removed; for `allocate.depth: joint` or `cosine`."""

    sequences: Count | None = 8
    """Calibration sequences used, from the last; null: all."""
    of: Literal["layers", "parts"] = "layers"
    """What is removed at a time: a whole layer, or one attention or MLP, so that the layers differ."""
    removals: Count | None = None
    """The most removals that are put into order; null: half of those that are possible."""
    candidates: Annotated[int, Field(ge=2)] | None = None
    """How many removals `joint` measures in each step after the first: the ones that added least divergence when they
    were last measured; null: all that remain."""


class Levels(Section):
    """The measured divergence of the model when one block alone is taken to a level; for `allocate.method: search`."""

    sequences: Count | None = 8
    """Calibration sequences used, from the last; null: all."""
    number: Count = 8
    """Number of levels of every block, at even distances up to all of its units."""


class Width(Section):
    """The measured divergence of the model with fewer columns in its residual stream; for `allocate.width`."""

    sequences: Count | None = 8
    """Calibration sequences that the divergence is measured on, from the last; null: all."""
    widths: Count | Annotated[tuple[Count, ...], Field(min_length=1, strict=False)] = 4
    """Number of widths that are measured, at even distances from half of the columns to all of them, if the model's
    config can have them; or a list of widths. If `allocate.width` is a number, only this width is measured."""
    multiple: Count = 8
    """Widths are multiples of this, unless they are listed."""
    axes: Literal["auto", "principal", "selected"] = "auto"
    """`selected`: the columns of the dense model with the largest values stay; `principal`: the stream is rotated to
    its principal axes, which loses less and needs an output head of its own and RMS norms; `auto`: `principal` if the
    model can have it."""

    @property
    def number(self) -> int:
        """How many widths are measured, where `allocate.width` does not name one."""
        return self.widths if isinstance(self.widths, int) else len(set(self.widths))


class Latency(Section):
    """The measured time of a layer by its width; for `allocate.objective: latency`."""

    tokens: Count = 256
    """Tokens of each sequence in one forward pass; 1: a step of decoding, without the attention to a past."""
    batch: Count = 1
    """Sequences of one forward pass."""
    widths: Annotated[int, Field(ge=2)] = 5
    """Number of widths that each part is measured at, up to all of its units."""
    rounds: Count = 9
    """Timed rounds over all widths; the median counts."""


ORDERS = ("joint", "cosine")
"""The values of `allocate.depth` by which whole layers or parts go in the order of the depth stage."""


Stays = Annotated[float, Field(gt=0, le=1)] | None


class Budgets(Section):
    """Shares of the dense model that may stay, each a limit of its own, for `method: search`; null: no limit."""

    parameters: Stays = None
    """Parameters of the layers."""
    total: Stays = None
    """All parameters, with embeddings and head."""
    active: Stays = None
    """Parameters of the layers that a token goes through; in a mixture, without the experts not chosen for it."""
    macs: Stays = None
    """Multiply-accumulates a token, with the output head."""
    cache: Stays = None
    """Elements of the KV cache per token."""
    state: Stays = None
    """Elements of recurrent states per sequence."""
    latency: Stays = None
    """Time of a forward pass on this machine, with embeddings and head (the latency stage)."""
    bytes: Stays = None
    """Bytes of the weights as they are served, by the bits of `allocate.bits`."""

    @property
    def asked(self) -> dict[str, float]:
        """The limits that are set, by their names."""
        return {name: share for name, share in self.model_dump().items() if share is not None}


class Bits(Section):
    """Bits that a weight takes where the model is served, for the budget `bytes`; null: not said."""

    layers: Annotated[float, Field(gt=0, le=64)] | None = None
    """Bits in the layers, such as 4.5 for a type of llama.cpp that stores 32 weights of 4 bits with a scale of 16."""
    outside: Annotated[float, Field(gt=0, le=64)] | None = None
    """Bits in embeddings, head and all else outside of the layers."""


class Allocate(Section):
    """How much is removed, and from which layers and parts."""

    ratio: Annotated[float, Field(gt=0, lt=1)] | None = 0.2
    """Share to remove; null: the share that `method: retention` decides, or none beside the `budgets`."""
    ratio_of: Literal["decoder", "total"] = "decoder"
    """Scope of the share: the layers alone (`decoder`), or the whole model (`total`)."""
    objective: Literal["parameters", "macs", "cache", "latency"] = "parameters"
    """Quantity that the ratio is a share of: parameters (and so bytes), multiply-accumulates a token, bytes of the KV
    cache, or time of a forward pass on this machine (the latency stage)."""
    budgets: Budgets = Budgets()
    """Shares of the dense model that may stay, several at once, for `method: search` with `ratio: null`."""
    bits: Bits = Bits()
    """Bits that a weight takes where the model is served, for the budget `bytes`."""
    nested: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(default=(), strict=False)
    """Smaller ratios whose cuts this plan contains: what they remove is removed here too, so that each smaller model
    is a part of the larger ones."""
    method: Literal["uniform", "global", "functional", "retention", "hgsp", "search"] = "uniform"
    """`uniform`: the same counts in every layer; `global`: the lowest scores anywhere; `functional`: layers that
    change their input less lose more; `retention`: blocks whose importance lies in few units lose more; `hgsp`: the
    lowest scores anywhere, weighed by the measured worth of their layer or block (the sensitivity stage); `search`:
    least measured divergence (the levels stage)."""
    network_type: Literal["transformer", "mixed", "snn", "rnn"] = "transformer"
    """Share of the importance that `retention` keeps of a block whose units are alike: 85, 90, 90, 95 %. These are
    conventions, not measured: the share is higher if the kind of network carries an error further. All described
    families are transformers."""
    worth: Literal["none", "functional", "sensitivity"] = "none"
    """Worth of a layer or block. It is divided among the units by their ranks (`score.scaling: rank`), since ranks do
    not compare between blocks. `functional`: how far the layer changes its input; `sensitivity`: the measured loss of
    removing the block."""
    temperature: Annotated[float, Field(ge=0, le=10)] = 1.0
    """How strongly `hgsp` weighs scores by their layer or block; 0 is `global`."""
    threshold: Threshold = "percentile:25"
    """Loss increase of a layer, in nats, up to which `hgsp` weighs by the layer instead of the block: a number
    (0: never), `blockwise` (never), `layerwise` (always), or `percentile:P` of the layers' own increases."""
    collapse_below: Annotated[float, Field(ge=0, le=1)] = 0.0
    """`hgsp` removes whole layers that would keep less than this share; 0: none. Needs `depth: units`."""
    gradient_fix: Literal["none", "normalize", "adaptive", "depth", "adaptive+depth", "auto"] = "none"
    """Multiplies each layer's gradients in the cached sums, against vanishing. `normalize`: by 1 / their mean norm;
    `adaptive`: by the median norm / theirs (0.1 to 10); `depth`: by a weight that falls with depth; `adaptive+depth`:
    by both; `auto`: chosen by the gradient ratio; `preset`: as the preset says."""
    depth_weights: Literal["linear", "sqrt", "log"] = "sqrt"
    """How the weight of `depth` falls from the first layer to the last."""
    shape: Literal["auto", "uniform", "per_layer"] = "auto"
    """`uniform` loads everywhere, and is refused if the plan differs by layer; `auto`: `uniform` if possible."""
    split: Literal["auto", "proportional", "importance"] = "auto"
    """How `uniform` divides the budget, and `functional` that of a layer. `proportional`: near-equal shares of each
    part; `importance`: least summed importance, for scores that compare between parts; `auto`: `importance` for such
    scores."""
    rank_by: Literal["score", "importance"] = "score"
    """Quantity that units are ranked by: importance per parameter (or per unit of another objective), or importance."""
    min_groups: Floor = 1
    """Attention groups that each layer keeps at least; with 0, a whole attention can be removed."""
    min_channels: Floor = 1
    """MLP channels that each layer keeps at least; with 0, a whole MLP can be removed."""
    channel_multiple: Count | Literal["auto"] = "auto"
    """The kept channels of a pruned MLP are a multiple of this. `auto`: the largest of 256, 128, 64 and 32 (sizes of
    blocks of quantized weights) that divides the dense width, that is at most half of the channels which a layer loses
    on average, and at which the share removed lies within one point (0.01) of the one asked for; 1 if there is none,
    and for networks that are not transformers."""
    freeze_first: Floor = 0
    """Layers at the input that keep everything."""
    freeze_last: Floor = 0
    """Layers at the output that keep everything."""
    depth: Literal["none", "units", "joint", "cosine"] = "none"
    """Whether whole layers are removed. `none`: a part of every layer stays; `units`: a layer is removed if the method
    removes all of its units; `joint`: the depth stage removes the layer that adds least divergence, measures the
    others again, and so on; `cosine`: the layers that change the direction of their input least are removed first."""
    layers: Floor | None = None
    """How many layers or parts of that order are removed, for `depth: joint` and `cosine`; null: with `search` the
    number with the least loss, else as many as fit into the ratio. The method removes the rest of the ratio from the
    layers that stay."""
    width: Count | Literal["auto"] | None = None
    """Columns of the residual stream that stay, in all layers, the embedding and the output head (the width stage);
    null: all. The removed ones count towards the ratio. `auto`: the width with which `search` loses least."""
    evaluations: Floor = 0
    """Whole plans that `search` measures to improve on the first one: those of `functional`, `global` and `uniform`,
    then changes of single layers of the best one."""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Minutes after which `search` ends; null: no limit, which gives the same result on every machine."""
    seed: Floor = 0
    """Seed of the changes that `search` tries."""

    @property
    def columns(self) -> int | None:
        """The columns of the residual stream that stay, where a number is given."""
        return self.width if isinstance(self.width, int) else None

    @model_validator(mode="before")
    @classmethod
    def _no_former_key(cls, data: Any) -> Any:
        if isinstance(data, dict) and "allow_layer_removal" in data:
            instead = "units" if data["allow_layer_removal"] is True else "none"
            conflicts(iter([f"allocate.allow_layer_removal is now allocate.depth; write depth: {instead} instead"]))
        return data

    @property
    def times(self) -> bool:
        """Whether something is a share of a measured time."""
        return self.objective == "latency" or self.budgets.latency is not None

    @property
    def may_empty(self) -> bool:
        """Whether a layer may go because all of its units do."""
        return self.depth == "units"

    @property
    def ordered(self) -> bool:
        """Whether whole layers or parts go in the order of the depth stage."""
        return self.depth in ORDERS


class Slice(Section):
    """How the pruned model is made."""

    repair: Literal["none", "bias", "local", "sequential", "block"] = "sequential"
    """`bias`: the removed inputs' mean; `local`: least squares on the consumers' weights from the cached Gram
    matrices; `sequential`: the same layer by layer, on the outputs of the layers that are already pruned, by two to
    three forward passes; `block`: from `local` on, all weights of each layer are trained to give the dense layer's
    output, layer by layer."""
    damping: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Ridge of the repair, relative to each input's mean square; `auto`: the one that does best on
    calibration sequences that the fit does not see, for each map."""
    fisher_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How far the Gram matrices of `local` are weighted by the gradients at the inputs."""
    drift: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """How much of the drift of the residual stream each map of `sequential` corrects; `auto`: all of it in layers that
    only add the outputs of their maps, nothing in others, such as those with a norm behind each part."""
    drift_cap: Annotated[float, Field(gt=0)] | None = 2.0
    """Limit of the drift of a token, as a multiple of the median over its sequence; null: no limit."""
    producer_steps: Floor = 0
    """Conjugate gradient steps, at most, on the maps that compute the kept channels of each MLP in `sequential`, its
    gate and up projection; 0: only the maps that read the channels are fitted."""
    block_epochs: Count = 2
    """How often `block` goes through the text in each layer, at most; it ends earlier where the error on held-out
    sequences rises."""
    block_rate: Annotated[float, Field(gt=0, le=1)] = 1e-3
    """Largest learning rate of `block`."""
    block_ahead: bool = True
    """Whether `block` trains each layer for the output of the next layer too, which takes about half as long again and
    the memory of two layers."""
    sequences: Count | None = None
    """Sequences that `sequential` and `block` are fitted to, from the first that `tokenize` drew for them; null: all.
    """
    rescale: Literal["auto", "none"] = "auto"
    """Rescaling behind whole layers or parts that are gone, where the residual stream is shorter than the dense one.
    `auto`: with all repairs but `sequential` and `block`, which fit the maps there, later layers add less, by the same
    factor; `none`: none."""
    dtype: Dtype = "auto"
    """Storage type of the pruned model; `auto` keeps the dense model's."""


class Recover(Section):
    """Training of the pruned model on what the dense model predicts."""

    method: Literal["none", "lora", "full"] = "none"
    """`none`: the pruned model stays as slice wrote it; `full`: all weights are trained; `lora`: small matrices beside
    the linear maps are trained, and added to the weights in the end; needs `pip install 'libprune[lora]'`."""
    teacher: Source | None = None
    """Another model to learn from, in the forms of `prepare.model`; it must have the same vocabulary. null: the dense
    model. If you prune in several steps, name the model with which the first step began."""
    text: Texts | None = None
    """The text to train on, in the forms of `tokenize.text`, or a list of texts with shares; null: the documents that
    the calibration text is drawn from."""
    length: Annotated[int, Field(ge=2)] = 256
    """Tokens of a training sequence."""
    tokens: Count = 40960
    """Tokens that are trained on in all; a text that gives fewer is read several times."""
    held_out: Count = 16
    """Sequences that are not trained on, from the end of the text, to choose the best step."""
    checks: Count = 5
    """How often the loss on the held-out sequences is measured, and a checkpoint written, at even distances."""
    patience: Count = 2
    """Training ends after this number of checks in a row without a lower held-out loss."""
    batch_tokens: Count = 1024
    """Tokens of one step of the optimizer, in all processes together, rounded down to whole sequences (at least
    one). `compute.batch_tokens` is the most in one pass; a step that holds more takes several passes."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Divides the logits of both models before their predictions are compared."""
    cross_entropy: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the cross-entropy to the text in the loss; the rest is the divergence from the dense model."""
    hidden_states: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the relative squared distance between the hidden states of both models, layer by layer."""
    top_k: Count | None = None
    """Largest predictions of the dense model that the teacher stage stores for each token, so that later trainings run
    no dense model; null: nothing is stored, and the dense model runs beside the trained one."""
    optimizer: Literal["adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adafactor"] = "adamw_torch_fused"
    """Optimizer, by its name in transformers; `adamw_bnb_8bit` needs the package bitsandbytes."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Largest learning rate; null: 1e-4 for `full`, 1e-3 for `lora`."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps in which the learning rate rises to its largest value."""
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """How the learning rate falls to 0 afterwards; with `constant_with_warmup` it stays."""
    weight_decay: Weight = 0.0
    """Decoupled weight decay."""
    clip: Weight = 1.0
    """Largest norm of the gradient, to which larger ones are scaled down; 0: none is."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights while they are trained, and of their gradients and optimizer states. Passes are computed in
    `compute.dtype`, but in this type where that is float32, or float16 on a CPU."""
    lora_rank: Count = 16
    """Rank of the matrices that `lora` trains."""
    lora_alpha: Count | None = None
    """Scale of these matrices, divided by the rank; null: twice the rank."""
    lora_targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = "all-linear"
    """Endings of the names of the linear maps beside which matrices are trained; `all-linear`: all of them, but not the
    head that predicts tokens."""
    seed: Floor = 0
    """Seed of the choice and order of sequences, of dropout and of the matrices of `lora`."""

    @model_validator(mode="after")
    def _parts_fit(self) -> "Recover":
        conflicts(self._conflicts())
        return self

    def _conflicts(self) -> Iterator[str]:
        if self.text == ():
            yield "recover.text lists no text; null trains on the documents of the calibration text"
        yield from _share_faults("recover.text", self.text)
        if self.top_k is not None and self.hidden_states:
            yield "recover.hidden_states needs the dense model itself; set recover.top_k to null"
        if self.teacher is not None and self.hidden_states:
            yield "recover.hidden_states compares with the dense model's layers; set recover.teacher to null"
        if self.cross_entropy == 1:
            in_vain = {} if self.temperature == 1 else {"temperature": "1"}
            if not self.compares:
                in_vain |= {name: "null" for name in ("teacher", "top_k") if getattr(self, name) is not None}
            for name, value in in_vain.items():
                yield (
                    "recover.cross_entropy: 1 compares no predictions with another model's, so that "
                    f"recover.{name} changes nothing; set it to {value}"
                )

    @property
    def compares(self) -> bool:
        """Whether the loss compares with another model: not where it is the cross-entropy to the text alone."""
        return self.cross_entropy < 1 or self.hidden_states > 0

    @property
    def runs_teacher(self) -> bool:
        """Whether the model to learn from runs beside the trained one."""
        return self.compares and self.top_k is None

    @property
    def of_predictions(self) -> dict[str, str]:
        """The keys that are set and mean nothing for a model that gives embeddings, each with what to say of it."""
        without = {"top_k": "null"} if self.top_k is not None else {}
        without |= {"cross_entropy": "0"} if self.cross_entropy else {}
        return {
            key: f"recover.{key} is of predicted tokens or labels, and this model gives embeddings, which are compared "
            f"by their cosine; set it to {value}"
            for key, value in without.items()
        }

    @property
    def rate(self) -> float:
        """The largest learning rate."""
        return self.learning_rate or {"full": 1e-4, "lora": 1e-3}.get(self.method, 1e-4)


class Evaluate(Section):
    """Measurements on the dense and the pruned model."""

    prompt_tokens: Count = 256
    """Length of the prompt for prefill speed."""
    decode_tokens: Count = 16
    """Tokens generated for decode speed."""
    rounds: Count = 5
    """Timed rounds; dense and pruned alternate in each."""
    continuations: Floor = 3
    """Number of beginnings of evaluation windows, spread over the text, that both models continue; 0: none."""
    continuation_tokens: Count = 32
    """Tokens of each such beginning and of each continuation; at most half of an evaluation window."""
    tasks: tuple[str, ...] = Field(default=(), strict=False)
    """Zero-shot tasks of lm-evaluation-harness that have an accuracy, such as `piqa`, or groups of tasks, such as
    `mmlu`; needs `pip install 'libprune[tasks]'`."""
    task_folder: Source | None = None
    """Folder of YAML files of further tasks, such as tasks on local data."""
    task_limit: Count | None = None
    """Questions of each task, from the first; null: all."""
    task_batch: Count = 8
    """Questions of one batch."""


class Export(Section):
    """The final model in the formats of other programs, each tried in the program itself where it is installed."""

    formats: tuple[Literal["gguf", "onnx", "openvino", "transformers"], ...] = Field(default=(), strict=False)
    """`gguf` for llama.cpp and what builds on it; `onnx` for ONNX Runtime; `openvino`; `transformers`: the model with
    the channels of `pad_channels` as a folder. They need `pip install 'libprune[gguf,onnx,openvino]'`."""
    gguf_types: Annotated[tuple[Literal["f32", "f16", "bf16", "q8_0"], ...], Field(min_length=1, strict=False)] = (
        "f16",
        "q8_0",
    )
    """Types of matrices in GGUF files, one file each; `llama-quantize` of llama.cpp makes smaller ones from f16."""
    pad_channels: Count = 1
    """Channels of zeros fill each MLP up to a multiple of this, such as 256; they change no result."""
    speed: bool = True
    """Time the dense and the pruned model alternately in each program."""
    prompt_tokens: Count = 256
    """Length of the prompt for prefill speed."""
    decode_tokens: Count = 32
    """Tokens generated for decode speed."""
    rounds: Count = 5
    """Timed rounds; dense and pruned alternate in each."""
    threads: Count | None = None
    """Threads that each program computes with; null: one a core."""

    @model_validator(mode="after")
    def _folder_is_padded(self) -> "Export":
        if "transformers" in self.formats and self.pad_channels == 1:
            raise ValueError("export.formats has transformers, which is the pruned folder itself; set pad_channels")
        return self
