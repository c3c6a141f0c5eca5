"""The `two_form` profile: attention of prompts' tokens by heads, of generated ones absorbed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsv3_plugin.checkpoint.presets import read_config
from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.errors import ConfigError, KernelError
from dsv3_plugin.layers.model import bind_ops
from dsv3_plugin.ops.head_attention import head_attention
from dsv3_plugin.profile import ATTENTION_VARIABLE, BF16, SLICES_VARIABLE, Profile, profile_for
from dsv3_plugin.registry import Ops

CPU = torch.device("cpu")
CONFIG = DeepseekV3Config.from_dict(read_config("small"))
TWO_FORM = replace(BF16, attention="two_form")


# The setting


def test_the_profile_says_its_form(monkeypatch: pytest.MonkeyPatch) -> None:
    assert profile_for(CONFIG) is BF16 and BF16.attention == "absorbed"
    monkeypatch.setenv(ATTENTION_VARIABLE, "absorbed")
    assert profile_for(CONFIG) is BF16
    monkeypatch.setenv(ATTENTION_VARIABLE, "two_form")
    assert profile_for(CONFIG) == TWO_FORM != BF16
    assert str(TWO_FORM) == "bf16 two_form"
    monkeypatch.setenv(SLICES_VARIABLE, "2")
    assert str(profile_for(CONFIG)) == "bf16 two_form in 2 reduction slices"


@pytest.mark.parametrize("text", ["", "heads", "TWO_FORM"])
def test_another_word_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ATTENTION_VARIABLE, text)
    with pytest.raises(ConfigError, match=f"^DSV3_ATTENTION={text!r}; use absorbed or two_form$"):
        profile_for(CONFIG)


def bound(profile: Profile) -> Ops:
    return bind_ops(CONFIG, profile, CPU)


def test_provenance_names_the_profile_and_its_operation() -> None:
    record = bound(TWO_FORM).record()
    assert record["profile"] == "bf16 two_form"
    assert "head_attention" in [choice["operation"] for choice in record["operations"]]
    assert "profile bf16 two_form, strict mode" in bound(TWO_FORM).announcement("x")
    # The twin: other profiles have no kernel of it.
    assert "head_attention" not in [choice["operation"] for choice in bound(BF16).record()["operations"]]
    with pytest.raises(KernelError, match="head_attention was called in the bf16 profile, which does not use it"):
        bound(BF16)[head_attention](scale=1.0)  # type: ignore[call-arg]
