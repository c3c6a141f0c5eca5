"""Writing texts or conversations as Megatron's indexed dataset, tokenized as DeepSeek-V3's report says.

    python examples/prepare_data.py pretrain CHECKPOINT texts.jsonl more.txt --output TEXT
    python examples/prepare_data.py sft CHECKPOINT conversations.jsonl --output CONVERSATIONS --longest 4096

CHECKPOINT has the tokenizer. A line of a .jsonl file is a document, its `text`, or a conversation, its `messages`; any
other file is one document. TEXT.bin and TEXT.idx are what `--data-path TEXT` of Megatron reads.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from dsv3_plugin.errors import DSV3Error, InputError
from dsv3_plugin.megatron_backend.corpus import Corpus, read_corpus


def rate(text: str) -> float:
    """An argument's number."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text}: from 0 to 1")
    return number


def parse_arguments() -> argparse.Namespace:
    """The rates of fill-in-the-middle and of splitting are of pre-training alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    pretrain, sft = kinds.add_parser("pretrain"), kinds.add_parser("sft")
    for kind in (pretrain, sft):
        kind.add_argument("checkpoint", type=Path)
        kind.add_argument("files", type=Path, nargs="+")
        kind.add_argument("--output", type=Path, required=True, help="a new file, without its ending")
    pretrain.add_argument("--fim-rate", type=rate, default=0.1)
    pretrain.add_argument("--split-rate", type=rate, default=0.0, help="of tokens of punctuation and line breaks")
    pretrain.add_argument("--seed", type=int, default=1234)
    sft.add_argument("--longest", type=int, required=True, help="leave out conversations of more tokens")
    return parser.parse_args()


def lines(file: Path) -> Iterator[str]:
    """Of a text. Raises `InputError` for what is none."""
    try:
        with file.open(encoding="utf-8") as opened:
            yield from opened
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read: {getattr(error, 'strerror', error)}") from None


def records(files: list[Path], key: str) -> Iterator[tuple[str, Any]]:
    """(where, what is under `key`) of each line of each .jsonl file. Raises `InputError` for lines without."""
    for file in files:
        for number, line in enumerate(lines(file), 1):
            try:
                found = json.loads(line)[key]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise InputError(f"{file}:{number}: is no JSON object with {key!r}") from None
            yield f"{file}:{number}", found


def texts(files: list[Path]) -> Iterator[tuple[str, Any]]:
    """(where, a document) one after the other."""
    for file in files:
        if file.suffix == ".jsonl":
            yield from records([file], "text")
        else:
            yield str(file), "".join(lines(file))


def write(arguments: argparse.Namespace) -> str:
    """Returns what was written, in words. Raises `InputError` for files that cannot be read or are there already."""
    data, index = (Path(f"{arguments.output}{suffix}") for suffix in (".bin", ".idx"))
    for file in (data, index):
        if file.exists():
            raise InputError(f"{file}: exists; name another --output")
    if not data.parent.is_dir():
        raise InputError(f"--output {arguments.output}: there is no folder {data.parent}")
    rates = {name: value for name, value in vars(arguments).items() if name in ("fim_rate", "split_rate", "seed")}
    corpus = read_corpus(arguments.checkpoint, **rates)
    dtype = np.uint16 if corpus.tokenizer.get_vocab_size() <= 1 << 16 else np.int32
    # Under their names once they are whole: what fails or is killed leaves nothing that looks like data.
    parts = [Path(f"{file}.part") for file in (data, index)]
    builder = IndexedDatasetBuilder(str(parts[0]), dtype=dtype, multimodal=arguments.kind == "sft")
    try:
        said = add_all(builder, corpus, arguments)
        builder.finalize(str(parts[1]))
        for part, file in zip(parts, (data, index), strict=True):
            part.rename(file)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    return said


def add_all(builder: IndexedDatasetBuilder, corpus: Corpus, arguments: argparse.Namespace) -> str:
    """All documents. Returns how many, in words. Raises `InputError` that names the one which is none."""
    documents = tokens = left_out = 0
    is_sft = arguments.kind == "sft"
    for where, record in records(arguments.files, "messages") if is_sft else texts(arguments.files):
        try:
            segments = corpus.conversation(record) if is_sft else [(corpus.text(documents, record), True)]
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        ids = list(chain.from_iterable(part for part, _ in segments))
        if is_sft and len(ids) > arguments.longest:
            left_out += 1
            continue
        modes = [int(learned) for _, learned in segments] if is_sft else None
        builder.add_document(torch.tensor(ids), [len(part) for part, _ in segments], modes)
        documents, tokens = documents + 1, tokens + len(ids)
    if not documents:
        longest = f" of at most {arguments.longest:,} tokens" if is_sft else ""
        raise InputError(f"{', '.join(map(str, arguments.files))}: no document{longest} in it")
    said = f"{documents:,} documents, {tokens:,} tokens"
    return said + (f"; {left_out:,} longer ones left out" if left_out else "")


def main() -> None:
    """Errors that are meant for the user are one line."""
    arguments = parse_arguments()
    try:
        print(f"{arguments.output}: {write(arguments)}")
    except (DSV3Error, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
