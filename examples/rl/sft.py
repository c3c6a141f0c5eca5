"""Supervised fine-tuning on conversations: the answers are learned, and no conversation sees another.

    python examples/rl/sft.py MODEL DATA.jsonl OUT

DATA holds a conversation a line, as `examples/prepare_data.py sft` reads them for Megatron's own training loop, too:

    {"messages": [{"role": "user", "content": "3141="}, {"role": "assistant", "content": "1134"}]}

OUT is a new Hugging Face folder. The recipe `v3` is that of DeepSeek-V3's report (arXiv:2412.19437, section 5.1): two
epochs, a cosine from 5e-6 to 1e-6, several conversations in a sequence, masked from each other.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from pathlib import Path

import torch
from recipes import SFT
from record import console
from task import Conversation, Words
from trainer import Trainer, pack

from dsv3_plugin.argument_types import above_zero, not_negative, positive, seed
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.checkpoint.writer import require_writable
from dsv3_plugin.errors import DSV3Error, InputError


def parse_arguments() -> argparse.Namespace:
    """With the defaults of a recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a Hugging Face folder with a tokenizer and an MTP layer")
    parser.add_argument("data", type=Path, help="conversations, a JSON object a line")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--recipe", choices=SFT, help="a paper's settings, in the place of those of a toy")
    parser.add_argument("--epochs", type=positive, default=2)
    parser.add_argument("--batch-size", type=positive, default=64, help="conversations of an optimizer step")
    parser.add_argument("--lr", type=above_zero, default=2e-3)
    parser.add_argument("--min-lr", type=above_zero, default=2e-4)
    parser.add_argument("--clip-grad", type=not_negative, default=1.0)
    parser.add_argument("--mtp-loss-scaling-factor", type=not_negative, default=0.1)
    parser.add_argument("--moe-router-bias-update-rate", type=not_negative, default=1e-3)
    parser.add_argument("--seed", type=seed, default=1234)
    known, _ = parser.parse_known_args()
    parser.set_defaults(**SFT.get(known.recipe, {}))
    return parser.parse_args()


def conversations(file: Path) -> list[Conversation]:
    """Those of a file. Raises `InputError` that names the line which is none of one question and one answer."""
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read: {getattr(error, 'strerror', error)}") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(Conversation.parse(json.loads(line)))
        except (ValueError, KeyError, TypeError, RecursionError):
            what = "is no JSON object with 'messages' of one user and one assistant, each a text"
            raise InputError(f"{file}:{number}: {what}") from None
    if not found:
        raise InputError(f"{file}: no conversations in it")
    return found


def cosine(step: int, steps: int, lr: float, min_lr: float) -> float:
    """From `lr` at the first of `steps` to `min_lr` at the last."""
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * step / max(1, steps - 1)))


def start(arguments: argparse.Namespace) -> None:
    """All epochs."""
    if arguments.out.exists():
        raise InputError(f"{arguments.out}: exists already, and nothing is overwritten")
    require_writable(arguments.out, str(arguments.out))
    data = conversations(arguments.data)
    longest, words = CheckpointReader(arguments.checkpoint).config.max_position_embeddings, Words(arguments.checkpoint)
    samples = [(words.prompt(each.user), words.answer(each.assistant), 1.0) for each in data]
    for number, (prompt, answer, _) in enumerate(samples, 1):
        if (tokens := len(prompt) + len(answer)) > longest:
            raise InputError(f"{arguments.data}:{number}: {tokens:,} tokens; the model knows {longest:,} positions")
    trainer = Trainer(
        arguments.checkpoint,
        seed=arguments.seed,
        clip_grad=arguments.clip_grad,
        mtp_loss_scaling_factor=arguments.mtp_loss_scaling_factor,
        moe_router_bias_update_rate=arguments.moe_router_bias_update_rate,
    )
    draw = random.Random(arguments.seed)
    order = [i for _ in range(arguments.epochs) for i in draw.sample(range(len(samples)), len(samples))]
    size = arguments.batch_size
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    for step, batch in enumerate(batches):
        packed = pack([samples[i] for i in batch])
        with trainer.gradients(cosine(step, len(batches), arguments.lr, arguments.min_lr)) as said:
            loss = -trainer.log_probs(packed).mean()
            loss.backward()
        console.print(
            f"step {step} of {len(batches)} | {len(packed.tokens):,} tokens | loss {loss.item():.4f}"
            f" | lr {said['lr']:.2e} | grad norm {said['gradient_norm']:.3f}"
        )
    trainer.export(arguments.out)
    console.print(f"{arguments.out}: {trainer.fingerprint().digest}")


def main() -> None:
    """Errors that are meant for the user are one line."""
    arguments = parse_arguments()
    torch.set_num_threads(1)  # a CPU's sums depend on it
    try:
        start(arguments)
    except DSV3Error as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
