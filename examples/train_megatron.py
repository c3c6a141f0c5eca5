"""Pre-training DeepSeek-V3 with Megatron-Core, in one small loop, on the text that every Python ships or your own.

    torchrun --nproc-per-node 2 examples/train_megatron.py CHECKPOINT --expert-model-parallel-size 2

CHECKPOINT is a Hugging Face folder (`dsv3 checkpoint make tiny CHECKPOINT`): its configuration and its tokenizer, and
with `--finetune-from-weights` its weights. The recipe is the DeepSeek-V3 report's (section 4.2), scaled to a toy:
AdamW 0.9 / 0.95, gradients clipped at 1, growing batches, warm-up, constant, cosine; MTP loss weighted 0.3, then 0.1;
the bias update balances experts, and rests at the end. Parallel ranks, optimizer, schedules and `--save` are
Megatron's; pretrain_megatron.py uses its training loop, too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.num_microbatches_calculator import (
    get_current_global_batch_size,
    get_num_microbatches,
    init_num_microbatches_calculator,
    update_num_microbatches,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from torch import distributed as dist

from dsv3_plugin.argument_types import above_zero, from_zero, not_negative, positive, seed, share
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.checkpoint.writer import copy_side_files, require_writable, require_writable_file
from dsv3_plugin.conformance.texts import real_text, tokenize
from dsv3_plugin.errors import DSV3Error, EngineError, InputError
from dsv3_plugin.megatron_backend import recipe
from dsv3_plugin.megatron_backend.config import transformer_config
from dsv3_plugin.megatron_backend.convert import RELEASE, TRACKER, find_checkpoint, readable
from dsv3_plugin.megatron_backend.log_probs import log_probs
from dsv3_plugin.megatron_backend.model import build_model
from dsv3_plugin.megatron_backend.moe import Router
from dsv3_plugin.megatron_backend.weights import load_checkpoint, save_checkpoint

EVALUATED = ".trainer"
"""Suffix of what `--evaluate FILE` writes beside it."""


def parse_arguments() -> argparse.Namespace:
    """Megatron's own names where it has them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, nargs="+", help="text files, in place of Python's language reference")
    parser.add_argument(
        "--finetune-from-weights",
        action="store_true",
        help="begin from the checkpoint's weights, without --load",
    )
    parser.add_argument("--tensor-model-parallel-size", type=positive, default=1)
    parser.add_argument("--pipeline-model-parallel-size", type=positive, default=1)
    parser.add_argument("--expert-model-parallel-size", type=positive, default=1)
    parser.add_argument("--use-distributed-optimizer", action="store_true")
    parser.add_argument("--train-iters", type=from_zero, default=200)
    parser.add_argument("--exit-interval", type=positive, help="stop after so many iterations, as if interrupted")
    parser.add_argument("--seq-length", type=positive, default=128)
    parser.add_argument("--micro-batch-size", type=positive, default=4)
    parser.add_argument("--global-batch-size", type=positive, default=8)
    parser.add_argument(
        "--rampup-batch-size",
        nargs=3,
        type=int,
        metavar=("START", "INCREMENT", "SAMPLES"),
        help="begin with batches of START, which grow by INCREMENT to the global size over so many samples",
    )
    parser.add_argument("--recompute-granularity", choices=("full", "selective"))
    parser.add_argument("--recompute-method", choices=("uniform", "block"))
    parser.add_argument("--recompute-num-layers", type=positive)
    parser.add_argument("--recompute-modules", nargs="+")
    parser.add_argument("--lr-warmup-fraction", type=share, default=0.05)
    parser.add_argument("--lr", type=above_zero, default=1e-3)
    parser.add_argument("--min-lr", type=not_negative, default=1e-4)
    parser.add_argument("--weight-decay", type=not_negative, default=0.1)
    parser.add_argument("--clip-grad", type=not_negative, default=1.0)
    parser.add_argument("--init-method-std", type=above_zero, default=0.02)
    # The report's 0.001 is for many thousands of iterations.
    parser.add_argument("--moe-router-bias-update-rate", type=not_negative, default=1e-2)
    parser.add_argument("--moe-aux-loss-coeff", type=not_negative, default=1e-4)
    parser.add_argument("--seed", type=seed, default=1234)
    parser.add_argument("--save", type=Path, help="write Megatron's distributed checkpoint to this folder at the end")
    parser.add_argument("--load", type=Path, help="continue from such a folder, or begin from a converted checkpoint")
    parser.add_argument("--hf-output", type=Path, help="write a Hugging Face checkpoint to this new folder at the end")
    parser.add_argument("--evaluate", type=Path, help=f"JSON list of [prompt, answer], token ids; writes {EVALUATED}")
    parser.add_argument("--load-output", type=Path, help="write each expert's load at each iteration to this file")
    arguments = parser.parse_args()
    if arguments.min_lr > arguments.lr:
        parser.error(f"--min-lr {arguments.min_lr} is above --lr {arguments.lr}")
    for name, granularity in ("method", "full"), ("num_layers", "full"), ("modules", "selective"):
        if getattr(arguments, f"recompute_{name}") is not None and arguments.recompute_granularity != granularity:
            parser.error(f"--recompute-{name.replace('_', '-')} needs --recompute-granularity {granularity}")
    return arguments


def read(files: list[Path] | None) -> str:
    """The text to train on. Raises `InputError` for what is no text."""
    try:
        return "\n\n".join(file.read_text("utf-8") for file in files) if files else real_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--data: cannot be read: {error}") from None


class Text:
    """Samples of a token stream in an order that the seed fixes, whatever the layout."""

    def __init__(self, tokens: list[int], arguments: argparse.Namespace) -> None:
        self.tokens = torch.tensor(tokens)
        self.length = arguments.seq_length
        self.micro_batch = arguments.micro_batch_size
        if len(tokens) <= self.length:
            raise InputError(f"the text has {len(tokens)} tokens, and --seq-length {self.length} needs one more")
        generator = torch.Generator("cpu").manual_seed(arguments.seed)
        self.order = torch.randperm((len(tokens) - 1) // self.length, generator=generator)

    def unigram_entropy(self) -> float:
        """Nats a token: what a model reaches that knows each token's frequency and nothing else."""
        total = len(self.tokens)
        return -sum(n / total * math.log(n / total) for n in Counter(self.tokens.tolist()).values())

    def micro_batches(self, first: int, batch: int) -> Iterator[dict[str, torch.Tensor]]:
        """This data-parallel rank's share of the `batch` samples from `first` on."""
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        first += rank * batch // size
        for start in range(first, first + batch // size, self.micro_batch):
            samples = self.order[torch.arange(start, start + self.micro_batch) % len(self.order)]
            window = self.tokens[samples.unsqueeze(1) * self.length + torch.arange(self.length + 1)]
            device = torch.device(torch.cuda.current_device())
            yield {
                "input_ids": window[:, :-1].to(device),
                "labels": window[:, 1:].to(device),
                "position_ids": torch.arange(self.length, device=device).expand(len(window), -1),
                "loss_mask": torch.ones(len(window), self.length, device=device),
            }


def forward_step(batches: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """One micro-batch, as Megatron's schedules call it. MTP's loss joins inside the model."""
    output = model(**next(batches), attention_mask=None)

    def loss_of(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = losses.float().mean()
        # A copy: the schedule divides the loss in place.
        return loss, {"lm loss": loss.detach().clone()}

    return output, loss_of


class Loads:
    """Tokens that each expert of each layer got, an iteration at a time."""

    def __init__(self) -> None:
        self.history: list[torch.Tensor] = []

    def finalize(self, model: list[torch.nn.Module], *args: Any, **kwargs: Any) -> None:
        """Read the routers' counters before Megatron's `finalize_model_grads` updates the biases and clears them."""
        counts = [m.local_tokens_per_expert for chunk in model for m in chunk.modules() if isinstance(m, Router)]
        if counts:
            total = torch.stack(counts)  # type: ignore[arg-type]
            dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
            self.history.append(total.cpu())
        finalize_model_grads(model, *args, **kwargs)

    def imbalance(self, last: int) -> float:
        """Most over mean tokens of an expert, summed over the last iterations, averaged over layers."""
        loads = torch.stack(self.history[-last:]).sum(0).double()
        return float((loads.amax(1) / loads.mean(1)).mean())


def require_places(arguments: argparse.Namespace) -> None:
    """Raise `InputError` for what cannot be read or written at the end, before hours of work go into it."""
    if arguments.save:
        if arguments.save.resolve() == arguments.checkpoint.resolve():
            raise InputError(f"--save {arguments.save}: is the checkpoint's own folder; name another")
        require_writable(arguments.save, f"--save {arguments.save}")
    if output := arguments.hf_output:
        if output.exists():
            raise InputError(f"--hf-output {output}: exists already and is not overwritten")
        require_writable(output, f"--hf-output {output}")
    if output := arguments.load_output:
        require_writable_file(output, f"--load-output {output}")
    if arguments.evaluate:
        output = arguments.evaluate.with_suffix(EVALUATED)
        require_writable_file(output, f"--evaluate writes {output}")


def read_samples(file: Path, vocab_size: int) -> list[tuple[list[int], list[int]]]:
    """[prompt, answer] of each sample. Raises `InputError` for a file that holds something else."""
    if file.suffix == EVALUATED:
        raise InputError(f"--evaluate {file}: the answer would be written over it; give it another suffix")
    try:
        pairs = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--evaluate {file}: cannot be read: {error}") from None

    def are_tokens(ids: Any) -> bool:
        return isinstance(ids, list) and bool(ids) and all(type(token) is int for token in ids)

    is_list = isinstance(pairs, list) and bool(pairs)
    if not is_list or not all(isinstance(p, list) and len(p) == 2 and all(map(are_tokens, p)) for p in pairs):
        raise InputError(f"--evaluate {file}: is no JSON list of [prompt, answer], each a list of token ids")
    tokens = [token for pair in pairs for part in pair for token in part]
    if unknown := next((token for token in tokens if not 0 <= token < vocab_size), None):
        raise InputError(f"--evaluate {file}: token {unknown}, and the model knows those from 0 to {vocab_size - 1}")
    return [(prompt, answer) for prompt, answer in pairs]


def start(arguments: argparse.Namespace) -> None:
    """Process groups. Raises `EngineError` for sizes that do not fit."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    tensor, pipeline = arguments.tensor_model_parallel_size, arguments.pipeline_model_parallel_size
    expert = arguments.expert_model_parallel_size
    if world % (tensor * pipeline) or (world // pipeline) % expert:
        raise EngineError(
            f"{world} processes cannot be divided into tensor parallel {tensor}, pipeline parallel {pipeline} and"
            f" expert parallel {expert}"
        )
    if arguments.evaluate and pipeline > 1:
        raise EngineError("--evaluate needs the whole model on a rank: --pipeline-model-parallel-size 1")
    replicas = world // (tensor * pipeline)
    schedule = recipe.batch_size_schedule(arguments.rampup_batch_size, arguments.global_batch_size)
    for size in (int(step.split(":")[1]) for step in schedule.split()):
        if size % (replicas * arguments.micro_batch_size):
            raise EngineError(
                f"global batch size {size} is not a multiple of micro batch size"
                f" {arguments.micro_batch_size} times {replicas} data parallel ranks"
            )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # torchrun says who the others are; alone there is nobody to find.
    alone: dict[str, Any] = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", **alone)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=True,
    )
    init_num_microbatches_calculator(
        dist.get_rank(),
        micro_batch_size=arguments.micro_batch_size,
        data_parallel_size=replicas,
        step_batch_size_schedule=schedule,
    )
    torch.manual_seed(arguments.seed)
    model_parallel_cuda_manual_seed(arguments.seed)


def train(arguments: argparse.Namespace) -> None:
    """The whole run."""
    reader = CheckpointReader(arguments.checkpoint)
    evaluated = read_samples(arguments.evaluate, reader.config.vocab_size) if arguments.evaluate else []
    text = Text(tokenize(read(arguments.data), arguments.checkpoint), arguments)
    loads = Loads()
    config = transformer_config(
        reader.config,
        reader.profile(),
        tensor_model_parallel_size=arguments.tensor_model_parallel_size,
        pipeline_model_parallel_size=arguments.pipeline_model_parallel_size,
        expert_model_parallel_size=arguments.expert_model_parallel_size,
        init_method_std=arguments.init_method_std,
        moe_router_bias_update_rate=arguments.moe_router_bias_update_rate,
        moe_aux_loss_coeff=arguments.moe_aux_loss_coeff,
        recompute_granularity=arguments.recompute_granularity,
        recompute_method=arguments.recompute_method,
        recompute_num_layers=arguments.recompute_num_layers,
        recompute_modules=arguments.recompute_modules,
        finalize_model_grads_func=loads.finalize,
    )
    gpt = build_model(
        reader.config,
        config,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    model: Any = Float16Module(config, gpt) if config.bf16 else gpt
    if arguments.finetune_from_weights and not arguments.load:
        load_checkpoint(gpt, arguments.checkpoint)
    model = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=arguments.use_distributed_optimizer
        ),
        model,
    )
    model.broadcast_params()
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=arguments.lr,
            min_lr=arguments.min_lr,
            adam_beta1=0.9,
            adam_beta2=0.95,
            weight_decay=arguments.weight_decay,
            clip_grad=arguments.clip_grad,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=arguments.use_distributed_optimizer,
        ),
        [model],
    )
    iterations = arguments.train_iters
    course = recipe.Course(max(iterations, 1), arguments.lr)  # in iterations, of whatever batch
    warmup = max(1, int(arguments.lr_warmup_fraction * iterations))
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=arguments.lr,
        min_lr=arguments.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=max(warmup + 1, course.decay_ends),
        lr_decay_style="WSD",
        wsd_decay_steps=course.decay_ends - course.decay_begins,
        lr_wsd_decay_style="cosine",
        start_wd=arguments.weight_decay,
        end_wd=arguments.weight_decay,
        wd_incr_steps=max(iterations, 1),
        wd_incr_style="constant",
    )
    first, samples = resume(arguments.load, gpt, optimizer, schedule) if arguments.load else (0, 0)
    if first > iterations:
        raise InputError(
            f"--load {arguments.load}: is at iteration {first} already, and --train-iters {iterations} leaves nothing"
            " to train; give more, or an earlier checkpoint"
        )
    if dist.get_rank() == 0:
        print(f"{len(text.tokens):,} tokens, unigram entropy {text.unigram_entropy():.3f} nats", flush=True)

    forward_backward = get_forward_backward_func()
    last = min(iterations, first + (arguments.exit_interval or iterations))
    for iteration in range(first, last):
        course.follow(config, iteration, arguments.moe_router_bias_update_rate)
        update_num_microbatches(samples, consistency_check=False)
        batch = get_current_global_batch_size()
        model.zero_grad_buffer()
        optimizer.zero_grad()
        losses = forward_backward(
            forward_step_func=forward_step,
            data_iterator=text.micro_batches(samples, batch),
            model=[model],
            num_microbatches=get_num_microbatches(),
            seq_length=text.length,
            micro_batch_size=text.micro_batch,
            forward_only=False,
        )
        _, gradient_norm, _ = optimizer.step()
        samples += batch
        schedule.step(increment=1)
        report(iteration, losses, gradient_norm, optimizer.param_groups[0]["lr"], batch)
        if not math.isfinite(gradient_norm):
            raise EngineError(f"iteration {iteration}: the gradients' norm is {gradient_norm}; nothing is saved")

    if evaluated:
        evaluate(evaluated, arguments.evaluate.with_suffix(EVALUATED), model)
    if arguments.save:
        save(arguments.save, arguments.checkpoint, last, samples, gpt, optimizer, schedule)
    if arguments.hf_output:
        save_checkpoint(gpt, arguments.checkpoint, arguments.hf_output)
    if loads.history and dist.get_rank() == dist.get_world_size() - 1:
        window = max(1, (last - first) // 10)
        print(f"max / mean load of an expert over the last {window} iterations: {loads.imbalance(window):.3f}")
        if arguments.load_output:
            torch.save(torch.stack(loads.history), arguments.load_output)


def report(iteration: int, losses: list[dict[str, torch.Tensor]], gradient_norm: float, lr: float, batch: int) -> None:
    """A line an iteration, from the last pipeline stage, which knows the losses."""
    if not losses:
        return
    group = parallel_state.get_data_parallel_group()
    loss = torch.stack([micro_batch["lm loss"] for micro_batch in losses]).mean()
    dist.all_reduce(loss, op=dist.ReduceOp.AVG, group=group)
    line = f"iteration {iteration} | lm loss {loss.item():.6f}"
    if "loss_values" in MTPLossLoggingHelper.tracker:
        MTPLossLoggingHelper.reduce_metrics_in_tracker()
        line += f" | mtp loss {MTPLossLoggingHelper.tracker['loss_values'][0].item() / len(losses):.6f}"
        MTPLossLoggingHelper.clean_metrics_in_tracker()
    if parallel_state.get_data_parallel_rank() == 0:
        print(f"{line} | grad norm {gradient_norm:.6f} | lr {lr:.3e} | batch {batch}", flush=True)


def evaluate(pairs: list[tuple[list[int], list[int]]], file: Path, model: Any) -> None:
    """Log-probabilities of samples by the training forward, packed: what a policy gradient weighs them with.

    `file` gets, for each [prompt, answer], fp32 log-probabilities of its answer's tokens as a list of JSON.
    """
    samples = [prompt + answer for prompt, answer in pairs]
    prompt_lens = [len(prompt) for prompt, _ in pairs]
    device = torch.device(torch.cuda.current_device())
    starts = torch.tensor([0, *map(len, samples)], device=device).cumsum(0).int()
    longest = max(map(len, samples))
    packing = PackedSeqParams("thd", starts, starts, max_seqlen_q=longest, max_seqlen_kv=longest)
    tokens = torch.tensor([token for sample in samples for token in sample], device=device)
    positions = torch.cat([torch.arange(len(sample), device=device) for sample in samples])
    with torch.no_grad():
        logits = model(tokens[None], positions[None], None, packed_seq_params=packing, prompt_lens=prompt_lens)[0]
    chosen = log_probs(logits[:-1], tokens[1:]).tolist()
    ends = starts[1:].tolist()
    of_samples = [chosen[end - 1 - len(answer) : end - 1] for end, (_, answer) in zip(ends, pairs, strict=True)]
    if dist.get_rank() == 0:
        file.write_text(json.dumps(of_samples))


def state_of(model: Any, optimizer: Any, schedule: Any, *, is_loading: bool) -> dict[str, Any]:
    """What continuing needs; the text's order is a function of the samples."""
    # How the distributed optimizer cuts its state: so that any layout can read it.
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
    weights = model.sharded_state_dict(metadata=metadata)
    return {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata),
        "schedule": schedule.state_dict(),
        "iteration": 0,
        "consumed_samples": 0,
    }


def save(folder: Path, like: Path, iteration: int, samples: int, model: Any, optimizer: Any, schedule: Any) -> None:
    """Write Megatron's distributed checkpoint, as its own training loop lays it out, and what is beside the weights."""
    latest = folder / f"iter_{iteration:07d}"
    latest.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    state = state_of(model, optimizer, schedule, is_loading=False)
    dist_checkpointing.save(state | {"iteration": iteration, "consumed_samples": samples}, str(latest))
    if dist.get_rank() == 0:
        copy_side_files(like, folder)
        (folder / TRACKER).write_text(str(iteration))


def resume(folder: Path, model: Any, optimizer: Any, schedule: Any) -> tuple[int, int]:
    """Read it; returns the iteration to continue with and the samples before it.

    Of a converted checkpoint, which has no optimizer's state, only the weights are read.
    """
    latest, _ = find_checkpoint(folder)
    is_release = latest.name == RELEASE
    if is_release:
        wanted = {"model": model.sharded_state_dict()}
    else:
        wanted = state_of(model, optimizer, schedule, is_loading=True)
    with readable(latest):
        state = dist_checkpointing.load(wanted, str(latest))
    model.load_state_dict(state["model"])
    if is_release:
        optimizer.reload_model_params()
        return 0, 0
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return int(state["iteration"]), int(state["consumed_samples"])


def main() -> None:
    """Errors that are meant for the user are one line."""
    arguments = parse_arguments()
    try:
        require_places(arguments)
        start(arguments)
        train(arguments)
    except DSV3Error as error:
        sys.exit(f"error: {error}")
    dist.barrier()
    dist.destroy_process_group()


# Megatron's checkpoint writers import this file again.
if __name__ == "__main__":
    main()
