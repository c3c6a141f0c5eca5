"""SGLang's all-reduce as `dsv3 bench layouts` takes it, on one rank without a card: its kernel is torch's here.

With `without` SGLang's groups are not made. Prints the sums of a size that it takes and of one that it leaves, or why
there are none.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext

import torch
from sglang.srt.distributed import parallel_state
from sglang.srt.distributed.device_communicators import custom_all_reduce
from torch import distributed as dist

from dsv3_plugin.kernels.bench.all_reduce import all_reduces


class Twice:
    disabled = False
    capture = nullcontext

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        parallel_state.get_world_group().barrier()  # as SGLang does where it looks at the cards

    def should_custom_ar(self, x: torch.Tensor) -> bool:
        return len(x) == 2

    def custom_all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def main() -> None:
    custom_all_reduce.dispatch_custom_allreduce = lambda group, device: Twice
    if "without" in sys.argv:
        parallel_state.init_distributed_environment = lambda **_: None
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found, missing = all_reduces(dist.group.WORLD, torch.device("cpu"))
    if "SGLang" in missing:
        print(missing["SGLang"])
        return
    sums = [found["SGLang"].run(torch.ones(size)) for size in (2, 3)]
    print([x if x is None else x.tolist() for x in sums])


if __name__ == "__main__":
    main()
