"""The `dsv3` command, the doctor and the measurements: on top of everything, imported by nothing."""
