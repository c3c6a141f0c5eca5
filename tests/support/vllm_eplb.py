"""vLLM's rebalancer moves experts of our model between two gloo ranks: `vllm_eplb.py CHECKPOINT [BREAK]`.

vLLM refuses `--enable-eplb` on a CPU, so that its machinery is driven here without an engine. The first rank prints, as
JSON, whether the bits stayed those of one rank, what moved, and whether a new load and the fingerprint find the experts
where they lie. `BREAK` "maps" keeps the maps of before the move.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
import traceback
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import ParallelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.distributed.eplb.eplb_state import EplbState
from vllm.model_executor.models.interfaces import is_mixture_of_experts

from dsv3_plugin.checkpoint.fingerprint import fingerprint, fingerprint_of_checkpoint
from dsv3_plugin.checkpoint.loader import WeightLoader, load_model
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.layers.attend import WholeSequences
from dsv3_plugin.layers.model import DeepseekV3, bind_ops
from dsv3_plugin.layout import Group, Layout
from dsv3_plugin.vllm_backend.eplb import MovableExperts, placement_of, with_replicas

REPLICAS = 4
TOKENS = torch.arange(40) * 11 % 300


class _Event:
    """Of a card, which is not here."""

    def __init__(self, **_: Any) -> None:
        """Nothing."""

    def record(self, *_: Any) -> None:
        """Nothing."""

    def elapsed_time(self, _: Any) -> float:
        return 0.0

    synchronize = wait = record


class Served(torch.nn.Module, MovableExperts):
    """The adapter's model, without an engine's cache."""

    def __init__(self, reader: CheckpointReader, layout: Layout) -> None:
        super().__init__()
        self.config, self.layout = reader.config, layout
        self.ops = bind_ops(self.config, reader.profile(), torch.device("cpu"), layout=layout)
        deepseek = DeepseekV3(self.ops, self.config, layout)
        self.model, self.lm_head = deepseek.model, deepseek.lm_head
        self.weight_loader = WeightLoader(self, self.config, "main", layout=layout)
        self.weight_loader.read(reader)

    def logits(self) -> torch.Tensor:
        positions, attend = torch.arange(len(TOKENS)), WholeSequences(self.ops, self.config)
        return self.lm_head(self.model(self.model.embed_tokens(TOKENS), positions, attend))


def rank_of(rank: int, checkpoint: str, store: str, broken: str) -> dict[str, Any]:
    torch.Event, torch.accelerator.current_stream = _Event, lambda *_: _Event()  # type: ignore[misc,assignment]
    torch.accelerator.current_device_index = lambda: 0  # type: ignore[assignment]
    config = VllmConfig(parallel_config=ParallelConfig(tensor_parallel_size=2, enable_expert_parallel=True))
    parallel = config.parallel_config
    parallel.enable_eplb = True
    parallel.eplb_config.num_redundant_experts = REPLICAS
    parallel.eplb_config.use_async = False
    parallel.eplb_config.window_size, parallel.eplb_config.step_interval = 2, 4
    parallel.eplb_config.communicator = "torch_gloo"
    with set_current_vllm_config(config), torch.inference_mode():
        parallel_state.init_distributed_environment(2, rank, f"file://{store}", rank, "gloo")
        parallel_state.initialize_model_parallel(2, backend="gloo")
        reader = CheckpointReader(checkpoint)
        experts = Group(rank, 2, parallel_state.get_ep_group().device_group)
        served = Served(reader, with_replicas(Layout(experts=experts), reader.config, parallel))
        assert is_mixture_of_experts(served)
        one = load_model(reader, bind_ops(reader.config, reader.profile(), torch.device("cpu")))
        attend = WholeSequences(one.ops, reader.config)
        alone = one.lm_head(one(TOKENS, torch.arange(len(TOKENS)), attend))
        state = EplbState(parallel, torch.device("cpu"))
        state.add_model(served, SimpleNamespace(model=checkpoint, compute_hash=lambda: "served"))
        layers = served.moe_layers
        before = [placement_of(layer) for layer in layers]
        equal, loads = [], []
        for _ in range(parallel.eplb_config.step_interval + 2):
            kept = [(layer.logical_to_physical_map.clone(), layer.logical_replica_count.clone()) for layer in layers]
            equal.append(torch.equal(served.logits().view(torch.int32), alone.view(torch.int32)))
            loads.append(int(sum(layer.expert_load.sum() for layer in layers)))
            state.step()
            if broken == "maps":
                for layer, (slots, counts) in zip(layers, kept, strict=True):
                    layer.logical_to_physical_map, layer.logical_replica_count = slots, counts
        after = [placement_of(layer) for layer in layers]
        served.follow_experts()
        held = fingerprint(served, served.config, "main", served.layout).tensors
        whole = fingerprint_of_checkpoint(reader).tensors
        served.weight_loader.read(reader)
        return {
            "equal": equal,
            "loads": loads,
            "moved": before != after,
            "placements": [placement.experts for placement in after],
            "fingerprint": held == {name: whole[name] for name in held},
            "equal_after_update": torch.equal(served.logits().view(torch.int32), alone.view(torch.int32)),
        }


def _process(rank: int, arguments: tuple[str, str, str], answers: Any) -> None:
    torch.set_num_threads(1)
    try:
        answers.put((rank, rank_of(rank, *arguments)))
    except BaseException:
        answers.put((rank, traceback.format_exc()))


def main() -> None:
    checkpoint, broken = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = checkpoint, f"{folder}/store", broken
        ranks = [context.Process(target=_process, args=(rank, arguments, answers)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        found = dict(answers.get(timeout=240) for _ in ranks)
    print(json.dumps([found[rank] for rank in range(2)]))


if __name__ == "__main__":
    main()
