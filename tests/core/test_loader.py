"""Weight updates: all tensors of a checkpoint, or the model may not answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from dsv3_plugin.checkpoint.loader import WeightLoader, all_finite, load_model, load_mtp
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.errors import CheckpointError
from dsv3_plugin.layers.model import DeepseekV3, bind_ops
from dsv3_plugin.registry import Ops

EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
Items = list[tuple[str, torch.Tensor]]


@pytest.fixture(scope="module")
def reader(tiny_checkpoint) -> CheckpointReader:
    return CheckpointReader(tiny_checkpoint("bf16"))


@pytest.fixture(scope="module")
def items(reader: CheckpointReader) -> Items:
    return list(reader.tensors())


@pytest.fixture(scope="module")
def ops(reader: CheckpointReader) -> Ops:
    return bind_ops(reader.config, reader.profile(), torch.device("cpu"))


@pytest.fixture
def loader(reader: CheckpointReader, ops: Ops) -> WeightLoader:
    return WeightLoader(load_model(reader, ops), reader.config, "main", holds_weights=True)


def state(loader: WeightLoader) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in loader.model.state_dict().items()}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def refused(act: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as error:
        act()
    return str(error.value)


def test_a_list_is_looked_through_before_anything_is_written(loader: WeightLoader, items: Items) -> None:
    before = state(loader)
    new = [(name, tensor + 1) for name, tensor in items]
    for wrong in (("model.typo", torch.ones(1)), new[0], (EXPERT, torch.ones(1))):
        bucket = [*new, wrong]
        refused(lambda bucket=bucket: loader.load(bucket))  # type: ignore[misc]
        loader.require_whole()
    assert equal(state(loader), before)
    # The twin: of a stream nobody knows what comes.
    assert "model.typo is unknown" in refused(lambda: loader.load(iter([*new[:3], ("model.typo", new[0][1])])))
    assert "refused: tensor model.typo is unknown" in refused(loader.require_whole)
    assert not equal(state(loader), before)


def test_a_tensor_that_comes_twice(loader: WeightLoader, items: Items) -> None:
    first, second = items[0][0], items[1][0]
    assert refused(lambda: loader.load([items[0], items[0]])) == f"tensor {first} came twice in one update"
    loader.require_whole()
    loader.load(items[:2])
    assert refused(lambda: loader.load(items[1:3])) == f"tensor {second} came twice in one update"
    assert f"refused: tensor {second} came twice" in refused(loader.require_whole)


def test_half_an_update(loader: WeightLoader, items: Items) -> None:
    mine = [item for item in items if item[0] in loader.wanted]
    loader.load(mine[:-1])
    last = mine[-1][0]
    left = f"1 of {len(loader.wanted)} tensors have not come: {last}"
    assert loader.problem == f"an update of its weights is under way, {left}"
    assert refused(loader.finish) == f"missing tensors of the main model (1): {last}"
    assert loader.problem == f"an update of its weights was not finished, {left}"
    assert "may not answer" in refused(loader.require_whole)
    # What is left of it is a bucket of the next one: it does not make the mixture whole.
    loader.load(mine[-1:])
    assert loader.problem is not None
    loader.load(mine[:-1])
    loader.require_whole()


def test_what_comes_for_another_model_after_the_last_tensor(loader: WeightLoader, items: Items) -> None:
    mine = [item for item in items if item[0] in loader.wanted]
    others = [item for item in items if item[0] not in loader.wanted]
    assert others
    loader.begin()
    loader.load(mine)
    loader.load(others)
    loader.finish()
    loader.require_whole()
    # The twin: one tensor of this model more begins another update.
    loader.load(mine[:1])
    assert refused(loader.finish).startswith("missing tensors of the main model")


def test_a_sender_that_dies_or_begins_again(loader: WeightLoader, items: Items) -> None:
    def dies() -> Iterator[tuple[str, torch.Tensor]]:
        yield items[0]
        raise ConnectionError("the sender is gone")

    with pytest.raises(ConnectionError):
        loader.load(dies())
    assert loader.problem == "an update of its weights was refused: the sender is gone"
    loader.begin()
    loader.load(items[:3])
    loader.begin()
    assert "was not finished" in str(loader.problem)
    loader.load(items)
    loader.finish()
    loader.require_whole()


def test_an_update_of_nothing(loader: WeightLoader) -> None:
    loader.finish()
    loader.begin()
    assert refused(loader.finish).startswith(f"missing tensors of the main model ({len(loader.wanted)}): ")
    loader.require_whole()


def test_weights_that_nobody_loaded(reader: CheckpointReader, ops: Ops, items: Items) -> None:
    loader = WeightLoader(DeepseekV3(ops, reader.config), reader.config, "main")
    assert "no weights have been loaded" in refused(loader.require_whole)
    loader.load(items)
    loader.require_whole()


def test_what_another_model_holds(reader: CheckpointReader, ops: Ops, items: Items) -> None:
    model = load_mtp(reader, ops)
    loader = WeightLoader(model, reader.config, "mtp", holds_weights=True)
    loader.share(["model.embed_tokens.weight", "lm_head.weight"])
    embedding = model.embed_tokens.weight.clone()
    loader.load([(name, tensor + 1) for name, tensor in items])
    loader.require_whole()
    assert torch.equal(model.embed_tokens.weight, embedding)


def test_a_parameter_without_memory(reader: CheckpointReader, ops: Ops, items: Items) -> None:
    model = DeepseekV3(ops, reader.config).to("meta")
    loader = WeightLoader(model, reader.config, "main", holds_weights=True)
    assert "on the meta device" in refused(lambda: loader.load(items))
    assert loader.problem is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none(loader: WeightLoader, items: Items, value: float) -> None:
    broken = [(name, tensor.clone()) for name, tensor in items]
    place = next(i for i, (name, _) in enumerate(broken) if name == EXPERT)
    broken[place][1][3, 5] = value
    before = state(loader)
    assert refused(lambda: loader.load(broken)) == f"NaN or infinity in 1 tensors: {EXPERT}"
    assert equal(state(loader), before)
    loader.require_whole()
    assert EXPERT in refused(lambda: loader.load(iter(broken)))
    assert EXPERT in refused(loader.require_whole)
    loader.load(iter(items))
    loader.require_whole()


@pytest.mark.parametrize(("code", "finite"), [(0x7F, False), (0xFF, False), (0x7E, True), (0xFE, True), (0x00, True)])
def test_codes_of_fp8(code: int, finite: bool) -> None:
    values = torch.full((4, 8), 0x38, dtype=torch.uint8)
    values[2, 7] = code
    assert bool(all_finite(values.view(torch.float8_e4m3fn))) is finite
