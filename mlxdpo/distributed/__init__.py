"""Several processes, or several Macs, as one run."""
