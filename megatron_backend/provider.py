"""The model in the hands of Megatron's own training script: `pretrain`, its arguments and its builders.

A script like Megatron's `pretrain_gpt.py` changes in three lines, as examples/pretrain_megatron.py shows:

    args = parse_and_validate_args(add_arguments)  # adds --hf-config
    model = model_config(args)                     # in place of gpt_config_from_args(args)
    pretrain(..., get_embedding_ranks=get_embedding_ranks)  # this module's, in place of its own

One that hands over a function gives `model_provider`. Like `megatron.training`, this module needs Python 3.12.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import get_args
from megatron.training.argument_utils import core_transformer_config_from_args, gpt_config_from_args
from megatron.training.checkpointing import checkpoint_exists
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from dsv3_plugin.checkpoint.writer import require_writable
from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.errors import EngineError
from dsv3_plugin.megatron_backend import loop, options, recipe, schedule
from dsv3_plugin.megatron_backend.adam import provide_precise_adam
from dsv3_plugin.megatron_backend.config import megatron_arguments, of_model
from dsv3_plugin.megatron_backend.fp8 import take_format
from dsv3_plugin.megatron_backend.model import DeepseekV3GPTModel, build_model
from dsv3_plugin.megatron_backend.pipeline import embedding_ranks
from dsv3_plugin.profile import profile_for


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Megatron's `extra_args_provider`: `--hf-config` gives the defaults of all arguments that describe the model.

    What is parsed is looked at before Megatron does: an option that is refused, that says another model than the
    checkpoint's configuration, or that names a folder of weights without any, raises `EngineError`; what is no
    configuration of this model raises `ConfigError`, and a folder that cannot be written `InputError`.
    """
    group = parser.add_argument_group("dsv3-plugin")
    group.add_argument(
        "--hf-config",
        type=Path,
        required=True,
        help="a Hugging Face folder or config.json; it stands for all arguments that describe the model",
    )
    group.add_argument(
        "--report-recipe",
        action="store_true",
        help="the course of the DeepSeek-V3 report (section 4.2) over --train-samples: learning rate, growing batches,"
        " MTP's weight, the router's bias; and its other settings as defaults. Without it all stay as their arguments"
        " say",
    )
    group.add_argument(
        "--ema-decay",
        type=float,
        help="keep an exponential moving average of the weights in the CPU's memory and save it beside the run, in the"
        " folder ema of --save",
    )
    loop.extend()
    parse = parser.parse_known_args

    def parse_and_check(args: Any = None, namespace: Any = None, **kwargs: Any) -> tuple[argparse.Namespace, list[str]]:
        words = sys.argv[1:] if args is None else list(args)
        if (folder := _hf_config(words)) is not None:
            parser.set_defaults(**megatron_arguments(DeepseekV3Config.from_pretrained(folder)))
        of_report = {**recipe.SETTINGS, **schedule.OPTIMIZER} if "--report-recipe" in words else {}
        before = {name: parser.get_default(name) for name in of_report}
        parser.set_defaults(**of_report)
        parsed, unknown = parse(words, namespace, **kwargs)
        parser.set_defaults(**before)
        if parsed.report_recipe:
            schedule.prepare(parsed, parser.get_default)
        _require_supported(parsed)
        if parsed.use_precision_aware_optimizer:
            provide_precise_adam()
        return parsed, unknown

    parser.parse_known_args = parse_and_check  # type: ignore[method-assign,assignment]
    return parser


def _hf_config(words: list[str]) -> Path | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--hf-config", type=Path)
    try:
        folder: Path | None = parser.parse_known_args(words)[0].hf_config
    except argparse.ArgumentError:
        return None  # which the real parser says better
    return folder


def _require_supported(args: argparse.Namespace) -> None:
    """Raise `EngineError` for arguments that are refused, or that are not the checkpoint's."""
    if args.spec is not None:
        refuse_spec()
    config = DeepseekV3Config.from_pretrained(args.hf_config)
    profile = profile_for(config)
    take_format(args, profile)
    options.require_supported(vars(args), of_model(config, profile), config)
    if args.ema_decay is not None and args.save is None:
        raise EngineError(f"ema_decay={args.ema_decay} without --save: nobody would see the average; give --save")
    if args.save is not None:
        if not args.save_interval:
            raise EngineError(f"save={args.save} needs --save-interval, the iterations from one checkpoint to the next")
        require_writable(args.save, f"--save {args.save}")
    _require_weights(args)


def _require_weights(args: argparse.Namespace) -> None:
    """Raise `EngineError` for folders without weights for Megatron, which would begin with random ones.

    `--load` may have none yet where it is also `--save`: so begins a run that can be resumed.
    """
    load, save, pretrained = args.load, args.save, args.pretrained_checkpoint
    if load is not None and args.ckpt_step:
        iteration = Path(load) / f"iter_{args.ckpt_step:07d}"
        if not iteration.is_dir():
            raise EngineError(f"--ckpt-step {args.ckpt_step}: there is no {iteration}")
        return
    if checkpoint_exists(load):
        return
    if load is not None and (save is None or os.path.realpath(load) != os.path.realpath(save)):
        raise EngineError(f"--load {load}: {_lack(Path(load))}")
    if pretrained is not None and not checkpoint_exists(pretrained):
        raise EngineError(f"--pretrained-checkpoint {pretrained}: {_lack(Path(pretrained))}")


def _lack(folder: Path) -> str:
    """Why Megatron finds no checkpoint in a folder, and what to do."""
    if not folder.is_dir():
        return "no such folder; for random weights leave it out, or let it be the folder of --save"
    if (folder / "config.json").exists() or any(folder.glob("*.safetensors")):
        return "is a Hugging Face folder; convert it with `dsv3 convert to-megatron`"
    return "holds no checkpoint of Megatron (no latest_checkpointed_iteration.txt)"


@dataclass(kw_only=True)
class DeepseekV3ModelConfig(GPTModelConfig):  # type: ignore[misc]
    """Megatron's configuration of a model, which names its builder, with ours in it."""

    builder: ClassVar[str] = f"{__name__}.DeepseekV3ModelBuilder"
    hf_config: DeepseekV3Config | None = None


class DeepseekV3ModelBuilder(GPTModelBuilder):  # type: ignore[misc]
    """Builds a pipeline stage; wrapping it for data parallel ranks stays Megatron's."""

    def build_model(
        self,
        pg_collection: Any,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> DeepseekV3GPTModel:
        """Raises what `dsv3_plugin.megatron_backend.model.build_model` does."""
        _require_global_groups(pg_collection)
        config = self._model_config
        stages = config.transformer.virtual_pipeline_model_parallel_size
        if pre_process is None:
            pre_process = is_vp_first_stage(vp_stage, stages) and is_pp_first_stage(pg_collection.pp)
        if post_process is None:
            post_process = is_vp_last_stage(vp_stage, stages) and is_pp_last_stage(pg_collection.pp)
        args = get_args()
        model = build_model(
            config.hf_config,
            config.transformer,
            pre_process,
            post_process,
            vp_stage,
            preferred_kernels=args.preferred_kernels,
        )
        model.documents_share_rows = args.reset_position_ids or args.sft
        return model


def model_config(args: argparse.Namespace) -> DeepseekV3ModelConfig:
    """The model of `--hf-config`, with the command line's parallel sizes, recomputation and other settings.

    Raises `EngineError` for arguments that are refused, or that are not the checkpoint's.
    """
    _require_supported(args)
    config: DeepseekV3ModelConfig = gpt_config_from_args(args, model_config_cls=DeepseekV3ModelConfig)
    config.hf_config = DeepseekV3Config.from_pretrained(args.hf_config)
    return config


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> DeepseekV3GPTModel:
    """Megatron's `model_provider`, of the arguments that `get_args()` knows."""
    _require_global_groups(pg_collection)
    args = get_args()
    described = model_config(args)
    assert described.hf_config is not None
    model = build_model(
        described.hf_config,
        config or described.transformer,
        pre_process,
        post_process,
        vp_stage,
        preferred_kernels=args.preferred_kernels,
    )
    model.documents_share_rows = args.reset_position_ids or args.sft
    return model


def get_embedding_ranks(pp_ranks: list[int]) -> list[int]:
    """Megatron's `get_embedding_ranks`, of the arguments that `get_args()` knows: hand it to `pretrain`."""
    return embedding_ranks(pp_ranks, core_transformer_config_from_args(get_args()))


def _require_global_groups(pg_collection: Any) -> None:
    """Raise `EngineError` for process groups of a model's own: the layers use those of `parallel_state`."""
    ours = ProcessGroupCollection.use_mpu_process_groups()
    for name in ("tp", "pp", "ep", "embd"):
        if pg_collection is not None and getattr(pg_collection, name, None) is not getattr(ours, name):
            raise EngineError(
                f"pg_collection.{name} is not parallel_state's, and the layers know no other process groups"
            )


def refuse_spec(*_: Any, **__: Any) -> NoReturn:
    """What `--spec dsv3_plugin.megatron_backend.provider refuse_spec` finds: an `EngineError` that says what to do."""
    raise EngineError(
        "--spec replaces the decoder layers only: Megatron's own head and MTP layer would stay, and no logit would be"
        " the servers'; use dsv3_plugin.megatron_backend.provider's model_config or model_provider"
    )
