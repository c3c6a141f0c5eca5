"""A machine without a GPU prints the logits that an H200 printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hopper_card import needs_hopper
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_model import PROFILES, contracts, logits

from dsv3_plugin.kernels.certify.compare import bits_differ

# Recorded on an NVIDIA H200: python tests/support/tiny_model.py tests/kernels/tiny_model_h200.safetensors
RECORDING = Path(__file__).with_name("tiny_model_h200.safetensors")
RECORDED = load_file(RECORDING)
with safe_open(RECORDING, "pt") as file:
    THEN, NOW = json.loads(file.metadata()["contracts"]), json.loads(contracts())
CHANGED = sorted(op for op in THEN.keys() | NOW.keys() if THEN.get(op) != NOW.get(op))


def require_recorded(name: str, printed: torch.Tensor) -> None:
    """All bits are those of the recording. Others are excused by a contract that has changed since, and only by that:
    a new version may have the bits of the old one.
    """
    wrong = bits_differ(RECORDED[name], printed)
    if wrong and CHANGED:
        pytest.skip(f"logits were recorded with other contracts of {', '.join(CHANGED)}: record them on a Hopper card")
    assert wrong == 0


@pytest.mark.parametrize("name", PROFILES)
def test_a_cpu_prints_the_logits_of_an_h200(name: str) -> None:
    printed = logits(name, "cpu")
    print(name, printed.numel(), "logits, standard deviation", printed.std().item())
    assert printed.isfinite().all()
    require_recorded(name, printed)


def test_the_profiles_differ() -> None:
    """The twin: the comparison can fail."""
    assert bits_differ(RECORDED["bf16"], RECORDED["fp8 ue8m0"]) > 1000


@needs_hopper
@pytest.mark.parametrize("name", PROFILES)
def test_this_card_prints_them_too(name: str) -> None:
    require_recorded(name, logits(name, "cuda"))
