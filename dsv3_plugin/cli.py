"""The `dsv3` command. Each subject has its own commands, next to its code; here they are put together."""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer

from dsv3_plugin.bench import app as bench_app
from dsv3_plugin.checkpoint.cli import app as checkpoint_app
from dsv3_plugin.conformance.cli import app as conformance_app
from dsv3_plugin.errors import DSV3Error
from dsv3_plugin.kernels.cli import app as kernels_app
from dsv3_plugin.megatron_backend.cli import app as convert_app

app = typer.Typer(
    help="DeepSeek-V3 with one arithmetic in vLLM, SGLang and Megatron-Core.",
    no_args_is_help=True,
    add_completion=False,
)
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(conformance_app, name="conformance")
app.add_typer(convert_app, name="convert")
app.add_typer(bench_app, name="bench")
app.add_typer(kernels_app, name="kernels")


class Interrupted(BaseException):
    """A signal that asks the command to end. No `Exception`, so that nothing but clearing up happens on its way; who
    clears up adds a note that says what is left.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


@contextmanager
def _interruptible() -> Iterator[None]:
    """The first signal raises `Interrupted`; a second one ends the process at once."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        raise Interrupted(number)

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    # `nohup` and a shell's background jobs have some ignored.
    before = {each: signal.getsignal(each) for each in signals if signal.getsignal(each) != signal.SIG_IGN}
    for each in before:
        signal.signal(each, interrupt)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def main() -> None:
    """Run the command line. An error that is meant for the user is one line on stderr and exit status 2; a signal's is
    128 and its number, as a shell has it.
    """
    try:
        with _interruptible():
            app()
    except DSV3Error as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        print("; ".join([f"error: {stop}", *getattr(stop, "__notes__", [])]), file=sys.stderr)
        sys.exit(128 + stop.number)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {error.filename or 'the output'}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
