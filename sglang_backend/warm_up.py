"""Compiling the kernels of our models before SGLang records its graphs, which is the last thing before requests."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from dsv3_plugin.engines import is_ours
from dsv3_plugin.layers.warm_up import warm_up
from dsv3_plugin.sglang_backend import compat

logger = logging.getLogger("sglang.dsv3_plugin")


def compile_before_graphs(init_cuda_graphs: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `ModelRunner.init_cuda_graphs`, which each runner calls, also where it records none."""
    if is_ours(runner.model) and runner.device != "cpu":  # where nothing is compiled
        _compile(runner)
    return init_cuda_graphs(runner, *args, **kwargs)


def _compile(runner: Any) -> None:
    values, model = compat.server_options(), runner.model
    chunk = values["chunked_prefill_size"]
    seconds = warm_up(
        model.model,
        getattr(model, "lm_head", None),
        model.layout,
        block_size=runner.token_to_kv_pool.page_size,
        most_tokens=chunk if chunk > 0 else values["max_prefill_tokens"],
        most_logits=runner.max_running_requests * (values["speculative_num_draft_tokens"] or 1),
    )
    logger.info("dsv3-plugin: the %s model's kernels are compiled, in %.0f s", model.weight_loader.part, seconds)


HOOKS: dict[str, Callable[..., Any]] = {
    "sglang.srt.model_executor.model_runner.ModelRunner.init_cuda_graphs": compile_before_graphs
}
