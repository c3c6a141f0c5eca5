"""A pass in one of SGLang's CUDA graphs, played on a CPU, in SGLang's own environment:
`python tests/support/sglang_graph.py CHECKPOINT PAGE_SIZE`.

A graph repeats what was done with the memory that it was recorded over. So a replay is here: SGLang's own buffers are
filled for a batch as its runner does it, its scheduler then changes its table of slots, and the same attention runs
over the same memory again. Prints one line for each property, and one for each twin that breaks it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import torch
from sglang.srt.model_executor.cuda_graph_buffer_registry import build_decode_registry
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.layers.model import bind_ops
from dsv3_plugin.profile import profile_for
from dsv3_plugin.sglang_backend import attention

CONTEXT, SLOTS, MAX_REQUESTS = 24, 100, 4
BUFFERS = "positions", "out_cache_loc", "req_pool_indices", "seq_lens"


class Server:
    """The memory that SGLang holds, with three requests in it; page 0 and request 0 are nobody's."""

    def __init__(self, checkpoint: str, page_size: int) -> None:
        self.config = DeepseekV3Config.from_pretrained(checkpoint)
        self.ops = bind_ops(self.config, profile_for(self.config), torch.device("cpu"))
        draw = torch.Generator().manual_seed(0)
        self.numbers = torch.randn(64, 4, self.config.latent_dim, generator=draw).bfloat16()
        self.cache = torch.randn(SLOTS, 1, self.config.latent_dim, generator=draw).bfloat16()
        self.slots = torch.zeros(MAX_REQUESTS + 1, CONTEXT, dtype=torch.int32)
        self.page_size = page_size
        pages = torch.randperm(SLOTS // page_size - 1, generator=draw).to(torch.int32) + 1
        owned = pages[:, None] * page_size + torch.arange(page_size)
        self.slots[1:] = owned.flatten()[: MAX_REQUESTS * CONTEXT].view(MAX_REQUESTS, CONTEXT)
        runner = SimpleNamespace(
            token_to_kv_pool=SimpleNamespace(
                page_size=page_size, start_layer=0, get_key_buffer=lambda layer: self.cache
            ),
            req_to_token_pool=SimpleNamespace(req_to_token=self.slots),
            model_config=SimpleNamespace(context_len=CONTEXT),
        )
        self.backend = attention.LatentBackend(runner)

    def batch(self, mode: ForwardMode, requests: list[int], lengths: list[int], width: int) -> SimpleNamespace:
        """`width` new tokens of each request, at the end of `lengths` tokens."""
        pairs = list(zip(requests, lengths, strict=True))
        positions = torch.cat([torch.arange(length - width, length) for _, length in pairs])
        rows = torch.tensor(requests).repeat_interleave(width)
        return SimpleNamespace(
            forward_mode=mode,
            batch_size=len(requests),
            positions=positions,
            out_cache_loc=self.slots[rows, positions].long(),
            req_pool_indices=torch.tensor(requests),
            seq_lens=torch.tensor(lengths),
        )

    @contextmanager
    def scheduler_at_work(self) -> Iterator[None]:
        """It gives the slots to other requests."""
        before = self.slots.clone()
        self.slots[1:] = before[1:].roll(1, 0)
        yield
        self.slots.copy_(before)

    def attend(self, batch: SimpleNamespace) -> tuple[attention.LatentAttend, torch.Tensor]:
        """Write the tokens of a batch and attend with them, as a layer does."""
        tokens = len(batch.positions)
        with forward_context(ForwardContext(attn_backend=self.backend)):
            attend = attention.LatentAttend(self.ops, self.config, 0, batch.positions, batch, {})
        return attend, attend(0, self.numbers[:tokens], self.numbers[:tokens, 0])


class Graph:
    """One of four requests with `width` tokens each, over SGLang's own buffers."""

    def __init__(self, server: Server, mode: ForwardMode, width: int) -> None:
        self.server, self.width = server, width
        self.registry = build_decode_registry(
            device=torch.device("cpu"),
            max_bs=MAX_REQUESTS,
            max_num_token=MAX_REQUESTS * width,
            seq_len_fill_value=server.backend.get_cuda_graph_seq_len_fill_value(),
            cache_loc_dtype=torch.int64,
            share_pool=False,
        )
        server.backend.init_cuda_graph_state(MAX_REQUESTS, MAX_REQUESTS * width)
        buffers = {n: self.registry.get_slot(n).slice_for(MAX_REQUESTS, MAX_REQUESTS * width) for n in BUFFERS}
        self.batch = SimpleNamespace(forward_mode=mode, batch_size=MAX_REQUESTS, **buffers)
        server.backend.init_forward_metadata_out_graph(self.batch, in_capture=True)
        self.recorded = self.run()[0]

    def run(self) -> tuple[attention.LatentAttend, torch.Tensor]:
        with patch.object(attention, "is_recorded", lambda x: True):
            return self.server.attend(self.batch)

    def fill(self, batch: SimpleNamespace) -> None:
        """As SGLang's runner does before a replay."""
        requests = batch.batch_size
        self.registry.fill_from(
            batch,
            raw_bs=requests,
            padded_bs=MAX_REQUESTS,
            raw_num_tokens=requests * self.width,
            padded_num_tokens=MAX_REQUESTS * self.width,
        )

    def replay(self, batch: SimpleNamespace) -> tuple[attention.LatentAttend, torch.Tensor]:
        """With the scheduler at work while the graph runs."""
        self.fill(batch)
        self.server.backend.init_forward_metadata_out_graph(self.batch)
        with self.server.scheduler_at_work():
            return self.run()


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """In every bit."""
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def compare(server: Server, graph: Graph, batch: SimpleNamespace) -> tuple[bool, bool]:
    """Whether a replay answers what an eager pass does, and leaves the same in every slot that a request owns."""
    empty = server.cache.clone()
    _, expected = server.attend(batch)
    written = server.cache.clone()
    server.cache.copy_(empty)
    _, out = graph.replay(batch)
    answer = equal(out[: len(expected)], expected), equal(server.cache[server.page_size :], written[server.page_size :])
    server.cache.copy_(empty)
    return answer


def drafted(server: Server, batch: SimpleNamespace, slots: torch.Tensor) -> torch.Tensor:
    """One token a request in each step, at the next position each time; slots [steps, requests]."""
    outs = []
    for step in slots:
        batch.out_cache_loc = step
        outs.append(server.attend(batch)[1])
        batch.positions.add_(1)
    batch.positions.sub_(len(slots))
    return torch.stack(outs)


def compare_drafts(server: Server) -> bool:
    """Whether a graph of two draft steps answers what eager ones do."""
    requests, lengths = [4, 2], [13, 23]
    batch = server.batch(ForwardMode.DECODE, requests, lengths, 1)
    slots = torch.stack([server.slots[requests, batch.positions + step].long() for step in range(2)])
    graph, steps = Graph(server, ForwardMode.DECODE, 1), attention.DraftSteps(server.backend, 2)
    steps.init_cuda_graph_state(MAX_REQUESTS, MAX_REQUESTS)
    expected = drafted(server, batch, slots)
    graph.fill(batch)
    padded = torch.zeros(2, MAX_REQUESTS, dtype=torch.int64)
    padded[:, : len(requests)] = slots
    steps.init_forward_metadata_out_graph(graph.batch)
    with server.scheduler_at_work(), patch.object(attention, "is_recorded", lambda x: True):
        steps.init_forward_metadata_in_graph(graph.batch)
        out = drafted(server, graph.batch, padded)
    return equal(out[:, : len(requests)].contiguous(), expected)


def main() -> None:
    server = Server(sys.argv[1], int(sys.argv[2]))
    for mode, width in ((ForwardMode.DECODE, 1), (ForwardMode.TARGET_VERIFY, 3)):
        graph = Graph(server, mode, width)
        batches = [
            server.batch(mode, [1, 2, 3, 4], [20, 9, 3, 12], width),
            server.batch(mode, [4, 2], [13, 24], width),
            server.batch(mode, [3], [4], width),
        ]
        print(f"{mode.name} equals an eager pass:", [compare(server, graph, batch) for batch in batches])
        server.backend.init_cuda_graph_state(2, 2)
        again = graph.replay(batches[1])[0]
        stays = again.batch.block_table.data_ptr() == graph.recorded.batch.block_table.data_ptr()
        print(f"{mode.name} reads where it was recorded:", stays)
        print(f"{mode.name} pads with requests as long as their queries:", again.batch.seq_lens[2:].tolist())

        # The twins.
        with patch.object(
            attention,
            "block_tables",
            lambda backend, requests: server.slots[requests, :: server.page_size] // server.page_size,
        ):
            print(f"{mode.name}, table read while the graph runs:", compare(server, graph, batches[1])[0])
        with patch.object(server.backend, "init_forward_metadata_out_graph", lambda batch: None):
            print(f"{mode.name}, table of the replay before:", compare(server, graph, batches[0])[0])
        graph.registry.get_slot("out_cache_loc").reset_padding = lambda raw, padded: None
        compare(server, graph, batches[0])
        print(f"{mode.name}, slots of the replay before in padded rows:", compare(server, graph, batches[1])[1])

    print("two draft steps equal eager ones:", compare_drafts(server))
    tables = server.backend.tables_of_graphs
    with patch.object(server.backend, "init_forward_metadata_out_graph", lambda *args, **kwargs: tables.zero_()):
        print("two draft steps without a table:", compare_drafts(server))


if __name__ == "__main__":
    main()
