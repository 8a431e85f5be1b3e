"""mlxdpo against mlx-lm-lora, soup-cli and TRL on one machine: seconds of a step, memory, and proof that all agree.

    python -m benchmarks.peers --json results.json          install the peers, run everything, print a table
    python -m benchmarks.peers --from results.json --docs   write docs/evidence/benchmarks.md and its plot again

How it is fair: every side is a process of its own that keeps its trainer alive, and the sides take their steps in turn,
the order rotating, so that whatever else the machine does hits all alike. All start from the same weights and the same
adapter, see the same token ids of real text, and must report the same loss at each step; where they do not, the
workload is void. Each peer runs its own, untouched training loop.

This package's top level and `sides/protocol.py` need nothing but Python: the peers' environments run them.
"""
