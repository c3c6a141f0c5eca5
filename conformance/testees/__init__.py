"""The testees that ship with the suite: one program an engine, run by the engine's own Python."""
