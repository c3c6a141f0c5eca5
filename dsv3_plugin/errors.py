"""Errors that are written for the user.

Every error that bad input can cause is a `DSV3Error`: one line that says what was wrong, where, and
what to do about it. The command line prints the line and exits with status 2; an engine shows it as
the last line of its traceback. Anything else that escapes is a bug of ours.
"""


class DSV3Error(Exception):
    """Base of all errors that are meant for the user."""


class ConfigError(DSV3Error):
    """A model configuration is missing, malformed, or describes a model that this package does not implement."""


class CheckpointError(DSV3Error):
    """A checkpoint's files or tensors do not match its configuration."""


class KernelError(DSV3Error):
    """No kernel may serve an operation, or a kernel provider is broken."""


class InputError(DSV3Error):
    """An operation was called with a tensor that its contract does not admit."""


class EngineError(DSV3Error):
    """An engine is missing, outside its tested range in a way that cannot work, or set up in an unsupported way."""


class ConformanceError(DSV3Error):
    """A conformance run cannot be carried out: a testee is missing, crashed, or broke the protocol."""


class DiffError(DSV3Error):
    """Two sides of `dsv3 diff` cannot be read, or have nothing in common."""
