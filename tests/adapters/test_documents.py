"""Documents that share a sequence: what Megatron's dataset says of them, and what the model then computes."""

from __future__ import annotations

import re

from conftest import TinyCheckpoint
from megatron_programs import needs_megatron, printed, warm

pytestmark = needs_megatron

PROGRAM = """
import sys
from types import SimpleNamespace
import torch
from megatron.core import parallel_state
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import distributed as dist
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.errors import InputError
from dsv3_plugin.megatron_backend.config import transformer_config
from dsv3_plugin.megatron_backend.model import build_model
from dsv3_plugin.megatron_backend.weights import load_checkpoint

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
model_parallel_cuda_manual_seed(0)
reader = CheckpointReader(sys.argv[1])
full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
models = {}
for name, settings in ("kept", {}), ("recomputed", full):
    models[name] = build_model(reader.config, transformer_config(reader.config, reader.profile(), **settings)).train()
    load_checkpoint(models[name], sys.argv[1])
seen = []
models["kept"].output_layer.register_forward_hook(lambda module, args, output: seen.append(output[0].transpose(0, 1)))

# Two rows of 24 tokens; a document ends with token 0.
EOD, ends = 0, ((6, 15, 23), (10, 16))
tokens = torch.randint(1, 1000, (2, 24), generator=torch.Generator().manual_seed(3))
for row, of_row in enumerate(ends):
    tokens[row, list(of_row)] = EOD

def of_dataset(*reset):
    made = [_get_ltor_masks_and_position_ids(row, EOD, *reset, False, True) for row in tokens]
    return torch.stack([positions for _, _, positions in made]), torch.stack([mask for mask, _, _ in made])

def logits(model, ids, positions, mask=None, **kwargs):
    seen.clear()
    model(ids, positions, mask, **kwargs)
    return seen[1], seen[0]  # Megatron runs the head for MTP first

def documents(of_row):
    bounds = [0, *(end + 1 for end in of_row if end < 23), 24]
    return list(zip(bounds, bounds[1:]))

positions, mask = of_dataset(True, True)
plain = torch.arange(24).expand(2, -1)
together, drafts = logits(models["kept"], tokens, positions)
of_one, _ = logits(models["kept"], tokens[:1].repeat(2, 1), positions[:1])
assert torch.equal(of_one[1], together[0])
with_mask, _ = logits(models["kept"], tokens, positions, mask)
ignored, _ = logits(models["kept"], tokens, plain)
rows = equal = masked = drafted = twin = 0
for row, of_row in enumerate(ends):
    for start, end in documents(of_row):
        ids = tokens[row : row + 1, start:end]
        alone, of_mtp = logits(models["kept"], ids, torch.arange(end - start)[None])
        rows += end - start
        equal += int((together[row, start:end] == alone[0]).all(-1).sum())
        masked += int((with_mask[row, start:end] == alone[0]).all(-1).sum())
        # The draft from a document's last token reads the next one's first, as Megatron's labels do.
        drafted += int((drafts[row, start : end - 1] == of_mtp[0, :-1]).all(-1).sum())
        twin += int((ignored[row, start:end] == alone[0]).all(-1).sum())
print("rows", rows, "equal", equal, "masked", masked, "drafted", drafted, "twin", twin)

def gradients(model):
    model.zero_grad()
    model(tokens, positions, None, labels=tokens.roll(-1, 1)).mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}

kept, recomputed = (gradients(model) for model in models.values())
print("recomputed", all(torch.equal(kept[name], recomputed[name]) for name in kept))

starts = torch.tensor([0, 10, 25], dtype=torch.int32)
packing = PackedSeqParams("thd", starts, starts, max_seqlen_q=15, max_seqlen_kv=15)
causal = of_dataset(False, False)[1]
for arguments in (
    (tokens, plain, of_dataset(False, True)[1]), (tokens, positions, causal), (tokens, plain + 1, None),
    (tokens, positions, mask[:, 0]), (tokens, None, mask), (tokens[:1], plain[:1], None, None, None, None, packing),
    (tokens[:1], plain[:1], mask[:1], None, None, None, packing), (tokens, plain, None, None, None, SimpleNamespace()),
    (tokens, plain[:, :-1], None),
):
    try:
        models["kept"](*arguments)
        print("accepted")
    except InputError as error:
        print("refused", error)
models["kept"](tokens, plain, causal)
models["kept"].documents_share_rows = True
try:
    models["kept"](tokens, None, None)
except InputError as error:
    print("refused", error)
"""


def test_a_document_has_the_bits_that_it_has_alone(tiny_checkpoint: TinyCheckpoint) -> None:
    said = printed(warm("-c", PROGRAM, tiny_checkpoint("bf16")))
    counts = re.search(r"^rows 48 equal 48 masked 48 drafted 42 twin (\d+)$", said, re.M)
    # The twin: without the positions only the first document of each row is right.
    assert counts is not None and int(counts[1]) == 7 + 11, said[-3000:]
    assert "recomputed True" in said
    refused = [line.removeprefix("refused ") for line in said.splitlines() if line.startswith(("refused", "acc"))]
    assert [line.split(":")[0].split(",")[0] for line in refused] == [
        "the attention mask is not the causal one over the documents that position_ids say",
        "the attention mask is not the causal one over the documents that position_ids say",
        "position_ids must count from 0 in each document",
        "the attention mask is not the causal one over the documents that position_ids say",
        "an attention mask needs position_ids",
        "packed sequences from 0 to 25 are not the one row of tokens (1",
        "packed sequences from 0 to 25 are not the one row of tokens (1",
        "a trainer's model has no cache",
        "position_ids (2",
        "documents share rows",
    ]
