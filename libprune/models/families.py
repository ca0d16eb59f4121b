"""Families of the user's own: files that describe model types which libprune ships no family for."""

from pathlib import Path

from libprune.engine.architecture import know_family
from libprune.engine.errors import FamilyError, SourceError
from libprune.engine.family import Family, load_family, shipped
from libprune.pipeline.sources import resolve
from libprune.pipeline.terminal import masked


def use_families(source: str | None) -> None:
    """Make the families of a file, or of all YAML files of a folder, known to this process.

    Later stages need no file: `architecture.json` and the record of a pruned folder hold the family.

    Args:
        source: as in `prepare.families`; None for none.

    Raises:
        SourceError: if there is no such file, or the folder holds no YAML file.
        FamilyError: if a file is not valid, or describes what another one or libprune itself describes already.
    """
    if source is None:
        return
    path = resolve(source)
    if path is None:
        raise SourceError(f"prepare.families = {masked(source)!r} does not exist (seen from {Path.cwd()})")
    files = sorted([*path.glob("*.yaml"), *path.glob("*.yml")]) if path.is_dir() else [path]
    if not files:
        raise SourceError(f"prepare.families = {masked(source)!r} is a folder without a .yaml file")
    found: dict[Path, Family] = {}
    for file in files:
        family = load_family(file)
        for other, holder in [(one, f"family {one.family!r} of libprune") for one in shipped().values()] + [
            (one, str(where)) for where, one in found.items()
        ]:
            _require_apart(file, family, other, holder)
        found[file] = family
    for family in found.values():
        know_family(family.model_dump(mode="json"))


def _require_apart(file: Path, family: Family, other: Family, holder: str) -> None:
    """Stop where two files describe one model type, or have one name: neither may silently replace the other."""
    both = sorted(set(family.model_types) & set(other.model_types))
    if both:
        raise FamilyError(
            f"{file} describes model_type {both[0]!r}, and so does {holder}; take it out of model_types, or leave the "
            "file out of prepare.families"
        )
    if family.family == other.family:
        raise FamilyError(f"{file} is named family: {family.family}, and so is {holder}; give it another name")
