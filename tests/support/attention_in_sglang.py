"""The SGLang adapter's attention on a CPU, in SGLang's own environment: `python tests/support/attention_in_sglang.py
CHECKPOINT`. A sparse layer runs through it, and on torch's "meta" device, whose numbers nobody can read, a step of it.
"""

from __future__ import annotations

import pkgutil
import sys
from types import SimpleNamespace
from unittest.mock import patch

import torch
from no_reads import reads_nothing
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.plugins import load_plugins
from sglang.srt.speculative import eagle_draft_extend_cuda_graph_runner as graphs
from sparse_layer import LENGTHS, STEPS, Toy, joined, spans, toy

from dsv3_plugin.layers.attend import WholeSequences, attending, select_all
from dsv3_plugin.ops.paged_batch import PagedBatch
from dsv3_plugin.sglang_backend import attention, compat

GRAPHS = "cuda_graph_runner_for_draft_extend"
SLOTS, CONTEXT, PAGE_SIZE = 300, 96, 4


class Engine:
    """SGLang's pools, sized by its own numbers after our hook, and its passes."""

    def __init__(self, own: Toy, device: str = "cpu") -> None:
        self.own, self.device = own, torch.device(device)
        config = own.config
        model_config = SimpleNamespace(
            context_len=CONTEXT, kv_lora_rank=config.kv_lora_rank, qk_rope_head_dim=config.qk_rope_head_dim
        )
        model = type("Model", (), {"__module__": "dsv3_plugin.sglang_backend.models", "config": config})()
        runner = SimpleNamespace(model=model, model_config=model_config)
        attention.size_slots(lambda runner: None, runner)
        width = model_config.kv_lora_rank + model_config.qk_rope_head_dim
        self.cache = torch.full((SLOTS, 1, width), torch.nan, dtype=own.x[0].dtype, device=self.device)
        pages = torch.randperm(SLOTS // PAGE_SIZE - 1, generator=torch.Generator().manual_seed(3)).to(torch.int32) + 1
        owned = pages[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)
        self.slots = owned.flatten()[: len(LENGTHS) * CONTEXT].view(-1, CONTEXT)
        runner.token_to_kv_pool = SimpleNamespace(
            page_size=PAGE_SIZE, start_layer=0, get_key_buffer=lambda layer: self.cache
        )
        runner.req_to_token_pool = SimpleNamespace(req_to_token=self.slots.to(self.device))
        self.backend = attention.LatentBackend(runner)

    def attend(self, step: int) -> attention.LatentAttend:
        """Built once for the pass, for all layers."""
        counts = [last - first for first, last in spans(step)]
        active = [i for i, count in enumerate(counts) if count]
        positions = torch.cat([torch.arange(*span) for span in spans(step)])
        requests = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(counts))
        batch = SimpleNamespace(
            forward_mode=ForwardMode.EXTEND,
            batch_size=len(active),
            out_cache_loc=self.slots[requests, positions].long().to(self.device),
            req_pool_indices=torch.tensor(active).to(self.device),
            extend_seq_lens=torch.tensor([counts[i] for i in active]).to(self.device),
            extend_seq_lens_cpu=[counts[i] for i in active],
        )
        with forward_context(ForwardContext(attn_backend=self.backend)):
            return attention.LatentAttend(self.own.ops, self.own.config, 0, positions.to(self.device), batch, {})


def records(backend: object, ranks: int = 1, requests: int = 8) -> bool:
    """Whether the draft's pass over verified tokens is recorded, with graphs of so many requests."""
    layout = SimpleNamespace(experts=SimpleNamespace(size=ranks))
    runner = SimpleNamespace(device="cuda", model=SimpleNamespace(layout=layout))
    worker = SimpleNamespace(draft_runner=runner, draft_extend_attn_backend=backend)
    with (
        patch.object(graphs, "EAGLEDraftExtendCudaGraphRunner", lambda worker: "recorded"),
        patch.object(compat, "tokens_in_graphs", lambda device: requests),
    ):
        attention.record_draft_extend(lambda worker: setattr(worker, GRAPHS, None), worker)
    return getattr(worker, GRAPHS) == "recorded"


def main() -> None:
    own = toy(sys.argv[1])
    engine, forgetful = Engine(own), Engine(own)
    outs = joined([own.run(spans(i), engine.attend(i)) for i in range(len(STEPS) - 1)])
    itself = WholeSequences(own.ops, own.config)
    whole = [own.layer(x, *own.rotary(torch.arange(len(x))), itself) for x in own.x]
    print("sparse equals whole sequences:", all(map(torch.equal, outs, whole)))
    with patch.object(attention, "attending", lambda *args: attending(*args[:-1], select_all)):
        outs = joined([own.run(spans(i), forgetful.attend(i)) for i in range(len(STEPS) - 1)])
    print("without the selection:", any(map(torch.equal, outs, whole)))

    remote = Engine(own, "meta")

    def step() -> PagedBatch:
        attend = remote.attend(2)
        q = torch.empty(attend.batch.num_tokens, 2, own.config.latent_dim, device="meta", dtype=own.x[0].dtype)
        attend(0, q, q.new_empty(len(q), own.config.cached_dim), own.layer.select)
        return attend.batch

    print("reads:", reads_nothing(own.ops, step))
    load_plugins()
    choose = pkgutil.resolve_name(compat.page_size_default())
    on_gpu = {"attention_backend": "dsv3", "device": "cuda", "page_size": None, "chunked_prefill_size": 8192}
    others = {"device": "cpu"}, {"attention_backend": "triton"}, {"chunked_prefill_size": 100}, {"page_size": 32}
    sizes = [choose(SimpleNamespace(**on_gpu | other)).get("page_size") for other in ({}, *others)]
    ours = object.__new__(attention.LatentBackend)
    kinds = [records(ours), records(object()), records(ours, ranks=2), records(ours, requests=0)]
    print("drafts recorded, of SGLang's backend, over ranks, without graphs:", kinds)
    print("keys of a page on a GPU, on a CPU, of SGLang's, with odd chunks, named:", sizes)


if __name__ == "__main__":
    main()
