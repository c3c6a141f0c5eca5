"""SGLang's own pools, with the arguments that it passes to an out-of-tree platform."""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool


class LatentPool(MLATokenToKVPool):
    """SGLang passes every such pool the width of an index that only sparse attention has."""

    def __init__(self, *args: Any, index_head_dim: None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


class TokenAllocator(TokenToKVPoolAllocator):
    """SGLang passes every such allocator a page size; this one has pages of one token."""

    def __init__(self, size: int, *, page_size: int, **kwargs: Any) -> None:
        if page_size != 1:
            raise ValueError(f"page_size={page_size}; the CPU platform has pages of one token")
        super().__init__(size, **kwargs)
