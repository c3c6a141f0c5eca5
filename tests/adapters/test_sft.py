"""Conversations in Megatron's dataset: packed whole, apart from each other, and only answers learned."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from megatron_programs import LOOP, needs_megatron, printed, warm
from mini_checkpoint import MINI
from paths import ROOT, TESTS

from dsv3_plugin.checkpoint.make import CheckpointDtype, make_checkpoint
from dsv3_plugin.checkpoint.tokenizer import DEEPSEEK_VOCAB

pytestmark = needs_megatron

PREPARE, PRETRAIN = (ROOT / "examples" / name for name in ("prepare_data.py", "pretrain_megatron.py"))
ON_CPU = TESTS / "pretrain_on_cpu.py"

DATASET = """
import json, sys
from types import SimpleNamespace
import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.datasets.utils import Split
from dsv3_plugin.errors import InputError
from dsv3_plugin.megatron_backend.sft_dataset import SFTDataset

ROW, prefix = 16, sys.argv[1]
random = np.random.RandomState(0)
builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.int32, multimodal=True)
conversations = {}
for number in range(40):
    prompt, answer, more = (random.randint(1, 6) for _ in range(3))
    # The first token says which conversation it is.
    ids = [1000 + number, *range(100, 99 + prompt + answer + more)]
    lengths, modes = ([prompt, answer, more], [0, 1, 0]) if number % 2 else ([prompt + more, answer], [0, 1])
    builder.add_document(torch.tensor(ids), lengths, modes)
    conversations[1000 + number] = ids, [m for n, m in zip(lengths, modes) for _ in range(n)]
builder.finalize(prefix + ".idx")

def build(size, samples=(60, None, None)):
    config = GPTDatasetConfig(
        random_seed=5, sequence_length=size, blend=([prefix], None), split="100,0,0", path_to_cache=sys.argv[1] + "c",
        tokenizer=SimpleNamespace(unique_identifiers={}, vocab_size=2000, eod=0), reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(SFTDataset, samples, lambda: True, config).build()[0]

dataset = build(ROW)
rows, seen, padded, bad = [dataset[i] for i in range(60)], [], 0, []
for row in rows:
    real = ~row["padding_mask"]
    starts = [i for i in (row["position_ids"] == 0).nonzero()[:, 0].tolist() if real[i]]
    ends = [*starts[1:], int(real.sum())]
    padded += ROW - ends[-1]
    if row["loss_mask"][ends[-1]:].any() or real[ends[-1]:].any():
        bad.append("padding")
    for start, end in zip(starts, ends):
        ids, learned = conversations[int(row["tokens"][start])]
        seen.append(ids[0])
        labels = row["labels"][start : end - 1].tolist()
        if row["tokens"][start:end].tolist() != ids or labels != ids[1:]:
            bad.append("tokens")
        if row["position_ids"][start:end].tolist() != list(range(len(ids))):
            bad.append("positions")
        if row["loss_mask"][start:end].tolist() != [*map(float, learned[1:]), 0.0]:
            bad.append("loss")
again = build(ROW)
try:
    build(8)
except InputError as error:
    refused = str(error)
print("RESULT", json.dumps({
    "bad": bad, "first epoch": sorted(seen[:40]) == sorted(conversations), "second": seen[40:80] != seen[:40],
    "padded": padded / (60 * ROW), "counts": [seen.count(number) for number in conversations],
    "same": all(torch.equal(again[i][name], rows[i][name]) for i in range(60) for name in rows[i]), "refused": refused,
}))
"""


def test_rows_hold_whole_conversations(tmp_path: Path) -> None:
    done = warm("-c", DATASET, tmp_path / "data")
    assert "RESULT" in done.stdout, printed(done)[-3000:]
    found = json.loads(done.stdout.split("RESULT")[1].splitlines()[0])
    assert found["bad"] == [] and found["first epoch"] and found["second"] and found["same"]
    assert found["padded"] < 0.35 and max(found["counts"]) - min(found["counts"]) <= 1
    assert "40 conversations, the longest of" in found["refused"]


def prepare(kind: str, tokenizer: Path, file: Path, output: Path, *arguments: object) -> str:
    done = warm(PREPARE, kind, tokenizer, file, "--output", output, *arguments)
    return printed(done)


def test_a_run_learns_answers(tmp_path: Path) -> None:
    """From a file of conversations to steps, with DeepSeek's tokenizer."""
    checkpoint = tmp_path / "checkpoint"
    make_checkpoint(MINI | {"vocab_size": DEEPSEEK_VOCAB}, checkpoint, 1, dtype=CheckpointDtype("bf16"))

    def conversation(question: str, answer: str) -> str:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return json.dumps({"messages": messages}) + "\n"

    file = tmp_path / "conversations.jsonl"
    file.write_text(conversation("1 + 1?", "2") + conversation("long " * 99, "yes") + conversation("2 + 2?", "4"))
    said = prepare("sft", checkpoint, file, tmp_path / "sft", "--longest", 32)
    assert "2 documents, 20 tokens; 1 longer ones left out" in said, said
    said = prepare("sft", checkpoint, file, tmp_path / "sft", "--longest", 32)
    assert said.strip().endswith("sft.bin: exists; name another --output")
    file.write_text('{"text": "a"}\n')
    said = prepare("sft", checkpoint, file, tmp_path / "other", "--longest", 32)
    assert said.strip().endswith("conversations.jsonl:1: is no JSON object with 'messages'")

    # What fails leaves no file that looks like data.
    texts, options = tmp_path / "texts.jsonl", ("--output", tmp_path / "texts")
    for written, says in (
        (b'{"text": "a"}\n{"text": 5}\n', "texts.jsonl:2: a text is no string of characters: int"),
        (b'{"text": "a"}\n\xff\n', "texts.jsonl: cannot be read: 'utf-8' codec can't decode"),
        (b'{"text": ' + b"[" * 100_000, "texts.jsonl:1: is no JSON object with 'text'"),
        (b"", "texts.jsonl: no document in it"),
    ):
        texts.write_bytes(written)
        said = printed(warm(PREPARE, "pretrain", checkpoint, texts, *options)).splitlines()[-1]
        assert said.startswith("error: ") and says in said
        assert sorted(path.name for path in tmp_path.glob("texts*")) == ["texts.jsonl"]
    said = prepare("pretrain", checkpoint, texts, tmp_path / "none" / "texts")
    assert said.strip().endswith(f"there is no folder {tmp_path / 'none'}")
    said = prepare("pretrain", checkpoint, texts, tmp_path / "texts", "--fim-rate", "nan")
    assert said.strip().endswith("argument --fim-rate: nan: from 0 to 1")

    model = "--hf-config", checkpoint, "--tokenizer-type", "NullTokenizer", "--vocab-size", DEEPSEEK_VOCAB - 1
    size = "--micro-batch-size", 1, "--global-batch-size", 2, "--seq-length", 32, "--train-iters", 2, "--lr", 1e-3
    machine = "--transformer-impl", "local", "--distributed-backend", "gloo", "--log-interval", 1
    data = "--sft", "--data-path", tmp_path / "sft", "--split", "100,0,0", "--eval-iters", 0, "--eval-interval", 9
    done = warm(ON_CPU, PRETRAIN, *model, *size, *machine, *data, ranks=1, modules=LOOP)
    losses = [float(loss) for loss in re.findall(r"lm loss: (\S+)", done.stdout)]
    # Random weights: each answer as likely as any.
    assert len(losses) == 2 and abs(losses[0] - math.log(DEEPSEEK_VOCAB)) < 1, printed(done)[-3000:]
    assert losses[1] < losses[0] - 1
