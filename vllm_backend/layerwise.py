"""Out of vLLM's layer-wise reload, which our models do not need.

Before an update in the checkpoint's format vLLM moves every parameter to the meta device and hangs a loader on it,
which keeps what comes until a layer is whole and copies it into the old memory then. Our loader writes into that memory
itself, in any order, and knows what is missing. So it takes the parameters back, and vLLM's finish finds nothing to do.
"""

from __future__ import annotations

from torch import nn

from dsv3_plugin.errors import EngineError


def take_back(model: nn.Module) -> bool:
    """Give `model` its parameters and buffers again where vLLM has begun a layer-wise reload; whether it had."""
    tensors = (*model.parameters(), *model.buffers())
    if not any(tensor.is_meta for tensor in tensors):
        return False
    try:
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    except ImportError:
        raise EngineError(
            "this vLLM updates weights in a way that dsv3-plugin does not know: it moved them to the meta device, and"
            " model_loader.reload.layerwise.get_layerwise_info, which tells where they were, is missing"
        ) from None
    for module in model.modules():
        info = get_layerwise_info(module)
        if not any(info.kernel_tensors or ()):
            continue
        parameters, buffers = info.kernel_tensors
        for name, tensor in (parameters | buffers).items():
            setattr(module, name, tensor)
        info.reset()
    return True
