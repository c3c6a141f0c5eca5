"""Kernels in Triton (and Gluon, its lower level), one module for each module of `dsv3_plugin.ops`."""
