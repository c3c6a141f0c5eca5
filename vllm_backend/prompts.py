"""Where the requests' prompts end, which the `two_form` profile asks.

vLLM's attention metadata does not say it, and a chunk that is computed again after a preemption goes beyond its prompt.
vLLM's model runner knows it in host memory, in the order of the batch. It has first positions there, too: exact for
requests in their prompts, guessed only where drafts were not verified yet.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from dsv3_plugin.errors import EngineError

_CHOICE = "_determine_batch_execution_and_padding"


class Prompts:
    """Those of a model runner's requests."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner

    def of(self, requests: int) -> tuple[list[int], list[int]]:
        """Of the batch's first `requests` prompts' lengths, and positions of their next tokens; 0 of padding."""
        lengths, positions = (each[:requests].tolist() for each in self._numbers())
        padding = [0] * (requests - len(lengths))
        return lengths + padding, positions + padding

    def are_next(self) -> bool:
        """Whether the next pass has rows of prompts."""
        lengths, positions = self._numbers()
        return bool((positions < lengths).any())

    def _numbers(self) -> tuple[Any, Any]:
        batch = self.runner.input_batch
        return batch.num_prompt_tokens[: batch.num_reqs], batch.num_computed_tokens_cpu[: batch.num_reqs]


def know_prompts(runner: Any) -> Prompts:
    """A runner's prompts. From now on its passes with rows of prompts run without CUDA graphs, which are of generated
    tokens: vLLM takes a prompt's last token, alone in a chunk, for one. Raises `EngineError` where it cannot be told.
    """
    choose = getattr(runner, _CHOICE, None)
    if choose is None:
        raise EngineError(f"vLLM's model runner has no {_CHOICE}, as the tested versions have")
    prompts = Prompts(runner)

    @wraps(choose)
    def choose_execution(*args: Any, force_eager: bool = False, **kwargs: Any) -> Any:
        return choose(*args, force_eager=force_eager or prompts.are_next(), **kwargs)

    setattr(runner, _CHOICE, choose_execution)
    return prompts
