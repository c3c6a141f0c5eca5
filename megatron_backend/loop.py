"""What `--report-recipe` and `--ema-decay` add to Megatron's own training loop.

The loop looks up its parts in its module, `megatron.training.training`. Three are replaced there, once; each does what
Megatron's does unless its argument was given.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from megatron.core.utils import get_model_config, unwrap_model
from megatron.training import get_args, training

from dsv3_plugin.megatron_backend.average import WeightAverage
from dsv3_plugin.megatron_backend.schedule import CourseScheduler, course_of, require_whole_micro_batches


def extend() -> None:
    """Replace the parts."""
    if getattr(training, "knows_report", False):
        return
    training.knows_report = True
    for part in _get_optimizer_param_scheduler, _setup_model_and_optimizer, _save_checkpoint:
        _replace(part.__name__.removeprefix("_"), part)


def _replace(name: str, part: Callable[..., Any]) -> None:
    original = getattr(training, name)

    @wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return part(original, *args, **kwargs)

    setattr(training, name, call)


def _get_optimizer_param_scheduler(original: Callable[..., Any], optimizer: Any) -> Any:
    """With `--report-recipe` that of the course, which rank 0 says."""
    args = get_args()
    if not args.report_recipe:
        return original(optimizer)
    require_whole_micro_batches(args)
    training.update_train_iters(args)
    course = course_of(args)
    if args.rank == 0:
        print("\n".join(course.described(args.report_batch_size, args.moe_router_bias_update_rate)), flush=True)
    return CourseScheduler(
        optimizer,
        course,
        args.weight_decay,
        config=get_model_config(optimizer.model_chunks[0]),
        bias_update_rate=args.moe_router_bias_update_rate,
        use_checkpoint_opt_param_scheduler=args.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=args.override_opt_param_scheduler,
    )


def _setup_model_and_optimizer(original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """With `--ema-decay` the weights are averaged from now on; of a run that continues the average does, too."""
    model, optimizer, scheduler = original(*arguments, **keywords)
    args = get_args()
    if args.ema_decay is not None and optimizer is not None:
        average = WeightAverage(unwrap_model(model), args.ema_decay)
        if args.iteration and not average.load(Path(args.load) / "ema", args.iteration) and args.rank == 0:
            print(f"{args.load}/ema has no average of iteration {args.iteration}: it begins with the weights")
        average.follow(optimizer, late=args.overlap_param_gather)
        optimizer.weight_average = average
    return model, optimizer, scheduler


def _save_checkpoint(
    original: Callable[..., Any], iteration: int, model: Any, optimizer: Any, *arguments: Any, **keywords: Any
) -> None:
    """The average, too."""
    original(iteration, model, optimizer, *arguments, **keywords)
    if (average := getattr(optimizer, "weight_average", None)) is not None:
        average.save(Path(get_args().save) / "ema", iteration)
