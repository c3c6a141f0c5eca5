"""Requests that vLLM takes and cannot answer: each is refused alone, before it ends the engine for all."""

from __future__ import annotations

from functools import wraps
from typing import Any

from vllm import sampling_params
from vllm.sampling_params import SamplingParams

from dsv3_plugin.errors import EngineError

DRAFT = "DeepSeekMTPModel"


def install() -> None:
    """Look at sampling parameters where vLLM does, once a process: where requests come in."""
    validate = getattr(SamplingParams, "_validate_spec_decode", None)
    if validate is None:
        raise EngineError("this vLLM's SamplingParams has no _validate_spec_decode, where dsv3-plugin refuses requests")
    if hasattr(validate, "__wrapped__"):
        return

    @wraps(validate)
    def validate_spec_decode(params: SamplingParams, speculative_config: Any, *args: Any) -> None:
        validate(params, speculative_config, *args)
        draft = getattr(speculative_config, "draft_model_config", None)
        if params.logprob_token_ids and draft is not None and DRAFT in draft.architectures:
            raise sampling_params.VLLMValidationError(
                "logprob_token_ids is not supported with speculative decoding; ask for logprobs"
            )

    SamplingParams._validate_spec_decode = validate_spec_decode
