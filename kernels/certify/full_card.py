"""Attention of more requests than a card has multiprocessors, which the model is too slow for."""

from __future__ import annotations

import time

import torch

from dsv3_plugin.kernels.certify.compare import bits_differ, largest_difference
from dsv3_plugin.kernels.certify.findings import Result
from dsv3_plugin.kernels.certify.targets import Target
from dsv3_plugin.ops.paged_batch import PagedBatch


def check_full_card(target: Target, seed: int, device: str = "cuda") -> Result:
    """Attention of a batch that fills the card, where a tile's splits are walked in order, against each request alone,
    which takes split-KV. The model is too slow for such sizes; it has seen single requests.
    """
    began = time.perf_counter()
    generator = torch.Generator(device).manual_seed(seed)
    requests, heads, longest = 150, 128, 4200
    lengths = torch.randint(1, longest, (requests,), generator=generator, device=device, dtype=torch.int32)
    pages = -(-longest // 64)
    table = torch.randperm(requests * pages, generator=generator, device=device).to(torch.int32).view(requests, pages)
    cache = torch.randn(requests * pages, 64, 576, generator=generator, device=device, dtype=torch.bfloat16)
    q = torch.randn(requests, heads, 576, generator=generator, device=device, dtype=torch.bfloat16)
    starts = torch.arange(requests + 1, device=device, dtype=torch.int32)
    sizes = {"kv_lora_rank": 512, "scale": 576**-0.5}

    def attend(own: slice) -> torch.Tensor:
        batch = PagedBatch.of(q[own], cache, table[own], lengths[own], starts[: len(q[own]) + 1])
        out: torch.Tensor = target.part.run(q[own], cache, batch, **sizes)
        return out

    together = attend(slice(requests))
    alone = [attend(slice(i, i + 1)) for i in range(requests)]
    wrong = [bits_differ(out, together[i : i + 1]) for i, out in enumerate(alone)]
    first_wrong = next((f"request {i} of {int(lengths[i])} keys: {n} outputs" for i, n in enumerate(wrong) if n), "")
    seconds = time.perf_counter() - began
    wrong_cases = sum(n > 0 for n in wrong)
    return Result(
        op=target.kernel.op,
        provider=target.kernel.provider,
        implementation=target.part.name,
        cases=requests,
        outputs=together.numel(),
        wrong_cases=wrong_cases,
        wrong_outputs=sum(wrong),
        first_wrong=first_wrong,
        seconds=seconds,
        exact=target.is_meant_exact,
        largest_difference=largest_difference(torch.cat(alone), together),
        full_card=True,
    )
