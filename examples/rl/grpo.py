"""GRPO with one arithmetic: Megatron trains, vLLM and SGLang sample, and both know one log-probability of each token.

    dsv3 checkpoint make examples/rl/config.json MODEL --seed 1
    python examples/rl/grpo.py MODEL RUN --server vllm sglang

A model of random weights learns from solved problems what an answer looks like (`--sft-steps`), then from the rewards
of its own answers to get them right. A step:

1. The servers answer prompts, `--samples` times each: with drafts, at several temperatures, some of them preempted,
   beside requests that are aborted.
2. The training forward gives a log-probability of every token that they sampled. It is the servers', in every bit, so
   that the importance ratio begins at exactly 1 and nothing is corrected. Else the run ends and says what differs.
3. One or more optimizer steps of the clipped objective (GRPO: arXiv:2402.03300, section 4.1), with advantages
   normalised within each prompt's answers and the mean over all tokens (DAPO: arXiv:2503.14476).
4. The servers take the new weights in place. Their fingerprints are the trainer's, else the run ends and names the
   tensors that are not.

With `--one-step-off` the servers sample the next step's answers while the trainer learns. Each answer says which
weights made it, and its log-probabilities are compared under those.

Megatron is in trainer.py, the engines in servers.py, what a step asks them in rollout.py, prompts and rewards in
task.py. One trainer process, whose folders the servers can read; verl is the framework for scale.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from record import Clock, Record, console, draw, forget_from
from rollout import MismatchError, Sample, measure, packed_of, per_token, roll_out, say_greedy_reward
from servers import SERVERS, Server, counted, started
from task import TASKS, Words, problems
from trainer import Packed, Trainer, formulas, pack

from dsv3_plugin.checkpoint.reader import some_names
from dsv3_plugin.errors import DSV3Error, InputError


def parse_arguments() -> argparse.Namespace:
    """Megatron's own names where it has them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a Hugging Face folder with a tokenizer and an MTP layer")
    parser.add_argument("run", type=Path, help="a new folder, for metrics.jsonl, checkpoints, weights and logs")
    parser.add_argument("--resume", action="store_true", help="continue the run of that folder where it was saved")
    parser.add_argument(
        "--server",
        nargs="+",
        default=["vllm", "sglang"],
        metavar="NAME[=ADDRESS]",
        help=f"{', '.join(SERVERS)}: one that runs at an address, else one that is started here",
    )
    parser.add_argument(
        "--kv-tokens", type=int, default=2048, help="room in the cache of a server that is started here"
    )
    parser.add_argument("--task", choices=TASKS, default="sort")
    parser.add_argument("--sft-steps", type=int, default=25)
    parser.add_argument("--sft-batch-size", type=int, default=64)
    parser.add_argument("--sft-lr", type=float, default=2e-3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=16, help="of a step, dealt to the servers in turn")
    parser.add_argument("--samples", type=int, default=8, help="answers to a prompt")
    parser.add_argument("--max-tokens", type=int, default=5, help="of an answer; a longer one is cut, and wrong")
    parser.add_argument(
        "--temperature", type=float, nargs="+", default=[1.0, 0.7], help="of a server's prompts in turn"
    )
    parser.add_argument("--hang-up", type=int, default=2, help="requests of a server and step that are aborted")
    parser.add_argument("--one-step-off", action="store_true", help="sample the next step's answers while training")
    parser.add_argument("--inner-updates", type=int, default=1, help="optimizer steps on the answers of a step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--lr-warmup-steps", type=int, default=3)
    parser.add_argument("--clip-grad", type=float, default=1.0)
    parser.add_argument("--clip-ratio", type=float, default=0.2)
    parser.add_argument("--kl-coefficient", type=float, default=0.0, help="of k3 to the model before step 0")
    parser.add_argument("--mtp-loss-scaling-factor", type=float, default=0.1, help="drafts follow the policy by it")
    parser.add_argument("--moe-router-bias-update-rate", type=float, default=1e-3)
    parser.add_argument("--eval-prompts", type=int, default=64, help="of greedy answers before and after")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument(
        "--save-interval", type=int, default=10, help="steps between checkpoints; the last is saved too"
    )
    parser.add_argument("--exit-interval", type=int, help="stop after so many steps, as if interrupted")
    parser.add_argument("--tensorboard-dir", type=Path)
    parser.add_argument("--plot", type=Path, help="draw the run to this SVG or PNG at its end; needs matplotlib")
    return parser.parse_args()


# What must be equal


def compare(step: int, samples: Sequence[Sample], packed: Packed, found: torch.Tensor, trainer: Trainer) -> float:
    """The largest |difference| of the trainer's log-probabilities, `found` fp32 [N], from the servers'.

    Raises `MismatchError` unless they are equal in every bit, and says what differs.
    """
    given = per_token(samples, lambda sample: sample.logprobs, found)
    if torch.equal(found, given):
        return float((found - given).abs().max())
    with torch.no_grad():
        known = formulas(trainer.logits(packed), packed)
    owners = [sample.server for sample in samples for _ in sample.tokens]
    server = owners[int((found != given).nonzero()[0])]
    of_server = torch.tensor([owner == server for owner in owners], device=found.device)

    def formula(numbers: torch.Tensor) -> str:
        equal = (name for name, right in known.items() if torch.equal(right[of_server], numbers[of_server]))
        return next(equal, "of no known formula")

    differences = (found - given)[of_server].abs()
    raise MismatchError(
        f"step {step}: {int((differences != 0).sum())} of {len(differences)} log-probabilities of {server} are not the"
        f" trainer's, largest |difference| {float(differences.max()):.3g}."
        f" {server}'s are {formula(given)}; the trainer's are {formula(found)}"
    )


def hand_over(trainer: Trainer, servers: list[Server], run: Path, version: int) -> str:
    """Bring the trainer's weights to all servers; returns their fingerprint. The folders of `version` and of version 0,
    which a KL divergence is measured to, are kept.

    Raises `MismatchError` unless all servers then hold the trainer's weights.
    """
    folder = run / "weights" / str(version)
    shutil.rmtree(folder, ignore_errors=True)  # of a step that was not finished
    trainer.export(folder)
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda server: server.update(folder, str(version)), servers))
    held = trainer.fingerprint()
    for server in servers:
        if names := held.difference(server.fingerprint()):
            raise MismatchError(
                f"step {version}: {server.name} does not hold the trainer's weights in {len(names)} of"
                f" {len(held.tensors)} tensors: {some_names(names)}"
            )
    for old in folder.parent.iterdir():
        if old.name not in ("0", folder.name):
            shutil.rmtree(old)
    return held.digest


# Learning


def warmed_up(lr: float, step: int, arguments: argparse.Namespace) -> float:
    """The learning rate of a step: constant after its warm-up."""
    return lr * min(1.0, (step + 1) / max(1, arguments.lr_warmup_steps))


def learn_format(trainer: Trainer, words: Words, arguments: argparse.Namespace) -> None:
    """Supervised learning on solved problems: from random weights to answers of the right form."""
    for step in range(arguments.sft_steps):
        solved = problems(arguments.task, arguments.sft_batch_size, arguments.seed, "sft", step)
        packed = pack([(words.prompt(problem), words.answer(problem), 1.0) for problem in solved])
        with trainer.gradients(warmed_up(arguments.sft_lr, step, arguments)) as said:
            loss = -trainer.log_probs(packed).mean()
            loss.backward()
        if step % 5 == 4:
            console.print(f"sft step {step} | loss {loss.item():.4f} | grad norm {said['gradient_norm']:.3f}")


def learn(
    trainer: Trainer,
    samples: list[Sample],
    step: int,
    reference: list[torch.Tensor] | None,
    arguments: argparse.Namespace,
) -> dict[str, float]:
    """The optimizer steps on a step's answers; returns what to log. Raises `MismatchError` (`compare`)."""
    packed = packed_of(samples)
    is_on_policy = all(sample.version == step for sample in samples)
    logged: dict[str, float] = {}
    of_reference = None
    if reference is not None:
        with trainer.holding(reference):
            of_reference = trainer.log_probs(packed)
    for update in range(arguments.inner_updates):
        with trainer.gradients(warmed_up(arguments.lr, step, arguments)) as said:
            new = trainer.log_probs(packed)
            if update == 0 and is_on_policy:
                logged["max_difference"] = compare(step, samples, packed, new.detach(), trainer)
            old = per_token(samples, lambda sample: sample.logprobs, new)
            advantages = per_token(samples, lambda sample: [sample.advantage or 0.0] * len(sample.tokens), new)
            learned = per_token(
                samples, lambda sample: [sample.advantage is not None] * len(sample.tokens), new
            ).float()
            ratios = (new - old).exp()
            clipped = ratios.clamp(1 - arguments.clip_ratio, 1 + arguments.clip_ratio)
            losses = -torch.minimum(ratios * advantages, clipped * advantages)
            if of_reference is not None:
                k3 = (of_reference - new).exp() - (of_reference - new) - 1
                losses = losses + arguments.kl_coefficient * k3
                logged["kl_to_reference"] = float((k3.detach() * learned).sum() / learned.sum())
            (losses * learned).sum().div(learned.sum()).backward()
        if update == 0:
            logged |= {"ratio_min": float(ratios.min()), "ratio_max": float(ratios.max())}
            logged["entropy"] = float(-new.detach().mean())
        logged |= said | {"clipped": float(((clipped != ratios).float() * learned).sum() / learned.sum())}
    return logged


# The run


@dataclass
class Progress:
    """Where a run is: the next step, and with `--one-step-off` the answers that wait for it."""

    step: int = 0
    waiting: list[Sample] | None = None
    max_difference: float | None = None
    """Of their log-probabilities, under the weights that sampled them."""


def save(trainer: Trainer, progress: Progress, run: Path) -> None:
    """Write a checkpoint, whole or not at all, in place of the one before."""
    folder = run / "checkpoints" / f"{progress.step:05d}"
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    trainer.save(part)
    (part / "progress.json").write_text(json.dumps(asdict(progress)))
    part.rename(folder)
    for old in folder.parent.iterdir():
        if old != folder:
            shutil.rmtree(old)


def resume(trainer: Trainer, run: Path) -> Progress:
    """Continue from the checkpoint of a run; what it recorded of later steps is forgotten."""
    folders = sorted(folder for folder in (run / "checkpoints").glob("*") if not folder.suffix)
    if not folders:
        raise InputError(f"{run}: holds no checkpoint to resume from")
    trainer.load(folders[-1])
    saved = json.loads((folders[-1] / "progress.json").read_text())
    forget_from(run, saved["step"])
    waiting = None if saved["waiting"] is None else [Sample(**sample) for sample in saved["waiting"]]
    return Progress(**saved | {"waiting": waiting})


def train(
    trainer: Trainer, servers: list[Server], words: Words, progress: Progress, arguments: argparse.Namespace
) -> None:
    """All steps from `progress.step` on."""
    run, steps = arguments.run, arguments.steps
    record = Record(run, arguments.tensorboard_dir)
    digest = hand_over(trainer, servers, run, progress.step)
    reference = trainer.weights_of(run / "weights" / "0") if arguments.kl_coefficient else None
    if progress.step == 0:
        say_greedy_reward(servers, words, arguments)
    last = min(steps, progress.step + (arguments.exit_interval or steps))
    with ThreadPoolExecutor(1) as background:
        for step in range(progress.step, last):
            clock, before = Clock(), counted(servers)
            samples = progress.waiting or roll_out(servers, words, step, step, arguments)
            clock.lap("sample")
            ahead: Future[list[Sample]] | None = None
            if arguments.one_step_off and step + 1 < steps:
                sampler = trainer.weights()
                ahead = background.submit(roll_out, servers, words, step + 1, step, arguments)
            of_step = {"step": step, "weights": digest, "max_difference": progress.max_difference}
            of_step |= measure(samples) | learn(trainer, samples, step, reference, arguments)
            clock.lap("train")
            progress = Progress(step + 1)
            if ahead is not None:
                progress.waiting = ahead.result()
                clock.lap("wait")
                packed = packed_of(progress.waiting)
                with trainer.holding(sampler):
                    found = trainer.log_probs(packed)
                    progress.max_difference = compare(step + 1, progress.waiting, packed, found, trainer)
                clock.lap("compare")
            of_step |= {name: number - before[name] for name, number in counted(servers).items()}
            digest = hand_over(trainer, servers, run, step + 1)
            clock.lap("update")
            record.add(of_step | {"seconds": clock.laps})
            if (step + 1) % arguments.save_interval == 0 or step + 1 == last:
                save(trainer, progress, run)
    if last == steps:
        say_greedy_reward(servers, words, arguments)


def start(arguments: argparse.Namespace) -> None:
    """The whole run. Servers start while the model learns the format."""
    run: Path = arguments.run
    if not arguments.resume and run.exists() and any(run.iterdir()):
        raise InputError(f"{run}: is not empty, and nothing is overwritten; --resume continues a run")
    named = [server.partition("=") for server in arguments.server]
    if unknown := [name for name, _, _ in named if name not in SERVERS]:
        raise InputError(f"--server {unknown[0]}: not one of {', '.join(SERVERS)}")
    is_on_cpu = not torch.cuda.is_available()
    trainer = Trainer(
        arguments.checkpoint,
        seed=arguments.seed,
        clip_grad=arguments.clip_grad,
        mtp_loss_scaling_factor=arguments.mtp_loss_scaling_factor,
        moe_router_bias_update_rate=arguments.moe_router_bias_update_rate,
    )
    words = Words(arguments.checkpoint)
    progress = resume(trainer, run) if arguments.resume else Progress()
    (run / "weights").mkdir(parents=True, exist_ok=True)
    # The threads end first, so that no server starts behind the stack that ends it.
    with ExitStack() as stack, ThreadPoolExecutor() as threads:

        def server(name: str, address: str) -> Server:
            if address:
                return SERVERS[name](address)
            log = run / f"{name}.log"
            return stack.enter_context(started(name, arguments.checkpoint, log, arguments.kv_tokens, is_on_cpu))

        starting = [threads.submit(server, name, address) for name, _, address in named]
        if not arguments.resume:
            learn_format(trainer, words, arguments)
        train(trainer, [future.result() for future in starting], words, progress, arguments)
    if arguments.plot:
        draw(run, arguments.plot)


def main() -> None:
    """Errors that are meant for the user are one line."""
    arguments = parse_arguments()
    torch.set_num_threads(1)  # a CPU's sums depend on it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers are ended
    try:
        start(arguments)
    except DSV3Error as error:
        sys.exit(f"error: {error}")


# Megatron's checkpoint writers import this file again.
if __name__ == "__main__":
    main()
