"""The programs that are measured, and the reference whose logits theirs are compared with."""
