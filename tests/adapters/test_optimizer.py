"""Adam with moments in bf16, and the average of the weights: their numbers, and that cutting moves no bit."""

from __future__ import annotations

import json
from typing import Any

from megatron_programs import needs_megatron, printed, warm

pytestmark = needs_megatron


def results(program: str, *arguments: object) -> dict[str, Any]:
    done = warm("-c", program, *arguments)
    assert "RESULT" in done.stdout, printed(done)[-3000:]
    return dict(json.loads(done.stdout.split("RESULT")[1].splitlines()[0]))


ADAM = """
import json
import torch
from dsv3_plugin.errors import EngineError
from dsv3_plugin.megatron_backend.adam import PreciseAdam

SIZE, STEPS = 1001, 20
generator = torch.Generator().manual_seed(0)
begin = torch.randn(SIZE, generator=generator).bfloat16()
gradients = [torch.randn(SIZE, generator=generator) * 0.1 for _ in range(STEPS)]
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
OWN = {"master_weights": True, "use_decoupled_grad": True}

def run(pieces, dtype, resume=None, own=OWN, start=begin):
    parameters = [piece.clone() for piece in start.split(pieces)]
    moments = {"exp_avg_dtype": dtype, "exp_avg_sq_dtype": dtype}
    make = lambda: PreciseAdam([{"params": parameters}], **SETTINGS, **moments, **own)
    adam = make()
    for step, gradient in enumerate(gradients):
        if step == resume:
            state, adam = adam.state_dict(), make()
            adam.load_state_dict(state)
        for parameter, piece in zip(parameters, gradient.split(pieces)):
            setattr(parameter, "decoupled_grad" if own else "grad", piece.clone())
        adam.step()
    states = [adam.state[parameter] for parameter in parameters]
    return {name: torch.cat([state[name] for state in states]) for name in adam.dtypes} | {"p": torch.cat(parameters)}

def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)

def oracle(rounded):
    p, m, v = begin.double(), torch.zeros(SIZE).double(), torch.zeros(SIZE).double()
    for step, gradient in enumerate(gradients, 1):
        g = gradient.double()
        m, v = m * 0.9 + g * 0.1, v * 0.95 + g * g * 0.05
        p = p - 1e-3 * (m / (1 - 0.9**step) / ((v / (1 - 0.95**step)).sqrt() + 1e-8) + 0.1 * p)
        m, v = rounded(m), rounded(v)
    return p

# Megatron's own main parameters, as it has them beside TransformerEngine's FP8.
given = run(SIZE, torch.bfloat16, own={}, start=begin.float(), resume=7)
bf16, fp32 = run(SIZE, torch.bfloat16), run(SIZE, torch.float32)
to_bf16 = lambda x: x.float().bfloat16().double()
far = lambda found, wanted: float((found.double() - wanted).abs().max())
refused = []
for settings in {"master_weight_dtype": torch.bfloat16}, {"adam_w_mode": False}, {"capturable": True}:
    try:
        PreciseAdam([{"params": []}], **SETTINGS, **settings)
    except EngineError as error:
        refused.append(str(error))
print("RESULT", json.dumps({
    "dtypes": [str(bf16[name].dtype) for name in ("master_param", "exp_avg", "exp_avg_sq", "p")],
    "given": torch.equal(given["p"], bf16["master_param"]) and torch.equal(given["exp_avg"], bf16["exp_avg"]),
    "rounded": torch.equal(bf16["p"], bf16["master_param"].bfloat16()),
    "cut": equal(bf16, run(7, torch.bfloat16)),
    "resumed": equal(bf16, run(SIZE, torch.bfloat16, resume=STEPS // 2)),
    "precisions equal": torch.equal(bf16["master_param"], fp32["master_param"]),
    "fp32": far(fp32["master_param"], oracle(lambda x: x)),
    "bf16": far(bf16["master_param"], oracle(to_bf16)),
    "between": far(oracle(to_bf16), oracle(lambda x: x)),
    "refused": refused,
}))
"""


def test_adam_with_moments_in_bf16() -> None:
    found = results(ADAM)
    assert found["dtypes"] == ["torch.float32", "torch.bfloat16", "torch.bfloat16", "torch.bfloat16"]
    assert found["given"] and found["rounded"] and found["cut"] and found["resumed"] and not found["precisions equal"]
    # Against float64 with the same rounding of moments: some units of fp32's last place, and far below what it does.
    assert found["fp32"] < 2e-6 and found["bf16"] < 0.2 * found["between"], found
    assert len(found["refused"]) == 3 and all("without TransformerEngine" in line for line in found["refused"])


AVERAGE = """
import json, sys, time
from pathlib import Path
import torch
from megatron.core import parallel_state
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import distributed as dist
from dsv3_plugin.errors import EngineError
from dsv3_plugin.megatron_backend.average import WeightAverage

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel(create_gloo_process_groups=True)

class Chunk(torch.nn.Linear):
    def sharded_state_dict(self):
        groups = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_data_parallel_group()
        state = self.state_dict(keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, "", {}, tp_group=groups[0], dp_cp_group=groups[1])

class Optimizer:
    def __init__(self, chunk):
        self.chunk = chunk

    @torch.no_grad()
    def step(self):
        for parameter in self.chunk.parameters():
            parameter.mul_(1.5).sub_(0.01)
        return "done"

class Late(Optimizer):  # what a step makes is gathered during the next forward pass
    @torch.no_grad()
    def step(self):
        super().step()
        self.made = [parameter.clone() for parameter in self.chunk.parameters()]
        for parameter in self.chunk.parameters():
            parameter.fill_(7)

    @torch.no_grad()
    def gather(self):
        for parameter, made in zip(self.chunk.parameters(), self.made):
            parameter.copy_(made)

def begin(kind=Optimizer):
    torch.manual_seed(0)
    chunk = Chunk(33, 17).bfloat16()
    return chunk, kind(chunk), WeightAverage([chunk], 0.9)

def run_late(late):
    chunk, optimizer, average = begin(Late)
    average.follow(optimizer, late=late)
    for _ in range(8):
        optimizer.step()
        optimizer.gather()
    average.save(Path(sys.argv[1]), 8)
    return average.averages[0]["weight"]

def run(steps, resume=None, broken=False):
    chunk, optimizer, average = begin()
    fold = average._fold
    def slowly(copied):
        if broken:  # the twin: it reads what the next step has written
            average.arriving = average.parameters
        time.sleep(0.05)
        fold(copied)
    average._fold = slowly
    average.follow(optimizer)
    expected = chunk.weight.detach().float()
    for step in range(steps):
        if step == resume:
            average.save(Path(sys.argv[1]), step)
            average = WeightAverage([chunk], 0.9)
            assert average.load(Path(sys.argv[1]), step) and not average.load(Path(sys.argv[1]), step + 1)
            optimizer = Optimizer(chunk)
            average.follow(optimizer)
        assert optimizer.step() == "done"
        expected = expected * 0.9 + chunk.weight.detach().float() * (1 - 0.9)
    average.wait()
    return average.averages[0]["weight"], expected, chunk.weight

found, expected, weight = run(8)
resumed, _, _ = run(8, resume=4)
twin, _, _ = run(8, broken=True)
refused = []
for decay in 0.0, 1.0:
    try:
        WeightAverage([begin()[0]], decay)
    except EngineError as error:
        refused.append(str(error))
print("RESULT", json.dumps({
    "equal": torch.equal(found, expected), "resumed": torch.equal(found, resumed), "twin": torch.equal(found, twin),
    "late": torch.equal(found, run_late(True)), "late twin": torch.equal(found, run_late(False)),
    "weights": torch.equal(found, weight.float()), "dtype": str(found.dtype), "refused": refused,
}))
"""


def test_the_average_is_of_each_step_s_weights_however_late_it_is(tmp_path: Any) -> None:
    found = results(AVERAGE, tmp_path / "ema")
    assert found["equal"] and found["resumed"] and found["dtype"] == "torch.float32"
    assert not found["twin"] and not found["weights"]
    assert found["late"] and not found["late twin"]
    assert [line.split(":")[0] for line in found["refused"]] == ["--ema-decay 0.0", "--ema-decay 1.0"]
