"""One hand-made row (or the consecutive rows of one prompt) for every registered row shape, and for known sets."""

from typing import Any

from mlxdpo.data.fields import Row
from mlxdpo.data.formats import FORMATS, Items, check_columns, convert, detect


def turns(*contents: str) -> list[dict[str, str]]:
    """User and assistant turns in alternation."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


def items_of(rows: list[dict[str, Any]], name: str | None = None) -> Items:
    """What a list of raw rows gives under their detected or the named shape."""
    shape = FORMATS[name] if name else detect(rows[0])
    for row in rows:
        check_columns(shape, row)
    return convert(shape, [Row(f"x.jsonl:{n}", row) for n, row in enumerate(rows, 1)])


FIXTURES: dict[str, list[dict[str, Any]]] = {
    "cai": [{"init_prompt": "Hi?", "init_response": "Bad.", "revision_response": "Good."}],
    "hh": [
        {
            "chosen": "\n\nHuman: Hi?\n\nAssistant: Yes?\n\nHuman: Go on.\n\nAssistant: I think so.",
            "rejected": "\n\nHuman: Hi?\n\nAssistant: Yes?\n\nHuman: Go on.\n\nAssistant: I doubt it.",
        }
    ],
    "shp": [{"history": "Hi?", "human_ref_A": "Bad.", "human_ref_B": "Good.", "labels": 0, "score_ratio": 2.5}],
    "strength": [{"prompt": "Hi?", "response_1": "Bad.", "response_2": "Good.", "preference_strength": 2}],
    "ratings": [
        {"prompt": "Hi?", "response": "Bad.", "helpfulness": 1, "verbosity": 2},
        {"prompt": "Hi?", "response": "Good.", "helpfulness": 4, "verbosity": 3},
    ],
    "ranked": [{"prompt": "Hi?", "completions": ["Bad.", "Good."], "scores": [0.1, 0.9]}],
    "unpaired": [{"prompt": "Hi?", "completion": "Good.", "label": True}],
    "completion": [{"prompt": "Hi?", "completion": "Good."}],
    "system": [{"system": "Be kind.", "prompt": "Hi?", "chosen": "Good.", "rejected": "Bad."}],
    "text": [{"prompt": "Hi?", "chosen": "Good.", "rejected": "Bad."}],
    "orca": [{"system": "", "question": "Hi?", "chosen": "Good.", "rejected": "Bad."}],
    "messages": [
        {"prompt": turns("Hi?"), "chosen": turns("", "Good.")[1:], "rejected": turns("", "Bad.")[1:]},
    ],
    "turns": [{"prompt": "Hi?", "chosen": turns("Hi?", "Good."), "rejected": turns("Hi?", "Bad.")}],
    "implicit": [{"chosen": turns("Hi?", "Good."), "rejected": turns("Hi?", "Bad.")}],
    "conversation": [{"messages": turns("Hi?", "Good.")}],
    "steps": [{"prompt": "Hi?", "steps": [{"chosen": "Good.", "rejected": "Bad."}, {"role": "tool", "content": "1"}]}],
    "tree": [{"trajectory": [{"from": "user", "value": "Hi?"}], "chosen": "Good.", "rejected": "Bad."}],
    "step_labels": [{"messages": turns("Hi?", "Good."), "labels": [True]}],
    "step_rewards": [{"messages": turns("Hi?", "Good."), "rewards": [0.5]}],
}

_TURNS = {"chosen": turns("Hi?", "Good."), "rejected": turns("Hi?", "Bad.")}
_TEXTS = {"chosen": "Good.", "rejected": "Bad."}

# Column layouts as the cards of the data sets give them, and the shape each must be read as.
KNOWN_SETS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "openbmb/UltraInteract_pair": (
        "tree",
        [
            {"id": "7_0_1", "parent_id": "7", "task": "Math", "dataset": "MATH"}
            | {"trajectory": [{"from": "user", "value": "Hi?"}], "chosen": "Good.", "rejected": "Bad."}
        ],
    ),
    "HuggingFaceH4/ultrafeedback_binarized": (
        "turns",
        [
            {"prompt": "Hi?", "prompt_id": "7", **_TURNS, "messages": turns("Hi?", "Good."), "score_chosen": 8.0}
            | {"score_rejected": 5.0}
        ],
    ),
    "trl-lib/ultrafeedback_binarized": ("implicit", [_TURNS | {"score_chosen": 8.0, "score_rejected": 5.0}]),
    "argilla/dpo-mix-7k": ("implicit", [_TURNS | {"dataset": "x", "chosen_rating": 5.0, "rejected_rating": 4.0}]),
    "argilla/distilabel-capybara-dpo-7k-binarized": (
        "turns",
        [{"source": "x", "conversation": [], "prompt": "Hi?", **_TURNS, "rating_chosen": 5, "rating_rejected": 2}],
    ),
    "argilla/ultrafeedback-binarized-preferences-cleaned": (
        "turns",
        [{"source": "x", "prompt": "Hi?", **_TURNS, "chosen-rating": 5.0, "rejected-rating": 4.0}],
    ),
    "Intel/orca_dpo_pairs": ("orca", [{"system": "", "question": "Hi?"} | _TEXTS]),
    "jondurbin/truthy-dpo-v0.1": ("system", [{"id": "1", "source": "x", "system": "", "prompt": "Hi?"} | _TEXTS]),
    "mlabonne/orpo-dpo-mix-40k": ("turns", [{"source": "x", **_TURNS, "prompt": "Hi?", "question": "Hi?"}]),
    "stanfordnlp/SHP": (
        "shp",
        [{"post_id": "1", "domain": "d", "score_A": 1, "score_B": 9, "score_ratio": 9.0} | FIXTURES["shp"][0]],
    ),
    "trl-lib/tldr-preference": ("text", [{"prompt": "POST: Hi?\n\nTL;DR:"} | _TEXTS]),
    "trl-lib/kto-mix-14k": (
        "unpaired",
        [{"prompt": turns("Hi?"), "completion": turns("", "Good.")[1:], "label": True}],
    ),
    "argilla/kto-mix-15k": (
        "unpaired",
        [{"dataset": "x", "prompt": "Hi?", "completion": turns("Hi?", "Good."), "label": True, "rating": 5.0}],
    ),
    "snorkelai/Snorkel-Mistral-PairRM-DPO-Dataset": (
        "turns",
        [{"prompt_id": "1", "prompt": "Hi?", **_TURNS, "all_generated_responses": ["a"], "all_rm_scores": [1.0]}],
    ),
    "HuggingFaceH4/cai-conversation-harmless": (
        "cai",
        [{"index": 1, "prompt": "Hi?", "messages": [], **_TURNS} | FIXTURES["cai"][0]],
    ),
    "nvidia/HelpSteer2": (
        "ratings",
        [row | {"correctness": 1, "coherence": 1, "complexity": 1} for row in FIXTURES["ratings"]],
    ),
    "nvidia/HelpSteer2 preference": (
        "strength",
        [{"split": "train", "preference_statement": "b", "preference_elaboration": "c"} | FIXTURES["strength"][0]],
    ),
    "ShareGPT turns": (
        "implicit",
        [
            {
                name: [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": said}]
                for name, said in (("chosen", "Good."), ("rejected", "Bad."))
            }
        ],
    ),
}
