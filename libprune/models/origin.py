"""Where a dense model comes from: what a model card says of it, and the metadata of exported files."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from gguf import GGUFReader
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from libprune.engine.errors import naming
from libprune.pipeline.artifacts import read_json
from libprune.pipeline.sections import Prepare
from libprune.pipeline.sources import resolve

CARD = "README.md"
"""The model card of a model folder."""
_RECORD = "libprune.json"
_HUB = "https://huggingface.co/"
_GGUF_SOURCES = ("general.source.repo_url", "general.repo_url", "general.base_model.0.repo_url")


@dataclass(frozen=True)
class Origin:
    """The model that a pruned one was made from.

    Attributes:
        name: its name, without a path.
        license: the name of its licence as hubs write it, such as `apache-2.0`; None if it does not say.
        base_model: its name on the hub, with the organization; None if it is not known to be there.
        cuts: how often it had been pruned before this run.
        decoder: number of parameters that its layers had before the first of these cuts; None where there was none.
    """

    name: str
    license: str | None
    base_model: str | None
    cuts: int = 0
    decoder: int | None = None

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Origin":
        """Read what `dataclasses.asdict` makes of it, in this version or in one that did not count the cuts."""
        return Origin(data["name"], data["license"], data["base_model"], data.get("cuts", 0), data.get("decoder"))

    def after(self, parameters: Mapping[str, Mapping[str, int]]) -> "Origin":
        """The origin of a model that is to be pruned once more.

        Args:
            parameters: of the record of the last cut: by `dense` and `pruned` the numbers, with those of the layers as
                `decoder`.
        """
        return replace(self, cuts=self.cuts + 1, decoder=self.decoder or parameters["dense"]["decoder"])


def find_origin(params: Prepare) -> Origin:
    """The origin of a dense model: by its name on the hub, its folder's model card, or the metadata of its GGUF file.

    A folder that libprune has written has the origin of the model that was pruned first, and one cut more.

    Args:
        params: name the model.

    Raises:
        SourceError: if the package or the path does not exist.
        ArtifactError: if the record of a folder that libprune has written is damaged.
    """
    path = resolve(params.model)
    if path is None:
        return Origin(params.model.rpartition("/")[2], _license(_hub_card(params)), params.model)
    if path.is_file():
        return _of_gguf(path)
    if (path / _RECORD).is_file() and "origin" in (record := read_json(path / _RECORD, "slice")):
        return Origin.from_json(record["origin"]).after(record["parameters"])
    return Origin(path.resolve().name, _license(path / CARD), None)


def _hub_card(params: Prepare) -> Path | None:
    """The model card of a model on the hub; None if it has none, or the hub is out of reach and it was never loaded."""
    try:
        return Path(hf_hub_download(params.model, CARD, revision=params.revision))
    except (HfHubHTTPError, OSError):
        return None


def _license(card: Path | None) -> str | None:
    """The licence that the head of a model card names; None without a card, a head that can be read, or a licence."""
    if card is None or not card.is_file():
        return None
    before, _, rest = card.read_text(errors="replace").partition("---\n")
    try:
        head = None if before else yaml.safe_load(rest.partition("\n---")[0])
    except (yaml.YAMLError, ValueError):  # of a date that there is not
        return None
    found = head.get("license") if isinstance(head, dict) else None
    return found if isinstance(found, str) else None


def _of_gguf(path: Path) -> Origin:
    """The origin that the metadata of a GGUF file tell, under the name of the file."""
    with naming(f"{path} cannot be read as GGUF"):
        fields = GGUFReader(path).fields

    def said(key: str) -> str | None:
        return str(fields[key].contents()) if key in fields else None

    hub = next((url for key in _GGUF_SOURCES if (url := said(key)) and url.startswith(_HUB)), None)
    base = None if hub is None else "/".join(hub.removeprefix(_HUB).split("/")[:2])
    return Origin(path.stem, said("general.license"), base)
