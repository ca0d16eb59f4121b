"""A `python` whose programs are forks of one process that has imported torch, transformers and what else is large.

Each saves the 6 s of CPU that the imports take, and a command of DVC the second that its own take. Of libprune nothing
is imported, and a program sees only what its folder and its PYTHONPATH hold. In all else it is a process of its own:
arguments, environment, working folder, standard streams and exit status are those that were asked for.
"""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE
from tempfile import TemporaryDirectory

from tests.support.closure import ROOT


@contextmanager
def preloaded(path: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """Writes the `python`, which works as long as the context; it is also the `sys.executable` of its programs.

    It knows `-m MODULE`, `-c CODE`, `-I -c CODE` and a script, each with arguments; any other use of it is that of the
    real one.
    """
    with TemporaryDirectory() as short:  # the address of a socket has some hundred characters at most
        address = f"{short}/socket"
        command = [sys.executable, "-c", SERVER, str(ROOT), address, str(path)]
        with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, cwd=short, env=environment) as server:
            assert server.stdout.readline() == b"ready\n"
            path.write_text(f"#!{sys.executable} -IS\n" + CLIENT.format(python=sys.executable, address=address))
            path.chmod(0o755)
            yield
            assert server.poll() is None, "it ended before its time, and so did every program that came after"


BIN = ".venv/bin"
"""Of a folder, where its own programs lie."""


def install(python: Path, folder: Path) -> None:
    """Give a folder the `python`, and a `dvc` that it runs; they are found where `BIN` is the first on the PATH."""
    (folder / BIN).mkdir(parents=True)
    (folder / BIN / "python").symlink_to(python)
    (folder / BIN / "dvc").write_text('#!/bin/sh\nexec python -m dvc "$@"\n')
    (folder / BIN / "dvc").chmod(0o755)


CLIENT = """\
import json, os, socket, sys
arguments = sys.argv[1:]
if arguments[0] not in ("-m", "-c") and arguments[:2] != ["-I", "-c"] and arguments[0].startswith("-"):
    os.execv({python!r}, ["python", *arguments])
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({address!r})
    socket.send_fds(connection, [b"0"], [0, 1, 2])
    connection.sendall(json.dumps([os.getcwd(), dict(os.environ), arguments]).encode())
    connection.shutdown(socket.SHUT_WR)
    sys.exit(int(connection.recv(9) or 1))
"""

SERVER = """
import atexit, gc, json, os, runpy, select, signal, socket, sys, threading
from contextlib import suppress
os.environ["MPLBACKEND"] = "agg"
import datasets, gguf, jaxtyping, markdown_it.presets, matplotlib.backends.backend_agg, scipy.optimize, scipy.stats
import matplotlib.backends.backend_svg, matplotlib.figure, pydantic.root_model, torch, typer
import transformers.modeling_gguf_pytorch_utils, transformers.models.llama.modeling_llama
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
sys.path[:] = [path for path in sys.path if path and path != sys.argv[1]]
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
assert "libprune" not in sys.modules
listening = socket.socket(socket.AF_UNIX)
listening.bind(sys.argv[2])
listening.listen()
gc.freeze()  # so that forks do not copy what they only look through for garbage
print("ready", flush=True)


def load_dvc():
    # What its commands import, when the first of them is asked for.
    from dvc.cli.parser import get_main_parser
    import dpath, dulwich.client, dulwich.worktree, dvc.data_cloud, dvc.repo.artifacts, dvc.repo.index, dvc.repo.plots
    import dvc.repo.experiments.executor.local, dvc.repo.experiments.queue.celery, dvc.repo.reproduce
    import dvc.repo.experiments.queue.workspace, dvc.utils.hydra, dvc.utils.strictyaml, dvc_data.hashfile.db.local
    import dvc_render, hydra, networkx, pygit2, ruamel.yaml.cyaml, scmrepo.git
    get_main_parser()
    gc.freeze()


asking = {}  # the connections that wait for the end of a program
woken, wake = os.pipe()
os.set_blocking(wake, False)
signal.signal(signal.SIGCHLD, lambda *_: None)
signal.set_wakeup_fd(wake)
while True:
    ready = select.select([listening, sys.stdin, woken], [], [])[0]
    if sys.stdin in ready:
        sys.exit()
    if woken in ready:
        os.read(woken, 4096)
        while asking and (ended := os.waitpid(-1, os.WNOHANG))[0]:  # and so their CPU time is counted
            with asking.pop(ended[0]) as connection, suppress(OSError):
                connection.sendall(b"%d" % (os.waitstatus_to_exitcode(ended[1]) & 255))
    if listening in ready:
        connection = listening.accept()[0]
        streams = []
        try:
            _, streams, _, _ = socket.recv_fds(connection, 1, 3)
            folder, environment, arguments = json.loads(connection.makefile().read())
        except (OSError, ValueError):  # it was killed before it had said what to run
            connection.close()
            for stream in streams:
                os.close(stream)
            continue
        if arguments[:2] == ["-m", "dvc"]:
            load_dvc()
        if not (program := os.fork()):
            break
        asking[program] = connection
        for stream in streams:
            os.close(stream)

# From here on, the program.
signal.set_wakeup_fd(-1)
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
for held in (listening, connection, *asking.values()):
    held.close()
for number in (woken, wake):
    os.close(number)
for number, stream in enumerate(streams):
    os.dup2(stream, number)
    os.close(stream)
os.chdir(folder)
os.environ.clear()
os.environ.update(environment)
sys.dont_write_bytecode = bool(environment.get("PYTHONDONTWRITEBYTECODE"))
sys.pycache_prefix = environment.get("PYTHONPYCACHEPREFIX") or None
sys.executable = sys.argv[3]
sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path and arguments[0] != "-I"]


def run():
    if arguments[0] == "-I":
        sys.argv = arguments[1:2] + arguments[3:]
        exec(arguments[2], {"__name__": "__main__"})
    elif arguments[0] == "-c":
        sys.argv = arguments[:1] + arguments[2:]
        sys.path.insert(0, "")
        exec(arguments[1], {"__name__": "__main__"})
    elif arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, folder)
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
        runpy.run_path(arguments[0], run_name="__main__")


# A process ends as Python ends it, but does not take apart all that is loaded: this takes longer than most programs.
status = 0
try:
    run()
except SystemExit as end:
    status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    if not isinstance(end.code, int | None):
        print(end.code, file=sys.stderr)
except KeyboardInterrupt:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
except BaseException:
    sys.excepthook(*sys.exc_info())
    status = 1
threading._shutdown()
atexit._run_exitfuncs()
try:
    sys.stdout.flush()
    sys.stderr.flush()
except OSError:
    status = 120  # as Python says that nobody reads what it prints
os._exit(status & 255)
"""
