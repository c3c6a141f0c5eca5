"""Training measured side by side: steps of one model by this package and by Megatron's own TransformerEngine layers.

Each contender is a process of its own and gets the same weights, tokens and recipe; so their losses are compared, too.
`plan` says who trains what, `protocol` how a contender is told and answers, `text` what all of them read, `runner`
starts them one after the other, and `board` and `report` are what is made of their answers. `contender` is the
program; its `trainer`, the only module that knows Megatron, has its weights from `weights` and its times from
`stopwatch`.
"""
