"""examples/pretrain_megatron.py, which then writes the fingerprint of the weights that it trained.

python pretrain_on_cpu.py pretrain_probe.py FILE [--break NAME] ARGUMENTS OF THE EXAMPLE
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.training import training
from paths import ROOT
from torch import distributed as dist

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.megatron_backend import layers, model, moe, optimizer, pipeline
from dsv3_plugin.megatron_backend.weights import fingerprint

EXAMPLE = ROOT / "examples" / "pretrain_megatron.py"
train = training.train


def break_property(name: str) -> None:
    """The twins: each gives up one thing that this adapter does for Megatron."""
    if name == "waiting":  # for weights that another rank's optimizer has stepped
        layers._wait_for_weights = lambda *_: None
    elif name == "embedding":  # which stages share it
        model.require_embedding_group = lambda _: None
        pipeline.embedding_ranks = lambda ranks, _: [ranks[0], ranks[-1]]
    elif name == "weights":  # of experts, whose gradient is the router's
        dispatch = moe.MoE.dispatch
        moe.MoE.dispatch = lambda self, rows, probs: dispatch(self, rows, probs.detach().requires_grad_())
    else:
        assert name == "steps"  # of Adam, which a checkpoint holds
        optimizer._own_steps = lambda _: None


def main() -> None:
    """Called by pretrain_on_cpu."""
    file = Path(sys.argv.pop(1))
    if sys.argv[1] == "--break":
        break_property(sys.argv.pop(2))
        del sys.argv[1]

    def train_and_write(forward_step: Any, chunks: list[DistributedDataParallel], *args: Any, **kwargs: Any) -> Any:
        done = train(forward_step, chunks, *args, **kwargs)
        config = DeepseekV3Config.from_pretrained(training.get_args().hf_config)
        found = fingerprint(chunks, config)
        if dist.get_rank() == 0:
            file.write_text(found.model_dump_json())
        return done

    training.train = train_and_write
    runpy.run_path(str(EXAMPLE), run_name="script")["main"]()
