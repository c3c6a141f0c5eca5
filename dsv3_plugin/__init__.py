"""DeepSeek-V3, its arithmetic defined once, for vLLM, SGLang and Megatron-Core."""

from dsv3_plugin.version import __version__

__all__ = ["__version__"]
