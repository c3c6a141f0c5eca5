"""The vLLM adapter: it moves data and does no arithmetic."""
