"""The model in the hands of Megatron's own training script: `pretrain`, its arguments and its builders.

A script like Megatron's `pretrain_gpt.py` changes in two lines:

    args = parse_and_validate_args(add_arguments)  # adds --hf-config
    model = model_config(args)                     # in place of gpt_config_from_args(args)

and goes on with `pretrain(pretrain_cfg_container_from_args(args, model), ...)`, as examples/pretrain_megatron.py does.
One that hands over a function gives `model_provider`. Like `megatron.training`, this module needs Python 3.12.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.training import get_args
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.errors import EngineError
from dsv3_plugin.megatron_backend.config import megatron_arguments
from dsv3_plugin.megatron_backend.model import DeepseekV3GPTModel, build_model


class DescribeModel(argparse.Action):
    """Sets every argument of Megatron's that describes the model. What the command line says after it wins."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Raises `ConfigError` for what is no configuration of this model."""
        for name, value in megatron_arguments(DeepseekV3Config.from_pretrained(values)).items():
            setattr(namespace, name, value)
        setattr(namespace, self.dest, values)


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Megatron's `extra_args_provider`."""
    parser.add_argument_group("dsv3-plugin").add_argument(
        "--hf-config",
        type=Path,
        required=True,
        action=DescribeModel,
        help="a Hugging Face folder or config.json; it stands for all arguments that describe the model",
    )
    return parser


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
        config = self._model_config
        stages = config.transformer.virtual_pipeline_model_parallel_size
        if pre_process is None:
            pre_process = is_vp_first_stage(vp_stage, stages) and is_pp_first_stage(pg_collection.pp)
        if post_process is None:
            post_process = is_vp_last_stage(vp_stage, stages) and is_pp_last_stage(pg_collection.pp)
        return build_model(config.hf_config, config.transformer, pre_process, post_process, vp_stage)


def model_config(args: argparse.Namespace) -> DeepseekV3ModelConfig:
    """The model of `--hf-config`, with the command line's parallel sizes, recomputation and other settings.

    Raises `EngineError` beside `--spec`, which would have no effect.
    """
    if args.spec is not None:
        refuse_spec()
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
    model = model_config(get_args())
    assert model.hf_config is not None
    return build_model(model.hf_config, config or model.transformer, pre_process, post_process, vp_stage)


def refuse_spec(*_: Any, **__: Any) -> NoReturn:
    """What `--spec dsv3_plugin.megatron_backend.provider refuse_spec` finds: an `EngineError` that says what to do."""
    raise EngineError(
        "--spec replaces the decoder layers only: Megatron's own head and MTP layer would stay, and no logit would be"
        " the servers'; use dsv3_plugin.megatron_backend.provider's model_config or model_provider"
    )
