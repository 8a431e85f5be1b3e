"""What the tests' Mac (`pytest --mac`) does otherwise than a CPU, test by test, and why. Everything else is the same.

Keys are node ids, or their beginnings. `DIFFERENT` has to fail there; `ROUNDED` may, by how a processor rounds.
"""
