"""The `dsv3` command. Each subject has its own commands, next to its code; here they are put together."""

from __future__ import annotations

import sys

import typer

from dsv3_plugin.bench import app as bench_app
from dsv3_plugin.checkpoint.cli import app as checkpoint_app
from dsv3_plugin.checkpoint.fingerprint_cli import main as fingerprint
from dsv3_plugin.conformance.cli import app as conformance_app
from dsv3_plugin.doctor import main as doctor
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
app.add_typer(convert_app, name="convert")
app.add_typer(bench_app, name="bench")
app.add_typer(kernels_app, name="kernels")
app.command("doctor")(doctor)


def main() -> None:
    """Run the command line. An error that is meant for the user is one line on stderr and exit status 2."""
    try:
        app()
    except DSV3Error as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
