"""Whether vLLM answers what one card answers without EPLB, in CUDA graphs, while it moves experts between two cards.

    DSV3_REDUCTION_SLICES=2 python tests/gpu/eplb_on_cards.py CHECKPOINT [LAYOUT ...]  # on Hopper cards, in vLLM's

Layouts are dp=2 and tp=2,sync by default: dp=N or tp=N, and whether vLLM moves experts between two steps or, as by its
default, beside them. All prompts are answered in rounds, during each of which experts move, and compared with one
card's: tokens, and the log-probabilities of the likeliest ones. Before and after, each rank is asked for the
fingerprint of its weights, which names the experts that it holds and tells whether their bytes are the checkpoint's.
The twin is one more round, with the maps that vLLM had when it started, over the experts as they lie then; it must
answer otherwise. Prints one line a layout, and exits with 1 if one is not as it should be, or if no expert moved.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import graphs_over_ranks as ranks
import torch
from in_graphs import PROMPTS

ROUNDS = 2
STEPS = 16
"""Between two moves. A round has three times as many, and the first move is after a quarter."""
REPLICAS = 4
DEFAULT = ("dp=2", "tp=2,sync")
EXPERT = re.compile(r"\.layers\.(\d+)\.mlp\.experts\.(\d+)\.")

Held = dict[str, str]
"""What a worker holds: the digests of its tensors by Hugging Face's names."""


class FirstMaps:
    """What the twin asks of a worker (`worker_extension_cls`)."""

    get_model: Any
    eplb_first_maps: list[list[torch.Tensor]]

    def eplb_keep_maps(self) -> None:
        """Those of now."""
        self.eplb_first_maps = [[x.clone() for x in maps] for maps in _maps(self.get_model())]

    @torch.inference_mode()
    def eplb_put_maps_back(self) -> None:
        """Where layers and CUDA graphs read them."""
        for maps, first in zip(_maps(self.get_model()), self.eplb_first_maps, strict=True):
            for x, old in zip(maps, first, strict=True):
                x.copy_(old)


def _maps(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(layer.logical_to_physical_map, layer.logical_replica_count) for layer in model.moe_layers]


class Rank(NamedTuple):
    """What a data-parallel rank found."""

    rounds: list[ranks.Answers]
    """Of its prompts, the twin's last."""
    before: list[Held]
    """Of each of its workers, before any request."""
    after: list[Held]


class Layout(NamedTuple):
    """How ranks share the model, and whether vLLM moves experts between two steps."""

    tp: int
    dp: int
    sync: bool

    @classmethod
    def parsed(cls, text: str) -> Layout:
        """Raises `argparse.ArgumentTypeError`."""
        found = re.fullmatch(r"(tp|dp)=([2-8])(,sync)?", text)
        if found is None:
            raise argparse.ArgumentTypeError(f"{text!r} is no layout: tp=N or dp=N, of 2 to 8 cards, then maybe ,sync")
        sizes = {"tp": 1, "dp": 1, found[1]: int(found[2])}
        return cls(sizes["tp"], sizes["dp"], found[3] is not None)

    def __str__(self) -> str:
        """As on the command line, with vLLM's default spelled out."""
        return f"{f'tp={self.tp}' if self.tp > 1 else f'dp={self.dp}'},{'sync' if self.sync else 'async'}"

    def options(self) -> dict[str, Any]:
        """Of vLLM."""
        return {
            "enable_expert_parallel": True,
            "enable_eplb": True,
            "eplb_config": {
                "window_size": STEPS // 2,
                "step_interval": STEPS,
                "num_redundant_experts": REPLICAS,
                "use_async": not self.sync,
                "communicator": "torch_gloo",
            },
            "worker_extension_cls": f"{Path(__file__).stem}.{FirstMaps.__name__}",
        }


def child(checkpoint: str, layout: Layout, rank: int, to: Path) -> None:
    """Answer in rounds as one data-parallel rank, write what was found, and leave: engines keep threads."""
    prompts = [list(prompt) for prompt in PROMPTS[rank :: layout.dp]]
    llm = ranks.vllm_engine(checkpoint, layout.tp, enforce_eager=False, **layout.options())

    def held() -> list[Held]:
        return [worker["tensors"] for worker in llm.collective_rpc("dsv3_fingerprint")]

    meet(to, "started", rank, layout.dp)
    llm.collective_rpc("eplb_keep_maps")
    before, rounds = held(), []
    for i in range(ROUNDS):
        meet(to, f"round-{i}", rank, layout.dp)
        rounds.append(ranks.vllm_answers(llm, prompts))
        meet(to, f"answered-{i}", rank, layout.dp)
    time.sleep(3)  # data-parallel engines go on for some steps, in which experts move
    after = held()
    llm.collective_rpc("eplb_put_maps_back")
    meet(to, "twin", rank, layout.dp)
    rounds.append(ranks.vllm_answers(llm, prompts))
    to.write_text(json.dumps(Rank(rounds, before, after)))
    meet(to, "done", rank, layout.dp)
    sys.stdout.flush()
    os._exit(0)


def meet(to: Path, where: str, rank: int, size: int) -> None:
    """Wait for the other data-parallel ranks, so that no engine steps while another is asked."""
    files = [to.with_name(f"{where}-{i}") for i in range(size)]
    files[rank].touch()
    ends = time.monotonic() + ranks.SECONDS
    while not all(file.exists() for file in files):
        if time.monotonic() > ends:
            raise SystemExit(f"rank {rank} has waited for the others ({where}) for {ranks.SECONDS} s")
        time.sleep(0.02)


def found_by(checkpoint: str, layout: Layout, folder: Path) -> tuple[list[Rank], str]:
    """By each data-parallel rank, and what was logged."""
    results = [folder / f"{rank}.json" for rank in range(layout.dp)]
    paths = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, __file__, checkpoint, str(layout).removesuffix(",async"), "--child"]
    starts = []
    for rank, to in enumerate(results):
        place = ranks.vllm_place(rank, layout.dp) if layout.dp > 1 else {}
        starts.append(([*command, str(rank), str(to)], os.environ | {"PYTHONPATH": paths} | place))
    logged = ranks.run_together(f"vllm {layout}", starts, folder / "log")
    return [Rank(*json.loads(to.read_text())) for to in results], logged


def experts_of(held: Held) -> set[tuple[int, int]]:
    """Layers and experts."""
    return {(int(found[1]), int(found[2])) for name in held if (found := EXPERT.search(name))}


def whole_answers(found: Sequence[Rank], i: int) -> ranks.Answers:
    """Of all prompts in round `i`."""
    return [found[k % len(found)].rounds[i][k // len(found)] for k in range(len(PROMPTS))]


def equal_answers(alone: ranks.Answers, found: ranks.Answers) -> int:
    """How many have the tokens and log-probabilities of one card."""
    return sum(json.dumps(x) == json.dumps(y) for x, y in zip(alone, found, strict=True))


def judge(layout: Layout, alone: ranks.Answers, whole: Held, found: Sequence[Rank], logged: str) -> bool:
    """Print a line; whether all is as it should be. `whole` is the checkpoint's."""
    *alike, twin = (equal_answers(alone, whole_answers(found, i)) for i in range(ROUNDS + 1))
    before, after = ([held for rank in found for held in getattr(rank, when)] for when in ("before", "after"))
    moved = sum(len(experts_of(new) - experts_of(old)) for old, new in zip(before, after, strict=True))
    all_experts = experts_of(whole)
    complete = all(set().union(*map(experts_of, each)) == all_experts for each in (before, after))
    bytes_right = all(whole.get(name) == digest for held in before + after for name, digest in held.items())
    in_graphs = ranks.OVER_PEERS in logged and ranks.WITHOUT_GRAPHS not in logged
    print(
        f"vllm {layout}: {' and '.join(map(str, alike))} of {len(alone)} answers equal, in {ROUNDS} rounds;"
        f" {moved} experts came to a card that had not held them, of {len(all_experts)} in all layers;"
        f" none is missing: {complete}; their bytes are the checkpoint's: {bytes_right};"
        f" over peers in graphs: {in_graphs}; twin with the first maps: {twin} equal",
        flush=True,
    )
    right = all(count == len(alone) for count in alike) and complete and bytes_right
    return right and moved > 0 and in_graphs and twin < len(alone)


def main(checkpoint: str, layouts: Sequence[Layout]) -> bool:
    """Whether all layouts are as they should be."""
    from dsv3_plugin.checkpoint.fingerprint import fingerprint_of_checkpoint, owner
    from dsv3_plugin.checkpoint.names import checkpoint_tensors
    from dsv3_plugin.checkpoint.reader import CheckpointReader

    reader, right = CheckpointReader(checkpoint), True
    slots = reader.config.n_routed_experts + REPLICAS
    for layout in layouts:
        if slots % (layout.tp * layout.dp):
            raise SystemExit(f"{layout}: {slots} experts, of which {REPLICAS} are replicas, have no such equal parts")
    specs, digests = checkpoint_tensors(reader.config), fingerprint_of_checkpoint(reader).tensors
    whole = {name: digest for name, digest in digests.items() if owner(specs[name]) == "main"}
    with tempfile.TemporaryDirectory() as folder:
        alone, _ = ranks.answer("vllm", checkpoint, "one", Path(folder, "one.log"))
        for layout in layouts:
            Path(folder, str(layout)).mkdir()
            right &= judge(layout, alone, whole, *found_by(checkpoint, layout, Path(folder, str(layout))))
    return right


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("layouts", nargs="*", type=Layout.parsed, default=[Layout.parsed(text) for text in DEFAULT])
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        rank, to = options.child
        child(options.checkpoint, options.layouts[0], int(rank), Path(to))
    sys.exit(not main(options.checkpoint, options.layouts))
