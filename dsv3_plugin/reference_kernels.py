"""The reference as a kernel provider: on a CPU it is the arithmetic itself."""

from __future__ import annotations

from dsv3_plugin.hooks import SUPPORTED, Kernel, Setting, Support, hookimpl, unsupported
from dsv3_plugin.ops import combine, fp8, fused, linear, mla_attention, rms_norm, rope, router, silu_and_mul
from dsv3_plugin.ops.contract import Contract
from dsv3_plugin.version import __version__

PROVIDER = "reference"

_REFERENCES = (
    (linear.LINEAR, linear.linear),
    (linear.HEAD_LINEAR, linear.head_linear),
    (linear.GROUPED_LINEAR, linear.grouped_linear),
    (fp8.QUANTIZE_FP8, fp8.quantize_fp8),
    (fp8.FP8_LINEAR, fp8.fp8_linear),
    (fp8.GROUPED_FP8_LINEAR, fp8.grouped_fp8_linear),
    (rms_norm.RMS_NORM, rms_norm.rms_norm),
    (rope.ROPE, rope.rope),
    (silu_and_mul.SILU_AND_MUL, silu_and_mul.silu_and_mul),
    (router.ROUTER_LINEAR, router.router_linear),
    (router.ROUTE, router.route),
    (router.MOE_ROUTER, router.moe_router),
    (combine.COMBINE, combine.combine),
    (mla_attention.MLA_ATTENTION, mla_attention.mla_attention),
    (fused.ADD_RMS_NORM, fused.add_rms_norm),
    (fused.RMS_NORM_FP8, fused.rms_norm_fp8),
    (fused.ADD_RMS_NORM_FP8, fused.add_rms_norm_fp8),
    (fused.SILU_AND_MUL_FP8, fused.silu_and_mul_fp8),
    (fused.PERMUTE, fused.permute),
    (fused.PERMUTE_FP8, fused.permute_fp8),
)


def only_cpu(setting: Setting) -> Support:
    """The reference's bits are defined on a CPU; on another device the library's sums are not its contract."""
    if setting.device_type == "cpu" and setting.arithmetic == "cpu":
        return SUPPORTED
    return unsupported(f"defines the CPU arithmetic, not {setting.arithmetic} on {setting.device_type}")


def _kernel(contract: Contract, run: object) -> Kernel:
    return Kernel(
        op=contract.op,
        contract_version=contract.version,
        provider=PROVIDER,
        version=__version__,
        run=run,  # type: ignore[arg-type]
        is_supported=only_cpu,
    )


@hookimpl
def dsv3_kernels() -> list[Kernel]:
    """One kernel an operation."""
    return [_kernel(contract, run) for contract, run in _REFERENCES]
