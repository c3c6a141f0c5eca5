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
4. The servers take the new weights in place, out of the trainer's memory where they share its card, else from files.
   Their fingerprints are the trainer's, else the run ends and names the tensors that are not.

With `--one-step-off` the servers sample the next step's answers while the trainer learns. Each answer says which
weights made it, and its log-probabilities are compared under those.

Megatron is in trainer.py, the engines in servers.py and launch.py, their new weights in hand_over.py, what a step asks
them in rollout.py, what must be equal in mismatch.py, prompts and rewards in task.py and judge.py, papers' settings in
recipes.py. One trainer process, whose folders or memory the servers can read; verl is the framework for scale.
"""

from __future__ import annotations

import argparse
import operator
import random
import shlex
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import reduce
from pathlib import Path
from threading import Event
from urllib.parse import urlsplit

import torch
from judge import Judge
from launch import ENVIRONMENTS, Launch, exit_on_sigterm, started
from mismatch import Checks
from progress import Progress, resume, save
from recipes import GRPO
from record import Clock, Record, console, draw, require_plot
from rollout import Sample, measure, packed_of, per_token, roll_out, say_greedy_reward
from servers import SERVERS, Server, counted
from task import TASKS, Words, problems
from trainer import Packed, Trainer, pack

from dsv3_plugin.argument_types import above_zero, from_zero, not_negative, positive, seed
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.errors import DSV3Error, EngineError, InputError
from dsv3_plugin.profile import ATTENTION_VARIABLE, SLICES_VARIABLE


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
    parser.add_argument(
        "--hand-over",
        choices=("files", "ipc"),
        help="how servers get weights: by default from the trainer's memory where all are started here on a card",
    )
    parser.add_argument("--stock", action="store_true", help="servers without this plugin: differences are recorded")
    parser.add_argument("--no-drafts", dest="drafts", action="store_false", help="servers do not draft")
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS, help="a folder with one for each server")
    for name in SERVERS:
        parser.add_argument(
            f"--{name}-options", type=shlex.split, default=[], help=f"more options of {name}, where it is started here"
        )
    parser.add_argument("--task", choices=TASKS, default="sort")
    parser.add_argument("--recipe", choices=GRPO, help="a paper's settings, in the place of those of a toy")
    parser.add_argument("--reward", nargs="+", choices=("rule", "model"), default=["rule"], help="what is added up")
    parser.add_argument("--reward-model", type=Path, help="the folder of a judge; sample.py and sft.py make one")
    parser.add_argument("--sft-steps", type=from_zero, default=25)
    parser.add_argument("--sft-batch-size", type=positive, default=64)
    parser.add_argument("--sft-lr", type=above_zero, default=2e-3)
    parser.add_argument("--steps", type=from_zero, default=30)
    parser.add_argument("--prompts", type=positive, default=32, help="of a step, dealt to the servers in turn")
    parser.add_argument("--samples", type=positive, default=8, help="answers to a prompt")
    parser.add_argument("--max-tokens", type=positive, default=5, help="of an answer; a longer one is cut, and wrong")
    parser.add_argument(
        "--temperature", type=above_zero, nargs="+", default=[1.0, 0.7], help="of a server's prompts in turn"
    )
    parser.add_argument("--hang-up", type=from_zero, default=2, help="requests of a server and step that are aborted")
    parser.add_argument("--one-step-off", action="store_true", help="sample the next step's answers while training")
    parser.add_argument(
        "--inner-updates", type=positive, default=1, help="how often the answers of a step are learned from"
    )
    parser.add_argument(
        "--mini-batches", type=positive, default=1, help="optimizer steps that share the answers of a step"
    )
    parser.add_argument(
        "--micro-batch-size", type=positive, help="answers of a pass of the trainer; by default all of them"
    )
    parser.add_argument("--lr", type=above_zero, default=5e-4)
    parser.add_argument("--lr-warmup-steps", type=from_zero, default=3)
    parser.add_argument("--clip-grad", type=not_negative, default=1.0)
    parser.add_argument("--clip-ratio", type=not_negative, default=0.2)
    parser.add_argument("--kl-coefficient", type=not_negative, default=0.0, help="of k3 to the model before step 0")
    parser.add_argument(
        "--reference-interval",
        type=from_zero,
        default=0,
        help="optimizer steps until the policy is the reference; 0: never",
    )
    parser.add_argument(
        "--mtp-loss-scaling-factor", type=not_negative, default=0.1, help="drafts follow the policy by it"
    )
    parser.add_argument("--moe-router-bias-update-rate", type=not_negative, default=1e-3)
    parser.add_argument("--eval-prompts", type=from_zero, default=64, help="of greedy answers before and after")
    parser.add_argument("--seed", type=seed, default=1234)
    parser.add_argument(
        "--save-interval", type=from_zero, default=10, help="steps between checkpoints; the last is saved too; 0: none"
    )
    parser.add_argument("--exit-interval", type=positive, help="stop after so many steps, as if interrupted")
    parser.add_argument("--tensorboard-dir", type=Path)
    parser.add_argument("--plot", type=Path, help="draw the run to this SVG or PNG at its end; needs matplotlib")
    known, _ = parser.parse_known_args()
    parser.set_defaults(**GRPO.get(known.recipe, {}))
    return parser.parse_args()


def hand_over(
    checks: Checks, version: int, ask: Callable[[Server], list[Sample]], clock: Clock, kept: int | None
) -> str:
    """Bring the trainer's weights to all servers; returns their fingerprint. Of the folders, those of the versions
    `version` and `kept` stay.

    Raises `MismatchError` unless all servers then hold the trainer's weights (`Checks.weights`).
    """
    folder = checks.run / "weights" / str(version)
    shutil.rmtree(folder, ignore_errors=True)  # of a step that was not finished
    if version == kept or not checks.launch.from_memory:
        checks.trainer.export(folder)
        clock.lap("export")
    weights = checks.trainer.in_memory(drafts=checks.launch.drafts) if checks.launch.from_memory else None

    def update(server: Server) -> None:
        if weights is None:
            server.update(folder, str(version))
        else:
            server.update_from_memory(weights, str(version))

    with ThreadPoolExecutor() as threads:
        list(threads.map(update, checks.servers))
    clock.lap("update")
    digest = checks.weights(version, ask)
    clock.lap("verify")
    for old in folder.parent.iterdir():
        if old.name not in (str(kept), folder.name):
            shutil.rmtree(old)
    return digest


# Learning


def warmed_up(lr: float, step: int, arguments: argparse.Namespace) -> float:
    """The learning rate of a step: constant after its warm-up."""
    return lr * min(1.0, (step + 1) / max(1, arguments.lr_warmup_steps))


def passes(interval: int, done: int, more: int) -> bool:
    """Whether a multiple of `interval` lies behind `done` and not behind `done` + `more`; never where it is 0."""
    return interval > 0 and done // interval < (done + more) // interval


def learn_format(trainer: Trainer, words: Words, arguments: argparse.Namespace) -> None:
    """Supervised learning on solved problems: from random weights to answers of the right form."""
    for step in range(arguments.sft_steps):
        solved = problems(arguments.task, arguments.sft_batch_size, arguments.seed, "sft", step)
        packed = pack([(words.prompt(each.prompt), words.answer(each.answer), 1.0) for each in solved])
        with trainer.gradients(warmed_up(arguments.sft_lr, step, arguments)) as said:
            loss = -trainer.log_probs(packed).mean()
            loss.backward()
        if step % 5 == 4:
            console.print(f"sft step {step} | loss {loss.item():.4f} | grad norm {said['gradient_norm']:.3f}")


def learn(
    checks: Checks,
    samples: list[Sample],
    step: int,
    reference: list[torch.Tensor] | None,
    arguments: argparse.Namespace,
) -> dict[str, float]:
    """The optimizer steps on a step's answers; returns what to log. Raises `MismatchError` (`Checks.log_probs`)."""
    trainer, size = checks.trainer, arguments.micro_batch_size
    is_on_policy = all(sample.version == step for sample in samples)
    differences: dict[str, float] = {}
    if is_on_policy and (arguments.mini_batches > 1 or checks.launch.stock):
        # Of all answers, before the first optimizer step.
        found, differences = compared(checks, step, samples, size)
        if checks.launch.stock:
            # As trainers do whose servers say something else: the ratio is to the trainer's own numbers.
            parts = found.split([len(sample.tokens) for sample in samples])
            samples = [replace(each, logprobs=part.tolist()) for each, part in zip(samples, parts, strict=True)]
    draw = random.Random(repr((arguments.seed, "mini-batches", step)))
    batches: list[list[Sample]] = []
    for _ in range(arguments.inner_updates):
        order = samples if arguments.mini_batches == 1 else draw.sample(samples, len(samples))
        batches += [order[part :: arguments.mini_batches] for part in range(arguments.mini_batches)]
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    for batch in batches:
        micro_batches = parts_of(batch, size)
        of_reference: list[torch.Tensor | None] = [None] * len(micro_batches)
        if reference is not None:
            with trainer.holding(reference):
                of_reference = [trainer.log_probs(packed_of(part)) for part in micro_batches]
        compares = is_on_policy and not differences
        told: list[dict[str, float]] = []
        with trainer.gradients(warmed_up(arguments.lr, step, arguments)) as said:
            for part, of_part in zip(micro_batches, of_reference, strict=True):
                share = tokens(part) / tokens(batch)
                packed = packed_of(part)
                trainer.weigh(share)
                new = trainer.log_probs(packed)
                if compares:
                    differences = joined(differences, compared_part(checks, step, part, packed, new.detach(), share))
                loss, logged = clipped_loss(part, new, of_part, arguments, tokens(batch), learned_tokens(batch))
                loss.backward()
                told.append(logged)
        last = said | reduce(joined, told)
        first = first or last
    return differences | last | {name: first[name] for name in ("ratio_min", "ratio_max", "entropy")}


def compared(
    checks: Checks, step: int, samples: list[Sample], micro_batch_size: int | None
) -> tuple[torch.Tensor, dict[str, float]]:
    """The trainer's log-probabilities of answers, fp32 [N], and how far the servers' are (`Checks.log_probs`)."""
    found: list[torch.Tensor] = []
    differences: dict[str, float] = {}
    with torch.no_grad():
        for part in parts_of(samples, micro_batch_size):
            packed = packed_of(part)
            found.append(checks.trainer.log_probs(packed))
            share = tokens(part) / tokens(samples)
            differences = joined(differences, compared_part(checks, step, part, packed, found[-1], share))
    return torch.cat(found), differences


def compared_part(
    checks: Checks, step: int, samples: list[Sample], packed: Packed, found: torch.Tensor, share: float
) -> dict[str, float]:
    """The same of answers that have a share of the tokens."""
    differences = checks.log_probs(step, samples, packed, found)
    return differences | {"mean_difference": share * differences["mean_difference"]}


def parts_of(samples: list[Sample], size: int | None) -> list[list[Sample]]:
    """Micro-batches of `size` answers, or one."""
    size = size or len(samples)
    return [samples[first : first + size] for first in range(0, len(samples), size)]


def tokens(samples: list[Sample]) -> int:
    """Of all answers."""
    return sum(len(sample.tokens) for sample in samples)


def learned_tokens(samples: list[Sample]) -> int:
    """Without those of aborted answers."""
    return tokens([sample for sample in samples if sample.advantage is not None])


def joined(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """What is logged of two parts of a batch: the lower minimum, the higher maximum, the sum of shares of a mean."""
    if not one:
        return other
    by = {"ratio_min": min, "ratio_max": max, "max_difference": max}
    return {name: by.get(name, operator.add)(one[name], other[name]) for name in one}


def clipped_loss(
    samples: list[Sample],
    new: torch.Tensor,
    of_reference: torch.Tensor | None,
    arguments: argparse.Namespace,
    tokens: int,
    learned_tokens: int,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Answers' share of the mean over a batch's tokens of GRPO's clipped objective, negative, and what to log.

    `new` and `of_reference`, fp32 [N], are the trainer's log-probabilities, with the weights as they are and with those
    of the reference. The batch has `tokens`, and learns from `learned_tokens` of them.
    """
    old = per_token(samples, lambda sample: sample.logprobs, new)
    advantages = per_token(samples, lambda sample: [sample.advantage or 0.0] * len(sample.tokens), new)
    learned = per_token(samples, lambda sample: [sample.advantage is not None] * len(sample.tokens), new).float()
    ratios = (new - old).exp()
    clipped = ratios.clamp(1 - arguments.clip_ratio, 1 + arguments.clip_ratio)
    losses = -torch.minimum(ratios * advantages, clipped * advantages)
    logged = {"ratio_min": float(ratios.min()), "ratio_max": float(ratios.max())}
    logged |= {"entropy": float(-new.detach().sum() / tokens)}
    logged |= {"clipped": float(((clipped != ratios).float() * learned).sum() / learned_tokens)}
    if of_reference is not None:
        k3 = (of_reference - new).exp() - (of_reference - new) - 1
        losses = losses + arguments.kl_coefficient * k3
        logged["kl_to_reference"] = float((k3.detach() * learned).sum() / learned_tokens)
    return (losses * learned).sum() / learned_tokens, logged


# The run


def train(
    trainer: Trainer,
    servers: list[Server],
    launch: Launch,
    words: Words,
    progress: Progress,
    arguments: argparse.Namespace,
) -> None:
    """All steps from `progress.step` on."""
    run, steps = arguments.run, arguments.steps
    record = Record(run, arguments.tensorboard_dir)
    checks = Checks(trainer, servers, run, launch)

    def handed_over(step: int, clock: Clock) -> str:
        def ask(server: Server) -> list[Sample]:
            return roll_out([server], words, step, step, arguments)

        return hand_over(checks, step, ask, clock, progress.reference if arguments.kl_coefficient else None)

    digest = handed_over(progress.step, Clock())
    reference = trainer.weights_of(run / "weights" / str(progress.reference)) if arguments.kl_coefficient else None
    judge = Judge(trainer, arguments.reward_model, words) if "model" in arguments.reward else None
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
            if judge is not None:
                samples = judge.graded(
                    samples, with_rule="rule" in arguments.reward, micro_batch_size=arguments.micro_batch_size
                )
                clock.lap("judge")
            of_step = {"step": step, "weights": digest} | (progress.differences or {})
            of_step |= measure(samples) | learn(checks, samples, step, reference, arguments)
            clock.lap("train")
            progress = Progress(step + 1, progress.reference)
            updates = arguments.inner_updates * arguments.mini_batches
            if reference is not None and passes(arguments.reference_interval, step * updates, updates):
                reference, progress.reference = trainer.weights(), step + 1
            if ahead is not None:
                progress.waiting = ahead.result()
                clock.lap("wait")
                with trainer.holding(sampler):
                    _, progress.differences = compared(checks, step + 1, progress.waiting, arguments.micro_batch_size)
                clock.lap("compare")
            of_step |= {name: number - before[name] for name, number in counted(servers).items()}
            digest = handed_over(step + 1, clock)
            record.add(of_step | {"seconds": clock.laps})
            if arguments.save_interval and ((step + 1) % arguments.save_interval == 0 or step + 1 == last):
                save(trainer, progress, run)
    if not (folder := run / "weights" / str(last)).exists():
        trainer.export(folder)
    if last == steps:
        say_greedy_reward(servers, words, arguments)


def from_memory(asked: str | None, servers: list[tuple[str, str]]) -> bool:
    """Whether servers take weights out of the trainer's memory; of each its name and its address, if it has one.

    Raises `InputError` where that is asked for and cannot be.
    """
    on_card = torch.cuda.is_available()
    if asked is None:
        return on_card and not any(address for _, address in servers)
    if asked == "files":
        return False
    for name, address in servers:
        if address and urlsplit(address).hostname not in ("localhost", "127.0.0.1", "::1"):
            raise InputError(f"--hand-over ipc: {name} at {address} is not on this host; --hand-over files")
        if name == "vllm" and not on_card:
            raise InputError("--hand-over ipc: vLLM takes weights out of a card's memory only; --hand-over files")
    return True


def start(arguments: argparse.Namespace) -> None:
    """The whole run. Servers start while the model learns the format."""
    run: Path = arguments.run
    if run.exists() and not run.is_dir():
        raise InputError(f"{run}: is no folder; name one for the run")
    if not arguments.resume and run.exists() and any(run.iterdir()):
        raise InputError(f"{run}: is not empty, and nothing is overwritten; --resume continues a run")
    named = [server.partition("=") for server in arguments.server]
    if unknown := [name for name, _, _ in named if name not in SERVERS]:
        raise InputError(f"--server {unknown[0]}: not one of {', '.join(SERVERS)}")
    if ("model" in arguments.reward) != (arguments.reward_model is not None):
        raise InputError("--reward model and --reward-model FOLDER go together")
    if arguments.plot is not None:
        require_plot(arguments.plot)
    if arguments.reward_model is not None:
        CheckpointReader(arguments.reward_model)
    if (answered := arguments.prompts * arguments.samples) < arguments.mini_batches:
        raise InputError(f"--mini-batches {arguments.mini_batches}: a step has {answered} answers")
    launch = Launch(
        arguments.checkpoint,
        on_cpu=not torch.cuda.is_available(),
        kv_tokens=arguments.kv_tokens,
        stock=arguments.stock,
        drafts=arguments.drafts,
        from_memory=from_memory(arguments.hand_over, [(name, address) for name, _, address in named]),
        environments=arguments.environments,
        options={name: getattr(arguments, f"{name}_options") for name in SERVERS},
    )
    reader = CheckpointReader(arguments.checkpoint)
    # What only servers know is asked before the model learns anything.
    ours = str(reader.profile())
    for name, _, address in named:
        launch.require(name, address)
        if address and not launch.stock and (theirs := SERVERS[name](address).profile()) != ours:
            raise EngineError(
                f"--server {name}={address}: computes in {theirs}, the trainer in {ours};"
                f" start both with the same dtype, {ATTENTION_VARIABLE} and {SLICES_VARIABLE}"
            )
    trainer = Trainer(
        arguments.checkpoint,
        seed=arguments.seed,
        clip_grad=arguments.clip_grad,
        mtp_loss_scaling_factor=arguments.mtp_loss_scaling_factor,
        moe_router_bias_update_rate=arguments.moe_router_bias_update_rate,
    )
    words = Words(arguments.checkpoint)
    progress = resume(trainer, run) if arguments.resume else Progress()
    if progress.step > arguments.steps:
        raise InputError(
            f"--resume: {run} is at step {progress.step} already, and --steps {arguments.steps} leaves nothing to"
            " learn; give more"
        )
    (run / "weights").mkdir(parents=True, exist_ok=True)
    # The threads end first, so that no server starts behind the stack that ends it, and wait for none that starts.
    ending = Event()
    with ExitStack() as stack, ThreadPoolExecutor() as threads, ExitStack() as first:
        first.callback(ending.set)

        def server(name: str, address: str) -> Server:
            if address:
                return SERVERS[name](address)
            return stack.enter_context(started(name, launch, run / f"{name}.log", ending))

        starting = [threads.submit(server, name, address) for name, _, address in named]
        if not arguments.resume:
            learn_format(trainer, words, arguments)
        train(trainer, [future.result() for future in starting], launch, words, progress, arguments)
    if arguments.plot:
        draw(run, arguments.plot)


def main() -> None:
    """Errors that are meant for the user are one line."""
    arguments = parse_arguments()
    torch.set_num_threads(1)  # a CPU's sums depend on it
    exit_on_sigterm()
    try:
        start(arguments)
    except DSV3Error as error:
        sys.exit(f"error: {error}")


# Megatron's checkpoint writers import this file again.
if __name__ == "__main__":
    main()
