"""The SGLang adapter: it moves data and does no arithmetic."""
