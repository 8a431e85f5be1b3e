"""The Data tab: pairs, looked at and edited."""
