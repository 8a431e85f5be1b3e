"""Mutation testing: small faults are planted one at a time, and each should make a test fail. See docs/evidence/tests.md."""
