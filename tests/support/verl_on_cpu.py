"""verl's own pieces in one loop on a CPU, as far as they go without Ray: `python verl_on_cpu.py CHECKPOINT`.

The trainer is verl's Megatron engine, with `external_lib=dsv3_plugin.hosts.verl`. The server is vLLM with MTP drafts,
started on made-up weights, with verl's extension of its worker. The engine's export goes into it by verl's buckets.
vLLM samples, the engine computes the log-probabilities again, and verl's metric compares them. Then the engine takes an
optimizer step.
A line of JSON for each comparison.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.errors import EngineError

EXTENSION = "verl.workers.rollout.vllm_rollout.utils.vLLMColocateWorkerExtension"
SOCKET = "ipc:///tmp/rl-colocate-zmq-{job}-replica-0-rank-0.sock"
# verl's defaults, as its configuration files give them.
OVERRIDES = {
    "recompute_granularity": None,
    "recompute_modules": ["core_attn"],
    "recompute_method": None,
    "recompute_num_layers": None,
    "attention_backend": "flash",
}
PROMPTS = (3, 9, 5, 7)
NEW_TOKENS = 12


def prepare() -> None:
    """Before verl is imported, here and in the processes that this one starts."""
    place = str(Path(__file__).parent)
    os.environ |= {
        "VERL_USE_EXTERNAL_MODULES": "verl_cpu_platform",
        "VERL_RAY_JOB_ID": str(os.getpid()),
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "PYTHONPATH": os.pathsep.join([place, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    sys.path.insert(0, place)


def trainer(checkpoint: str, **others: Any) -> Any:
    """verl's Megatron engine with a policy to train, on this rank; `others` are fields of its configuration."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import HFModelConfig, McoreEngineConfig, McoreOptimizerConfig, MtpConfig

    model = HFModelConfig(
        path=checkpoint,
        external_lib="dsv3_plugin.hosts.verl",
        override_config={"attn_implementation": "eager"},
        mtp=MtpConfig(enable=True, enable_train=True),
    )
    from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead

    settings = {
        "vanilla_mbridge": True,
        "expert_tensor_parallel_size": 1,
        "override_transformer_config": dict(OVERRIDES),
    } | others
    engine = MegatronEngineWithLMHead(
        model,
        McoreEngineConfig(**settings),
        McoreOptimizerConfig(lr=1e-3, total_training_steps=10),
        CheckpointConfig(),
    )
    # verl does so where there is a GPU.
    model_parallel_cuda_manual_seed(42)
    engine.initialize()
    return engine


def samples(prompts: list[list[int]], answers: list[list[int]], temperature: float) -> Any:
    """What verl's trainer holds of answers of one length: prompts padded at the left, responses at the right."""
    from tensordict import TensorDict

    batch, left, right = len(prompts), max(map(len, prompts)), len(answers[0])
    ids = torch.zeros(batch, left + right, dtype=torch.int64)
    seen = torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids[row, left - len(prompt) :] = torch.tensor(prompt + answer)
        seen[row, left - len(prompt) :] = 1
    return TensorDict(
        {
            "input_ids": ids,
            "attention_mask": seen,
            "position_ids": (seen.cumsum(1) - 1).clamp(min=0),
            "prompts": ids[:, :left],
            "responses": ids[:, left:],
            "response_mask": torch.ones(batch, right, dtype=torch.int64),
            "temperature": torch.full((batch,), temperature),
        },
        batch_size=[batch],
    )


def for_engine(of_trainer: Any) -> Any:
    """The samples as verl hands them to an engine: without padding, in micro-batches of 48 tokens at the most."""
    from verl.utils import tensordict_utils as tu
    from verl.utils.dataset.dataset_utils import DatasetPadMode
    from verl.workers.utils.padding import left_right_2_no_padding

    batch = left_right_2_no_padding(of_trainer.clone())
    settings = {"use_dynamic_bsz": True, "max_token_len_per_gpu": 48, "calculate_entropy": True}
    tu.assign_non_tensor(batch, pad_mode=DatasetPadMode.NO_PADDING, global_batch_size=len(of_trainer), **settings)
    return batch


def log_probs(engine: Any, of_trainer: Any) -> torch.Tensor | None:
    """Of the responses, fp32 [batch, tokens], as the engine recomputes them; None on a rank that has none."""
    from verl.workers.utils.padding import no_padding_2_padding

    batch = for_engine(of_trainer)
    with engine.eval_mode():
        output = engine.infer_batch(batch)
    return no_padding_2_padding(output["model_output"]["log_probs"], batch) if "model_output" in output else None


def learn(engine: Any, of_trainer: Any) -> None:
    """An optimizer step towards the samples."""
    from verl.workers.utils.padding import no_padding_2_padding

    def loss(model_output: Any, data: Any, dp_group: Any = None) -> tuple[torch.Tensor, dict[str, Any]]:
        return -no_padding_2_padding(model_output["log_probs"], data).mean(), {}

    with engine.train_mode():
        engine.train_batch(for_engine(of_trainer), loss)


class Loop:
    def __init__(self, checkpoint: str) -> None:
        from vllm import LLM

        self.llm = LLM(
            checkpoint,
            dtype="bfloat16",
            load_format="dummy",
            logprobs_mode="processed_logprobs",
            worker_extension_cls=EXTENSION,
            speculative_config={"method": "mtp", "num_speculative_tokens": 1},
            max_model_len=256,
            max_num_seqs=8,
            kv_cache_memory_bytes=64 << 20,
            enforce_eager=True,
            seed=0,
        )
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        self.engine = trainer(checkpoint)
        self.vocab: int = self.engine.model_config.hf_config.vocab_size
        self.llm.collective_rpc("monkey_patch_model", kwargs={"vocab_size": self.vocab})

    def hand_weights_over(self) -> None:
        """In buckets of 2 MB, of which there are several."""
        from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

        rpc = {"args": ("update_weights_from_ipc",), "kwargs": {"kwargs": {"use_shm": True}}}
        receiver = threading.Thread(target=self.llm.collective_rpc, **rpc)  # type: ignore[arg-type]
        receiver.start()
        weights, _ = self.engine.get_per_tensor_param()
        socket = SOCKET.format(job=os.environ["VERL_RAY_JOB_ID"])
        asyncio.run(BucketedWeightSender(socket, bucket_size_mb=2, use_shm=True).async_send_weights(weights))
        receiver.join()
        self.llm.reset_prefix_cache()

    def rollout(self, temperature: float) -> Any:
        """Samples, and their log-probabilities as vLLM answers them."""
        from vllm import SamplingParams

        generator = torch.Generator().manual_seed(0)
        prompts = [torch.randint(3, self.vocab, (count,), generator=generator).tolist() for count in PROMPTS]
        params = SamplingParams(temperature=temperature, max_tokens=NEW_TOKENS, logprobs=0, seed=1, ignore_eos=True)
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = [request.outputs[0] for request in self.llm.generate(requests, params, use_tqdm=False)]
        answered = samples(prompts, [list(output.token_ids) for output in outputs], temperature)
        answered["rollout_log_probs"] = torch.tensor(
            [[step[t].logprob for t, step in zip(o.token_ids, o.logprobs, strict=True)] for o in outputs]
        )
        return answered

    def compare(self, what: str, sampled: Any) -> None:
        """Print verl's metric of the samples, and how many log-probabilities are equal."""
        from verl.protocol import DataProto
        from verl.utils.debug.metrics import calculate_debug_metrics

        old = log_probs(self.engine, sampled)
        assert old is not None
        compared = ("rollout_log_probs", "response_mask", "responses")
        metrics = calculate_debug_metrics(
            DataProto.from_dict({name: sampled[name] for name in compared} | {"old_log_probs": old})
        )
        equal = int((old == sampled["rollout_log_probs"]).sum())
        found = {"what": what, "tokens": old.numel(), "equal": equal}
        print(
            json.dumps(found | {name.removeprefix("training/"): value for name, value in metrics.items()}), flush=True
        )

    def saves(self) -> bool:
        """Whether verl's Hugging Face checkpoint holds what a server is sent."""
        with tempfile.TemporaryDirectory() as folder:
            self.engine.bridge.save_weights(self.engine.module, folder)
            saved = dict(CheckpointReader(folder).tensors())
            sent = dict(self.engine.get_per_tensor_param()[0])
        return saved.keys() == sent.keys() and all(torch.equal(saved[name], sent[name]) for name in sent)


def main() -> None:
    prepare()
    from verl.utils.megatron.tensor_parallel import vocab_parallel_log_probs_from_logits
    from verl.workers.engine.megatron import transformer_impl

    loop = Loop(sys.argv[1])
    for temperature in (1.0, 0.7):
        loop.hand_weights_over()
        sampled = loop.rollout(temperature)
        loop.compare(f"temperature {temperature}", sampled)
        learn(loop.engine, sampled)
    assert loop.saves()
    loop.compare("stale weights", loop.rollout(1.0))
    loop.hand_weights_over()
    transformer_impl.vocab_parallel_log_probs_from_logits = vocab_parallel_log_probs_from_logits
    loop.compare("verl's formula", loop.rollout(1.0))
    try:
        trainer(sys.argv[1], vanilla_mbridge=False)
    except EngineError as error:
        print("refused", error)


if __name__ == "__main__":
    main()
