"""The first stage of a project: links to the installed code, which the other stages depend on through DVC."""

from pathlib import Path

from libprune.engine.errors import ProjectError
from libprune.pipeline.atomic import remove
from libprune.pipeline.stage import user_errors
from libprune.project.pipeline_file import CODE, code_paths, is_current


def link_code(project: Path) -> None:
    """Make a link in a project to each file and folder of the installed code that a stage depends on.

    Args:
        project: the folder of the project.

    Raises:
        ProjectError: if the pipeline of the project is that of another version of libprune.
    """
    pipeline = project / "dvc.yaml"
    if not is_current(pipeline.read_text()):
        raise ProjectError(f"{pipeline} is the pipeline of another version of libprune; run `libprune update`")
    folder = project / CODE
    remove(folder)
    folder.mkdir(parents=True)
    for name, path in code_paths().items():
        (folder / name).symlink_to(path)


if __name__ == "__main__":
    with user_errors():
        link_code(Path())
