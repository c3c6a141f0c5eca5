"""Over how many ranks a testee spreads the model, in the words of `--layout`: `tp=2,pp=2`, `dp=2,ep=2`.

The claim of tier T1: no layout changes a bit. So every layout is compared with what one rank computes, the reference.
Tensor parallelism shares the slices of sums: it needs `DSV3_REDUCTION_SLICES`, the same for all sides.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.errors import ConformanceError
from dsv3_plugin.profile import SLICES_VARIABLE, Profile


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of the groups."""

    tp: int = 1
    """Ranks that share heads, vocabulary and dense features."""
    dp: int = 1
    """Ranks with requests of their own."""
    pp: int = 1
    """Stages."""
    ep: int = 1
    """Ranks that share the routed experts: 1, or those of `tp` and `dp`."""

    @classmethod
    def parse(cls, text: str) -> ParallelLayout:
        """`tp=2,pp=2`; `one` for one rank. Raises `ConformanceError` for what is not a layout."""
        if text == "one":
            return ONE_RANK
        sizes: dict[str, int] = {}
        for word in text.split(","):
            found = re.fullmatch(r"(tp|dp|pp|ep)=([1-9]\d*)", word)
            if found is None or found[1] in sizes:
                raise ConformanceError(
                    f"--layout {text}: {word!r} is not one of tp=N, dp=N, pp=N, ep=N, each once; one rank is 'one'"
                )
            sizes[found[1]] = int(found[2])
        layout = cls(**sizes)
        if layout.ep not in (1, layout.tp * layout.dp):
            raise ConformanceError(
                f"--layout {text}: experts are spread over all of the {layout.tp * layout.dp} ranks of tp and dp,"
                f" ep={layout.tp * layout.dp}"
            )
        return layout

    @property
    def ranks(self) -> int:
        """Processes."""
        return self.tp * self.dp * self.pp

    def require_possible(self, config: DeepseekV3Config, profile: Profile) -> None:
        """Raise `ConformanceError` where a model cannot be spread so."""
        if self.pp > config.num_hidden_layers:
            raise ConformanceError(
                f"--layout {self}: each stage has a decoder layer at least, and the model has"
                f" {config.num_hidden_layers}, so pp={config.num_hidden_layers} at most"
            )
        if config.n_routed_experts % self.ep:
            raise ConformanceError(
                f"--layout {self}: {self.ep} ranks cannot share the model's {config.n_routed_experts} routed experts"
                " in equal parts"
            )
        self.require_slices(profile)

    def require_slices(self, profile: Profile) -> None:
        """Raise `ConformanceError` where tensor-parallel ranks cannot share a profile's sums."""
        if self.tp & (self.tp - 1):
            raise ConformanceError(
                f"--layout {self}: ranks share slices of sums, whose number is a power of two; so is tp"
            )
        if profile.reduction_slices % self.tp:
            raise ConformanceError(
                f"--layout {self}: set {SLICES_VARIABLE} to a power of two that {self.tp} divides, which all sides then"
                f" compute in; it is {profile.reduction_slices}"
            )

    def __str__(self) -> str:
        """As `parse` reads it."""
        return ",".join(f"{name}={size}" for name, size in asdict(self).items() if size > 1) or "one"


ONE_RANK = ParallelLayout()


@dataclass(frozen=True)
class RankOf:
    """One process of a layout: data parallelism outermost, then stages, then tensor parallelism."""

    layout: ParallelLayout
    rank: int
    ports: tuple[int, ...]
    """Free ports of this machine, the same for all ranks."""

    @classmethod
    def parse(cls, layout: str, rank: int, ports: str) -> RankOf:
        """From what `testees.ranks.start_ranks` tells a process; ports are separated by commas."""
        return cls(ParallelLayout.parse(layout), rank, tuple(map(int, ports.split(","))))

    @property
    def dp_rank(self) -> int:
        """Which of the processes with requests of their own."""
        return self.rank // (self.layout.pp * self.layout.tp)

    @property
    def pp_rank(self) -> int:
        """Which stage."""
        return self.rank // self.layout.tp % self.layout.pp

    @property
    def tp_rank(self) -> int:
        """Which of those that share heads."""
        return self.rank % self.layout.tp

    @property
    def is_last_stage(self) -> bool:
        """Whether it has the head."""
        return self.pp_rank == self.layout.pp - 1

    def has(self, index: int) -> bool:
        """Whether the request that is `index`-th of a round is this rank's."""
        return index % self.layout.dp == self.dp_rank


ALONE = RankOf(ONE_RANK, 0, ())
"""The process of one rank."""
