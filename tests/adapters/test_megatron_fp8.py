"""Megatron's arguments for FP8: what they agree with, and whose kernels they ask for."""

from __future__ import annotations

from argparse import Namespace

import pytest

from dsv3_plugin.errors import EngineError
from dsv3_plugin.megatron_backend.fp8 import FP32_SCALES, take_format
from dsv3_plugin.profile import BF16, FP8_FLOAT32, FP8_UE8M0, Profile


def asked(fp8: str | None = "e4m3", recipe: str = "blockwise") -> Namespace:
    return Namespace(fp8=fp8, fp8_recipe=recipe)


@pytest.fixture(autouse=True)
def without_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FP32_SCALES, raising=False)


def test_arguments_that_say_what_the_checkpoint_says_ask_for_transformer_engine() -> None:
    args = asked()
    for _ in range(2):  # the parser looks at them, and the builder again
        take_format(args, FP8_UE8M0)
        assert args.fp8 is None and args.preferred_kernels == "transformer-engine"
    without = asked(None, "delayed")
    take_format(without, FP8_UE8M0)
    assert without.fp8 is None and without.preferred_kernels is None
    hybrid = asked("hybrid")
    take_format(hybrid, FP8_UE8M0)
    assert hybrid.fp8 == "hybrid", "which the table of options refuses"


@pytest.mark.parametrize(
    ("args", "profile", "variable", "message"),
    [
        (asked(), BF16, None, r"fp8=e4m3 .*is in bf16: convert it to fp8, or leave --fp8-format out"),
        (asked(recipe="delayed"), FP8_UE8M0, None, r"fp8_recipe=delayed .*give --fp8-recipe blockwise"),
        (asked(), FP8_UE8M0, "1", rf"{FP32_SCALES}=1 gives .* fp32 scales, .* has power-of-two ones: unset it"),
        (asked(), FP8_FLOAT32, "1", r"has fp32 scales: .* Take a checkpoint with power-of-two scales"),
        (asked(), FP8_FLOAT32, None, r"has fp32 scales: .* or train in bf16 after dsv3 convert to-megatron"),
    ],
)
def test_what_does_not_agree_is_named(
    args: Namespace, profile: Profile, variable: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable is not None:
        monkeypatch.setenv(FP32_SCALES, variable)
    with pytest.raises(EngineError, match=message):
        take_format(args, profile)
