"""The vLLM adapter's attention on a CPU, in vLLM's own environment: `python tests/support/attention_in_vllm.py
CHECKPOINT`. A sparse layer runs through it, and on torch's "meta" device, whose numbers nobody can read, a step of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from unittest.mock import patch

import torch
from no_reads import reads_nothing
from sparse_layer import LENGTHS, STEPS, Toy, joined, spans, toy

from dsv3_plugin.layers.attend import Attend, Select, WholeSequences, attending, select_all
from dsv3_plugin.ops.paged_batch import PagedBatch
from dsv3_plugin.vllm_backend import attention, graphs

PAGE, NUM_BLOCKS, PADDING = 16, 20, 3
TABLE = torch.tensor([[7, 2, 19, 4, 11, 5], [3, 17, 1, 0, 0, 0], [9, 0, 0, 0, 0, 0]], dtype=torch.int32)


class Engine:
    """One layer's pages as vLLM makes them, and its steps; page 0 is nobody's."""

    def __init__(self, own: Toy, device: str = "cpu") -> None:
        self.own, self.device = own, torch.device(device)
        self.vllm_config = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=4, max_num_batched_tokens=256),
            compilation_config=SimpleNamespace(static_forward_context={}),
            cache_config=SimpleNamespace(block_size=PAGE),
            model_config=None,
            speculative_config=None,
            parallel_config=None,
        )
        loader = type("Loader", (), {"require_whole": lambda self: None})()
        self.layer = attention.LatentCache(own.ops, own.config, self.vllm_config, "layer", loader)
        spec = self.layer.get_kv_cache_spec(self.vllm_config)
        shape = attention.LatentBackend.get_kv_cache_shape(NUM_BLOCKS, spec.block_size, 1, spec.head_size)
        self.layer.kv_cache = torch.full(shape, torch.nan, dtype=spec.dtype, device=self.device)
        self.builder = attention.LatentMetadataBuilder(spec, ["layer"], self.vllm_config, self.device)

    def metadata(self, step: int) -> attention.LatentMetadata:
        """Built once for the step, for all layers."""
        queries = [last - first for first, last in spans(step)]
        positions = torch.cat([torch.arange(*span) for span in spans(step)])
        requests = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(queries))
        starts = torch.tensor([0, *queries], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        common = SimpleNamespace(
            num_actual_tokens=len(positions),
            num_reqs=len(LENGTHS),
            query_start_loc=starts.to(self.device),
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor(STEPS[step + 1], dtype=torch.int32).to(self.device),
            block_table_tensor=TABLE.to(self.device),
            slot_mapping=(TABLE[requests, positions // PAGE] * PAGE + positions % PAGE).to(self.device),
        )
        return self.builder.build(0, common)

    def attend(self, metadata: attention.LatentMetadata) -> Attend:
        """As the layers of the model are given it."""
        caches = SimpleNamespace(attn_metadata={"layer": metadata})

        def attend(layer_idx: int, q: torch.Tensor, cached: torch.Tensor, select: Select = select_all) -> torch.Tensor:
            with patch.object(attention, "get_forward_context", lambda: caches):
                return self.layer(q, cached, select)

        return attend


class Recording:
    """A recording in pieces, as vLLM's, of which a CPU can make the gaps alone. `late`: whether they are made again."""

    def __init__(self, late: bool = True) -> None:
        self.late = late
        self.gaps: list[Callable[[], None]] = []

    def add_eager(self, gap: Callable[[], None]) -> None:
        gap()
        self.gaps.append(gap)

    def replay(self) -> None:
        for gap in self.gaps if self.late else ():
            gap()

    def of(self, layer: attention.LatentCache, q: torch.Tensor, cached: torch.Tensor) -> torch.Tensor:
        """Where the graph puts what the layer finds for what is in q and cached: recorded in a pass of no request."""
        nobody = SimpleNamespace(attn_metadata=None, cudagraph_runtime_mode=graphs.CUDAGraphMode.PIECEWISE)
        with (
            patch.object(attention, "get_forward_context", lambda: nobody),
            patch.object(graphs, "get_forward_context", lambda: nobody),
            patch.object(graphs, "weak_ref_tensors", lambda x: x),  # the CPU build has none
            patch.object(graphs.BreakableCUDAGraphCapture, "current", lambda: self),
        ):
            return layer(q, cached)


def in_gaps(own: Toy, recording: Recording) -> bool:
    """Whether a recorded graph's attention is that of passes without one, whose rows it pads."""
    eager, recorded = Engine(own), Engine(own)
    most = PADDING + max(sum(last - first for first, last in spans(i)) for i in range(len(STEPS) - 1))
    q, cached = (own.x[0].new_zeros(most, *shape) for shape in ((2, own.config.latent_dim), (own.config.cached_dim,)))
    out = recording.of(recorded.layer, q, cached)
    equal = not out.count_nonzero()
    for i in range(len(STEPS) - 1):
        q.normal_()
        cached.normal_()
        found = eager.attend(eager.metadata(i))(0, q, cached)
        step = SimpleNamespace(attn_metadata={"layer": recorded.metadata(i)})
        with patch.object(attention, "get_forward_context", lambda step=step: step):
            recording.replay()
        equal &= torch.equal(out, found) and bool(found.count_nonzero())
    return equal


def main() -> None:
    own = toy(sys.argv[1])
    engine, forgetful = Engine(own), Engine(own)
    outs = joined([own.run(spans(i), engine.attend(engine.metadata(i)), PADDING) for i in range(len(STEPS) - 1)])
    itself = WholeSequences(own.ops, own.config)
    whole = [own.layer(x, *own.rotary(torch.arange(len(x))), itself) for x in own.x]
    print("sparse equals whole sequences:", all(map(torch.equal, outs, whole)))
    with patch.object(attention, "attending", lambda *args: attending(*args[:-1], select_all)):
        outs = joined([own.run(spans(i), forgetful.attend(forgetful.metadata(i))) for i in range(len(STEPS) - 1)])
    print("without the selection:", any(map(torch.equal, outs, whole)))

    print("between graphs:", in_gaps(own, Recording()), "never again:", in_gaps(own, Recording(late=False)))

    remote = Engine(own, "meta")

    def step() -> PagedBatch:
        metadata = remote.metadata(2)
        q = torch.empty(metadata.batch.num_tokens, 2, own.config.latent_dim, device="meta", dtype=own.x[0].dtype)
        remote.attend(metadata)(0, q, q.new_empty(len(q), own.config.cached_dim), own.layer.select)
        return metadata.batch

    print("reads:", reads_nothing(own.ops, step))
    sizes = []
    for is_cuda in (True, False):
        with patch.object(attention.current_platform, "is_cuda", lambda is_cuda=is_cuda: is_cuda):
            sizes.append(attention.LatentBackend.get_preferred_block_size(16))
    print("keys of a page on a GPU, on a CPU:", sizes)


if __name__ == "__main__":
    main()
