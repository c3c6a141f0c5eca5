"""Training data from a served model: its right answers, as conversations that sft.py and prepare_data.py read.

    python examples/rl/sample.py MODEL OUT.jsonl --server vllm sglang

Of a policy this is rejection sampling: several answers to each prompt, of which the wrong ones are left out
(DeepSeek-R1, arXiv:2501.12948v2, the data of its second fine-tuning). Of a teacher it is the data that a smaller
student is distilled by. `--judge` writes verdicts instead: right and wrong answers, each with its mark, which teach a
model to be the judge of `grpo.py --reward model`.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch
from launch import ENVIRONMENTS, Launch, exit_on_sigterm, started
from record import console
from servers import SERVERS, Request, Server
from task import TASKS, Conversation, Problem, Words, problems

from dsv3_plugin.argument_types import above_zero, positive, seed
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.errors import DSV3Error, InputError


def parse_arguments() -> argparse.Namespace:
    """The servers' as those of grpo.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="what the servers serve")
    parser.add_argument("out", type=Path, help="a new file of conversations, a JSON object a line")
    parser.add_argument("--server", nargs="+", default=["vllm"], metavar="NAME[=ADDRESS]", help=", ".join(SERVERS))
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS, help="a folder with one for each server")
    parser.add_argument("--task", choices=TASKS, default="sort")
    parser.add_argument("--prompts", type=positive, default=64)
    parser.add_argument("--samples", type=positive, default=8, help="answers to a prompt")
    parser.add_argument("--temperature", type=above_zero, default=1.0)
    parser.add_argument("--max-tokens", type=positive, default=5)
    parser.add_argument("--judge", action="store_true", help="write answers and whether they are right")
    parser.add_argument("--seed", type=seed, default=1234)
    return parser.parse_args()


def right(problem: Problem, answers: list[str]) -> list[Conversation]:
    """Each different right answer once."""
    return [Conversation(problem.prompt, answer) for answer in dict.fromkeys(answers) if problem.reward(answer)]


def judged(problem: Problem, answers: list[str]) -> list[Conversation]:
    """As many right as wrong answers, each with its mark, so that no mark is the likelier one."""
    marks: dict[bool, list[str]] = {True: [], False: []}
    for answer in dict.fromkeys(answers):
        marks[bool(problem.reward(answer))].append(answer)
    count = min(map(len, marks.values()))
    return [problem.verdict(answer) for found in marks.values() for answer in found[:count]]


def start(arguments: argparse.Namespace) -> None:
    """Asks all servers, each for its share of the prompts."""
    if arguments.out.exists():
        raise InputError(f"{arguments.out}: exists already, and nothing is overwritten")
    if not arguments.out.parent.is_dir():
        raise InputError(f"{arguments.out}: there is no folder {arguments.out.parent}")
    CheckpointReader(arguments.checkpoint)
    words = Words(arguments.checkpoint)
    launch = Launch(arguments.checkpoint, not torch.cuda.is_available(), 2048, environments=arguments.environments)
    named = [server.partition("=") for server in arguments.server]
    for name, _, address in named:
        if name not in SERVERS:
            raise InputError(f"--server {name}: not one of {', '.join(SERVERS)}")
        launch.require(name, address)
    asked = problems(arguments.task, arguments.prompts, arguments.seed, "sample")
    seeds = random.Random(arguments.seed).sample(range(2**31 - arguments.samples), len(asked))
    with ExitStack() as stack:
        servers: list[Server] = []
        for name, _, address in named:
            log = arguments.out.with_name(f"{arguments.out.name}.{name}.log")
            servers.append(SERVERS[name](address) if address else stack.enter_context(started(name, launch, log)))

        def ask(k: int) -> list[tuple[Problem, list[str]]]:
            mine = range(len(asked))[k :: len(servers)]
            settings = arguments.temperature, arguments.max_tokens
            requests = [
                Request(words.prompt(asked[i].prompt), *settings, seed=seeds[i], n=arguments.samples) for i in mine
            ]
            texts = [
                [text for answer in answers if (text := words.text(answer.token_ids)) is not None]
                for answers in servers[k].sample(requests)
            ]
            return [(asked[i], found) for i, found in zip(mine, texts, strict=True)]

        with ThreadPoolExecutor() as threads:
            answered = [pair for part in threads.map(ask, range(len(servers))) for pair in part]
    choose = judged if arguments.judge else right
    found = [conversation for problem, texts in answered for conversation in choose(problem, texts)]
    arguments.out.write_text("".join(json.dumps(conversation.record()) + "\n" for conversation in found))
    count = sum(problem.reward(text) for problem, texts in answered for text in texts)
    total = arguments.prompts * arguments.samples
    console.print(f"{arguments.out}: {len(found)} conversations; {count:.0f} of {total} answers are right")


def main() -> None:
    """Errors that are meant for the user are one line."""
    arguments = parse_arguments()
    exit_on_sigterm()
    try:
        start(arguments)
    except DSV3Error as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
