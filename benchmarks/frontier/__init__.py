"""The controlled-sentiment experiment of the DPO paper (arXiv 2305.18290, figure 2 left) in small, on SmolLM2.

    python -m benchmarks.frontier --out runs/frontier --docs

Reward against sequence KL on held-out openings, at checkpoints of DPO at four betas, IPO, KTO, imitation of the
preferred, PPO, RLOO and best-of-n; three seeds, a second judge, a control with shuffled labels. More: docs/frontier.md.
"""
