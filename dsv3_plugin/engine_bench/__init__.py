"""Serving engines measured side by side: every contender in a process of its own, all decoding the same tokens.

`plan` says who is measured and what, `protocol` how a contender is told and answers, `contenders` are the programs,
`runner` starts them one after the other, `limits` is what the card allows, `judge` says which rows mean nothing, and
`report` and `plot` are what is drawn of the rest. Only `contenders.vllm` and `contenders.sglang` know an engine.
"""
