"""The measuring of the selection's table, on a machine without a GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: `make test` runs this in .envs/kernels")

from dsv3_plugin.kernels.bench import tune
from dsv3_plugin.kernels.bench.measure import Time


def test_a_backend_is_measured_with_each_load_alone_and_left_out_if_a_bit_differs_in_one(monkeypatch):
    """Each call prints its load; the fake clock reads the captured calls."""
    even, uneven = torch.zeros(4), torch.ones(4)

    def backend(*results: torch.Tensor | Exception) -> list[list[tune.Call]]:
        def call(result: torch.Tensor | Exception) -> torch.Tensor:
            if isinstance(result, Exception):
                raise result
            return result

        return [[partial(call, result)] for result in results]

    product = tune.Product(32, 4096, 7168, 1024)
    config = next(iter(product.configs()))
    backends = {
        "triton": backend(even, uneven),
        config: backend(even.clone(), uneven.clone()),
        "gluon": backend(even.clone(), uneven + 1),
        "deep-gemm": backend(even.clone(), RuntimeError("no such layout")),
    }
    monkeypatch.setattr(tune.Product, "calls", lambda self, weights: backends)
    monkeypatch.setattr(tune.measure, "capture", lambda calls: calls)

    def time_in_turns(graphs, calls, replays):
        assert all(len(graph) == calls == 1 for graph in graphs.values())
        slow = {name: 100.0 * (name == "triton") for name, _ in graphs}
        return {key: Time(slow[key[0]] + 10 + 4 * graph[0]()[0].item(), 0, 0) for key, graph in graphs.items()}

    monkeypatch.setattr(tune.measure, "time_in_turns", time_in_turns)
    said: list[str] = []
    row = tune._measure(product, [(even, even)], said.append)
    assert row.microseconds == {"triton": 112.0, "cuda": 12.0}
    assert row.config() == product.configs()[config]
    assert said == [
        "gluon differs in 4 outputs and is left out",
        "deep-gemm does not run: RuntimeError: no such layout",
    ]
