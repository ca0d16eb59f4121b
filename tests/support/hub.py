"""Data sets of the hub as `datasets` has them in its cache, which is where an offline run finds them."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import load_dataset

REVISION = "0123456789abcdef0123456789abcdef01234567"


def write_cached(
    cache: Path, data_set: str, splits: Mapping[str, Sequence[str]], config: str = "default", column: str = "text"
) -> None:
    """Put a data set into the cache folder as if it had been loaded from the hub at `REVISION`.

    Its Arrow files are made by `datasets` from local Parquet files; only their names are changed.
    """
    files = {}
    for split, documents in splits.items():
        path = cache / "made" / f"{split}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"id": range(len(documents)), column: list(documents)}), path)
        files[split] = str(path)
    made = load_dataset("parquet", config, data_files=files, cache_dir=str(cache / "made"))
    folder = Path(next(iter(made.values())).cache_files[0]["filename"]).parent
    target = cache / data_set.replace("/", "___") / config / "0.0.0" / REVISION
    shutil.copytree(folder, target)
    for path in target.glob("parquet-*"):
        path.rename(path.with_name(path.name.replace("parquet", data_set.split("/")[-1], 1)))
