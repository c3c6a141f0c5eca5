"""The SGLang testee with redundant experts, which SGLang moves every few passes.

Each rank tells in its result folder, in `experts.json`, which expert lay in which slot of each layer, one after the
other. `WATCHED_SGLANG=maps` lets the model send rows to where experts were at the start.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from dsv3_plugin.conformance.testees import program, sglang

EPLB = {"enable_eplb": True, "ep_num_redundant_experts": 4, "eplb_rebalance_num_iterations": 4}
EPLB |= {"expert_distribution_recorder_buffer_size": 4}


class Watched(sglang.SglangTestee):
    placements: list[Any]

    def start_engine(self, num_speculative_tokens: int) -> None:
        super().start_engine(num_speculative_tokens)
        model = self.scheduler.tp_worker.model_runner.model
        self.placements, follow = [], model.follow_experts

        def followed() -> None:
            if os.environ.get("WATCHED_SGLANG") == "maps" and self.placements:
                return
            follow()
            placement = model.followed.tolist()
            if placement not in self.placements[-1:]:
                self.placements.append(placement)
                Path(sys.argv[-1], "experts.json").write_text(json.dumps(self.placements))

        model.follow_experts = followed


def main() -> None:
    torch.cpu.empty_cache = lambda: None  # type: ignore[attr-defined]  # SGLang asks for it before it moves
    ranks = sglang.ranks
    sglang.ranks = lambda layout: ranks(layout) | EPLB
    program.main(Watched, Watched)


if __name__ == "__main__":
    main()
