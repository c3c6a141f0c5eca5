"""Engines that leave a prompt's rows in a folder, and find them there: `vllm_connector.py CHECKPOINT FOLDER`.

vLLM's ExampleConnector keeps each layer's rows in a file. Of each engine a line tells how many tokens its passes had,
and the digests of the raw logits that tokens were chosen from.
"""

from __future__ import annotations

import os

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}

import gc
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

PROMPT = [(i * 7919 + 13) % 1000 + 2 for i in range(45)]


def answer(checkpoint: str, folder: Path | None, drafts: int) -> dict[str, Any]:
    """Of one engine, which has a connector if there is a folder for it."""
    connector = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }
    llm = LLM(
        checkpoint,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=128,
        block_size=16,
        kv_cache_memory_bytes=16 << 20,
        enable_prefix_caching=False,
        kv_transfer_config=connector if folder else None,
        speculative_config={"method": "mtp", "num_speculative_tokens": drafts} if drafts else None,
    )
    model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
    passes: list[int] = []
    digests: list[str] = []
    forward, compute_logits = model.forward, model.compute_logits

    def watched_forward(**kwargs: Any) -> torch.Tensor:
        passes.append(len(kwargs["positions"]))
        return forward(**kwargs)

    def watched_logits(hidden_states: torch.Tensor) -> torch.Tensor:
        logits = compute_logits(hidden_states)
        digests.append(hashlib.blake2b(logits.numpy().tobytes(), digest_size=8).hexdigest())
        return logits

    model.forward, model.compute_logits = watched_forward, watched_logits
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    del llm, model
    cleanup_dist_env_and_memory()
    gc.collect()
    return {"passes": passes, "digests": digests, "tokens": list(output.outputs[0].token_ids)}


def spoil(folder: Path) -> None:
    """One bit of one number of a stored row of the second layer."""
    (file,) = folder.glob("*/model.layers.1.*")
    tensors = load_file(file)
    tensors["kv_cache"].view(torch.uint8).flatten()[0] ^= 1
    save_file(tensors, file)


def main() -> None:
    checkpoint, folder = sys.argv[1], Path(sys.argv[2])

    def tell(name: str, told: dict[str, Any]) -> None:
        print(f"TOLD {json.dumps({name: told})}", flush=True)

    for drafts in 0, 1:
        stored = folder / str(drafts)
        tell(f"alone {drafts}", answer(checkpoint, None, drafts))
        tell(f"stores {drafts}", answer(checkpoint, stored, drafts))
        tell(f"finds {drafts}", answer(checkpoint, stored, drafts))
    spoil(folder / "0")
    tell("finds others", answer(checkpoint, folder / "0", 0))


if __name__ == "__main__":
    main()
