"""A model meets a batch: log-probabilities, each distinct token computed once."""
