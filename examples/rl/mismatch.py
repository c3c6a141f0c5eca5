"""What must be equal in trainer and servers, and what is left behind where it is not: the input of `dsv3 diff`.

A run that ends leaves `RUN/mismatch/STEP/trainer` and the same of the server, each with tokens, log-probabilities,
fingerprints, kernels and settings, and prints the command that finds the cause in them. Where tokens, weights and
formulas tell none, that command runs trainer and server again, as testees of the conformance suite, on the first answer
that differs: it names the operation, and what implements it in each.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from launch import Launch
from pydantic import TypeAdapter
from rollout import MismatchError, Sample, packed_of, per_token
from safetensors.torch import save_file
from servers import Server
from trainer import Packed, Trainer, formulas

from dsv3_plugin.checkpoint.fingerprint import Fingerprint
from dsv3_plugin.checkpoint.reader import some_names
from dsv3_plugin.diff import samples as dump
from dsv3_plugin.profile import attention_from_environment

MOST_VERSIONS = 16
"""Among which a stale tensor is looked for."""
MOST_LOGITS = 1024
"""Tokens whose logits are written: a row of DeepSeek-V3's takes half a megabyte."""
TESTEE = "dsv3_plugin.conformance.testees"


@dataclass(frozen=True)
class Checks:
    """Of one run. Each raises `MismatchError`, which says what differs and how to see why."""

    trainer: Trainer
    servers: list[Server]
    run: Path
    launch: Launch
    """How the servers of this run are started; stock engines have no fingerprints, and may differ."""
    held: dict[int, Fingerprint] = field(default_factory=dict)
    """Of the latest versions that all held, the trainer's."""

    def weights(self, step: int, ask: Callable[[Server], list[Sample]]) -> str:
        """The fingerprint of the weights that all hold now. `ask` gets answers of a server that holds others."""
        held = self.trainer.fingerprint()
        for server in self.servers if not self.launch.stock else ():
            if names := held.difference(server.fingerprint()):
                samples = ask(server)
                packed = packed_of(samples)
                with torch.no_grad():
                    logits, found = self.trainer.logits(packed), self.trainer.log_probs(packed)
                raise self._mismatch(
                    f"step {step}: {server.name} does not hold the trainer's weights in {len(names)} of"
                    f" {len(held.tensors)} tensors: {some_names(names)}",
                    step,
                    server,
                    samples,
                    found,
                    logits,
                )
        self.held[step] = held
        self.held.pop(step - MOST_VERSIONS, None)
        return held.digest

    def log_probs(self, step: int, samples: Sequence[Sample], packed: Packed, found: torch.Tensor) -> dict[str, float]:
        """The |differences| of the trainer's log-probabilities, `found` fp32 [N], from the servers'."""
        given = per_token(samples, lambda sample: sample.logprobs, found)
        differences = (found - given).abs()
        if self.launch.stock or torch.equal(found, given):
            return {"max_difference": float(differences.max()), "mean_difference": float(differences.mean())}
        with torch.no_grad():
            logits = self.trainer.logits(packed)
            known = formulas(logits, packed)
        owners = [sample.server for sample in samples for _ in sample.tokens]
        server = owners[int((found != given).nonzero()[0])]
        of_server = torch.tensor([owner == server for owner in owners], device=found.device)

        def formula(numbers: torch.Tensor) -> str:
            equal = (name for name, right in known.items() if torch.equal(right[of_server], numbers[of_server]))
            return next(equal, "of no known formula")

        differences = differences[of_server]
        raise self._mismatch(
            f"step {step}: {int((differences != 0).sum())} of {len(differences)} log-probabilities of {server} are not"
            f" the trainer's, largest |difference| {float(differences.max()):.3g}."
            f" {server}'s are {formula(given)}; the trainer's are {formula(found)}",
            step,
            next(each for each in self.servers if each.name == server),
            [sample for sample in samples if sample.server == server],
            found[of_server],
            logits[of_server],
        )

    def _mismatch(
        self,
        says: str,
        step: int,
        server: Server,
        samples: Sequence[Sample],
        found: torch.Tensor,
        logits: torch.Tensor,
    ) -> MismatchError:
        """Writes both sides: the answers of one server, and of them the trainer's log-probabilities, fp32 [N], and
        logits, fp32 [N, vocab_size]: of the very pass that differs, for a wrong kernel may err in one row of it.
        """
        folder = self.run / "mismatch" / str(step)
        shutil.rmtree(folder, ignore_errors=True)  # of the same step, before the run was resumed
        sides = folder / "trainer", folder / server.name
        lengths = [len(sample.tokens) for sample in samples]
        ours, rows = found.split(lengths), logits.split(lengths)
        # First what differs: `dsv3 diff` computes only so many.
        order = sorted(range(len(samples)), key=lambda i: ours[i].equal(ours[i].new_tensor(samples[i].logprobs)))
        of_version = samples[0].version
        older = {each: held for each, held in self.held.items() if each < of_version}
        checkpoint = self.run / "weights" / str(of_version)
        if not checkpoint.exists():
            self.trainer.export(checkpoint)
        kernels = self.trainer.gpt.binding.ops.record(), server.kernels()
        write(
            sides[0],
            [(str(i), samples[i], ours[i].tolist()) for i in order],
            older | {of_version: self.trainer.fingerprint()},
            about("trainer", {"megatron-core": version("megatron-core")}, kernels[0]),
        )
        few = [i for n, i in enumerate(order) if sum(lengths[j] for j in order[: n + 1]) <= MOST_LOGITS]
        save_file({str(i): rows[i].float().cpu().contiguous() for i in few}, sides[0] / dump.LOGITS)
        write(
            sides[1],
            [(str(i), samples[i], samples[i].logprobs) for i in order],
            {of_version: server.fingerprint()},
            about(server.name, {server.name: server.engine_version()}, kernels[1]),
        )
        command = self._command(sides, checkpoint, [each["mode"] for each in kernels])
        return MismatchError(f"{says}\nto see why: {command}")

    def _command(self, sides: tuple[Path, Path], checkpoint: Path, modes: list[str]) -> str:
        """What finds the cause; testees run in the modes of trainer and server, but not in two forms of attention: a
        dump does not say where prompts end.
        """
        words = ["dsv3", "diff", *map(str, sides)]
        if attention_from_environment() == "two_form":
            return shlex.join(words)
        words += ["--checkpoint", str(checkpoint)]
        for engine, mode in zip(("megatron", sides[1].name), modes, strict=True):
            python = shlex.quote(str(self.launch.python(engine)))
            words += ["--testee", f"{engine}=env DSV3_PLUGIN_MODE={mode} {python} -m {TESTEE}.{engine}"]
        words += ["--device", "cuda" if torch.cuda.is_available() else "cpu"]
        return shlex.join([*words, "--keep", str(sides[0].with_name("testees"))])


def write(
    folder: Path,
    samples: list[tuple[str, Sample, list[float]]],
    weights: dict[int, Fingerprint],
    of_side: dump.About,
) -> None:
    """A side of `dsv3 diff`: samples with their names and their log-probabilities, fingerprints by version."""
    folder.mkdir(parents=True)
    with (folder / dump.SAMPLES).open("w") as file:
        for name, sample, logprobs in samples:
            prompt = len(sample.prompt)
            line = dump.Sample(
                id=name,
                token_ids=(*sample.prompt, *sample.tokens),
                mask=(0,) * prompt + (1,) * len(sample.tokens),
                logprobs=(None,) * prompt + tuple(logprobs),
                temperature=sample.temperature,
                version=sample.version,
            )
            print(line.model_dump_json(), file=file)
    (folder / dump.WEIGHTS).write_bytes(TypeAdapter(dict[int, Fingerprint]).dump_json(weights))
    (folder / dump.ABOUT).write_text(of_side.model_dump_json(indent=1))


def about(name: str, versions: dict[str, str], served: dict[str, Any]) -> dump.About:
    """What a side says of itself; `served` is what its kernels are (`Ops.record`)."""
    kernels = {}
    for each in served["operations"]:
        parts = ", ".join(part["name"] for part in each["implementations"])
        kernels[each["operation"]] = f"{each['provider']} {each['version']}" + (f" ({parts})" if parts else "")
    settings = {key: served[key] for key in ("mode", "profile", "device_type", "arithmetic")}
    return dump.About(
        name=name, versions=versions | {"dsv3-plugin": served["version"]}, kernels=kernels, settings=settings
    )
