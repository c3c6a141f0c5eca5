"""An update of vLLM out of memory, without a card: `python vllm_ipc.py CHECKPOINT`, in vLLM's environment.

What examples/rl sends goes through JSON to vLLM's own `ipc` engine. Handles are numbers here, of tensors in this
process. Prints each call and the names that came by it, a JSON array a line; exits with 1 unless every tensor that came
is the checkpoint's.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "rl"))

import hand_over
import torch
from servers import Vllm
from vllm.distributed.weight_transfer import ipc_engine

from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.errors import EngineError

OUR_CARD, THEIR_CARD = 0, 2  # the same one, in two processes
shared: list[torch.Tensor] = []


def reduce_tensor(tensor: torch.Tensor) -> tuple[None, tuple[int, ...]]:
    shared.append(tensor)
    return None, (0, 0, 0, 0, 0, 0, OUR_CARD, len(shared) - 1)


def rebuild_cuda_tensor(*arguments: int) -> torch.Tensor:
    assert arguments[6] == THEIR_CARD
    return shared[arguments[7]]


class OfNoServer(Vllm):
    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__("http://nowhere")
        self.came: list[tuple[str, torch.Tensor]] = []
        self.engine = ipc_engine.IPCWeightTransferEngine.__new__(ipc_engine.IPCWeightTransferEngine)
        self.engine.device = torch.device("cuda", THEIR_CARD)
        self.engine.model = SimpleNamespace(load_weights=self.came.extend)
        self.engine.packed = False
        self.tensors = tensors

    def post(self, path: str, body: object = None) -> Any:
        self.came.clear()
        sent = json.loads(json.dumps(body))
        if path == "/init_weight_transfer_engine":
            self.engine.init_transfer_engine(self.engine.parse_init_info(sent["init_info"]))
        if path == "/update_weights":
            self.engine.receive_weights(self.engine.parse_update_info(sent["update_info"]))
        for name, tensor in self.came:
            assert tensor.dtype == self.tensors[name].dtype and tensor.equal(self.tensors[name]), name
        print(json.dumps([path, *(name for name, _ in self.came)]))

    def get(self, path: str) -> Any:
        raise EngineError(f"no {path}")


if __name__ == "__main__":
    hand_over.reduce_tensor, hand_over.card_of = reduce_tensor, lambda _: "GPU-0"
    ipc_engine.rebuild_cuda_tensor = rebuild_cuda_tensor
    torch.cuda.get_device_properties = lambda _: SimpleNamespace(uuid="GPU-0")
    reader = CheckpointReader(sys.argv[1])
    tensors = dict(reader.tensors())
    last_layer = max(int(name.split(".")[2]) for name in tensors if name.startswith("model.layers."))
    of_draft = f"model.layers.{last_layer}."
    weights = hand_over.Weights(reader.tensors, lambda name: name.startswith(of_draft), bucket_bytes=1 << 20)
    OfNoServer(tensors).update_from_memory(weights, "1")
