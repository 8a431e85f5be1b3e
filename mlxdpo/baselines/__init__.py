"""What DPO is compared with: PPO and RLOO against a reward. Small and right, not a second product.

    from mlxdpo.baselines.online import Reward, tune_on_samples
    config = load_config("recipe.yaml", {"stage": "ppo"})
    for event in tune_on_samples(config, Reward("length", lambda prompts, answers: [len(a) for a in answers])):
        print(event)

The run directory is like any other: `mlxdpo eval`, `generate`, `compare` and `frontier` read it. Imitation of the
preferred answers is `stage: sft` of `mlxdpo train`.
"""
