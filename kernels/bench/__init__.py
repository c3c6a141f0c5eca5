"""The scoreboard: this package's kernels beside the best public ones, and the tuning that follows from it."""
