"""The Megatron-Core adapter: it moves data and does no arithmetic."""
