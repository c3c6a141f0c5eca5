"""The conformance suite: proves that engines print the same logits, bit for bit.

Engines cannot share an environment, so each runs as a program of its own, a *testee*, that talks to the suite through
files (`protocol`). The suite makes the cases (`cases`), starts the testees (`runner`), compares bit patterns
(`compare`) and reports (`report`).
"""
