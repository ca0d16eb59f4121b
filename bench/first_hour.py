"""Play the first hour of a user: from the wheel alone, in an empty folder, without git; check what is printed.

Makes a fresh environment, installs the wheel with its dependencies from the package index, and runs every command of
docs/projects.md and the example of docs/library.md on tiny models. Prints the seconds and the lines of each command.

    python -m bench.first_hour            # a fresh environment, some minutes for the installation
    python -m bench.first_hour --borrow   # the packages of this environment, and of libprune the wheel only
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from tests.support import tiny

ROOT = Path(__file__).parents[1]
TINY = {
    "tokenize.calibration_sequences": 8,
    "tokenize.calibration_length": 16,
    "tokenize.evaluation_windows": 4,
    "tokenize.evaluation_length": 16,
    "gradients.sequences": 8,
    "compute.dtype": "float32",
    "evaluate.prompt_tokens": 8,
    "evaluate.decode_tokens": 2,
}
SETTINGS = [word for key, value in TINY.items() for word in ("--set", f"{key}={value}")]


class Player:
    """Runs commands in one folder, as a user with one environment and no git does.

    Args:
        place: an empty folder; everything is written there.
        borrow: whether the dependencies are those of the environment that runs this.
    """

    def __init__(self, place: Path, borrow: bool) -> None:
        self.place = place
        self.bin = self._environment(place / "venv", borrow)
        (place / "empty").mkdir()
        variables = {"PATH": f"{self.bin}:{self._programs(place / 'programs')}", "XDG_CACHE_HOME": str(place / "cache")}
        kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        self.variables = kept | variables

    def _environment(self, folder: Path, borrow: bool) -> Path:
        pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(self.place / "wheel")]
        subprocess.run([*wheel, str(ROOT)], check=True)
        built = next((self.place / "wheel").glob("*.whl"))
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        if borrow:
            own = Path(next(folder.glob("lib/python*/site-packages")))
            (own / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
            subprocess.run([*pip, "--no-deps", str(built)], check=True)
            (folder / "bin/dvc").write_text(f"#!{folder}/bin/python\nfrom dvc.cli import main\nmain()\n")
            (folder / "bin/dvc").chmod(0o755)
        else:
            subprocess.run([*pip, "--constraint", str(ROOT / "constraints.txt"), str(built)], check=True)
        return folder / "bin"

    @staticmethod
    def _programs(folder: Path) -> Path:
        """A folder with every program of the system but git."""
        folder.mkdir()
        for place in (Path("/bin"), Path("/usr/bin")):
            for program in place.iterdir():
                if not program.name.startswith("git") and not (folder / program.name).is_symlink():
                    (folder / program.name).symlink_to(program)
        return folder

    def run(self, *words: str, folder: Path | None = None, code: int = 0) -> str:
        """Run a command, print how long it took and how many lines it printed, and return these."""
        begin = time.perf_counter()
        where = folder or self.place / "empty"
        done = subprocess.run(words, cwd=where, env=self.variables, capture_output=True, text=True)
        text = done.stdout + done.stderr
        shown = " ".join(word for word in words if word not in SETTINGS)
        print(f"{time.perf_counter() - begin:7.1f} s {len(text.splitlines()):4} lines   {shown}", flush=True)
        if done.returncode != code:
            raise SystemExit(f"{shown} ended with {done.returncode}, not {code}:\n{text}")
        return text


def said(text: str, *patterns: str) -> None:
    """Stop unless a text has every pattern."""
    for pattern in patterns:
        if not re.search(pattern, text, re.MULTILINE):
            raise SystemExit(f"no {pattern!r} in:\n{text}")


def worked(text: str) -> set[str]:
    """The stages that had something to do, by what they printed."""
    return set(re.findall(r"^\[\d+/\d+\] (\w+):", text, re.MULTILINE))


def play(player: Player) -> None:
    """The first hour."""
    place, empty = player.place, player.place / "empty"
    models = [tiny.write_model(place / name) for name in ("first", "second")]
    text = str(tiny.write_text(place / "text.txt", documents=600))
    said(player.run("libprune", "--version"), r"^libprune \d")
    said(player.run("libprune", "new", "wrong", "--model", "./gone", "--text", text, code=1), "prepare.model: ./gone")
    new = ("libprune", "new", "mine", "--model", str(models[0]), "--text", text, "--ratio", "0.3", *SETTINGS)
    said(player.run(*new), "git is not installed", "next: cd mine; dvc repro")
    mine = empty / "mine"
    player.run("libprune", "params", folder=mine)
    player.run("dvc", "repro", folder=mine)
    said(player.run("libprune", "show", folder=mine), "perplexity", "from_pretrained", "report/report.html")
    said(player.run("dvc", "status", folder=mine), "up to date")
    out = ("--text", text, *SETTINGS)
    small = player.run("libprune", "prune", str(models[0]), "small", *out, "--ratio", "0.2")
    said(small, r"^project: ", r"^model: +small/")
    again = player.run("libprune", "prune", str(models[0]), "smaller", *out, "--ratio", "0.3", "--preset", "fast")
    collecting = {"prepare", "tokenize", "gradients", "activations"}
    if not collecting <= worked(small) or collecting & worked(again):
        raise SystemExit(f"a second ratio collects again:\n{again}")
    player.run("libprune", "prune", str(models[1]), "other", *out)
    for name in ("small", "smaller", "other"):
        load = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
        player.run("python", "-c", load, f"{name}/model")
    said(player.run("libprune", "check", "small/model"), r"^ok ")
    example = "import doctest, sys; print(doctest.testfile(sys.argv[1], module_relative=False, encoding='utf-8', "
    example += "globs={'model': sys.argv[2], 'text': sys.argv[3]}))"
    long = str(tiny.write_text(place / "long.txt", documents=1000))
    said(player.run("python", "-c", example, str(ROOT / "docs/library.md"), str(models[0]), long), r"failed=0")


def main() -> None:
    """Play it in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--borrow", action="store_true", help="use the dependencies of this environment")
    folder = Path(tempfile.mkdtemp(prefix="first-hour-"))
    try:
        play(Player(folder, parser.parse_args().borrow))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("all as it should be")


if __name__ == "__main__":
    main()
