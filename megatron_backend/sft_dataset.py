"""Conversations in Megatron's dataset interface: several in a row, which do not see each other; answers are learned.

The file is Megatron's indexed dataset with modes: a document is a conversation, its sequences are segments, and mode 1
marks those to be learned. A row holds whole conversations, in an order that the seed draws anew for each epoch; the
rest of it is padding, which is neither learned nor counted among the experts' tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset

from dsv3_plugin.errors import InputError


class SFTDataset(MegatronDataset):  # type: ignore[misc]
    """Rows of `config.sequence_length` tokens."""

    def __init__(
        self, dataset: Any, dataset_path: str, indices: Any, num_samples: int | None, index_split: Any, config: Any
    ) -> None:
        """Raises `InputError` for a conversation that is longer than a row."""
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        ends = np.add.accumulate(dataset.sequence_lengths, dtype=np.int64)
        bounds = np.concatenate(([0], ends))[dataset.document_indices]
        self.lengths = np.diff(bounds)
        longest = int(self.lengths[indices].max(initial=0))
        if not len(indices) or longest > config.sequence_length:
            raise InputError(
                f"{dataset_path}: {len(indices)} conversations, the longest of {longest} tokens, for rows of"
                f" {config.sequence_length}: leave longer ones out when the file is written, or give longer rows"
            )
        self.rows: list[list[int]] = []
        random = np.random.RandomState(config.random_seed)
        while not self.rows or (num_samples is not None and len(self.rows) < num_samples):
            self.rows += self._packed(random.permutation(indices))

    def _packed(self, order: Any) -> Iterator[list[int]]:
        """Conversations in this order, as many in a row as fit."""
        row: list[int] = []
        free = self.config.sequence_length
        for number in order.tolist():
            if self.lengths[number] > free:
                yield row
                row, free = [], self.config.sequence_length
            row.append(number)
            free -= int(self.lengths[number])
        yield row

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: Any) -> int:
        """Conversations, which splits are cut from."""
        return len(low_level_dataset.document_indices) - 1

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: Any) -> IndexedDataset:
        """Raises `InputError` where there is no such file."""
        if not IndexedDataset.exists(dataset_path):
            raise InputError(f"{dataset_path}.idx: no such file; examples/prepare_data.py writes it")
        return IndexedDataset(dataset_path, multimodal=True, mmap=config.mmap_bin_files)

    def __len__(self) -> int:
        """Rows."""
        return len(self.rows)

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        """tokens, labels and position_ids int64 [s], which count from 0 in each conversation; loss_mask fp32 [s], 1
        where the label is to be learned; padding_mask bool [s], True for padding.
        """
        size = self.config.sequence_length
        row = {name: torch.zeros(size, dtype=torch.int64) for name in ("tokens", "labels", "position_ids")}
        row |= {"loss_mask": torch.zeros(size), "padding_mask": torch.ones(size, dtype=torch.bool)}
        begin = 0
        for number in self.rows[idx]:
            first, end = self.dataset.document_indices[number : number + 2]
            segments = [self.dataset[i] for i in range(first, end)]
            tokens = torch.from_numpy(np.concatenate([ids for ids, _ in segments]).astype(np.int64))
            learned = torch.cat([torch.full((len(ids),), float(mode)) for ids, mode in segments])
            here = slice(begin, begin + len(tokens))
            row["tokens"][here] = tokens
            row["labels"][here] = tokens.roll(-1)
            row["loss_mask"][here] = learned.roll(-1)
            row["loss_mask"][here.stop - 1] = 0.0  # nothing follows
            row["position_ids"][here] = torch.arange(len(tokens))
            row["padding_mask"][here] = False
            begin = here.stop
        row["position_ids"][begin:] = torch.arange(size - begin)
        return row
