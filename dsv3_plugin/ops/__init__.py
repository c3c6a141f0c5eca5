"""The operations: the contract in words and as a torch reference that is read as the specification.

A contract fixes inputs, outputs, the dtype at each boundary, the order of every sum, where it rounds and how
ties break. A kernel is any implementation that gives the same bits on its kind of device. On a CPU the
references below *are* the arithmetic: they use only operations whose bits depend neither on the number of rows,
nor on their neighbours, nor on the position in memory (`tile`, `elementary`).

Each module that declares operations (`operation`) holds all of them that is not a kernel: contract, reference, gradient
and random cases.
"""
