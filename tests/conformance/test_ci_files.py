"""What others put into their CI: the steps of the Action and of the GitLab template run here as they stand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from paths import ROOT, SUPPORT

BIN = Path(sys.executable).parent


def bash(script: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """As runners start a step, with this environment's commands."""
    env = os.environ | variables | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", "-eo", "pipefail", "-c", script], capture_output=True, text=True, env=env, cwd=folder
    )


class Action:
    """The composite action, with its inputs' defaults."""

    def __init__(self, folder: Path) -> None:
        read: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text())
        self.steps = {step["name"]: step for step in read["runs"]["steps"]}
        self.inputs = {name: value.get("default") for name, value in read["inputs"].items()}
        self.folder = folder
        self.files = {name: folder / name for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}

    def run(self, step: str, **inputs: str) -> subprocess.CompletedProcess[str]:
        """A step with some inputs."""
        values = {**self.inputs, **inputs}
        checkpoint = values["checkpoint"] or f"{self.folder}/dsv3-checkpoint"
        of_step = {
            name: checkpoint if name == "CHECKPOINT" else str(values[re.findall(r"inputs\.(\w+)", text)[0]])
            for name, text in self.steps[step].get("env", {}).items()
        }
        files = {name: str(path) for name, path in self.files.items()}
        script: str = self.steps[step]["run"]
        return bash(script, self.folder, RUNNER_TEMP=str(self.folder), **files, **of_step)


def test_the_action(tmp_path: Path) -> None:
    """Twin: a testee that is wrong fails the step, and the report is there all the same."""
    action = Action(tmp_path)
    assert action.steps["Install the suite"]["run"] == 'python -m pip install "$GITHUB_ACTION_PATH[conformance]"'
    assert action.inputs["testee"] is None and action.inputs["preset"] == "tiny"
    done = action.run("Make a checkpoint")
    assert done.returncode == 0, done.stderr
    program = f"{sys.executable} {SUPPORT / 'sabotaged_testee.py'}"
    for testee, status, headline in (
        (f"mine={program} foreign", 0, "All "),
        (f"mine={program} foreign\nother={program} ulp:norm\n", 1, "FAILED: "),
    ):
        done = action.run("Run the suite", testee=testee, arguments="--case decode --timeout 600")
        assert done.returncode == status, done.stderr
        report = Path(action.files["GITHUB_OUTPUT"].read_text().splitlines()[-1].removeprefix("report="))
        assert sorted(path.name for path in report.iterdir()) == [
            "report.html",
            "report.json",
            "report.md",
            "report.xml",
        ]
        assert json.loads((report / "report.json").read_text())["passed"] is (status == 0)
        summary = (report / "report.md").read_text()
        assert headline in summary.splitlines()[0] and "decode, one request at a time |" in summary
        assert action.files["GITHUB_STEP_SUMMARY"].read_text().endswith(summary)
    assert "* decode, other: specification: first difference in norm, request 0, position 0" in summary
    done = action.run("Run the suite", testee="tgi")
    assert done.returncode == 2 and "--testee tgi: unknown" in done.stderr


def test_the_gitlab_template(tmp_path: Path) -> None:
    header, text = (ROOT / "ci/gitlab-conformance.yml").read_text().split("\n---\n")
    inputs = yaml.safe_load(header)["spec"]["inputs"]
    assert set(re.findall(r"\$\[\[ inputs\.(\w+) \]\]", text)) == set(inputs)
    given = {name: str(value.get("default")) for name, value in inputs.items()}
    given |= {"testee": f"mine={sys.executable} {SUPPORT / 'sabotaged_testee.py'} foreign"}
    given |= {"arguments": "--case decode"}
    job = yaml.safe_load(re.sub(r"\$\[\[ inputs\.(\w+) \]\]", lambda m: json.dumps(given[m[1]]), text))
    job = job["dsv3-conformance"]
    install, *script = job["script"]
    assert install == 'python -m pip install "$PACKAGE"'
    done = bash("\n".join(script), tmp_path, **job["variables"])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / job["artifacts"]["reports"]["junit"]).is_file()


@pytest.mark.parametrize("file", sorted((ROOT / "docker").glob("*.Dockerfile")), ids=lambda path: path.name)
def test_dockerfiles_name_what_there_is(file: Path) -> None:
    """Targets of make, and versions that are tested."""
    text = file.read_text()
    for targets in re.findall(r"RUN make (.*)", text):
        done = subprocess.run(["make", "--dry-run", *targets.split()], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
    requirements = "".join(path.read_text() for path in (ROOT / "requirements").glob("*.txt"))
    for pin in re.findall(r'"([\w-]+==[\d.]+)"', text):
        assert pin in requirements
    tested = (ROOT / "docs/compatibility.md").read_text()
    for engine, version in re.findall(r"FROM (?:vllm|lmsysorg)/(\w+)[\w-]*:v([\d.]+)", text):
        assert re.search(rf"\| {engine} \|.*H200: {version}", tested, re.I)
