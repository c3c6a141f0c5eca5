"""Megatron's options: each has a rule, and what a user types is honoured or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import TinyCheckpoint
from megatron_programs import LOOP, needs_megatron, printed, warm
from paths import TESTS

ON_CPU = TESTS / "pretrain_on_cpu.py"
pytestmark = needs_megatron

# Run by pretrain_on_cpu: `megatron.training` needs its stand-ins.
PROGRAM = """
import argparse, dataclasses, json, sys
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.training.arguments import add_megatron_arguments
from dsv3_plugin.errors import DSV3Error
from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.megatron_backend.config import of_model
from dsv3_plugin.megatron_backend.options import OF_MODEL, OPTIONS
from dsv3_plugin.megatron_backend.provider import add_arguments
from dsv3_plugin.options import Options
from dsv3_plugin.profile import profile_for

OURS = "hf_config", "report_recipe", "ema_decay"

def main():
    checkpoint, cases = sys.argv[1], json.loads(sys.argv[2])
    parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    fields = [field.name for field in dataclasses.fields(MLATransformerConfig)]
    arguments = [action.dest for action in parser._actions if action.dest not in OURS]
    config = DeepseekV3Config.from_pretrained(checkpoint)
    # The twin: a table without one of its rules.
    rules = [rule for rule in OPTIONS.rules.values() if "context_parallel_size" not in rule.names]
    smaller = Options("Megatron", *{id(rule): rule for rule in rules}.values())
    said = []
    for words in cases:
        try:
            parser.parse_args(words)
            said.append(None)
        except DSV3Error as error:
            said.append(str(error))
    print("RESULT", json.dumps({
        "unknown": OPTIONS.unknown([*fields, *arguments]),
        "unknown to the twin": smaller.unknown([*fields, *arguments]),
        "undescribed": sorted(set(OF_MODEL.names) ^ set(of_model(config, profile_for(config)))),
        "count": len(set(fields) | set(arguments)),
        "said": said,
    }))
"""

NOT_THE_MODELS = (
    ("--rotary-base", "500000"),
    ("--rotary-scaling-factor", "1.0"),
    ("--mscale", "0.5"),
    ("--mscale-all-dim", "0.7"),
    ("--kv-lora-rank", "64"),
    ("--q-lora-rank", "64"),
    ("--qk-head-dim", "64"),
    ("--v-head-dim", "64"),
    ("--moe-router-topk", "2"),
    ("--moe-router-topk-scaling-factor", "1.0"),
    ("--moe-router-group-topk", "4"),
    ("--moe-router-num-groups", "8"),
    ("--moe-router-score-function", "softmax"),
    ("--moe-router-dtype", "fp64"),
    ("--norm-epsilon", "1e-5"),
    ("--normalization", "LayerNorm"),
    ("--num-layers", "3"),
    ("--mtp-num-layers", "2"),
    ("--num-experts", "8"),
    ("--moe-layer-freq", "1"),
    ("--padded-vocab-size", "2048"),
    ("--vocab-size", "5000"),
    ("--max-position-embeddings", "64"),
    ("--position-embedding-type", "yarn"),
)
REPORT = "--report-recipe", "--train-samples", "1000", "--global-batch-size", "10"
REFUSED = (
    ("--fp16",),
    ("--attention-dropout", "0.5"),
    ("--hidden-dropout", "0.1"),
    ("--moe-latent-size", "32"),
    ("--moe-token-dispatcher-type", "flex"),
    ("--moe-enable-deepep",),
    ("--delay-wgrad-compute",),
    ("--hybrid-layer-pattern", "+-+E/+E"),
    ("--context-parallel-size", "2"),
    ("--moe-router-load-balancing-type", "sinkhorn"),
    ("--moe-router-load-balancing-type", "seq_aux_loss", "quantile_balancing"),
    ("--defer-embedding-wgrad-compute",),
    ("--use-megatron-fsdp",),
    ("--cross-entropy-loss-fusion",),
    ("--mtp-loss-scaling-factor", "3.0", *REPORT),
    ("--lr-warmup-samples", "10", *REPORT),
    ("--min-lr", "1e-5", *REPORT),
    ("--global-batch-size", "4", "--report-recipe", "--train-samples", "1000"),
    ("--exp-avg-dtype", "bf16"),
    ("--use-precision-aware-optimizer",),
    ("--exp-avg-dtype", "fp16", "--use-precision-aware-optimizer", "--use-distributed-optimizer"),
    ("--main-params-dtype", "fp16", "--use-precision-aware-optimizer", "--use-distributed-optimizer"),
    ("--optimizer-cpu-offload",),
    ("--ema-decay", "0.999"),
    ("--fp8-format", "hybrid"),
    ("--fp8-format", "e4m3", "--fp8-recipe", "blockwise"),
    ("--optimizer", "muon"),
    ("--rampup-batch-size", "2", "2", "12"),
    ("--rotary-percent", "0.5"),
    ("--yarn-beta-fast", "16"),
    ("--log-max-attention-logit",),
    ("--expert-tensor-parallel-size", "2"),
    ("--reset-position-ids",),
    ("--reset-attention-mask",),
    ("--ckpt-format", "torch"),
    ("--moe-router-bias-update-rate", "nan"),
    ("--moe-aux-loss-coeff", "1e-4", "nan"),
    ("--clip-grad", "inf"),
    ("--lr", "inf"),
    ("--adam-beta1", "2"),
    ("--adam-beta2", "1.0"),
    ("--adam-eps", "0"),
    ("--clip-grad", "-1"),
    ("--weight-decay", "-1"),
    ("--moe-router-bias-update-rate", "-1"),
    ("--moe-aux-loss-coeff", "0.1", "-0.1"),
    ("--init-method-std", "-1"),
    ("--lr", "-1"),
    ("--lr-warmup-fraction", "2"),
    ("--lr-warmup-fraction", "-1"),
    ("--seed", "99999999999999999999"),
    ("--seed", "-1"),
    ("--min-lr", "1", "--lr", "0.001"),
    ("--global-batch-size", "-5", "--report-recipe", "--train-samples", "148"),
    ("--recompute-num-layers", "2", "--recompute-granularity", "full", "--recompute-method", "uniform"),
    ("--save", "new"),
)
HONOURED = (
    (),
    ("--moe-z-loss-coeff", "0.1"),
    ("--moe-router-load-balancing-type", "aux_loss", "seq_aux_loss", "--moe-aux-loss-coeff", "0.1", "0.1"),
    ("--mtp-loss-scaling-factor", "3.0"),
    ("--reset-position-ids", "--reset-attention-mask", *REPORT),
    ("--use-distributed-optimizer", "--use-precision-aware-optimizer", "--exp-avg-dtype", "bf16"),
    ("--ema-decay", "0.999", "--save", "new", "--save-interval=10", *REPORT),
    ("--rotary-base", "10000", "--vocab-size", "1023", "--bf16"),
    ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
    ("--expert-model-parallel-size", "2", "--overlap-moe-expert-parallel-comm"),
)
# Of folders in the test's own; `hf` is a Hugging Face checkpoint, `run` one of Megatron, `empty` neither.
WITHOUT_WEIGHTS = {
    ("--load", "hf"): "dsv3 convert to-megatron",
    ("--load", "hf", "--save", "new", "--save-interval=10"): "dsv3 convert to-megatron",
    ("--load", "new"): "no such folder",
    ("--load", "new", "--save", "empty", "--save-interval=10"): "no such folder",
    ("--load", "empty"): "holds no checkpoint of Megatron",
    ("--load", "run", "--ckpt-step=5"): "--ckpt-step 5: there is no ",
    (
        "--load",
        "new",
        "--save",
        "new",
        "--save-interval=10",
        "--pretrained-checkpoint",
        "hf",
    ): "dsv3 convert to-megatron",
    ("--pretrained-checkpoint", "new"): "no such folder",
}
WITH_WEIGHTS = (
    ("--load", "run"),
    ("--load", "run", "--save", "new", "--save-interval=10"),
    ("--load", "new", "--save", "new", "--save-interval=10"),
    ("--load", "empty", "--save", "empty", "--save-interval=10"),
    ("--load", "new", "--save", "new", "--save-interval=10", "--pretrained-checkpoint", "run"),
    ("--load", "run", "--pretrained-checkpoint", "new"),
)


def test_every_option_has_a_rule_and_no_value_is_lost(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("bf16")
    script = tmp_path / "script.py"
    script.write_text(PROGRAM)
    model = ["--hf-config", str(checkpoint)]
    flags = [*NOT_THE_MODELS, *REFUSED]
    # Before the model's own argument and after it.
    cases = [words for flag in flags for words in ([*model, *flag], [*flag, *model])]
    (tmp_path / "hf").symlink_to(checkpoint)
    for name in ("empty", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("release")
    # Megatron's folders have a configuration beside them, too.
    (tmp_path / "run" / "config.json").write_text("{}")
    weights = [
        [word if word.startswith("-") else str(tmp_path / word) for word in flag]
        for flag in (*WITHOUT_WEIGHTS, *WITH_WEIGHTS)
    ]
    in_fp8 = ["--hf-config", str(tiny_checkpoint("fp8")), "--fp8-format", "e4m3", "--fp8-recipe", "blockwise"]
    arguments = json.dumps([*cases, *([*flag, *model] for flag in (*weights, *HONOURED)), in_fp8])
    done = warm(ON_CPU, script, checkpoint, arguments, modules=LOOP)
    assert "RESULT" in done.stdout, printed(done)[-3000:]
    found = json.loads(done.stdout.split("RESULT")[1].splitlines()[0])
    assert found["unknown"] == [] and found["unknown to the twin"] == ["context_parallel_size"]
    assert found["undescribed"] == [] and found["count"] > 800
    said = iter(found["said"])
    for flag in flags:
        name = {"norm_epsilon": "layernorm_epsilon", "fp8_format": "fp8"}.get(
            flag[0][2:].replace("-", "_"), flag[0][2:].replace("-", "_")
        )
        for sentence in (next(said), next(said)):
            assert sentence is not None and f"{name}=" in sentence and "\n" not in sentence, (flag, sentence)
            if flag in NOT_THE_MODELS and name != "vocab_size":
                assert "and the checkpoint's configuration says" in sentence, sentence
    for flag, reason in WITHOUT_WEIGHTS.items():
        sentence = next(said)
        assert sentence is not None and reason in sentence and "\n" not in sentence, (flag, sentence)
    assert list(said) == [None] * len((*WITH_WEIGHTS, *HONOURED, in_fp8))
