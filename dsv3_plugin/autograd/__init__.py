"""Backward passes: one file for each family of operations, engine-free.

The forward's bits stay those of the bound kernels, whatever provider they come from. The gradient is written out and
computed in plain torch: it is the derivative of what the operation *means*, so it has no contract on its bits, and a
faster one may replace it. `bind.differentiable` puts the two together.
"""
