"""Which texts the params choose: presets, data sets of the hub, local files. Nothing is read here."""

from dataclasses import dataclass, replace
from pathlib import Path

from libprune.engine.errors import ParamsError, SourceError
from libprune.pipeline.sections import Tokenize, Vocabulary
from libprune.pipeline.sources import resolve

SELF = "self"
"""The text that the dense model writes itself; see `libprune.texts.self_text`."""


@dataclass(frozen=True)
class Preset:
    """Values of a text's keys that are null in params.yaml.

    Attributes:
        data_set: a hub id, or whatever else `tokenize.text` names.
        config: config of the data set.
        split: the split for calibration.
        held_out: the split for evaluation; None if the data set has none.
        column: the column that holds the text.
        streaming: whether the data set is read as a stream, because it is too large to be downloaded.
        revision: branch, tag or commit.
    """

    data_set: str
    config: str | None = None
    split: str = "train"
    held_out: str | None = None
    column: str = "text"
    streaming: bool = False
    revision: str | None = None


PRESETS = {
    "wikitext2": Preset("Salesforce/wikitext", "wikitext-2-raw-v1", held_out="test"),
    "ptb": Preset("ptb-text-only/ptb_text_only", held_out="test", column="sentence", revision="refs/convert/parquet"),
    "c4": Preset("allenai/c4", "en", held_out="validation", streaming=True),
    "fineweb-edu": Preset("HuggingFaceFW/fineweb-edu", "sample-10BT", streaming=True),
}
"""Texts by short names. `ptb` is a script on its main branch, which datasets 4 and later refuse; the hub keeps the same
data as Parquet on a branch of its own."""


@dataclass(frozen=True)
class TextSource:
    """One split of a data set.

    Attributes:
        name: its name in params.yaml: a preset, or the data set.
        data_set: a hub id, a local path or `package://NAME/path`.
        config, revision, split: those of a hub data set; without effect on local files.
        column: the column that holds the text.
        streaming: whether documents are read one after another, no more than are asked for.
        label: the column that holds the labels; None if no labels are wanted.
    """

    name: str
    data_set: str
    config: str | None
    revision: str | None
    split: str
    column: str
    streaming: bool
    label: str | None = None

    @property
    def path(self) -> Path | None:
        """The local file or folder; None of the hub.

        Raises:
            SourceError: if a package or path does not exist.
        """
        return None if self.name in PRESETS else resolve(self.data_set)


def calibration_source(settings: Tokenize, label: str | None = None) -> TextSource:
    """The source of the calibration text, with the given label column; keys of the params win over the preset's.

    Args:
        settings: of one text, as `libprune.texts.shares.parts_of` gives them.
        label: the column that holds the labels; None if no labels are wanted.
    """
    name = only_text(settings)
    preset = PRESETS.get(name, Preset(name))
    return TextSource(
        name=name,
        data_set=preset.data_set,
        config=settings.config or preset.config,
        revision=settings.revision or preset.revision,
        split=settings.split or preset.split,
        column=settings.column or preset.column,
        streaming=preset.streaming if settings.streaming is None else settings.streaming,
        label=label,
    )


def only_text(settings: Tokenize) -> str:
    """The name of the calibration text, where it is one."""
    assert isinstance(settings.text, str), "several texts are read one by one"
    return settings.text


def evaluation_source(settings: Tokenize, label: str | None = None) -> TextSource | None:
    """The source of the evaluation text; None if documents of the calibration text should be held out.

    Without `evaluation_text` it is the held-out split of the calibration text, which is `evaluation_split` or the
    preset's; local files and `fineweb-edu` have none. Another text that is no preset shares `column`.
    """
    name = settings.evaluation_text or only_text(settings)
    preset = PRESETS.get(name, Preset(name))
    split = settings.evaluation_split or preset.held_out
    if settings.evaluation_text is None and (split is None or calibration_source(settings).path is not None):
        return None
    if name == settings.text:
        source = calibration_source(settings, label)
    else:
        own = {} if name in PRESETS else {"column": settings.column}
        keys = {"text": name, "config": None, "revision": None, "split": None, "column": None} | own
        source = calibration_source(settings.model_copy(update=keys), label)
    return replace(
        source,
        config=settings.evaluation_config or source.config,
        split=split or (preset.split if name in PRESETS else "test"),
        column=settings.evaluation_column or source.column,
    )


def vocabulary_source(params: Vocabulary) -> TextSource:
    """The text whose tokens stay.

    Raises:
        ParamsError: if it is one that has no end, or that the model writes.
    """
    keys = {"text": params.text, "config": params.config, "revision": params.revision, "split": params.split}
    source = calibration_source(Tokenize.model_validate(keys | {"column": params.column}))
    if params.text == SELF:
        raise ParamsError("prepare.vocabulary.text: self is written by the model, with any of its tokens; name a text")
    if source.streaming and params.documents is None:
        raise ParamsError(
            f"prepare.vocabulary.text: {params.text} has no end; set prepare.vocabulary.documents to a number to read"
        )
    return source


def require_other_text(calibration: TextSource, evaluation: TextSource) -> None:
    """Stop if the evaluation text is the calibration text.

    Raises:
        SourceError: if both name one file, or overlapping splits of one data set.
    """
    path, other = calibration.path, evaluation.path
    if path and other:
        same = path.samefile(other)
    else:
        same = (calibration.data_set, calibration.config) == (evaluation.data_set, evaluation.config)
        same = same and _overlap(calibration.split, evaluation.split)
    if same:
        raise SourceError(
            f"the text to evaluate on is the text to calibrate on ({evaluation.name!r}, split {evaluation.split!r}); "
            "name another tokenize.evaluation_text or another tokenize.evaluation_split, or set both to null to set "
            "documents apart"
        )


def _overlap(split: str, other: str) -> bool:
    """Whether two splits may share rows; slices of one split, such as ``train[:10%]``, always count as sharing some."""
    names = [{part.partition("[")[0].strip() for part in one.split("+")} for one in (split, other)]
    return bool(names[0] & names[1]) or "all" in names[0] | names[1]
