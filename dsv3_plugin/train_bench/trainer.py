"""A model in Megatron-Core, of this package's layers or of its own, which learns step by step and times its parts.

Optimizer, gradient buffers and schedule are Megatron's for all: AdamW with fp32 main weights, moments and gradients.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from torch import distributed as dist
from torch import nn

from dsv3_plugin.autograd.fp8 import MasterWeights
from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.megatron_backend import compat
from dsv3_plugin.megatron_backend.config import transformer_config
from dsv3_plugin.megatron_backend.model import DeepseekV3GPTModel, build_model
from dsv3_plugin.ops.fp8_wgrad import fp8_wgrad, quantize_fp8_columns
from dsv3_plugin.profile import profile_for
from dsv3_plugin.registry import AnyOperation
from dsv3_plugin.train_bench import weights
from dsv3_plugin.train_bench.protocol import End, Job, Start, Step
from dsv3_plugin.train_bench.stopwatch import Stopwatch
from dsv3_plugin.version import __version__

WARM_UP = 0.1
"""Part of the steps in which the learning rate rises."""


class Trainer:
    """One model and its optimizer, on one rank."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job, self.device, self.on_gpu = job, device, device.type == "cuda"
        self.config = DeepseekV3Config.from_dict(job.config)
        self.profile = profile_for(self.config)
        settings = transformer_config(
            self.config,
            self.profile,
            finalize_model_grads_func=finalize_model_grads,
            perform_initialization=False,  # by `weights.fill`
            **job.settings,
        )
        gpt = self._ours(settings) if job.layers == "ours" else self._theirs(settings)
        self.gpt = gpt.to(device)  # Megatron builds some weights where torch does
        self.initial = weights.fill(self.gpt, self.config, job.seed)
        model: nn.Module = Float16Module(settings, self.gpt) if settings.bf16 else self.gpt
        self.model = DistributedDataParallel(settings, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=job.learning_rate,
                min_lr=job.learning_rate,
                adam_beta1=0.9,
                adam_beta2=0.95,
                weight_decay=0.1,
                clip_grad=1.0,
                bf16=settings.bf16,
                params_dtype=settings.params_dtype,
            ),
            [self.model],
        )
        self.stopwatch = Stopwatch(device)
        self._watch_modules()

    def _ours(self, settings: Any) -> DeepseekV3GPTModel:
        return build_model(self.config, settings, profile=self.profile)

    def _theirs(self, settings: Any) -> GPTModel:
        spec = get_gpt_decoder_block_spec(settings, use_transformer_engine=True)
        mtp = get_gpt_mtp_block_spec(settings, spec, use_transformer_engine=True) if settings.mtp_num_layers else None
        return GPTModel(
            settings,
            spec,
            vocab_size=self.config.vocab_size,
            max_sequence_length=self.config.max_position_embeddings,
            position_embedding_type="rope",
            rotary_base=self.config.rope_theta,
            share_embeddings_and_output_weights=False,
            mtp_block_spec=mtp,
        )

    def describe(self) -> Start:
        """What is about to train."""
        gpt, versions = self.gpt, {"dsv3-plugin": __version__, "torch": torch.__version__}
        versions |= {"python": platform.python_version(), "megatron-core": compat.megatron_version()}
        if isinstance(gpt, DeepseekV3GPTModel):
            model = gpt.binding.ops.announcement(type(gpt).__name__)
        else:
            versions["transformer-engine"] = metadata.version("transformer-engine")
            model = f"Megatron's {type(gpt).__name__}, {self.job.settings}"
        of_groups = {type(each.optimizer) for each in getattr(self.optimizer, "chained_optimizers", [self.optimizer])}
        return Start(
            device=torch.cuda.get_device_name() if self.on_gpu else "cpu",
            versions=versions,
            model=model,
            optimizer=", ".join(sorted(f"{kind.__module__.partition('.')[0]} {kind.__name__}" for kind in of_groups)),
            weights=sum(parameter.numel() for parameter in gpt.parameters()),
            initial=self.initial,
        )

    def step(self, number: int, tokens: torch.Tensor) -> Step:
        """Learn tokens [sequence + 1] in one step, the `number`th."""
        began = self._now()
        self._set_learning_rate(number)
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        (losses,) = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iter([_batch(tokens.to(self.device))]),
            model=[self.model],
            num_microbatches=1,
            seq_length=self.job.sequence,
            micro_batch_size=1,
            forward_only=False,
        )
        with self.stopwatch.during("optimizer"):
            _, gradient_norm, _ = self.optimizer.step()
        seconds = self._now() - began
        mtp: torch.Tensor | None = MTPLossLoggingHelper.tracker.get("loss_values")
        step = Step(
            seconds=seconds,
            loss=losses["lm loss"].item(),
            mtp_loss=None if mtp is None else float(mtp.sum()),
            gradient_norm=float(gradient_norm),
        )
        MTPLossLoggingHelper.clean_metrics_in_tracker()
        return step

    def profile_steps(self, first: int, tokens: Iterator[torch.Tensor]) -> End:
        """Steps whose parts are timed, and the end."""
        with self._watching_products():
            for number, of_step in enumerate(tokens, first):
                with self.stopwatch.step():
                    self.step(number, of_step)
        parts = {part: seconds / self.job.profiled for part, seconds in self.stopwatch.seconds().items()}
        end = End(parts=parts, profiled_seconds=sum(parts.values()) or None)
        if not self.on_gpu:
            return end
        held, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        return end.model_copy(update={"held_bytes": held, "peak_bytes": peak})

    def _now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _set_learning_rate(self, number: int) -> None:
        risen = min(1.0, (number + 1) / max(1.0, WARM_UP * self.job.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = self.job.learning_rate * risen

    def _watch_modules(self) -> None:
        """The parts of a layer, by the names that both kinds of layers have."""
        watch = self.stopwatch.watch
        for name, module in self.gpt.named_modules():
            place = name.rpartition(".")[2]
            if place == "self_attention":
                watch(module, "attention")
            elif place == "mlp" and hasattr(module, "experts"):
                watch(module, "routing")
            elif place == "mlp":
                watch(module, "dense")
            elif place == "experts":
                watch(module, "experts", around="routing")
            elif place == "shared_experts":
                watch(module, "shared expert", around="routing")
            elif place == "output_layer":
                watch(module, "head")

    @contextmanager
    def _watching_products(self) -> Iterator[None]:
        """See which products of the experts' backward pass are their weights' gradients."""
        wgrad, backward, stopwatch = "experts, wgrad", "experts, backward", self.stopwatch
        if isinstance(self.gpt, DeepseekV3GPTModel):
            masters = self.gpt.binding.ops.master_weights

            def observe(op: AnyOperation, run: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
                if op not in (fp8_wgrad, quantize_fp8_columns) or stopwatch.current != backward:
                    return run(*args, **kwargs)
                with stopwatch.during(wgrad):
                    return run(*args, **kwargs)

            if isinstance(masters, MasterWeights):
                masters.ops.tap(observe)
            yield
            return
        from transformer_engine.pytorch.module import grouped_linear

        product = grouped_linear.general_grouped_gemm

        def observed(*args: Any, **kwargs: Any) -> Any:
            with stopwatch.during(wgrad if kwargs.get("layout") == "NT" else stopwatch.current):
                return product(*args, **kwargs)

        grouped_linear.general_grouped_gemm = observed
        yield
        grouped_linear.general_grouped_gemm = product


def _batch(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """tokens [s + 1] as Megatron's model takes them, [1, s]."""
    given = tokens[:-1].unsqueeze(0)
    return {
        "input_ids": given,
        "labels": tokens[1:].unsqueeze(0),
        "position_ids": torch.arange(given.shape[1], device=tokens.device).unsqueeze(0),
        "loss_mask": torch.ones(given.shape, device=tokens.device),
    }


def _forward_step(batches: Iterator[dict[str, torch.Tensor]], model: nn.Module) -> tuple[torch.Tensor, Any]:
    """As Megatron's schedules call it. MTP's loss joins inside the model."""
    output = model(**next(batches), attention_mask=None)

    def loss_of(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = losses.float().mean()
        return loss, {"lm loss": loss.detach().clone()}  # the schedule divides the loss in place

    return output, loss_of


def start() -> torch.device:
    """Megatron's process groups, of one rank, and its device. Raises `EngineError` where Megatron has none."""
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=dist.HashStore(),  # type: ignore[attr-defined]
        rank=0,
        world_size=1,
    )
    parallel_state.initialize_model_parallel(create_gloo_process_groups=True, expert_tensor_parallel_size=1)
    init_num_microbatches_calculator(0, None, 1, 1, 1)
    torch.manual_seed(0)
    model_parallel_cuda_manual_seed(0)
    return compat.require_device()
