"""Checkpoints in Hugging Face layout: names, a reader that refuses what is wrong, a loader, a maker of test models."""
