"""Megatron-Core with TransformerEngine's products, as a trainer has them that is given `--fp8-format e4m3`.

Its rows are to be the others' all the same: a kernel of TransformerEngine's serves where a certificate says that it has
the contract's bits.
"""

from __future__ import annotations

from pathlib import Path

from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.conformance.layouts import ALONE, RankOf
from dsv3_plugin.conformance.protocol import Job
from dsv3_plugin.conformance.testees import program
from dsv3_plugin.conformance.testees.megatron import MegatronTestee
from dsv3_plugin.errors import ConformanceError
from dsv3_plugin.megatron_backend.fp8 import TRANSFORMER_ENGINE


class TransformerEngineTestee(MegatronTestee):
    """Raises `ConformanceError` for a checkpoint not in fp8, and where no kernel of TransformerEngine's serves."""

    preferred_kernels = TRANSFORMER_ENGINE

    def __init__(self, job: Job, rank: RankOf = ALONE) -> None:
        profile = CheckpointReader(Path(job.checkpoint)).profile()
        if not profile.is_fp8:
            raise ConformanceError(
                f"{job.checkpoint} is in {profile}: TransformerEngine's products are looked at in fp8"
            )
        super().__init__(job, rank)
        if not any(choice.provider == TRANSFORMER_ENGINE for choice in self.gpt.binding.ops.provenance):
            raise ConformanceError(
                f"no kernel of {TRANSFORMER_ENGINE} serves {job.checkpoint} on {job.device}:"
                f" `dsv3 kernels list --profile {'fp8' if profile.scale_format == 'ue8m0' else 'fp8-float32'}` says why"
            )


def main() -> None:
    """See the module."""
    program.main(TransformerEngineTestee, TransformerEngineTestee)


if __name__ == "__main__":
    main()
