"""The final model of a layout in other formats, tried in the programs that read them."""

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import AutoTokenizer

from libprune.engine.errors import ExportError
from libprune.export.comparison import WRITTEN, Agreement, choose_prompts, compare, speed_sentence
from libprune.export.formats import Format, asked_for
from libprune.export.padding import write_padded
from libprune.export.source import Source
from libprune.models.folder import own_model
from libprune.models.tokens import read_tokens
from libprune.pipeline.artifacts import read_architecture, same_origin
from libprune.pipeline.atomic import writing
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Export
from libprune.pipeline.terminal import Bar
from libprune.results.proof import reload, verify_folder
from libprune.results.record import Record, files_in, read_recovered, read_whole
from libprune.results.speed import SpeedComparison, compare_timed

SCRATCH = Path(".work/export")
"""Where the dense model lies in the formats that were timed, to be timed again."""


@dataclass(frozen=True)
class Exported:
    """One file or folder that the model was written as, and what its program made of it.

    Attributes:
        format: name of the format, and of the type of its weights.
        file: name of the file or folder.
        bytes: its size.
        quantised_bytes: its size once it is quantised to Q4_K_M; None for formats that have no such type.
        dense_bytes: size of the dense model in this format; None where it was not timed.
        dense_quantised_bytes: that of the dense model once it is quantised to Q4_K_M.
        program: the program that it was tried in, and its version; None if it was not.
        not_tried: why it was not tried, in a sentence.
        agreement: how near the program comes to the model.
        speed: the pruned model's speed beside the dense model's in this program.
    """

    format: str
    file: str
    bytes: int
    quantised_bytes: int | None = None
    dense_bytes: int | None = None
    dense_quantised_bytes: int | None = None
    program: str | None = None
    not_tried: str | None = None
    agreement: Agreement | None = None
    speed: SpeedComparison | None = None

    def sentences(self, folder: Path) -> Iterator[str]:
        """What was written and how it fared, one line each."""
        yield f"{folder / self.file}: {_size(self.bytes, self.dense_bytes)}"
        if self.agreement is not None:
            yield f"  {self.program}: {self.agreement.sentence()}"
        if self.speed is not None:
            yield f"  {self.program}: {speed_sentence(self.speed)}"
        if self.not_tried is not None:
            yield f"  {self.not_tried}"
        if self.quantised_bytes is not None and self.file.endswith(".f16.gguf"):
            yield f"  as Q4_K_M {_size(self.quantised_bytes, self.dense_quantised_bytes)}: llama-quantize " + (
                f"{folder / self.file} {folder / self.file.replace('f16', 'Q4_K_M')} Q4_K_M"
            )


def _size(pruned: int, dense: int | None) -> str:
    return f"{pruned / 1e6:,.1f} MB" + (f", × {pruned / dense:.3f} of the dense model" if dense else "")


@dataclass(frozen=True)
class Outcome:
    """What was exported.

    Attributes:
        model: folder of the final model.
        plan: how the plan of the model was made, as its record has it.
        text: the text that programs were compared on.
        tokens: the digest of its tokens.
        notes: what is to be known of all files, in sentences.
        files: what was written.
    """

    model: str
    plan: dict[str, Any]
    text: str
    tokens: str
    notes: tuple[str, ...]
    files: tuple[Exported, ...]

    def sentences(self, folder: Path) -> Iterator[str]:
        """What was written and how it fared, one line each."""
        yield from self.notes
        for one in self.files:
            yield from one.sentences(folder)

    def content(self) -> dict[str, Any]:
        """The content of `artifacts/export.json`."""
        return asdict(self)

    def metrics(self) -> dict[str, Any]:
        """The content of `metrics/export.json`: sizes, agreement and speeds by format."""
        return {
            one.format: {
                "bytes": one.bytes,
                "quantised_bytes": one.quantised_bytes,
                "divergence": one.agreement and one.agreement.divergence,
                "prefill_ratio": one.speed and one.speed.prefill_ratio,
                "decode_ratio": one.speed and one.speed.decode_ratio,
            }
            for one in self.files
        }


def export_layout(layout: Layout, params: Export, folder: Path, scratch: Path = SCRATCH) -> Outcome:
    """Write the final model of a layout in the formats that were asked for, and try each in its program.

    Args:
        layout: holds the pruned model, and the recovered one if there is one, which is then the final one.
        params: formats, padding and timing.
        folder: an existing, empty folder for the files.
        scratch: folder for the dense model in other formats.

    Raises:
        LibpruneError: if an artifact is missing or foreign, a format cannot hold the model, or a program computes
            something else.
    """
    formats = asked_for(params)
    architecture = read_architecture(layout)
    if architecture.experts and (formats or params.pad_channels > 1):
        raise ExportError(
            f"export.formats: {architecture.family} models are mixtures of experts, which libprune writes as a Hugging "
            "Face folder alone; ask for no format and no padding"
        )
    windows, meta = read_tokens(layout.evaluation_tokens, architecture.fingerprint)
    pruned = read_whole(layout.pruned, layout, {"model": architecture.fingerprint})
    same_origin(layout.evaluation_tokens, meta, {"calibration": pruned.provenance.get("tokens")})
    recovered = read_recovered(layout, pruned.provenance)
    final = pruned if recovered is None else Record(layout.recovered, recovered)
    source, notes = Source(final), []
    dense = Source(Record(own_model(layout, architecture), {"plan": {"shape": "uniform"}}))
    files = []
    if params.pad_channels > 1:
        source, note = _padded(source, params.pad_channels, folder / "transformers", choose_prompts(windows.ids))
        notes.append(note)
    if "transformers" in params.formats:
        program = f"transformers {version('transformers')}"
        files.append(Exported("transformers", "transformers", _bytes(source.folder), program=program))
    run = _Run(source, dense, params, windows.ids, scratch / architecture.fingerprint)
    files += [run.export(form, folder) for form in formats]
    notes += dict.fromkeys(caution for form in formats for caution in form.cautions(source))
    if params.pad_channels > 1 and "transformers" not in params.formats:
        shutil.rmtree(source.folder)
    made = (str(final.folder), final.provenance["plan"], meta["source"], meta["tokens"])
    return Outcome(*made, tuple(notes), tuple(files))


def _padded(source: Source, multiple: int, folder: Path, ids: Int[Tensor, "texts length"]) -> tuple[Source, str]:
    """The model with channels of zeros, after a proof that it computes the same, and a sentence about it."""
    folder.mkdir()
    wide = write_padded(source, multiple, folder)
    expected = reload(source.folder, ids, source.record.remote, source.head)["logits"]
    proof = verify_folder(folder, ids, expected, source.record.remote, source.head)
    before, after = (sum(layer.channels for layer in one.layers) for one in (source, wide))
    return wide, (
        f"{after - before:,} channels of zeros fill the {before:,} channels of all layers up to multiples of "
        f"{multiple}; the logits differ by {proof.difference:.1e} of {proof.scale:.1f}"
    )


@dataclass(frozen=True)
class _Run:
    """One export: the models, the text that they are compared on, and where the dense model is kept."""

    source: Source
    dense: Source
    params: Export
    windows: Int[Tensor, "windows length"]
    scratch: Path

    @cached_property
    def texts(self) -> Int[Tensor, "texts length"]:
        return choose_prompts(self.windows)

    @cached_property
    def prompt(self) -> list[int]:
        prompt: list[int] = self.windows.flatten()[: self.params.prompt_tokens].tolist()
        return prompt

    @cached_property
    def text(self) -> str:
        tokenizer = AutoTokenizer.from_pretrained(self.dense.folder, local_files_only=True, trust_remote_code=False)
        text: str = tokenizer.decode(self.texts[0])
        return text

    @property
    def context(self) -> int:
        """Tokens that a program must hold at once."""
        return max(self.texts.shape[1], len(self.prompt)) + max(WRITTEN, self.params.decode_tokens) + 1

    def export(self, form: Format, folder: Path) -> Exported:
        """Write one format, and compare and time it where its program is installed."""
        path = folder / form.file
        form.write(path, self.source)
        made: dict[str, Any] = {"bytes": _bytes(path), "quantised_bytes": form.quantised_bytes(path)}
        made["not_tried"] = form.missing()
        if made["not_tried"] is None:
            with form.open(path, self.source, self.context) as program:
                form.check(program, self.source, self.text)
                made["program"] = program.version
                made["agreement"] = compare(program, self.source, self.texts, form.limit)
                if self.params.speed:
                    made |= self._timed(form, program)
        return Exported(form.name, form.file, **made)

    def _timed(self, form: Format, program: Any) -> dict[str, Any]:
        """The sizes of the dense model in a format, and how fast it is beside the pruned one."""
        path = self.scratch / form.file
        if not path.exists():
            with writing(path) as partly:
                form.write(partly, self.dense)
        number = self.params.decode_tokens
        with form.open(path, self.dense, self.context) as dense:
            once, other = (partial(one.time, self.prompt, number) for one in (dense, program))
            rounds = self.params.rounds
            with Bar(total=rounds + 1, desc=f"export: speed of {form.file}", unit="round") as bar:
                speed = compare_timed(once, other, len(self.prompt), number, rounds, bar.update)
        return {"dense_bytes": _bytes(path), "dense_quantised_bytes": form.quantised_bytes(path), "speed": speed}


def _bytes(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else files_in(path).values()))
