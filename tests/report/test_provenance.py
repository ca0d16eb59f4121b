"""The provenance of a result: the commit of its project."""

import subprocess

from libprune.report.provenance import project_state


def test_the_commit_of_a_project_is_named_and_its_changes_noticed(tmp_path):
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.com")
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    assert project_state(tmp_path) == (None, False)
    git("init", "-q")
    assert project_state(tmp_path)[0] is None
    (tmp_path / "params.yaml").write_text("a: 1\n")
    (tmp_path / "notes.md").write_text("x\n")
    git("add", "-A")
    git("commit", "-q", "-m", "first")
    (tmp_path / "notes.md").write_text("y\n")
    assert project_state(tmp_path) == (git("rev-parse", "HEAD"), False)
    (tmp_path / "params.yaml").write_text("a: 2\n")
    assert project_state(tmp_path)[1]
