"""The contract table, a family a row: runs tests/contracts/test_families.py and prints how many cases passed.

python -m bench.contract_table > table.md
"""

import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from libprune.report.markdown import markdown_table
from tests.support.models import MODELS

ROOT = Path(__file__).parents[1]
KINDS = {
    "described, trainable": ("every parameter", "tensor parallel plan", "units and overhead", "survives json"),
    "sliced equals masked": ("sliced equals masked", "any plan is sliced"),
    "size and cache": ("predicted",),
    "loads": ("stock model", "config names", "refused", "loads", "tied weights", "stored type", "say nothing", "fresh"),
    "attention": ("attention implementation",),
    "cached steps and generation": ("cached steps", "generation"),
}
"""By the column of the table, what the names of its checks hold; the first that fits counts."""


def outcomes(report: Path) -> dict[tuple[str, str], Counter[str]]:
    """Passed, failed and skipped cases by column and family."""
    found: dict[tuple[str, str], Counter[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        check, _, ids = case.attrib["name"].removesuffix("]").partition("[")
        family = next((name for name in ids.split("-") if name in MODELS), "llama")
        outcome = "skipped" if case.find("skipped") is not None else "failed" if len(case) else "passed"
        words = check.removeprefix("test_").replace("_", " ")
        kind = next(name for name, parts in KINDS.items() if any(part in words for part in parts))
        found.setdefault((kind, family), Counter())[outcome] += 1
    return found


def cell(counts: Counter[str] | None) -> str:
    """How many cases passed; what failed beside it; a dash where transformers has nothing to compare with."""
    if counts is None:
        return ""
    if counts["failed"]:
        return f"{counts['passed']}, {counts['failed']} failed"
    return str(counts["passed"]) if counts["passed"] else "–"


def main() -> None:
    """Run the contract and print the table; exit with pytest's status."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "tests/contracts/test_families.py", f"--junitxml={report}"]
        done = subprocess.run([*command, "-p", "no:cacheprovider"], cwd=ROOT, stdout=sys.stderr, check=False)
        found = outcomes(report)
    rows = [(family, *(cell(found.get((kind, family))) for kind in KINDS)) for family in MODELS]
    print(markdown_table(rows, ("tiny model", *KINDS)))
    raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
