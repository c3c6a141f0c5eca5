"""The type of the adapters' tables of options."""

from __future__ import annotations

from enum import Enum

import pytest

from dsv3_plugin.errors import EngineError
from dsv3_plugin.options import Options, honoured, irrelevant, refused

TABLE = Options(
    "Engine",
    honoured("its scheduler", "max_num_seqs"),
    irrelevant("names a file", "tokenizer"),
    refused("one rank", "tensor_parallel_size", "pipeline_parallel_size", unless=(1,)),
    refused("no other cache", "kv_cache_dtype", allows=lambda value: value in ("auto", "bfloat16")),
)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"max_num_seqs": 7, "tokenizer": "x", "tensor_parallel_size": 1, "kv_cache_dtype": "bfloat16"},
        {"tensor_parallel_size": None, "pipeline_parallel_size": False},
    ],
)
def test_what_asks_for_nothing_passes(values: dict[str, object]) -> None:
    TABLE.require_supported(values)


@pytest.mark.parametrize("value", [2, True, "1", 1.0, 0])
def test_a_refused_value_is_named(value: object) -> None:
    """`True` is not 1 and `0` is not False: an engine means something else by them."""
    with pytest.raises(EngineError, match=rf"options of Engine: tensor_parallel_size={value!r}: one rank\."):
        TABLE.require_supported({"tensor_parallel_size": value})


def test_an_engines_enumeration_is_written_as_a_user_writes_it() -> None:
    backend = Enum("backend", {"FLASH_ATTN": "engine.attention.flash.Backend"})
    with pytest.raises(EngineError, match="kv_cache_dtype=FLASH_ATTN: no other cache"):
        TABLE.require_supported({"kv_cache_dtype": backend.FLASH_ATTN})


def test_every_refused_option_is_named_at_once() -> None:
    with pytest.raises(
        EngineError, match=r"pipeline_parallel_size=3: one rank; kv_cache_dtype='fp8': no other cache\."
    ):
        TABLE.require_supported({"kv_cache_dtype": "fp8", "pipeline_parallel_size": 3})


def test_an_option_without_a_rule_is_found() -> None:
    assert TABLE.unknown(["tokenizer", "new_in_0_99", "max_num_seqs"]) == ["new_in_0_99"]


def test_an_option_has_one_rule() -> None:
    with pytest.raises(ValueError, match="tokenizer of Engine has two rules"):
        Options("Engine", irrelevant("a", "tokenizer"), honoured("b", "tokenizer"))
