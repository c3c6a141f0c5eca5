"""Boards of `dsv3 bench engines` with made-up numbers, in which nothing is wrong."""

from __future__ import annotations

from dsv3_plugin.engine_bench import limits
from dsv3_plugin.engine_bench.judge import Board, Record
from dsv3_plugin.engine_bench.protocol import Measurement, Row, Start

VOCAB = 1024
PREFILL = Measurement(kind="prefill", requests=2, tokens=64)
DECODE = Measurement(kind="decode", requests=4, tokens=64)
DRAFTS = Measurement(kind="decode", requests=4, tokens=64, drafts=1, acceptance=0.5)
MODEL = limits.Model(
    name="model",
    profile="fp8",
    layers=3,
    expert_layers=2,
    experts=8,
    experts_per_token=2,
    max_positions=4096,
    vocab_size=VOCAB,
    mtp_layers=1,
    step_bytes=1_000_000_000,
    attention_bytes=400_000_000,
    mtp_bytes=300_000_000,
    expert_bytes=100_000_000,
    cached_bytes=1000,
    token_operations=1e10,
    pair_operations=1e6,
)


def row(measurement: Measurement, **known: object) -> Row:
    sound: dict[str, object] = {"finite": True, "as_forced": True, "pass_seconds": (1.1, 1.0)}
    if measurement.kind == "prefill":
        sound |= {"first_token_seconds": (0.5, 1.0)}
    else:
        sound |= {"step_ms": (2.0, 1.9, 2.2), "tokens_per_step": 1.0, "cached_tokens": 100.0, "experts": (6.0, 8.0)}
        sound |= {"first_token_seconds": (0.5, 1.0)}
    return Row.model_validate({"measurement": measurement, **sound, **known})


def record(name: str, role: str, *rows: Row, **known: object) -> Record:
    engine, _, way = name.partition("-")
    start = Start(device="H200 1", versions={}, served="Model", import_seconds=1, up_seconds=2)
    fields = {"name": name, "engine": engine, "way": way, "role": role, "settings": {}, "start": start, "rows": rows}
    return Record.model_validate(fields | known)


NAME = str(DECODE)
STOCK = record("vllm-stock", "stock", row(DECODE), distances={NAME: 0.1}, eager_distances={NAME: 0.09})
OURS = record("vllm-strict", "strict", row(DECODE, step_ms=(1.6, 1.5, 1.7)), distances={NAME: 0.0})


def board(*records: Record, **known: object) -> Board:
    fields = {"device": "H200 1", "date": "2026-01-01", "model": MODEL, "measurements": (PREFILL, DECODE, DRAFTS)}
    return Board.model_validate(
        {**fields, "impossible": {}, "records": records, "passes": 2, "steps": 8, **known},
    )
