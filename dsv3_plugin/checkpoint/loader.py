"""A checkpoint's tensors into our modules, in place: all of them, or the model may not answer.

A first load and a trainer's weight updates are one thing: tensors with Hugging Face's names come in any order, at once
or in buckets, until each of the model has come once. Between the first and the last the parameters are a mixture of two
models, which must not answer (`WeightLoader.problem`). Dtypes change only between bf16 and fp32: FP8 weights are copied
as they are, and never made here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from dsv3_plugin.checkpoint.names import BIAS_SUFFIX, Part, Target, TensorSpec, checkpoint_tensors, dtype_name
from dsv3_plugin.checkpoint.reader import IGNORED_SUFFIX, CheckpointReader, check_finite, some_names
from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.errors import CheckpointError
from dsv3_plugin.layers.model import DeepseekV3, weights_changed
from dsv3_plugin.layers.mtp import DeepseekV3MTP
from dsv3_plugin.layout import WHOLE, Layout
from dsv3_plugin.ops.quantize import E4M3
from dsv3_plugin.registry import Ops

Write = Callable[[nn.Parameter, torch.Tensor, tuple[int | slice, ...]], None]
"""Writes a tensor to `parameter[index]`; the whole parameter where the index is empty."""


def write_in_place(parameter: nn.Parameter, tensor: torch.Tensor, index: tuple[int | slice, ...]) -> None:
    """Copy `tensor` into its place. Raises `CheckpointError` for a parameter that has no memory."""
    if parameter.is_meta:
        raise CheckpointError("a parameter is on the meta device, where a weight that is written is lost")
    parameter[index].copy_(tensor)


class WeightLoader:
    """Writes the weights of one model, and knows whether they are those of one checkpoint.

    An *update* begins with `begin`, or with the first bucket after a whole one. It is whole once every tensor has come.
    What is refused before anything was written leaves the old weights in place. A refusal after that leaves a mixture,
    and the next update begins anew.
    """

    def __init__(
        self,
        model: nn.Module,
        config: DeepseekV3Config,
        part: Part,
        *,
        layout: Layout = WHOLE,
        holds_weights: bool = False,
        write: Write = write_in_place,
    ) -> None:
        """Nothing is read or written yet.

        Args:
            model: a `DeepseekV3` for the part `main`, a `DeepseekV3MTP` for `mtp`, or a module with their parameters.
            config: the checkpoint's configuration.
            part: which part of the checkpoint `model` is.
            layout: which part of that this rank holds. Tensors come whole, all of them to each rank, so that all ranks
                agree on what has come; those of other ranks are counted and not written.
            holds_weights: whether what the parameters hold now may answer: an engine filled them by itself.
            write: how a tensor gets into a parameter.
        """
        self.model = model
        self.part = part
        self.config = config
        self.follow(layout)
        whole = checkpoint_tensors(config)
        self.wanted = {name for name, spec in whole.items() if part in spec.targets and not spec.optional}
        self.write = write
        self.updates = 0
        """How many have been whole, the first load included."""
        self._came: set[str] | None = None
        self._finite: dict[str, torch.Tensor] = {}  # asked at the end: an answer waits for the device
        self._refused = None if holds_weights else "no weights have been loaded"

    @property
    def problem(self) -> str | None:
        """Why the model may not answer now, or None."""
        if self._came:
            return f"an update of its weights is under way, {self._lacking()}"
        return self._refused

    def tensor(self, name: str) -> torch.Tensor | None:
        """What the model holds of a checkpoint's tensor; None for one of another part, or of another rank's experts or
        layers. Tensor-parallel ranks make this call together.
        """
        if (target := self._own(name)) is None:
            return None
        return target.whole(dict(self.model.named_parameters())[target.parameter][target.index], self.layout.tensor)

    def follow(self, layout: Layout) -> None:
        """The weights are where `layout` says: an engine may move experts, but not while an update is under way."""
        self.layout = layout
        self.specs = checkpoint_tensors(self.config, layout)

    def _own(self, name: str) -> Target | None:
        """Where this rank holds a tensor, if it does."""
        spec = self.specs.get(name)
        return None if spec is None else spec.targets.get(self.part)

    def share(self, names: Iterable[str]) -> None:
        """Another model holds and updates these tensors: they are not waited for here, and passed over."""
        self.wanted -= set(names)

    def begin(self) -> None:
        """An update begins. What came of one that was not finished is refused."""
        if self._came:
            self._refused = f"an update of its weights was not finished, {self._lacking()}"
        self._came, self._finite = set(), {}

    @torch.no_grad()
    def load(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Take a bucket of an update, or all of it; returns the names that were used.

        Args:
            named_tensors: (name, tensor) on any device, in any order. Those of another part are passed over. A sequence
                is looked through before anything is written; of an iterator each tensor before it is, its numbers once
                all have come.

        Raises `CheckpointError` for an unknown name, one that has come already, a wrong shape or dtype, or a NaN or
        infinity; whatever `named_tensors` raises goes through. Either ends the update.
        """
        came = set() if self._came is None else self._came
        parameters = dict(self.model.named_parameters())
        used: set[str] = set()
        with self._refused_if_it_fails():
            if isinstance(named_tensors, Sequence):
                self.check(named_tensors)
            for name, tensor in named_tensors:
                target = self._place(name, tensor, parameters, came)
                if name not in self.wanted:
                    continue
                # A bucket of what another model holds begins nothing.
                self._came = came
                came.add(name)
                used.add(name)
                if target is not None:
                    self._take(name, tensor[target.part], target, parameters)
            self._end_if_whole(parameters)
        return used

    @torch.no_grad()
    def read(self, reader: CheckpointReader) -> None:
        """Take all of a checkpoint that `CheckpointReader.validate` has accepted: no more of its files is read than
        this rank holds.

        Raises `CheckpointError` as `load` does, and for what is missing.
        """
        self.begin()
        assert self._came is not None
        parameters = dict(self.model.named_parameters())
        own = {name: target for name in self.wanted if (target := self._own(name)) is not None}
        with self._refused_if_it_fails():
            self._came |= self.wanted - own.keys()
            for name, tensor in reader.tensors(own.__contains__, lambda name: own[name].part):
                _check(self.specs[name], tensor, parameters, own[name])
                self._came.add(name)
                self._take(name, tensor, own[name], parameters)
            self._end_if_whole(parameters)
        self.finish()

    def check(self, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Raise `CheckpointError` where `load` would, on all ranks; nothing is written, and the update goes on."""
        parameters = dict(self.model.named_parameters())
        seen = set(self._came or ())
        finite: dict[str, torch.Tensor] = {}
        for name, tensor in named_tensors:
            self._place(name, tensor, parameters, seen)
            if name in self.wanted:
                seen.add(name)
                finite[name] = all_finite(tensor)
        _require_finite(finite)

    def finish(self) -> None:
        """No more comes. Raises `CheckpointError` that names what is missing of an update under way, which ends it."""
        if self._came is not None:
            missing = self.wanted - self._came
            self.refuse(f"an update of its weights was not finished, {self._lacking()}")
            raise CheckpointError(f"missing tensors of the {self.part} model ({len(missing)}): {some_names(missing)}")

    def require_whole(self) -> None:
        """Raise `CheckpointError` unless the model may answer."""
        if (problem := self.problem) is not None:
            raise CheckpointError(f"the {self.part} model may not answer: {problem}. Send all weights again")

    def refuse(self, reason: str) -> None:
        """The update under way ends here: the model may not answer if some of it was written."""
        if self._came:
            self._refused = reason
        self._came, self._finite = None, {}

    def discard(self, reason: str) -> None:
        """The parameters hold nothing that may answer, e.g. since an engine released their memory."""
        self._refused = reason
        self._came = None

    @contextmanager
    def _refused_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.refuse(f"an update of its weights was refused: {error}")
            raise

    def _take(self, name: str, tensor: torch.Tensor, target: Target, parameters: dict[str, nn.Parameter]) -> None:
        """Write this rank's part of a tensor."""
        for index in (target.index, *target.replicas):
            self.write(parameters[target.parameter], tensor, index)
        self._finite[name] = all_finite(parameters[target.parameter][target.index])

    def _end_if_whole(self, parameters: dict[str, nn.Parameter]) -> None:
        if self._came != self.wanted:
            return
        _require_finite(self._finite)
        self._came = self._refused = None
        self._finite = {}
        self.updates += 1
        # On the meta device parameters are written by the engine, later, and the adapter says when.
        if not any(parameter.is_meta for parameter in parameters.values()):
            weights_changed(self.model)

    def _lacking(self) -> str:
        missing = self.wanted - (self._came or set())
        return f"{len(missing)} of {len(self.wanted)} tensors have not come: {some_names(missing)}"

    def _place(
        self, name: str, tensor: torch.Tensor, parameters: dict[str, nn.Parameter], came: set[str]
    ) -> Target | None:
        """Where a tensor goes, None for one that this rank does not hold. Raises `CheckpointError`."""
        if name.endswith(IGNORED_SUFFIX):
            return None
        spec = self.specs.get(name)
        if spec is None:
            raise CheckpointError(f"tensor {name} is unknown to this configuration; it would have been dropped")
        if problem := spec.mismatch(tuple(tensor.shape), tensor.dtype):
            raise CheckpointError(problem)
        if name not in self.wanted:
            return None
        if name in came:
            raise CheckpointError(f"tensor {name} came twice in one update")
        if (target := self._own(name)) is not None:
            _check(spec, tensor[target.part], parameters, target)
        return target


def load_weights(
    model: nn.Module, config: DeepseekV3Config, named_tensors: Iterable[tuple[str, torch.Tensor]], part: Part
) -> None:
    """Load all weights of a model at once. Raises `CheckpointError` as `WeightLoader` does, and for what is missing."""
    loader = WeightLoader(model, config, part)
    loader.load(named_tensors)
    loader.finish()


def load_model(reader: CheckpointReader, ops: Ops, layout: Layout = WHOLE) -> DeepseekV3:
    """Validate a checkpoint and load its main model for `ops`, or what is held here of it, on the device that they were
    bound for.
    """
    reader.validate()
    with torch.device(ops.setting.device_type):
        model = DeepseekV3(ops, reader.config, layout)
    WeightLoader(model, reader.config, "main", layout=layout).read(reader)
    return model


def load_mtp(reader: CheckpointReader, ops: Ops, layout: Layout = WHOLE) -> DeepseekV3MTP:
    """Validate a checkpoint and load its MTP layer with embedding and head. Raises `CheckpointError` without one."""
    if not reader.config.num_nextn_predict_layers:
        raise CheckpointError(f"{reader.path}: has no MTP layer (num_nextn_predict_layers is 0)")
    reader.validate()
    with torch.device(ops.setting.device_type):
        model = DeepseekV3MTP(ops, reader.config, layout)
    WeightLoader(model, reader.config, "mtp", layout=layout).read(reader)
    return model


def all_finite(tensor: torch.Tensor) -> torch.Tensor:
    """Whether a tensor of any dtype has neither NaN nor infinity: bool [] on its device."""
    if tensor.dtype == E4M3:  # whose only other numbers are the two codes of NaN
        return (tensor.view(torch.uint8) & 0x7F != 0x7F).all()
    return tensor.isfinite().all()


def _require_finite(finite: dict[str, torch.Tensor]) -> None:
    """Raise `CheckpointError` that names the tensors which are not."""
    told = [bool(answer) for answer in finite.values()]
    if wrong := [name for name, ok in zip(finite, told, strict=True) if not ok]:
        raise CheckpointError(f"NaN or infinity in {len(wrong)} tensors: {some_names(wrong)}")


def _check(spec: TensorSpec, tensor: torch.Tensor, parameters: dict[str, nn.Parameter], target: Target) -> None:
    """Raise `CheckpointError` unless a tensor fits its place in the model as it was built."""
    if target.parameter not in parameters:
        raise CheckpointError(
            f"tensor {spec.name} belongs to parameter {target.parameter}, which the model was built without;"
            " the model's profile or configuration is not the checkpoint's"
        )
    place = parameters[target.parameter][target.index]
    if place.shape != tensor.shape:
        raise CheckpointError(
            f"tensor {spec.name} has shape {list(tensor.shape)},"
            f" its place in parameter {target.parameter} has {list(place.shape)}"
        )
    if place.dtype != tensor.dtype and E4M3 in (place.dtype, tensor.dtype):
        raise CheckpointError(
            f"tensor {spec.name} is {dtype_name(tensor.dtype)}, parameter {target.parameter} is"
            f" {dtype_name(place.dtype)}; nothing is converted to or from fp8"
        )
    if spec.name.endswith(BIAS_SUFFIX):
        check_finite(f"tensor {spec.name}", tensor)
