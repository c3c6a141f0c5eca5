"""A Python that has imported what many programs need and runs each in a fork: `warm_python.py SOCKET MODULE ...`.

Whoever connects to SOCKET sends its standard output and error, and one line of JSON: `command`, which is what would
follow `python`; `environments`, one for each process that is to run it; `folder`, where it runs; `started_as`, its
`sys.orig_argv`. A line answers with the exit status. As torchrun does, it ends the other processes where one fails, and
all where the asker goes away. What such a program spawns with `multiprocessing` is a fork, too. For tests that would
else spend their time in imports: vLLM's take ten seconds.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import multiprocessing.context
import os
import runpy
import select
import signal
import socket
import sys
import threading
import types
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

SECONDS = 900


def serve() -> None:
    """Answer requests until stdin ends."""
    path, *modules = sys.argv[1:]
    before = dict(os.environ)
    for module in modules:
        importlib.import_module(module)
    by_imports = dict(os.environ.items() - before.items())
    if title := sys.modules.get("setproctitle"):
        title.getproctitle()  # it finds a title's place beside the environment that the program was started with
    sys.stdout.flush()  # engines print while they are imported
    gc.freeze()  # a collection in a fork would touch, and so copy, all that was imported
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.new")
    listener.listen()
    os.rename(f"{path}.new", path)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            return answer(connection, by_imports)
        connection.close()


def answer(connection: socket.socket, by_imports: dict[str, str]) -> None:
    """Run what is asked for, in children, with the variables that the imports set."""
    _, outputs, _, _ = socket.recv_fds(connection, 1, 2)
    request = json.loads(connection.makefile().readline())
    children: set[int] = set()
    # What ends a terminal's programs ends the asker: that it has gone is what counts here.
    former = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    for environment in request["environments"]:
        child = os.fork()
        if child == 0:
            for number, handler in former.items():
                signal.signal(number, handler)
            os.setpgid(0, 0)
            connection.close()
            end_with(partial(run, request, by_imports | environment, outputs))
        with suppress(PermissionError):  # it was faster, and is another program already
            os.setpgid(child, child)
        children.add(child)
    started = frozenset(children)

    def end(_: object = None) -> None:
        for child in started:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)

    timer = threading.Timer(SECONDS, end)
    timer.daemon = True
    timer.start()
    threading.Thread(target=lambda: connection.recv(1) or end(), daemon=True).start()
    status = wait_for(children)
    end()  # what they started and left behind
    with suppress(BrokenPipeError):
        connection.sendall(f"{status}\n".encode())
    os._exit(0)


def end_with(program: Callable[[], None]) -> NoReturn:
    """Run a program and end as any Python, which only would also take apart all modules: an engine's take up to three
    seconds.
    """
    status = 0
    try:
        program()
    except SystemExit as ended:
        if isinstance(ended.code, int):
            status = ended.code
        elif ended.code is not None:
            print(ended.code, file=sys.stderr)
            status = 1
    except Exception:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()  # other threads end first
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status & 0xFF)


def run(request: dict[str, Any], environment: dict[str, str], outputs: list[int]) -> None:
    """Be `python COMMAND`."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(request["folder"])
    for number, opened in enumerate((os.open(os.devnull, os.O_RDONLY), *outputs)):
        os.dup2(opened, number)
        os.close(opened)
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [folder for folder in path if folder and folder not in sys.path]
    first, *sys.argv[1:] = request["command"]
    sys.orig_argv = request["started_as"]
    # Engines insist on new Pythons for their processes, which would import everything again.
    multiprocessing.context._concrete_contexts["spawn"] = multiprocessing.get_context("fork")
    if first == "-c":
        program = sys.argv.pop(1)
        sys.argv[0], sys.path[0] = "-c", ""
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(program, "<string>", "exec"), main.__dict__)
    elif first == "-m":
        sys.argv[0] = sys.argv.pop(1)
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv[0], sys.path[0] = first, os.path.dirname(first)
        runpy.run_path(first, run_name="__main__")


def wait_for(children: set[int]) -> int:
    """The exit status of the first that fails, else 0; the others are ended then."""
    status = 0
    while children:
        child, how = os.wait()
        children.discard(child)
        if not status and (status := os.waitstatus_to_exitcode(how)):
            for other in children:
                os.kill(other, signal.SIGTERM)
    return status


if __name__ == "__main__":
    serve()
