"""The processes that are measured: one module for each side, all speaking `protocol`."""
