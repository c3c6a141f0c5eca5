"""The worked example of a provider, as its user installs it: found, checked, certified, bound; a change ends it."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from paths import ROOT

from dsv3_plugin import certificates
from dsv3_plugin.hooks import Setting
from dsv3_plugin.kernels.certify import compare, earn
from dsv3_plugin.kernels.certify.targets import DeviceName, chosen, where_of
from dsv3_plugin.profile import BF16, FP32
from dsv3_plugin.registry import Choice, bind

EXAMPLE = ROOT / "examples" / "kernel_provider"
MODULE = "rope_on_cpu"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """The folder that the example's wheel is unpacked to, as `pip install --target` would, among the places to import
    from; strict mode reads certificates from `mine.json` beside it.
    """
    shutil.copytree(EXAMPLE, tmp_path / "source")
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=tmp_path / "source", check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv(certificates.FILE_VARIABLE, str(tmp_path / "mine.json"))
    yield tmp_path / "site"
    sys.modules.pop(MODULE, None)


def serving() -> list[Choice]:
    """What serves the rotary embedding, in bf16 and in fp32."""
    all_ops = (bind(Setting("cpu", "cpu", profile), "strict") for profile in (BF16, FP32))
    return [choice for ops in all_ops for choice in ops.provenance if choice.op == "rope"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a machine with a GPU a check is of kernels for the GPU")
def test_a_provider_is_checked_certified_and_bound_and_a_change_ends_it(site):
    for rope in serving():
        assert rope.is_the_contract
        why = "has no certificate, which strict mode needs: it was compared with the contract nowhere"
        assert f"rope-on-cpu 1.0: {why}" in rope.refused

    main = "from dsv3_plugin.commands.cli import main; main()"
    # What the refusal tells its user to type, with fewer cases.
    words = certificates.command(["rope-on-cpu"]).split()[1:]
    paths = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", main, *words, "--cases", "100"],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "100 cases" in done.stdout and f"wrote 1 certificate to {certificates.user_file()}" in done.stdout
    for rope in serving():
        (part,) = rope.parts
        assert (rope.provider, part.implementation) == ("rope-on-cpu", "rope")
        assert part.certificate is not None and part.certificate.cases == 100

    # The twin: products that are not rounded to fp32 one by one, as one would write it in passing.
    module = site / MODULE / "__init__.py"
    text = module.read_text()
    assert "x.float().unflatten" in text
    module.write_text(text.replace("x.float().unflatten", "x.double().unflatten"))
    del sys.modules[MODULE]
    importlib.invalidate_caches()
    for rope in serving():
        assert rope.is_the_contract
        assert "its sources or its contract's constants have changed since" in " ".join(rope.refused)
    where = where_of(DeviceName.cpu)
    (target,) = chosen(None, ["rope-on-cpu"], where)
    (result,) = compare.check_alike([target], range(40), 0, where)
    assert result.failed and result.wrong_cases > 10
    assert not earn.earned([target], [result], 0, where)
