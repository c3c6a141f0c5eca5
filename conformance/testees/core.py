"""The core on tensor-parallel ranks, without an engine: the reference's schedule, each rank with its part of the model.

So the layout is tried on a machine before an engine's is: several ranks may share one card.
"""

from __future__ import annotations

from dsv3_plugin.conformance.layouts import ParallelLayout, RankOf
from dsv3_plugin.conformance.process_groups import join
from dsv3_plugin.conformance.protocol import Case, Job
from dsv3_plugin.conformance.testees import program
from dsv3_plugin.conformance.testees.reference import ReferenceTestee
from dsv3_plugin.errors import ConformanceError


class CoreTestee(ReferenceTestee):
    """One rank, or all of the model."""

    name = "core"

    def __init__(self, job: Job, rank: RankOf | None = None) -> None:
        if rank is None:
            super().__init__(job)
            return
        _, layout = join(rank, job.device)
        super().__init__(job, layout=layout)

    def run(self, case: Case) -> program.Outcome:
        """See `ReferenceTestee.run`: its own passes alone."""
        outcome = super().run(case)
        outcome.specification = None
        return outcome


def require_tensor_parallel(layout: ParallelLayout) -> None:
    """Raise `ConformanceError` for any other layout."""
    if layout.dp > 1 or layout.pp > 1:
        raise ConformanceError(f"--layout {layout}: the core alone runs tensor-parallel ranks; name tp only")


def main() -> None:
    """See the module."""
    program.main(CoreTestee, CoreTestee, require_tensor_parallel)


if __name__ == "__main__":
    main()
