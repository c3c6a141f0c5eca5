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

import argparse
import inspect
import json
import sys
from collections.abc import Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.training import get_args, get_tokenizer, pretrain, training
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split

from dsv3_plugin.errors import DSV3Error, EngineError
from dsv3_plugin.megatron_backend.provider import add_arguments, get_embedding_ranks, model_config
from dsv3_plugin.megatron_backend.sft_dataset import SFTDataset

_NOT_READ = {
    "fim_data": "it would fill in other middles after a restart; examples/prepare_data.py does it once",
    "dataloader_inter_document_masking": "--reset-position-ids --reset-attention-mask do that",
    "iterations_to_skip": "leave it out",
    "check_for_spiky_loss": "leave it out",
}


def require_supported(args: argparse.Namespace) -> None:
    """Raise `EngineError` for what `datasets` and `forward_step` do not look at."""
    for name, instead in _NOT_READ.items():
        if getattr(args, name):
            raise EngineError(f"examples/pretrain_megatron.py does not read {name}={getattr(args, name)}: {instead}")


def datasets(samples: Sequence[int], vp_stage: int | None = None) -> Any:
    """Megatron's datasets for training, validation and test, of so many samples; the same on every stage and rank."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences = args.per_dataset_sequences_path
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,  # attention knows from the positions where documents begin
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        sequences_per_dataset=json.loads(Path(sequences).read_text()) if sequences else None,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
    )
    kind = SFTDataset if args.sft else MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(kind, samples, lambda: True, config).build()


datasets.is_distributed = True  # type: ignore[attr-defined]  # every rank reads its own samples


def forward_step(
    batches: Iterator[dict[str, torch.Tensor]], model: Any, return_schedule_plan: bool = False
) -> tuple[Any, Any]:
    """One micro-batch, as Megatron's schedules call it; those that overlap communication ask for a plan of it. MTP's
    loss joins inside the model.
    """
    device = torch.cuda.current_device()
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in next(batches).items()}
    mask = batch["loss_mask"]
    known = {"labels": batch["labels"], "loss_mask": mask, "padding_mask": batch.get("padding_mask")}
    compute = model.build_schedule_plan if return_schedule_plan else model
    output = compute(batch["tokens"], batch["position_ids"], None, **known)

    def loss_of(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """The sum, over how many tokens it is, and both for the log."""
        total, tokens = (losses.float() * mask).sum(), mask.sum()
        return total, tokens.int(), {"lm loss": torch.stack([total.detach(), tokens])}

    return output, loss_of


def log_each_iteration_once() -> None:
    """Mend Megatron's log, which counts the first iteration of a process in two lines where `--log-interval` is 1: the
    second loss was the mean of both, and another one in a run that continues than in one that went through.
    """
    log = training.training_log
    arguments = inspect.signature(log)

    @wraps(log)
    def log_once(*args: Any, **kwargs: Any) -> Any:
        call = arguments.bind(*args, **kwargs)
        if call.arguments["iteration"] % get_args().log_interval == 0:
            call.arguments["is_first_iteration"] = False
        return log(*call.args, **call.kwargs)

    training.training_log = log_once


def main() -> None:
    """Errors that are meant for the user are one line."""
    try:
        args = parse_and_validate_args(add_arguments)
        require_supported(args)
        log_each_iteration_once()
        pretrain(
            pretrain_cfg_container_from_args(args, model_config(args)),
            datasets,
            ModelType.encoder_or_decoder,
            forward_step,
            get_embedding_ranks=get_embedding_ranks,
        )
    except DSV3Error as error:
        sys.exit(f"error: {error}")


# Megatron's checkpoint writers import this file again.
if __name__ == "__main__":
    main()
