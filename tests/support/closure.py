"""Which files of this project a module runs: the closure of its imports, found by reading, not by running."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DATA = {
    "libprune/engine/family.py": "libprune/families",
    "libprune/results/folder.py": "libprune/results/modeling_pruned.py.tmpl",
}
"""Files that a module reads beside its own code."""


def run_without_torch(stage: str, folder: Path) -> list[str]:
    """What a stage prints that has nothing to do, in a process of its own; it must not import torch either."""
    program = (
        f"import sys; from pathlib import Path; from stages.{stage} import main; "
        f"main(Path({str(folder / 'params.yaml')!r}), Path({str(folder / 'artifacts')!r})); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    *printed, imported = done.stdout.splitlines()
    assert imported == "False"
    return printed


def imports(path: Path) -> set[Path]:
    """The project files that one file imports, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            candidates = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            candidates = [alias.name for alias in node.names]
        else:
            continue
        files = (ROOT / f"{name.replace('.', '/')}.py" for name in candidates)
        found |= {file for file in files if file.exists()}
    return found


def closure(entry: Path) -> set[str]:
    """All project files that running a file can load, itself included, relative to the root."""
    todo, seen = [entry], set()
    while todo:
        path = todo.pop()
        if path not in seen:
            seen.add(path)
            todo.extend(imports(path))
    files = {str(path.relative_to(ROOT)) for path in seen}
    return files | {data for module, data in DATA.items() if module in files}
