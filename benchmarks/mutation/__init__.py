"""Mutation testing: small faults, one at a time; each should make a test fail. See docs/evidence/tests.md."""
