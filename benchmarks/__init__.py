"""Measurements that are too long for the test suite; each file says what it measures and how to run it."""
