"""Kernel providers: implementations that meet the contracts of `dsv3_plugin.ops` on other devices, and know no model."""
