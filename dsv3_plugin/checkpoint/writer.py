"""Writing a checkpoint folder: it appears complete or not at all, and nothing of the user's is overwritten."""

from __future__ import annotations

import fcntl
import glob
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dsv3_plugin.checkpoint.reader import INDEX_FILE, SINGLE_FILE
from dsv3_plugin.errors import CheckpointError, InputError

DEFAULT_SHARD_BYTES = 500_000_000
_PARTIAL = ".partial"

Progress = Callable[[int, int], None]
"""Called with the bytes done and to be done."""

# What stands beside the weights: configuration, tokenizer, chat template, model code, licences.
_SIDE_FILES = (".json", ".jinja", ".md", ".model", ".py")


@contextmanager
def new_folder(directory: str | Path, needed: int) -> Iterator[Path]:
    """A folder to fill, which becomes `directory` when the block ends without an error, else disappears.

    It is filled beside `directory`, as `NAME.LETTERS.partial`. Only a process that is killed leaves it.

    Args:
        directory: must not exist, or be empty.
        needed: bytes that will be written.

    Raises `CheckpointError` if the folder is in use, its disk is too small, or writing fails. Another exception gets a
    note of what is left, for the line that a signal prints.
    """
    directory = Path(directory).resolve()
    check_new_folder(directory, needed)
    # A sibling, so that the last step is a rename inside one file system.
    partial = directory.with_name(f"{directory.name}.{uuid4().hex[:8]}{_PARTIAL}")
    try:
        partial.mkdir(parents=True)
        with _locked(partial):
            yield partial
            partial.rename(directory)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: cannot be written: {error}; nothing is left of it") from None
    except BaseException as error:
        error.add_note(f"{directory} was not made, nothing is left of it")
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock that ends with this process: by it `leftovers` knows a dead writer's folder from a living one's."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def leftovers(directory: str | Path) -> list[Path]:
    """The folders that killed writers of `directory` left beside it; nothing is in the way, and they may be deleted."""
    directory = Path(directory).resolve()
    found = []
    for folder in sorted(directory.parent.glob(f"{glob.escape(directory.name)}.????????{_PARTIAL}")):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found.append(folder)
        except OSError:
            pass  # its writer lives, or cannot be asked
        finally:
            os.close(descriptor)
    return found


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
        raise CheckpointError(f"{directory}: needs {in_bytes(needed)}, {parent} has {in_bytes(free)} free")


def require_writable(folder: str | Path, said: str) -> None:
    """Raise `InputError`, which begins with what was `said`, unless a file can be made in a folder, or in the nearest
    one above it that exists. Nothing is left there.
    """
    folder = Path(folder).absolute()
    try:
        there = next(place for place in (folder, *folder.parents) if place.exists())
        # Only who makes a file knows: permissions do not bind root, nor say what a file system takes.
        with tempfile.NamedTemporaryFile(dir=there):
            pass
    except OSError as error:
        raise InputError(f"{said}: cannot be written: {error.strerror}; name another place") from None


def require_writable_file(file: Path, said: str) -> None:
    """Raise `InputError`, which begins with what was `said`, unless a file can be made in a folder that exists."""
    if file.is_dir() or not file.parent.is_dir():
        raise InputError(f"{said}: is no file that can be written; name one in a folder that exists")
    require_writable(file.parent, said)


def in_bytes(size: int) -> str:
    """A size in words: `3.4 MB`."""
    number = float(size)
    for unit in ("bytes", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.4g} GB"


def whole_bytes(gigabytes: float) -> int:
    """A shard's largest size, which users give in GB. Raises `CheckpointError` for less than a byte, NaN, infinity."""
    if not 1 <= gigabytes * 1e9 < math.inf:
        raise CheckpointError(f"--max-shard-size {gigabytes:g}: the largest file must have a size, in GB, above zero")
    return int(gigabytes * 1e9)


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
        write_file(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        write_index(folder, weight_map, total)


def write_file(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Write a safetensors file with the permissions of any other; safetensors makes it the owner's alone."""
    file.touch()
    mode = file.stat().st_mode
    save_file(dict(tensors), file, {"format": "pt"})
    file.chmod(mode)


def write_index(folder: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """Write the index: which file of `folder` holds which tensor, and the bytes of all."""
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def copy_side_files(source: Path, destination: Path) -> None:
    """Copy what stands beside the weights in a checkpoint folder."""
    for file in source.iterdir():
        if file.is_file() and file.suffix in _SIDE_FILES and file.name != INDEX_FILE:
            shutil.copyfile(file, destination / file.name)
