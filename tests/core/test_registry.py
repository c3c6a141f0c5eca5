"""Choosing kernels: certificates, versions, priorities, and what an installed provider may do wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from dsv3_plugin import certificates, reference_kernels, registry
from dsv3_plugin.certificates import Certificate
from dsv3_plugin.checkpoint.presets import read_config
from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.errors import KernelError
from dsv3_plugin.hooks import SUPPORTED, Implementation, Kernel, Setting, Support, unsupported
from dsv3_plugin.layers.model import bind_ops
from dsv3_plugin.ops.fp8_linear import fp8_linear
from dsv3_plugin.ops.fp8_wgrad import fp8_wgrad
from dsv3_plugin.ops.linear import linear
from dsv3_plugin.ops.operation import operations
from dsv3_plugin.ops.slices import Slices
from dsv3_plugin.profile import BF16, FP8_UE8M0, FP32
from dsv3_plugin.registry import MODE_VARIABLE, Choice, Ops, bind, mode_from_environment, with_training
from dsv3_plugin.version import __version__

CPU_BF16 = Setting("cpu", "cpu", BF16)
# It uses every operation.
FP8_IN_SLICES = replace(FP8_UE8M0, reduction_slices=2, attention="two_form")
CPU_FP8 = Setting("cpu", "cpu", FP8_IN_SLICES)
HOPPER = Setting("cuda", "sm90", FP8_IN_SLICES, (9, 0))
REFERENCE = reference_kernels.dsv3_kernels()
FP8_OPS = {"quantize_fp8", "fp8_linear", "grouped_fp8_linear", "rms_norm_fp8", "add_rms_norm_fp8"}
FP8_OPS |= {"head_linear_fp8", "silu_and_mul_fp8", "permute_fp8"}
TWO_FORM_OPS = {"head_attention"}
SLICED_OPS = {"sliced_linear", "sliced_fp8_linear"}
GRADIENTS = {"combine_gradient", "rms_norm_gradient", "silu_and_mul_gradient"}
TRAINING_OPS = GRADIENTS | {"quantize_fp8_weight", "quantize_fp8_columns", "fp8_wgrad"}
SERVED = [name for name, op in operations().items() if not op.training]

OURS = f"reference {__version__}"


def other_linear(x: torch.Tensor, weight: torch.Tensor, *, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    return linear(x, weight, out_dtype=out_dtype)


def kernel(
    provider: str = "fast_lab",
    *,
    op: str = "linear",
    contract_version: int = 1,
    priority: int = 10,
    refusal: str | None = None,
) -> Kernel:
    """A kernel of another provider."""
    return Kernel(
        op=op,
        contract_version=contract_version,
        provider=provider,
        version="3.2",
        run=other_linear,
        is_supported=lambda setting: Support(refusal),
        priority=priority,
    )


def certificate(setting: Setting = CPU_BF16, **changes: object) -> Certificate:
    """That of `other_linear` on this machine, as a check with enough equal cases would write it."""
    (part,) = kernel().parts
    subject = certificates.subject_of(part, linear, setting)
    plain = Certificate(
        subject=subject,
        seed=0,
        cases=100,
        refused_cases=0,
        cases_on_cpu=100,
        dtypes=("bfloat16",),
        page_sizes=(),
    )
    return plain.model_copy(update=changes)


@pytest.fixture
def users_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where strict mode looks for certificates; there is no file yet."""
    file = tmp_path / "certificates" / "mine.json"
    monkeypatch.setenv(certificates.FILE_VARIABLE, str(file))
    return file


def choice(ops: Ops, op: str = "linear") -> Choice:
    (found,) = [choice for choice in ops.provenance if choice.op == op]
    return found


def without(op: str) -> list[Kernel]:
    return [kernel for kernel in REFERENCE if kernel.op != op]


def test_the_reference_serves_every_operation_on_a_cpu() -> None:
    ops = bind(CPU_FP8, "strict", REFERENCE)
    assert ops.mode == "strict" and ops.setting == CPU_FP8
    assert [c.op for c in ops.provenance] == SERVED
    assert {(c.provider, c.is_the_contract) for c in ops.provenance} == {("reference", True)}
    assert all(c.refused == () for c in ops.provenance)
    assert ops[linear] is linear
    assert ops.describe().startswith(f"{OURS}: {next(iter(operations()))}, ")


def test_operations_are_bound_in_the_profiles_that_use_them_only() -> None:
    ops = bind(CPU_BF16, "strict", REFERENCE)
    assert set(operations()) - {c.op for c in ops.provenance} == FP8_OPS | SLICED_OPS | TWO_FORM_OPS | TRAINING_OPS
    fp8 = bind(Setting("cpu", "cpu", FP8_UE8M0), "strict", REFERENCE)
    assert set(operations()) - {c.op for c in fp8.provenance} == SLICED_OPS | TWO_FORM_OPS | TRAINING_OPS
    with pytest.raises(KernelError, match=r"^fp8_linear was called in the bf16 profile"):
        ops[fp8_linear](1, 2, x=3)  # type: ignore[arg-type]


def test_a_server_needs_no_kernel_of_the_backward_pass_and_a_trainer_does() -> None:
    served = [kernel for kernel in REFERENCE if kernel.op not in TRAINING_OPS]
    ops = bind(CPU_FP8, "strict", served)
    with pytest.raises(KernelError, match=r": combine_gradient, .*, silu_and_mul_gradient \(nothing"):
        with_training(ops, served)
    trained = with_training(ops, REFERENCE)
    assert {c.op for c in trained.provenance} - {c.op for c in ops.provenance} == TRAINING_OPS
    assert trained[fp8_wgrad] is fp8_wgrad and trained[linear] is ops[linear]
    in_bf16 = bind(CPU_BF16, "strict", served)
    trained = with_training(in_bf16, REFERENCE)
    assert {c.op for c in trained.provenance} - {c.op for c in in_bf16.provenance} == GRADIENTS, "none of FP8's"


def test_strict_mode_says_what_was_measured_of_a_kernel_without_certificate() -> None:
    measured = replace(kernel(), uncertified="differs in 0.027 % of the outputs")
    ops = bind(CPU_BF16, "strict", [measured, *REFERENCE])
    wanted = "fast_lab 3.2: has no certificate, which strict mode needs: differs in 0.027 % of the outputs"
    assert choice(ops).refused == (wanted,)
    assert choice(bind(CPU_BF16, "fast", [measured, *REFERENCE])).provider == "fast_lab"


UNKNOWN = "has no certificate, which strict mode needs: it was compared with the contract nowhere"


def test_strict_mode_passes_over_what_has_no_certificate(users_file: Path) -> None:
    ops = bind(CPU_BF16, "strict", [kernel(), *REFERENCE])
    assert ops[linear] is linear
    assert choice(ops).provider == "reference"
    assert choice(ops).refused == (f"fast_lab 3.2: {UNKNOWN}",)


def test_strict_mode_names_the_operation_and_what_the_kernel_lacks(users_file: Path) -> None:
    with pytest.raises(KernelError) as error:
        bind(CPU_BF16, "strict", [kernel(), *without("linear")])
    assert str(error.value) == (
        f"no kernel may serve in strict mode on cpu: linear (fast_lab 3.2: {UNKNOWN})."
        f" To certify them on this machine: dsv3 kernels check --provider fast_lab --certify {users_file}."
        " DSV3_PLUGIN_MODE=fast takes kernels without certificate"
    )


def test_fast_mode_admits_by_priority() -> None:
    offers = [kernel("slow_lab", priority=1), kernel("fast_lab", priority=10), *REFERENCE]
    for kernels in (offers, offers[::-1]):
        ops = bind(CPU_BF16, "fast", kernels)
        assert ops[linear] is other_linear
        assert choice(ops).provider == "fast_lab" and choice(ops).version == "3.2"
        assert [part.certificate for part in choice(ops).parts] == [None]
        refused = {"slow_lab 3.2: lower priority than fast_lab", f"{OURS}: lower priority than fast_lab"}
        assert set(choice(ops).refused) == refused
        assert choice(ops, "rope").provider == "reference"
    assert bind(CPU_BF16, "fast", [kernel(priority=-1), *REFERENCE])[linear] is linear
    described = bind(CPU_BF16, "fast", offers).describe()
    assert described.startswith(f"{OURS}: {next(iter(operations()))}, ")
    assert described.endswith("; fast_lab 3.2: linear by other_linear")


def test_a_certified_kernel_serves_in_strict_mode(users_file: Path) -> None:
    certificates.write(users_file, [certificate()])
    ops = bind(CPU_BF16, "strict", [kernel(), *REFERENCE])
    assert ops[linear] is other_linear
    (part,) = choice(ops).parts
    assert (part.implementation, part.certificate) == ("other_linear", certificate())
    assert str(choice(ops)) == "fast_lab 3.2 (other_linear)"


def test_a_provider_ships_certificates_of_its_own(users_file: Path, tmp_path: Path) -> None:
    shipped = tmp_path / "shipped.json"
    offer = replace(kernel(), certificates=shipped)
    assert bind(CPU_BF16, "strict", [offer, *REFERENCE])[linear] is linear
    certificates.write(shipped, [certificate()])
    assert bind(CPU_BF16, "strict", [offer, *REFERENCE])[linear] is other_linear


SUBJECT = certificate().subject
OTHERS = {
    "its sources or its contract's constants have changed": {
        "subject": SUBJECT.model_copy(update={"digest": "0" * 16})
    },
    "torch is .*, with 2.0 it was compared": {"subject": SUBJECT.model_copy(update={"versions": {"torch": "2.0"}})},
    "triton is absent, with 3.6.0": {
        "subject": SUBJECT.model_copy(update={"versions": SUBJECT.versions | {"triton": "3.6.0"}})
    },
    "this is .*, on an abacus .* it was compared": {"subject": SUBJECT.model_copy(update={"card": "an abacus"})},
    "version 7 of its contract was compared": {"subject": SUBJECT.model_copy(update={"contract_version": 7})},
    "99 cases were compared, 100 are needed": {"cases": 99},
    "it was not compared in bfloat16": {"dtypes": ("float32",)},
}


@pytest.mark.parametrize("why", OTHERS)
def test_a_certificate_of_something_else_is_none(users_file: Path, why: str) -> None:
    certificates.write(users_file, [certificate(**OTHERS[why])])
    ops = bind(CPU_BF16, "strict", [kernel(), *REFERENCE])
    assert ops[linear] is linear
    (refused,) = choice(ops).refused
    assert re.match(f"fast_lab 3.2: has no certificate, which strict mode needs: {why}", refused)
    # The twin: beside the one that holds it does no harm.
    certificates.write(users_file, [certificate()])
    assert bind(CPU_BF16, "strict", [kernel(), *REFERENCE])[linear] is other_linear


def test_what_an_adapter_answers_is_plain_data(users_file: Path) -> None:
    certificates.write(users_file, [certificate()])
    picks = replace(kernel(), served=lambda: {"1 x 2": "other_linear"})
    record = json.loads(json.dumps(bind(CPU_BF16, "strict", [picks, *REFERENCE]).record()))
    assert (record["mode"], record["profile"], record["device_type"]) == ("strict", "bf16", "cpu")
    of_linear, of_head = (each for each in record["operations"] if each["operation"] in ("linear", "head_linear"))
    assert of_linear["provider"] == "fast_lab" and of_linear["served_so_far"] == {"1 x 2": "other_linear"}
    (implementation,) = of_linear["implementations"]
    assert implementation["certificate"]["subject"]["card"] == SUBJECT.card
    assert of_head["is_the_contract"] and of_head["implementations"][0]["certificate"] is None


def test_a_file_of_something_else_is_named(users_file: Path) -> None:
    users_file.parent.mkdir()
    users_file.write_text('{"linear": "report 17"}')
    with pytest.raises(KernelError, match=r"mine\.json holds no certificates"):
        bind(CPU_BF16, "strict", [kernel(), *REFERENCE])


def test_a_kernel_whose_source_is_not_to_be_found_has_no_certificate(users_file: Path) -> None:
    misspelt = Implementation("other_linear", other_linear, f"{__name__}:other_linaer")
    for offer, name in (
        (replace(kernel(), run=print), "builtins:print"),
        (replace(kernel(), implementations=(misspelt,)), misspelt.entry),
    ):
        (refused,) = choice(bind(CPU_BF16, "strict", [offer, *REFERENCE])).refused
        assert refused.endswith(f"the source of {name} is not to be found: name the kernel's implementations")


class Scaled:
    """A kernel that is an object."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self.run(x, weight)

    def run(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear(x, weight) * self.scale


def scaled_by(scale: float) -> Callable[..., torch.Tensor]:
    """A kernel that is a closure."""

    def scaled(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear(x, weight) * scale

    return scaled


STATEFUL: dict[str, Callable[..., object]] = {
    "Scaled": Scaled(2),
    "Scaled.run": Scaled(2).run,
    "scaled_by.<locals>.scaled": scaled_by(2),
    "<lambda>": lambda x, weight: linear(x, weight),
    "other_linear": partial(other_linear, torch.ones(2000)),  # `repr` tells six of them
    "Linear": torch.nn.Linear(1, 1),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_what_has_a_state_has_no_certificate_until_its_provider_names_it(users_file: Path, name: str) -> None:
    offer = replace(kernel(), run=STATEFUL[name])
    with pytest.raises(KernelError) as error:
        bind(CPU_BF16, "strict", [offer, *without("linear")])
    assert f"needs: {name} is more than a top-level function of a module" in str(error.value)
    assert "name the kernel's `implementations` with `settings`" in str(error.value)
    assert "To certify" not in str(error.value), "a check would not help"

    # The twin: with the state in `settings` it is another subject for each.
    def digest(scale: float) -> str:
        part = Implementation("scaled", STATEFUL[name], f"{__name__}:other_linear", settings=lambda: repr(scale))
        return certificates.subject_of(part, linear, CPU_BF16).digest

    assert digest(1.0) == digest(1.0) != digest(2.0)


def test_settings_that_cannot_be_asked_are_named(users_file: Path) -> None:
    part = Implementation("scaled", other_linear, f"{__name__}:other_linear", settings=lambda: {}["scale"])
    ops = bind(CPU_BF16, "strict", [replace(kernel(), implementations=(part,)), *REFERENCE])
    (refused,) = choice(ops).refused
    assert refused.endswith("settings and versions of scaled cannot be asked: KeyError: 'scale'")


def test_the_source_of_a_partial_is_found() -> None:
    def digest(run: Callable[..., object]) -> str:
        (part,) = replace(kernel(), run=run).parts
        return certificates.subject_of(part, linear, CPU_BF16).digest

    plain = digest(other_linear)
    with_dtype = digest(partial(other_linear, out_dtype=torch.float32))
    assert plain != with_dtype == digest(partial(other_linear, out_dtype=torch.float32))
    assert with_dtype != digest(partial(other_linear, out_dtype=torch.bfloat16))


@pytest.mark.parametrize("mode", ["strict", "fast"])
def test_another_version_of_the_contract_is_refused(mode: registry.Mode) -> None:
    newer = kernel(contract_version=2)
    reason = "meets contract version 2, version 1 is needed"
    assert choice(bind(CPU_BF16, mode, [newer, *REFERENCE])).refused == (f"fast_lab 3.2: {reason}",)
    with pytest.raises(KernelError, match=rf"linear \(fast_lab 3\.2: {reason}\)"):
        bind(CPU_BF16, mode, [newer, *without("linear")])


@pytest.mark.parametrize("mode", ["strict", "fast"])
def test_a_kernel_may_refuse_the_setting(mode: registry.Mode) -> None:
    picky = kernel(refusal="needs kv_lora_rank 512")
    ops = bind(CPU_BF16, mode, [picky, *REFERENCE])
    assert choice(ops).provider == "reference"
    assert choice(ops).refused == ("fast_lab 3.2: needs kv_lora_rank 512",)


def test_a_kernel_sees_the_setting() -> None:
    seen = []

    def is_supported(setting: Setting) -> Support:
        seen.append(setting)
        return SUPPORTED

    kernels = [Kernel(op.name, op.version, "lab", "1", print, is_supported) for op in operations().values()]
    bind(HOPPER, "fast", kernels)
    assert seen == [HOPPER] * len(SERVED)


def test_cuda_without_kernels_lists_every_operation() -> None:
    with pytest.raises(KernelError) as error:
        bind(HOPPER, "strict", REFERENCE)
    message = str(error.value)
    every = ", ".join(SERVED)
    assert message == (
        f"no kernel may serve in strict mode on cuda: {every} ({OURS}: defines the CPU arithmetic, not sm90 on cuda)"
    )
    with pytest.raises(KernelError, match=rf"{every} \(nothing offered\)$"):
        bind(HOPPER, "fast", [])
    with pytest.raises(KernelError) as without_fp8:
        bind(Setting("cuda", "sm90", BF16, (9, 0)), "strict", REFERENCE)
    assert "fp8" not in str(without_fp8.value)


def test_the_reference_does_not_serve_a_modelled_tensor_core() -> None:
    with pytest.raises(KernelError, match="defines the CPU arithmetic, not sm90 on cpu"):
        bind(Setting("cpu", "sm90", FP32), "fast", REFERENCE)


def test_the_mode_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MODE_VARIABLE, raising=False)
    assert mode_from_environment() == "strict"
    monkeypatch.setenv(MODE_VARIABLE, "fast")
    assert mode_from_environment() == "fast"
    assert bind(CPU_BF16, None, [kernel(), *REFERENCE])[linear] is other_linear
    monkeypatch.setenv(MODE_VARIABLE, "Strict")
    with pytest.raises(KernelError, match=r"^DSV3_PLUGIN_MODE='Strict'; use strict or fast$"):
        bind(CPU_BF16, None, REFERENCE)
    assert bind(CPU_BF16, "strict", REFERENCE).mode == "strict"


# Installed providers

PROVIDER = """
from dsv3_plugin.hooks import Kernel, hookimpl

@hookimpl
def dsv3_kernels():
    return [Kernel("linear", 1, "lab", "1.0", print, priority=5)]
"""


def install(monkeypatch: pytest.MonkeyPatch, root: Path, name: str, source: str) -> None:
    """A distribution whose entry point `{name}_kernels` is the module `{name}_provider`."""
    (root / f"{name}_provider.py").write_text(source)
    info = root / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[dsv3_plugin]\n{name}_kernels = {name}_provider\n")
    monkeypatch.syspath_prepend(str(root))


def test_an_installed_provider_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, "good_lab", PROVIDER)
    ops = bind(CPU_BF16, "fast")
    assert ops[linear] is print
    assert choice(ops).provider == "lab" and f"{OURS}: lower priority than lab" in choice(ops).refused


def test_a_provider_with_a_missing_import_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, "broken_lab", "import a_module_that_nobody_has\n")
    with pytest.raises(KernelError, match=r"broken_lab_kernels .* cannot be loaded: ModuleNotFoundError.*nobody_has"):
        bind(CPU_BF16, "strict")


def test_a_provider_that_fails_in_its_own_words_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, "failing_lab", "raise RuntimeError('no driver')\n")
    with pytest.raises(KernelError, match="no driver") as error:
        bind(CPU_BF16, "strict")
    assert "failing_lab" in str(error.value)


HOOK = "from dsv3_plugin.hooks import Kernel, hookimpl\n@hookimpl\ndef dsv3_kernels():\n    return "
BROKEN = {
    "ends the process": ("import sys\nsys.exit(0)\n", r".* cannot be loaded: SystemExit: 0$"),
    "speaks in lines": ("raise RuntimeError('one\\ntwo')\n", r".* cannot be loaded: RuntimeError: one two$"),
    "has no hook": ("x = 1\n", r".* implements no hook: define a function dsv3_kernels, "),
    "misspells it": (HOOK.replace("_kernels", "_kernel") + "[]\n", r".* implements dsv3_kernel: define a function "),
    "raises in it": (HOOK + "1 / 0\n", " does not tell its kernels: ZeroDivisionError: division by zero$"),
    "returns nothing": (HOOK + "None\n", " does not tell its kernels: TypeError: "),
    "offers nothing": (HOOK + "[None]\n", r" offers NoneType None, not a dsv3_plugin\.hooks\.Kernel$"),
    "misspells an operation": (
        HOOK + "[Kernel('ropee', 1, 'lab', '1', print)]\n",
        " offers a kernel for 'ropee', which is no operation; they are ",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_provider_that_is_broken_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str
) -> None:
    source, said = BROKEN[fault]
    name = f"{fault.replace(' ', '_')}_lab"
    install(monkeypatch, tmp_path, name, source)
    with pytest.raises(KernelError, match=f"^the kernel provider {name}_kernels{said}") as error:
        bind(CPU_BF16, "strict")
    assert "\n" not in str(error.value)


def test_a_kernel_that_cannot_tell_whether_it_serves_is_named() -> None:
    offer = replace(kernel(), is_supported=lambda setting: Support(setting.dims["heads"]))
    with pytest.raises(KernelError, match=r"^the kernel provider fast_lab .* its linear serves: KeyError: 'heads'$"):
        bind(CPU_BF16, "strict", [offer, *REFERENCE])


def test_support_reads_as_what_it_says() -> None:
    assert SUPPORTED and not unsupported("lacks a card")
    assert (SUPPORTED and unsupported("first") and unsupported("second")).reason == "first"


@pytest.mark.parametrize("answer", [None, True, "needs a card"])
def test_a_kernel_that_answers_something_else_than_support_is_named(answer: object) -> None:
    """Twin: a text would count as true, and the kernel would serve where it says that it cannot."""
    offer = replace(kernel(), is_supported=lambda setting: answer)  # type: ignore[arg-type, return-value]
    with pytest.raises(KernelError, match=r"^the kernel provider fast_lab answers .* not a dsv3_plugin.hooks.Support$"):
        bind(CPU_BF16, "fast", [offer, *REFERENCE])


def test_a_user_who_stops_a_provider_stops_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, "slow_lab", "raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        bind(CPU_BF16, "strict")


def test_binding_a_model_pins_one_thread_and_passes_the_sizes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MODE_VARIABLE, raising=False)
    torch.set_num_threads(2)
    ops = bind_ops(DeepseekV3Config.from_dict(read_config("tiny")), BF16, torch.device("cpu"))
    assert torch.get_num_threads() == 1
    assert (ops.mode, ops.setting.device_type, ops.setting.arithmetic) == ("strict", "cpu", "cpu")
    assert ops.setting.dims["kv_lora_rank"] == 128 and ops.setting.dims["num_experts_per_tok"] == 4
    assert "norm_topk_prob" not in ops.setting.dims


def test_a_tap_stands_in_the_place_of_each_kernel() -> None:
    """Also in relatives that are bound already; what it answers is what the layers get."""
    ops = bind(CPU_BF16, "strict", REFERENCE)
    relative = replace(ops, slices=Slices(1))
    x, weight = torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(3, 4, dtype=torch.bfloat16)
    seen: list[str] = []

    def observe(op, run, /, *args, **kwargs):
        seen.append(op.name)
        return run(*args, **kwargs) + 1

    assert ops[linear](x, weight).tolist() == [[4.0] * 3] * 2 and not seen
    ops.tap(observe)
    assert relative[linear](x, weight, out_dtype=torch.float32).tolist() == [[5.0] * 3] * 2
    assert seen == ["linear"]
    # The twin: kernels that were bound on their own.
    bind(CPU_BF16, "strict", REFERENCE)[linear](x, weight)
    assert seen == ["linear"]
