"""slime's or miles' own weight export with this model, on ranks of a CPU, from a clone of their source:

    torchrun ... slime_on_cpu.py slime CLONE CHECKPOINT '{"expert_model_parallel_size": 2}'

Their iterators gather, broadcast and convert; what they give a server is compared with the checkpoint's bytes, on every
rank. The packages that they import and that no weight goes through are stand-ins.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from torch import distributed as dist

from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.hosts import slime
from dsv3_plugin.megatron_backend.config import transformer_config
from dsv3_plugin.megatron_backend.model import build_model
from dsv3_plugin.megatron_backend.weights import load_checkpoint


class StandIns(MetaPathFinder, Loader):
    """Finds a package that is not there, as one that has every name."""

    names = ("ray", "sglang", "torch_memory_saver", "transformers", "wandb", "httpx", "aiohttp", "yaml", "peft")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.names else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module: Any = MagicMock(name=spec.name)
        module.__path__, module.__spec__, module.__name__ = [], spec, spec.name
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def main() -> None:
    host, clone, checkpoint, sizes = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
    sys.path.append(str(Path(clone)))
    sys.meta_path.append(StandIns())
    sys.modules["tqdm"] = SimpleNamespace(tqdm=lambda items, **_: items)  # type: ignore[assignment]

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(expert_tensor_parallel_size=1, **sizes)
    model_parallel_cuda_manual_seed(0)
    reader = CheckpointReader(checkpoint)
    config = transformer_config(reader.config, reader.profile(), perform_initialization=False, **sizes)
    stage = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    model = [Float16Module(config, build_model(reader.config, config, *stage))]

    package = f"{host}.backends.megatron_utils"
    direct, common, to_servers = (
        importlib.import_module(f"{package}.update_weight.{name}")
        for name in ("hf_weight_iterator_direct", "common", "update_weight_from_distributed")
    )
    args = SimpleNamespace(
        hf_checkpoint=checkpoint,
        rollout_temperature=1.0,
        megatron_to_hf_mode="raw",
        mtp_num_layers=1,
        num_experts=reader.config.n_routed_experts,
        q_lora_rank=reader.config.q_lora_rank,
        vocab_size=reader.config.vocab_size,
        update_weight_buffer_size=1 << 20,
    )
    slime.init(args)
    if host == "slime":
        importlib.import_module(f"{package}.hf_to_megatron").load_hf_weights(args, model, checkpoint)
        accelerator = importlib.import_module("slime.utils.accelerator")
        accelerator.current_device, accelerator.synchronize = (lambda: torch.device("cpu")), (lambda: None)
    else:
        load_checkpoint(model, checkpoint)
        direct.get_parallel_state = common.get_parallel_state = _sizes_of_miles  # type: ignore[attr-defined]
    direct.get_gloo_group = lambda: dist.group.WORLD  # type: ignore[attr-defined]

    held = dict(reader.tensors())
    iterator = direct.HfWeightIteratorDirect(args, model, model_name="deepseekv3", quantization_config=None)
    local = dict(common.named_params_and_buffers(args, model))
    judge("from tensors", [pair for chunk in iterator.get_hf_weight_chunks(local) for pair in chunk], held)
    if host == "slime":
        sender = object.__new__(to_servers.UpdateWeightFromDistributed)
        sender.args, sender.model, sender.model_name, sender.quantization_config = args, model, "deepseekv3", None
        is_first = parallel_state.get_data_parallel_rank() == parallel_state.get_tensor_model_parallel_rank() == 0
        sender._is_pp_src_rank = is_first
        chunks = [*sender._iter_non_expert_chunks(), *sender._iter_expert_chunks()]
        judge("distributed", [pair for chunk in chunks for pair in chunk], held)


def judge(way: str, sent: list[tuple[str, torch.Tensor]], held: dict[str, torch.Tensor]) -> None:
    """Print what was sent; of a tensor that several stages hold, one of them at least."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [name for name, _ in sent])
    wrong = [n for n, tensor in sent if tensor.dtype != held[n].dtype or not torch.equal(tensor, held[n])]
    names = {name for of_rank in everyone for name in of_rank}
    copies = ("layers.4.embed_tokens.weight", "shared_head.head.weight")
    missing = sorted(name for name in held.keys() - names if not name.endswith(copies))
    found = {"way": way, "sent": len(sent), "wrong": wrong, "missing": missing}
    # In one piece beside the other ranks'.
    os.write(1, f"{json.dumps(found)}\n".encode())


def _sizes_of_miles() -> SimpleNamespace:
    of = parallel_state
    groups = {
        "pp": of.get_pipeline_model_parallel_group(),
        "ep": of.get_expert_model_parallel_group(),
        "tp": of.get_tensor_model_parallel_group(),
        "etp": of.get_expert_tensor_parallel_group(),
    }
    return SimpleNamespace(
        **{name: SimpleNamespace(group=g, size=g.size(), rank=g.rank()) for name, g in groups.items()}
    )


if __name__ == "__main__":
    main()
