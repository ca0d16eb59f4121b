"""Seeded damage of GGUF files, texts, artifacts and pruned folders, and of structured data and bytes in general."""

import bz2
import copy
import gzip
import io
import json
import lzma
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bench.forks import PIPELINE
from libprune.export.gguf_file import write_gguf
from libprune.pipeline.atomic import remove
from tests.support.exported import write_pruned

VALUES = [
    None,
    True,
    -1,
    0,
    1,
    3,
    10**9,
    10**24,
    1.5,
    float("nan"),
    "",
    "x",
    "\x1b[31m",
    [],
    [1],
    {},
    {"a": 1},
    "9" * 50,
]
"""What a value is replaced by."""
Attack = Callable[[Path, random.Random], list[str]]
"""Damages something in a place; returns the command, or the kind of use, that it is tried with."""


def change(data: Any, rng: random.Random) -> Any:
    """Structured data with one value, somewhere, replaced, removed, or put under another key."""
    data = copy.deepcopy(data)
    place = data
    while isinstance(place, dict | list) and place:
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.3:
            if rng.random() < 0.2:
                place.pop(key)
            else:
                place[key] = rng.choice(VALUES)
            break
        place = inner
    return data


def scramble(content: bytes, rng: random.Random, end: int) -> bytes:
    """Bytes of which some before `end` are others, gone, or twice there."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(max(1, min(end, len(changed))))
        match rng.randrange(3):
            case 0:
                changed[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del changed[at : at + rng.randint(1, 9)]
            case _:
                changed[at:at] = changed[at : at + rng.randint(1, 99)] * rng.randint(1, 3)
    return bytes(changed)


def attack_gguf(place: Path, rng: random.Random) -> list[str]:
    """A GGUF file with a damaged header, other values, or its end cut off."""
    whole, path = place / "gguf/whole.gguf", place / "bad.gguf"
    if not whole.exists():
        write_gguf(whole, write_pruned(whole.parent, "llama", "uniform")[0], "f32")
    content = whole.read_bytes()
    header = content.index(b"blk.0.") if rng.random() < 0.7 else len(content)
    match rng.randrange(4):
        case 0:
            content = content[: rng.randrange(len(content))]
        case 1:  # a length or a number of many bytes at once
            at = rng.randrange(header)
            content = content[:at] + rng.choice([b"\xff" * 8, b"\x00" * 8, b"\xff" * 4]) + content[at + 8 :]
        case _:
            content = scramble(content, rng, header)
    path.write_bytes(content)
    return [rng.choice(["inspect", "dense"]), str(path)]


def _table(rows: list[dict[str, Any]], separator: str) -> bytes:
    names = list(rows[0])
    lines = [separator.join(names), *(separator.join(str(row.get(name, "")) for name in names) for row in rows)]
    return "\n".join(lines).encode()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


WRITTEN: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    ".txt": lambda rows: "\n".join(str(row["text"]) for row in rows).encode(),
    ".jsonl": lambda rows: "\n".join(map(json.dumps, rows)).encode(),
    ".json": lambda rows: json.dumps(rows).encode(),
    ".csv": lambda rows: _table(rows, ","),
    ".tsv": lambda rows: _table(rows, "\t"),
    ".parquet": _parquet,
}
PACKED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.compress(content, "zstd", asbytes=True),
}
ODD = [
    "\ud800",
    "\x00",
    "\u2028",
    '"',
    "\t,",
    "\x1b[2J",
    "\ufeff",
    "\ud83d\ude00",
    "x" * (1 << 20),
    "\r",
    "'''",
    "<eos>",
]
"""Texts that libraries trip over."""


def attack_text(place: Path, rng: random.Random) -> list[str]:
    """A text of a known ending, packed or not: odd characters and values, damaged bytes, another encoding."""
    ending, packed = rng.choice(list(WRITTEN)), rng.choice(["", "", *PACKED])
    rows: list[dict[str, Any]] = [
        {"text": line, "number": n} for n, line in enumerate((place / "text.txt").read_text().splitlines())
    ]
    if rng.random() < 0.4:
        row = rng.choice(rows)
        row["text"] = row["text"][:20] + rng.choice(ODD) + row["text"][20:]
    if rng.random() < 0.3 and ending.startswith(".json"):
        rows = change(rows, rng)
    try:
        content = WRITTEN[ending](rows)
    except UnicodeEncodeError:
        content = "\n".join(str(row["text"]) for row in rows).encode("utf-8", "surrogatepass")
    if rng.random() < 0.2:
        content = content.decode(errors="replace").encode(rng.choice(["utf-16", "utf-8-sig", "utf-32-le"]))
    if rng.random() < 0.3:
        content = scramble(content, rng, len(content))
    if packed:
        content = PACKED[packed](content)
        if rng.random() < 0.4:
            content = scramble(content, rng, len(content)) if rng.random() < 0.5 else content[: rng.randrange(99)]
    folder = place / "texts"
    remove(folder)
    folder.mkdir()
    other = rng.choice(list(WRITTEN)) if rng.random() < 0.1 else ending
    path = folder / f"{rng.choice(['a', 'a[1]', '*', 'a b', '-'])}{other}{packed}"
    path.write_bytes(content)
    if rng.random() < 0.1:
        odd_file(folder / f"b{ending}", rng)
    reading = linked(place / "done/artifacts", place / "reading")
    return ["text", str(reading), str(folder if rng.random() < 0.2 else path)]


def odd_file(path: Path, rng: random.Random) -> None:
    """Put something in a place that is no plain file with content."""
    remove(path)
    match rng.randrange(7):
        case 0:
            path.mkdir()
        case 1:
            path.symlink_to(path)
        case 2:
            path.symlink_to("nowhere")
        case 3:
            os.mkfifo(path)
        case 4:
            path.symlink_to("/dev/zero")
        case 5:
            path.symlink_to("/proc/self/mem")
        case _:
            path.touch()


def damage_file(path: Path, rng: random.Random) -> None:
    """Put damaged content in the place of a file, which may be a hard link."""
    content = path.read_bytes()
    match rng.randrange(6):
        case 0 if path.suffix == ".json" and content:
            with suppress(ValueError):  # it has been damaged before
                content = json.dumps(change(json.loads(content), rng)).encode()
        case 1:
            content = content[: rng.randrange(len(content) + 1)]
        case 2:
            content = scramble(content, rng, 2000)
        case 3:
            content = content[:-200] + scramble(content[-200:], rng, 200)  # where Parquet has its footer
        case 4:
            return odd_file(path, rng)
        case _:
            content = scramble(content, rng, len(content))
    path.unlink()
    path.write_bytes(content)
    return None


def linked(source: Path, target: Path) -> Path:
    """A copy of a folder by hard links, in the place of an earlier one."""
    remove(target)
    return Path(shutil.copytree(source, target, copy_function=os.link))


READ = [
    (name, dep)
    for name, entry in PIPELINE.items()
    for dep in entry["deps"]
    if dep.startswith("artifacts/") and "/sources/" not in dep
]
"""Each stage with each artifact that it reads."""


def attack_artifact(place: Path, rng: random.Random) -> list[str]:
    """A damaged file among what a stage reads."""
    copied = linked(place / "done", place / "damaged")
    name, read = rng.choice(READ)
    artifact = copied / read
    path = rng.choice([one for one in sorted(artifact.rglob("*")) if one.is_file()]) if artifact.is_dir() else artifact
    damage_file(path, rng)
    return ["stage", name, str(copied), read]


def attack_folder(place: Path, rng: random.Random) -> list[str]:
    """A pruned folder with a damaged, missing or odd file, whose record may say nothing of its files."""
    folder = linked(place / "done/artifacts" / rng.choice(["pruned", "recovered"]), place / "bad")
    record = folder / "libprune.json"
    if rng.random() < 0.6:
        data = {key: value for key, value in json.loads(record.read_text()).items() if key != "files"}
        record.unlink()
        record.write_text(json.dumps(data))
    for _ in range(rng.randint(1, 2)):
        path = rng.choice([record, folder / "config.json", *sorted(one for one in folder.iterdir() if one.is_file())])
        if path.is_file() and not path.is_symlink():
            damage_file(path, rng)
    if rng.random() < 0.2:
        odd_file(folder / rng.choice(["more.json", "\x1b[31m.safetensors", "a.safetensors", "README.md"]), rng)
    return ["check", str(folder)]
