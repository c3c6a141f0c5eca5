"""A Python that has imported what many programs need and runs each in a fork of itself: `warm_python.py MODULE ...`.

Each line of stdin asks for one program, as JSON: `command`, which is what would follow `python`; `environments`, one
for each process that is to run it; `stdout` and `stderr`, the files that take what they print. A line of stdout answers
with the exit status. As torchrun does, it ends the other processes where one fails. For tests that would else spend
their time in imports: megatron.core takes four seconds.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import sys
import types
from typing import Any

SECONDS = 900


def serve() -> None:
    """Answer requests; a child returns once it has run its program, so that it ends as any Python does."""
    # Engines print while they are imported.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for module in sys.argv[1:]:
        importlib.import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        children = set()
        for environment in request["environments"]:
            child = os.fork()
            if child == 0:
                return run(request, environment)
            children.add(child)
        print(json.dumps(wait_for(children)), file=answers, flush=True)


def run(request: dict[str, Any], environment: dict[str, str]) -> None:
    """Be `python COMMAND`."""
    os.environ.clear()
    os.environ.update(environment)
    places = "/dev/null", request["stdout"], request["stderr"]
    for number, place in enumerate(places):
        opened = os.open(place, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    first, *sys.argv[1:] = request["command"]
    if first == "-c":
        program = sys.argv.pop(1)
        sys.argv[0], sys.path[0] = "-c", ""
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(program, "<string>", "exec"), main.__dict__)
    else:
        sys.argv[0], sys.path[0] = first, os.path.dirname(first)
        runpy.run_path(first, run_name="__main__")


def wait_for(children: set[int]) -> int:
    """The exit status of the first that fails, else 0. After `SECONDS` they are killed."""

    def kill(*_: object) -> None:
        for child in children:
            os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGALRM, kill)
    signal.alarm(SECONDS)
    status = 0
    while children:
        child, how = os.wait()
        children.discard(child)
        if not status and (status := os.waitstatus_to_exitcode(how)):
            for other in children:
                os.kill(other, signal.SIGTERM)
    signal.alarm(0)
    return status


if __name__ == "__main__":
    serve()
