"""What is trained and measured: arms (a method, its strength, a seed) and how much of each a budget allows."""

from __future__ import annotations

from typing import Any, NamedTuple

Settings = dict[str, Any]


class Method(NamedTuple):
    """A way to tune. `recipe` is laid over the demo's; `strengths` are betas, or what a nat of KL costs (ppo, rloo);
    `points` checkpoints are measured; `lr` is the peak learning rate."""

    title: str
    recipe: Settings
    strengths: tuple[float, ...]
    online: bool = False
    labels: str = "bundled_labels"
    points: int = 2
    lr: float = 5e-4


PAIRED: Settings = {"train": {"batch_size": 8}}
# 32 continuations a step. PPO passes over them three times; RLOO moves once a batch, hence its larger step.
PPO: Settings = {
    "stage": "ppo",
    "train": {"batch_size": 8, "gradient_accumulation": 2},
    "rollout": {"samples": 2, "max_tokens": 24, "epochs": 3, "minibatches": 2},
}
RLOO: Settings = {"stage": "rloo", "train": {"batch_size": 8}, "rollout": {"samples": 4, "max_tokens": 24}}
METHODS: dict[str, Method] = {
    "dpo": Method("DPO", PAIRED, (0.05, 0.1, 1.0, 5.0), points=3),
    "ipo": Method("IPO", PAIRED | {"loss": {"name": "ipo"}}, (0.1,)),
    # A pair is two thumbs: as many completions a step as in the other arms.
    "kto": Method("KTO", {"train": {"batch_size": 16}, "loss": {"name": "kto"}}, (0.1,)),
    "preferred": Method("preferred only", PAIRED | {"stage": "sft"}, (0.0,)),
    "ppo": Method("PPO", PPO, (0.02, 0.1), online=True, points=3),
    "rloo": Method("RLOO", RLOO, (0.05,), online=True, lr=1.5e-3),
    "shuffled": Method("DPO, labels shuffled", PAIRED, (0.1,), labels="shuffled"),
}


class Arm(NamedTuple):
    """One run. `name` is its folder."""

    method: str
    strength: float
    seed: int

    @property
    def name(self) -> str:
        """Short, and unique among the arms."""
        return f"{self.method}-{self.strength:g}-seed{self.seed}"


class Budget(NamedTuple):
    """How much is spent. A change of it belongs into a folder of its own: points would not be comparable.

    methods    which, with fewer strengths where they are named
    seeds      runs of each arm
    openings   held-out openings, `samples` continuations of each at a checkpoint, `pool` of the untuned model
    steps      optimizer steps of pair methods; rounds: batches of own samples of online ones
    points     most checkpoints measured of a run
    """

    methods: dict[str, tuple[float, ...]]
    seeds: tuple[int, ...] = (0, 1, 2)
    openings: int = 48
    samples: int = 1
    pool: int = 16
    steps: int = 24
    rounds: int = 12
    points: int = 3

    def arms(self) -> list[Arm]:
        """All runs, seed by seed, so that what is stopped early holds whole seeds."""
        return [
            Arm(method, strength, seed)
            for seed in self.seeds
            for method, strengths in self.methods.items()
            for strength in strengths
        ]

    def pace(self, arm: Arm) -> tuple[int, int]:
        """Steps of an arm, and after how many of them a checkpoint is measured."""
        method = METHODS[arm.method]
        steps = self.rounds if method.online else self.steps
        return steps, max(1, steps // min(method.points, self.points))

    def checkpoints(self, arm: Arm) -> list[int]:
        """The steps at which an arm is measured. Where it was stopped it has other checkpoints too."""
        steps, every = self.pace(arm)
        return sorted({*range(every, steps + 1, every), steps})


FULL = Budget({name: method.strengths for name, method in METHODS.items()})
SMALL = Budget(
    {"dpo": (0.1,), "rloo": (0.05,)},
    seeds=(0,),
    openings=8,
    pool=2,
    steps=2,
    rounds=1,
    points=1,
)
BUDGETS = {"full": FULL, "small": SMALL}


def recipe(arm: Arm, budget: Budget, model: str) -> Settings:
    """What an arm changes in the demo's recipe; data and out are the caller's."""
    method = METHODS[arm.method]
    given = {name: dict(value) if isinstance(value, dict) else value for name, value in method.recipe.items()}
    given["model"] = {"path": model}
    given["optim"] = {"lr": method.lr}
    steps, save = budget.pace(arm)
    given["train"] |= {
        "seed": arm.seed,
        "steps": steps,
        "save_every": save,
        "keep_checkpoints": 99,
        "epochs": 99,
        "eval_every": 0,
    }
    if method.online:
        given["rollout"] |= {"kl": arm.strength}
        given["loss"] = {"beta": 0.1}
    elif given.get("stage") != "sft":
        given["loss"] = given.get("loss", {}) | {"beta": arm.strength}
    return given
