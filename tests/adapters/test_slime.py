"""slime and miles with this model: what `init` puts in their place, and their own export from a clone of their source.

Their interface is recorded here as of August 2026 (slime 624b824, miles 31f1ca9): modules, names and arguments. With
`SLIME_SOURCE` or `MILES_SOURCE` naming a clone, its own code exports the weights of ranks.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import TinyCheckpoint
from megatron_programs import LOOP, needs_megatron, printed, warm
from paths import SUPPORT

pytestmark = needs_megatron

MODULES = "dsv3_plugin.hosts.slime", "dsv3_plugin.megatron_backend.config"

WEIGHTS = {
    "update_weight/common": """
def named_params_and_buffers(args, model, convert_to_global_name=True, translate_gpu_to_cpu=False):
    yield "theirs", None
def get_atomic_update_groups(args, model_name):
    return ["theirs"]
""",
    "megatron_to_hf/__init__": """
def convert_to_hf(args, model_name, name, param, quantization_config=None, transform_ue8m0=True):
    return [("theirs", param)]
""",
    "hf_to_megatron/__init__": "def load_hf_weights(args, model, path): raise NotImplementedError",
    "update_weight/sender": """
from ..megatron_to_hf import convert_to_hf
from .common import named_params_and_buffers
""",
}
FORMULAS = {
    "slime": {
        "utils/ppo_utils": """
import torch
def _calculate_log_probs_and_entropy_chunk(
    logits, tokens, tp_group, *, with_entropy, with_entropy_grad=True, log_prob_keep_mask
):
    found = torch.log_softmax(logits, -1)
    entropy = -(found * found.exp()).sum(-1) if with_entropy else None
    x = logits - logits.max(-1, keepdim=True).values
    return x.gather(-1, tokens[:, None]) - x.exp().sum(-1, keepdim=True).log(), entropy
def calculate_log_probs_and_entropy(logits, tokens, tp_group, with_entropy=False):
    return _calculate_log_probs_and_entropy_chunk(
        logits, tokens, tp_group, with_entropy=with_entropy, log_prob_keep_mask=None
    )
""",
    },
    "miles": {
        "backends/training_utils/loss_hub/math_utils": """
def compute_log_probs(logits, tokens, process_group, *, true_on_policy_mode=False, vocab_size=None):
    x = logits - logits.max(-1, keepdim=True).values
    return x.gather(-1, tokens[:, None]) - x.exp().sum(-1, keepdim=True).log()
def calculate_log_probs_and_entropy(logits, tokens, tp_group, with_entropy=False):
    return compute_log_probs(logits.clone(), tokens, tp_group), None
""",
    },
}
FORMULA = {"slime": "slime.utils.ppo_utils", "miles": "miles.backends.training_utils.loss_hub.math_utils"}

PROGRAM = """
import importlib, os, sys
from types import SimpleNamespace
import torch
from megatron.core import parallel_state
from torch import distributed as dist
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.errors import DSV3Error
from dsv3_plugin.hosts import slime
from dsv3_plugin.megatron_backend.config import transformer_config
from dsv3_plugin.megatron_backend.model import build_model
from dsv3_plugin.megatron_backend.weights import load_checkpoint

host, place, checkpoint, formula = sys.argv[1:]
sys.path.append(place)
weights = f"{host}.backends.megatron_utils"
sender = importlib.import_module(f"{weights}.update_weight.sender")
formula = importlib.import_module(formula)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
group = parallel_state.get_tensor_model_parallel_group()
generator = torch.Generator().manual_seed(0)
logits = torch.randn(64, 1024, generator=generator) * 4
tokens = torch.randint(1024, (64,), generator=generator)
theirs, _ = formula.calculate_log_probs_and_entropy(logits, tokens, group)

args = SimpleNamespace(hf_checkpoint=checkpoint, rollout_temperature=1.0)
for wrong in ({"rollout_temperature": 0.7}, {"true_on_policy_mode": True}):
    try:
        slime.init(SimpleNamespace(**(vars(args) | wrong)))
    except DSV3Error as error:
        print("refused", error)
os.environ["DSV3_ATTENTION"] = "two_form"
try:
    slime.init(args)
except DSV3Error as error:
    print("refused", error)
del os.environ["DSV3_ATTENTION"]
assert next(sender.named_params_and_buffers(args, [])) == ("theirs", None)
slime.init(args)

ours, _ = formula.calculate_log_probs_and_entropy(logits, tokens, group)
expected = torch.log_softmax(logits, -1).gather(-1, tokens[:, None])
print("log-probabilities", ours.shape == theirs.shape, torch.equal(ours, expected), torch.equal(theirs, expected))
if host == "slime":
    _, entropy = formula.calculate_log_probs_and_entropy(logits, tokens, group, with_entropy=True)
    print("entropies", tuple(entropy.shape))
    try:
        formula._calculate_log_probs_and_entropy_chunk(
            logits, tokens, group, with_entropy=False, log_prob_keep_mask=logits > 0
        )
    except DSV3Error as error:
        print("refused", error)

reader = CheckpointReader(checkpoint)
model = [build_model(reader.config, transformer_config(reader.config, reader.profile(), perform_initialization=False))]
if host == "slime":
    importlib.import_module(f"{weights}.hf_to_megatron").load_hf_weights(args, model, checkpoint)
else:
    load_checkpoint(model, checkpoint)
held = dict(reader.tensors())
sent = [
    pair
    for name, view in sender.named_params_and_buffers(args, model)
    for pair in sender.convert_to_hf(args, "deepseekv3", name, view)
]
print("sent", len(sent), "wrong", [name for name, tensor in sent if not torch.equal(tensor, held[name])])

"""


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """Packages `slime` and `miles` with the recorded interface."""
    for host, formula in FORMULAS.items():
        modules = formula | {f"backends/megatron_utils/{path}": text for path, text in WEIGHTS.items()}
        for path, text in modules.items():
            file = tmp_path / host / f"{path}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    return tmp_path


@pytest.mark.parametrize("host", ["slime", "miles"])
def test_init_takes_the_places_of_the_hosts_functions(
    host: str, recorded: Path, tiny_checkpoint: TinyCheckpoint
) -> None:
    arguments = host, recorded, tiny_checkpoint("fp8"), FORMULA[host]
    done = warm("-c", PROGRAM, *arguments, modules=MODULES)
    assert done.returncode == 0, printed(done)
    lines = done.stdout.splitlines()
    assert lines.pop(0).startswith("refused --rollout-temperature 0.7: the host divides by a Python number"), lines
    assert lines.pop(0).startswith("refused --true-on-policy-mode rounds logits to bf16")
    assert lines.pop(0) == "refused DSV3_ATTENTION=two_form is not yet served by slime and miles: unset it"
    # In their shape, equal to log-softmax; theirs are not.
    assert lines.pop(0) == "log-probabilities True True False"
    if host == "slime":
        assert lines.pop(0) == "entropies (64,)"
        assert lines.pop(0).startswith("refused log-probabilities within a nucleus")
    assert lines.pop(0) == "sent 499 wrong []"
    assert not lines


def test_a_version_without_one_of_the_functions_is_named(recorded: Path, tiny_checkpoint: TinyCheckpoint) -> None:
    (recorded / "slime/backends/megatron_utils/megatron_to_hf/__init__.py").write_text("convert_to_hf = None\n")
    done = warm("-c", PROGRAM, "slime", recorded, tiny_checkpoint("fp8"), FORMULA["slime"], modules=MODULES)
    assert done.returncode != 0
    assert "slime.backends.megatron_utils.megatron_to_hf has no convert_to_hf, which dsv3-plugin" in printed(done)


@needs_megatron
def test_arguments_that_the_host_lacks_are_named() -> None:
    code = "from types import SimpleNamespace as N; import dsv3_plugin.hosts.slime as s; s.init(N(**{}))"
    for given, name in ("{}", "--rollout-temperature"), ("dict(rollout_temperature=1.0)", "--hf-checkpoint"):
        done = warm("-c", code.replace("{}", given), modules=MODULES)
        assert done.returncode and f"{name} is not given, which dsv3-plugin needs" in printed(done)


def test_a_version_without_one_of_the_modules_is_named(recorded: Path, tiny_checkpoint: TinyCheckpoint) -> None:
    (recorded / "slime/backends/megatron_utils/megatron_to_hf/__init__.py").unlink()
    (recorded / "slime/backends/megatron_utils/megatron_to_hf").rmdir()
    code = "import sys; sys.path.insert(0, sys.argv[1]); import dsv3_plugin.hosts.slime as s"
    code += "; s.replace('slime.backends.megatron_utils.megatron_to_hf', 'convert_to_hf', lambda f: f)"
    done = warm("-c", code, recorded, modules=MODULES)
    assert "EngineError: slime.backends.megatron_utils.megatron_to_hf has no convert_to_hf" in printed(done)


# What slime's scripts/models/deepseek-v3.sh says, for `tiny`.
ARGUMENTS = """
--disable-bias-linear --num-layers 4 --hidden-size 256 --ffn-hidden-size 512 --num-attention-heads 4 --kv-channels 32
--normalization RMSNorm --position-embedding-type rope --norm-epsilon 1e-6 --swiglu
--untie-embeddings-and-output-weights --vocab-size 1024
--multi-latent-attention --q-lora-rank 128 --kv-lora-rank 128 --qk-head-dim 32 --qk-pos-emb-head-dim 16 --v-head-dim 32
--qk-layernorm --rotary-scaling-factor 4 --rotary-base 10000 --mscale 1.0 --mscale-all-dim 1.0
--attention-softmax-in-fp32 --no-rope-fusion
--num-experts 16 --moe-layer-freq [0,1,1,1] --moe-ffn-hidden-size 128 --moe-router-topk 4
--moe-shared-expert-intermediate-size 128 --moe-router-score-function sigmoid --moe-router-enable-expert-bias
--moe-router-load-balancing-type seq_aux_loss --moe-token-dispatcher-type alltoall --moe-aux-loss-coeff 0
--moe-router-bias-update-rate 0 --moe-router-group-topk 2 --moe-router-num-groups 4
--moe-router-topk-scaling-factor 2.5 --moe-router-dtype fp32 --moe-grouped-gemm
--mtp-num-layers 1 --mtp-loss-scaling-factor 0.2 --bf16 --attention-dropout 0.0 --hidden-dropout 0.0
--accumulate-allreduce-grads-in-fp32 --attention-backend flash --use-distributed-optimizer
--seq-length 4096 --max-position-embeddings 4096 --micro-batch-size 1 --train-iters 1 --lr 1e-6
"""
# What docs/rl.md adds to it.
ADDED = """
--make-vocab-size-divisible-by 1
--no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-dropout-fusion --no-bias-swiglu-fusion
"""

PROVIDER = """
import sys
import pretrain_on_cpu
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.training.arguments import parse_args, validate_args
from megatron.training.global_vars import set_args
from torch import distributed as dist
from dsv3_plugin.errors import DSV3Error
from dsv3_plugin.hosts.slime import model_provider

checkpoint, *sys.argv[1:] = sys.argv[1:]
args = parse_args()
args.hf_checkpoint, args.padded_vocab_size = checkpoint, args.vocab_size
validate_args(args)
set_args(args)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
model_parallel_cuda_manual_seed(0)
try:
    print(type(model_provider(pre_process=True, post_process=True)).__module__)
except DSV3Error as error:
    print("refused", error)
"""


def test_slimes_own_arguments_build_the_model(tiny_checkpoint: TinyCheckpoint) -> None:
    command = "-c", PROVIDER, tiny_checkpoint("bf16"), *ARGUMENTS.split()
    built = warm(*command, *ADDED.split(), modules=LOOP)
    assert built.stdout.splitlines()[-1:] == ["dsv3_plugin.megatron_backend.model"], printed(built)[-3000:]
    # What the script has, and no DeepSeek-V3.
    refused = warm(*command, *ADDED.split(), "--moe-router-pre-softmax", modules=LOOP)
    assert "refused" in refused.stdout and "moe_router_pre_softmax" in refused.stdout, printed(refused)[-3000:]


@pytest.mark.parametrize("host", ["slime", "miles"])
@pytest.mark.parametrize(
    ("ranks", "sizes"),
    [
        (4, {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}),
        (2, {"tensor_model_parallel_size": 2}),
    ],
    ids=["stages and experts", "tensor"],
)
def test_the_hosts_own_export_gives_the_bytes_of_the_checkpoint(
    host: str, ranks: int, sizes: dict[str, int], tiny_checkpoint: TinyCheckpoint
) -> None:
    variable = f"{host.upper()}_SOURCE"
    if variable not in os.environ:
        pytest.skip(f"{variable} names no clone of {host}")
    command = SUPPORT / "slime_on_cpu.py", host, os.environ[variable], tiny_checkpoint("bf16"), json.dumps(sizes)
    done = warm(*command, ranks=ranks, modules=MODULES, DSV3_REDUCTION_SLICES="2" if len(sizes) == 1 else "1")
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"way"')]
    assert done.returncode == 0 and lines, printed(done)[-3000:]
    assert all(line["wrong"] == line["missing"] == [] for line in lines), lines
    assert all(line["sent"] == 267 for line in lines if line["way"] == "from tensors"), lines
    assert sum(line["sent"] for line in lines if line["way"] == "distributed") >= (267 if host == "slime" else 0)
