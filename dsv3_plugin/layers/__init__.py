"""The layers: DeepSeek-V3 as torch modules over flattened tokens [T, hidden], with bound kernels and no engine.

Parameters carry Hugging Face's names; where a kernel wants several tensors as one (gate and up, all experts), the
fused name is vLLM's. What an engine supplies is one function, `Attend`: store the tokens' latent vectors, attend the
queries to the cache.
"""
