"""Pure numbers: arrays in, estimates with intervals out."""
