"""Frameworks of reinforcement learning that host a trainer and servers: what each calls to build our model in its
trainer, to hand its weights on, and to compute log-probabilities. The servers need nothing from here.
"""
