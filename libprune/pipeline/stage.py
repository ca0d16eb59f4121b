"""The command line that all stages share: options, errors in one line, time and memory."""

import os
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, NoReturn, ParamSpec

import typer

from libprune.engine.errors import LibpruneError, MeansError, ParamsError, lacking, printable
from libprune.pipeline.locks import watch_dvc
from libprune.pipeline.processes import end_with_dvc, leave_others, left_by_others, tell_others

P = ParamSpec("P")

ParamsFile = Annotated[Path, typer.Option("--params", help="The params file; its section of this stage is used.")]
Root = Annotated[Path, typer.Option("--artifacts", help="The folder of all artifacts.")]
MetricsFolder = Annotated[Path, typer.Option("--metrics", help="The folder of metrics.")]

_Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print the details, which otherwise go to logs/.")]
PARAMS, ROOT, METRICS = Path("params.yaml"), Path("artifacts"), Path("metrics")


def app(main: Callable[P, None]) -> typer.Typer:
    """A one-command app around a stage's main function; its docstring is the help."""
    application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @wraps(main)
    def command(*args: P.args, **kwargs: P.kwargs) -> None:
        verbose = kwargs.pop("verbose", False)
        end_with_dvc()
        watch_dvc()
        quiet()
        # these import tqdm, which reads once whether bars are to be shown
        from libprune.pipeline.sources import require_own_code
        from libprune.pipeline.terminal import VERBOSE

        if verbose:
            os.environ[VERBOSE] = "1"
        with user_errors():
            require_own_code()
            with _told(main.__module__.rpartition(".")[2], kwargs):
                main(*args, **kwargs)

    option = Parameter("verbose", Parameter.KEYWORD_ONLY, default=False, annotation=_Verbose)
    command.__signature__ = signature(main).replace(  # type: ignore[attr-defined]
        parameters=[*signature(main).parameters.values(), option]
    )
    command.__annotations__ = main.__annotations__ | {"verbose": _Verbose}
    application.command(help=main.__doc__)(command)
    return application


TRACEBACK = "LIBPRUNE_TRACEBACK"
"""Environment variable that, if it is set, shows where in the code an error arose."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Print what the user can mend, each fault in one line, and exit with 1, or with 130 after an interruption.

    That is an error of the user's input, a file that the system refuses, and a lack of space, memory or threads.
    Whatever else is raised is a defect of the code, and passes. The other processes of the stage are told of it.
    """
    try:
        yield
        leave_others()
    except KeyboardInterrupt:
        _end("stopped; what was finished is kept, unfinished work is saved in .work, and the same command goes on", 130)
    except Exception as error:
        if (left := left_by_others(error)) is not None:
            _end(f"error: {left}" if left else "", 1)
        if (said := _mendable(error)) is None or os.environ.get(TRACEBACK):
            tell_others(_one_line(f"{type(error).__name__}: {error}"))
            raise
        *others, last = error.faults if isinstance(error, ParamsError) else (said,)
        for fault in others:
            typer.echo(f"error: {_one_line(fault)}", err=True)
        _end(f"error: {last}", 1)


def _end(line: str, code: int) -> NoReturn:
    if line:
        typer.echo(_one_line(line), err=True)
        tell_others(_one_line(line).removeprefix("error: "))
    raise SystemExit(code) from None


def _one_line(text: str) -> str:
    return " ".join(printable(text).split())


def _mendable(error: Exception) -> str | None:
    """What to tell the user of an error; None for a defect of the code."""
    if isinstance(error, LibpruneError) and not isinstance(error, MeansError):
        return str(error)
    lacks = str(error) if isinstance(error, MeansError) else lacking(error)
    if lacks is not None:
        return f"{lacks}. What was finished is kept; the same command goes on when this is mended"
    if isinstance(error, OSError) and error.filename is not None and not isinstance(error, BrokenPipeError):
        return f"{error.filename}: {error.strerror}"
    return None


def _told(name: str, options: Mapping[str, Any]) -> AbstractContextManager[None]:
    """The context in which a stage is told of; empty in all processes of a stage but the first."""
    if not first_process():
        return nullcontext()
    from libprune.pipeline.story import telling

    stage = name if name != "__main__" else Path(sys.argv[0]).stem
    return telling(stage, options.get("params", PARAMS), options.get("artifacts", ROOT), peak_memory)


def first_process() -> bool:
    """Whether this is the only process of the stage, or the first of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def peak_memory() -> int:
    """The most memory that this process has held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def quiet() -> None:
    """Keep the libraries' own progress bars and notices out of the stages' output."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["TQDM_DISABLE"] = "1"  # those of libprune say that they are to be shown
