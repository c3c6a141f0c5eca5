"""Comparing kernels with the definition of their arithmetic, bit for bit, and certifying those that are equal."""
