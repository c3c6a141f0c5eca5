"""The reference as a kernel provider: on a CPU it is the arithmetic itself."""

from __future__ import annotations

from dsv3_plugin.hooks import SUPPORTED, Kernel, Setting, Support, hookimpl, unsupported
from dsv3_plugin.ops.operation import operations
from dsv3_plugin.version import __version__

PROVIDER = "reference"


def only_cpu(setting: Setting) -> Support:
    """The reference's bits are defined on a CPU; on another device the library's sums are not its contract."""
    if setting.device_type == "cpu" and setting.arithmetic == "cpu":
        return SUPPORTED
    return unsupported(f"defines the CPU arithmetic, not {setting.arithmetic} on {setting.device_type}")


@hookimpl
def dsv3_kernels() -> list[Kernel]:
    """One kernel an operation."""
    return [
        Kernel(
            op=op.name,
            contract_version=op.version,
            provider=PROVIDER,
            version=__version__,
            run=op,
            is_supported=only_cpu,
        )
        for op in operations().values()
    ]
