"""Writing a checkpoint folder: it appears complete or not at all, and nothing of the user's is overwritten."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dsv3_plugin.checkpoint.reader import INDEX_FILE, SINGLE_FILE
from dsv3_plugin.errors import CheckpointError

DEFAULT_SHARD_BYTES = 500_000_000

Progress = Callable[[int, int], None]
"""Called with the bytes done and to be done."""

# What stands beside the weights: configuration, tokenizer, chat template, model code, licences.
_SIDE_FILES = (".json", ".jinja", ".md", ".model", ".py")


@contextmanager
def new_folder(directory: str | Path, needed: int) -> Iterator[Path]:
    """A folder to fill, which becomes `directory` when the block ends without an error, else disappears.

    Args:
        directory: must not exist, or be empty.
        needed: bytes that will be written.

    Raises `CheckpointError` if the folder is in use, its disk is too small, or writing fails.
    """
    directory = Path(directory).resolve()
    check_new_folder(directory, needed)
    # A sibling, so that the last step is a rename inside one file system.
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        try:
            yield partial
            partial.rename(directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: cannot be written: {error}") from None


def check_new_folder(directory: str | Path, needed: int) -> None:
    """Raise `CheckpointError` if the folder is in use, or its disk has less than `needed` bytes."""
    directory = Path(directory).resolve()
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory}: is a file; name a folder that does not exist")
    if directory.is_dir() and any(directory.iterdir()):
        raise CheckpointError(f"{directory}: is not empty; nothing is overwritten, name another folder")
    parent = next(parent for parent in directory.parents if parent.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise CheckpointError(f"{directory}: needs {needed / 1e9:.1f} GB, {parent} has {free / 1e9:.1f} GB free")


def write_weights(
    folder: Path,
    sizes: Mapping[str, int],
    tensors: Callable[[Sequence[str]], Iterable[tuple[str, torch.Tensor]]],
    max_shard_bytes: int,
    progress: Progress,
) -> None:
    """Write safetensors files, and their index if there are several.

    Args:
        folder: exists.
        sizes: what to write, in order: name to bytes, those of its scales included.
        tensors: for some of the names, all tensors that belong in the file. Memory is needed for those of one file.
        max_shard_bytes: a file holds at most so much, or one name.
        progress: called after each tensor.

    Raises `CheckpointError` for a shard without a size.
    """
    if max_shard_bytes <= 0:
        raise CheckpointError(f"the largest shard must have a positive size, not {max_shard_bytes} bytes")
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size

    total, done = sum(sizes.values()), 0
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard: dict[str, torch.Tensor] = {}
        for name, tensor in tensors(names):
            shard[name] = tensor
            done += tensor.nbytes
            progress(done, total)
        save_file(shard, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        write_index(folder, weight_map, total)


def write_index(folder: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """Write the index: which file of `folder` holds which tensor, and the bytes of all."""
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def copy_side_files(source: Path, destination: Path) -> None:
    """Copy what stands beside the weights in a checkpoint folder."""
    for file in source.iterdir():
        if file.is_file() and file.suffix in _SIDE_FILES and file.name != INDEX_FILE:
            shutil.copyfile(file, destination / file.name)
