"""The report's course in Megatron's terms: arguments of its command line, and the scheduler of its optimizer.

Megatron's schedules end with a cosine; the report's last step of the learning rate is after it. So the scheduler is
Megatron's with another function of the samples, and is saved and restored as Megatron does. What else changes in the
course of a run is in the model's configuration, where Megatron reads it at each step: the scheduler sets it there.
"""

from __future__ import annotations

import argparse
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from dsv3_plugin.errors import EngineError
from dsv3_plugin.megatron_backend.recipe import MTP_LOSS_FACTOR, Course

OPTIMIZER = {
    "use_distributed_optimizer": True,
    "use_precision_aware_optimizer": True,
    "exp_avg_dtype": "bf16",
    "exp_avg_sq_dtype": "bf16",
}
"""Moments in bf16 beside fp32 main parameters and gradients (section 3.3.3), by the names of Megatron's arguments."""

_OF_THE_COURSE = (
    *("min_lr", "decoupled_lr", "decoupled_min_lr", "lr_decay_style", "lr_decay_iters", "lr_decay_samples"),
    *("lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples", "lr_warmup_fraction", "lr_warmup_iters"),
    *("lr_warmup_samples", "lr_warmup_init", "step_batch_size_schedule", "weight_decay_incr_style"),
    *("start_weight_decay", "end_weight_decay"),
)


class CourseScheduler(OptimizerParamScheduler):  # type: ignore[misc]
    """Megatron's, with the course's learning rate. `step(n)` counts n samples."""

    def __init__(
        self,
        optimizer: Any,
        course: Course,
        weight_decay: float,
        *,
        config: Any,
        bias_update_rate: float,
        **settings: Any,
    ) -> None:
        """`config` is the model's `TransformerConfig`, which changes in place; see `Course.follow`."""
        self.course = course
        self.config = config
        self.bias_update_rate = bias_update_rate
        super().__init__(
            optimizer,
            init_lr=0.0,
            max_lr=course.peak,
            min_lr=course.learning_rate(course.samples),
            lr_warmup_steps=course.warmup,
            lr_decay_steps=max(course.samples, course.warmup + 1),
            lr_decay_style="report",
            start_wd=weight_decay,
            end_wd=weight_decay,
            wd_incr_steps=course.samples,
            wd_incr_style="constant",
            **settings,
        )

    def step(self, increment: int) -> None:
        """Megatron's, and what the model's configuration says of the next step."""
        super().step(increment)
        self.course.follow(self.config, self.num_steps, self.bias_update_rate)

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """Of the next step, the same for all parameters."""
        return self.course.learning_rate(self.num_steps)


def prepare(args: argparse.Namespace, default: Any) -> None:
    """Of arguments just parsed, with `--report-recipe`: the growing batches, which Megatron checks and follows.

    `args.report_batch_size` remembers `--global-batch-size`, the last and largest. Raises `EngineError` for arguments
    that the course decides (`default(name)` is what they are when nobody gives them), and for a run without
    `--train-samples` and `--global-batch-size`.
    """
    given = [name for name in _OF_THE_COURSE if getattr(args, name) != default(name)]
    if args.mtp_loss_scaling_factor != MTP_LOSS_FACTOR:
        given.append("mtp_loss_scaling_factor")
    if given:
        pairs = ", ".join(f"{name}={getattr(args, name)}" for name in given)
        raise EngineError(f"{pairs} beside --report-recipe, which decides it: leave one out")
    if args.train_samples is None or args.global_batch_size is None:
        raise EngineError(
            "--report-recipe needs --train-samples, how many sequences the run has, in place of --train-iters, and"
            " --global-batch-size, the last and largest batch"
        )
    batches = Course(args.train_samples, args.lr).batches(args.global_batch_size)
    # Megatron divides by the length of a sequence again.
    args.step_batch_size_schedule = " ".join(f"{sample * args.seq_length}:{size}" for sample, size in batches)
    args.eval_global_batch_size = args.eval_global_batch_size or args.global_batch_size
    args.report_batch_size, args.global_batch_size = args.global_batch_size, None


def course_of(args: argparse.Namespace) -> Course:
    """The course of a run with `--report-recipe`."""
    return Course(args.train_samples, args.lr)


def require_whole_micro_batches(args: argparse.Namespace) -> None:
    """Raise `EngineError` unless each batch is as many micro-batches on each rank; of validated arguments."""
    at_once = args.micro_batch_size * args.data_parallel_size
    for _, size in course_of(args).batches(args.report_batch_size):
        if size % at_once:
            raise EngineError(
                f"--report-recipe has a batch of {size}, which is no multiple of"
                f" micro_batch_size={args.micro_batch_size} times {args.data_parallel_size} data parallel ranks"
            )
