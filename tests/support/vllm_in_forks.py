"""For programs in forks of a Python that has imported vLLM.

vLLM asks a new Python what it wants to know of a model class, so that its own need not import that; a fork has imported
it already.
"""

from __future__ import annotations

from vllm.model_executor.models import registry

registry._run_in_subprocess = lambda ask: ask()
