"""The `dsv3` command. Each subject has its own commands, next to its code; here they are put together."""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import typer

from dsv3_plugin.checkpoint.cli import app as checkpoint_app
from dsv3_plugin.checkpoint.fingerprint_cli import main as fingerprint
from dsv3_plugin.commands.bench import app as bench_app
from dsv3_plugin.commands.doctor import main as doctor
from dsv3_plugin.conformance.cli import app as conformance_app
from dsv3_plugin.diff.cli import main as diff
from dsv3_plugin.diff.replay import main as replay
from dsv3_plugin.errors import DSV3Error
from dsv3_plugin.kernels.cli import app as kernels_app
from dsv3_plugin.megatron_backend.cli import app as convert_app

app = typer.Typer(
    help="DeepSeek-V3 with one arithmetic in vLLM, SGLang and Megatron-Core.",
    no_args_is_help=True,
    add_completion=False,
)
app.add_typer(checkpoint_app, name="checkpoint")
app.command("fingerprint")(fingerprint)
app.add_typer(conformance_app, name="conformance")
app.command("diff")(diff)
app.command("replay")(replay)
app.add_typer(convert_app, name="convert")
app.add_typer(bench_app, name="bench")
app.add_typer(kernels_app, name="kernels")
app.command("doctor")(doctor)


class Interrupted(BaseException):
    """A signal that asks the command to end. No `Exception`, so that nothing but clearing up happens on its way; who
    clears up adds a note that says what is left.
    """


@contextmanager
def _interruptible() -> Iterator[list[signal.Signals]]:
    """The first signal raises `Interrupted` and stands in the list; a second one ends the process at once."""
    received: list[signal.Signals] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        received.append(signal.Signals(number))
        raise Interrupted

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    # `nohup` and a shell's background jobs have some ignored.
    before = {each: signal.getsignal(each) for each in signals if signal.getsignal(each) != signal.SIG_IGN}
    for each in before:
        signal.signal(each, interrupt)
    try:
        yield received
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def main() -> None:
    """Run the command line. An error that is meant for the user is one line on stderr and exit status 2, and so is a
    file that cannot be read or written; a signal's status is 128 and its number, as a shell has it.
    """
    with _interruptible() as received:
        try:
            app()
        except BaseException as error:
            if received:  # whatever a library made of `Interrupted`
                _fail(
                    "; ".join([f"stopped by {received[0].name}", *getattr(error, "__notes__", [])]), 128 + received[0]
                )
            if isinstance(error, DSV3Error):
                _fail(str(error), 2)
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            if isinstance(error, OSError) and (full or error.filename is not None):
                _fail(f"{error.filename or 'the output'}: {error.strerror}", 2)
            raise


def _fail(reason: str, status: int) -> NoReturn:
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(status)
