"""Pre-training DeepSeek-V3 by Megatron's own training loop, arguments, datasets and checkpoints.

    torchrun --nproc-per-node 8 examples/pretrain_megatron.py --hf-config MODEL --expert-model-parallel-size 8 \\
        --data-path TEXT --tokenizer-type HuggingFaceTokenizer --tokenizer-model MODEL \\
        --micro-batch-size 1 --global-batch-size 256 --seq-length 4096 --train-iters 100000 --lr 2.2e-4 \\
        --load CONVERTED --save CHECKPOINTS --save-interval 1000 --eval-iters 0 --eval-interval 1000

It is Megatron's `pretrain_gpt.py` with another model. MODEL is a Hugging Face folder or config.json and stands for all
arguments that describe the model; CONVERTED is what `dsv3 convert to-megatron` made of its weights. Needs Python 3.12,
as `megatron.training` does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.utils import get_model_config
from megatron.training import get_args, get_tokenizer, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split

from dsv3_plugin.errors import DSV3Error
from dsv3_plugin.megatron_backend import recipe
from dsv3_plugin.megatron_backend.provider import add_arguments, model_config


def datasets(samples: Sequence[int]) -> Any:
    """Megatron's datasets for training, validation and test, of so many samples."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,  # attention is causal over each sequence
    )
    kind = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(kind, samples, lambda: True, config).build()


datasets.is_distributed = True  # type: ignore[attr-defined]  # every rank reads its own samples


def forward_step(batches: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """One micro-batch, as Megatron's schedules call it. MTP's loss joins inside the model."""
    args = get_args()
    recipe.follow(get_model_config(model), args.curr_iteration / args.train_iters, args.moe_router_bias_update_rate)
    device = torch.cuda.current_device()
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in next(batches).items()}
    mask = batch["loss_mask"]
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], loss_mask=mask)

    def loss_of(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """The sum, over how many tokens it is, and both for the log."""
        total, tokens = (losses.float() * mask).sum(), mask.sum()
        return total, tokens.int(), {"lm loss": torch.stack([total.detach(), tokens])}

    return output, loss_of


def main() -> None:
    """Errors that are meant for the user are one line."""
    try:
        args = parse_and_validate_args(add_arguments)
        pretrain(
            pretrain_cfg_container_from_args(args, model_config(args)),
            datasets,
            ModelType.encoder_or_decoder,
            forward_step,
        )
    except DSV3Error as error:
        sys.exit(f"error: {error}")


# Megatron's checkpoint writers import this file again.
if __name__ == "__main__":
    main()
