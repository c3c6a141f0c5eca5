"""A machine without a GPU prints the logits that an H200 printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
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
# A change of a contract makes the logits stale until a card prints them again.
CHANGED = sorted(op for op in THEN.keys() | NOW.keys() if THEN.get(op) != NOW.get(op))
STALE = pytest.mark.skipif(
    bool(CHANGED),
    reason=f"logits were recorded with other contracts of {', '.join(CHANGED)}: record them again on a Hopper card",
)


@STALE
@pytest.mark.parametrize("name", PROFILES)
def test_a_cpu_prints_the_logits_of_an_h200(name):
    printed = logits(name, "cpu")
    print(name, printed.numel(), "logits, standard deviation", printed.std().item())
    assert printed.isfinite().all()
    assert bits_differ(RECORDED[name], printed) == 0


def test_the_profiles_differ():
    """The twin: the comparison can fail."""
    assert bits_differ(RECORDED["bf16"], RECORDED["fp8 ue8m0"]) > 1000


@STALE
@needs_hopper
@pytest.mark.parametrize("name", PROFILES)
def test_this_card_prints_them_too(name):
    assert bits_differ(RECORDED[name], logits(name, "cuda")) == 0
