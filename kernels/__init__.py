"""Kernel providers: implementations of `dsv3_plugin.ops` that meet its contracts on other devices; no model here."""
