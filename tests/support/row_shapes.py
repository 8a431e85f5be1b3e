"""One hand-made row (or the consecutive rows of one prompt) for every registered row shape, and for known sets."""

from typing import Any

from mlxdpo.data.fields import Row
from mlxdpo.data.formats import FORMATS, Items, check_columns, convert, detect
from mlxdpo.data.report import BadRow


def turns(*contents: str) -> list[dict[str, str]]:
    """User and assistant turns in alternation."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


def items_of(rows: list[dict[str, Any]], name: str | None = None) -> Items:
    """What a list of raw rows gives under their detected or the named shape."""
    shape = FORMATS[name] if name else detect(rows[0])
    flat = [shape.flattened(row) for row in rows]
    for row in flat:
        check_columns(shape, row)
    found = convert(shape, [Row(f"x.jsonl:{n}", row) for n, row in enumerate(flat, 1)])
    return [item for item in found if not isinstance(item, BadRow)]


def with_column(row: dict[str, Any], name: str, *value: Any) -> dict[str, Any]:
    """A row with another value in a column (`a.b`: in the object of column a), or without it where none is given."""
    outer, _, inner = name.partition(".")
    if inner:
        value = (with_column(row[outer], inner, *value),)
    kept = {n: v for n, v in row.items() if n != outer}
    return {n: value[0] if n == outer else v for n, v in row.items()} if value else kept


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
    "openai": [
        {
            "input": {"messages": turns("Hi?")},
            "preferred_output": turns("", "Good.")[1:],
            "non_preferred_output": turns("", "Bad.")[1:],
        }
    ],
    "helpsteer3": [{"context": turns("Hi?"), "response1": "Bad.", "response2": "Good.", "overall_preference": 1}],
    "safe_rlhf": [{"prompt": "Hi?", "response_0": "Bad.", "response_1": "Good.", "better_response_id": 1}],
    "webgpt": [
        {"question": {"full_text": "Hi?"}, "answer_0": "Bad.", "answer_1": "Good.", "score_0": -0.5, "score_1": 0.5}
    ],
    "summaries": [
        {
            "info": {"post": "Hi?", "title": "Tea.", "subreddit": "cooking"},
            "summaries": [{"text": "Bad."}, {"text": "Good."}],
            "choice": 1,
        }
    ],
    "alpaca_farm": [{"instruction": "Hi?", "input": "", "output_1": "Bad.", "output_2": "Good.", "preference": 2}],
    "arena": [
        {"conversation_a": turns("Hi?", "Good."), "conversation_b": turns("Hi?", "Bad."), "winner": "model_a"},
    ],
    "battle": [{"prompt": "Hi?", "response_a": "Bad.", "response_b": "Good.", "winner": "model_b"}],
    "arena_flags": [
        {"prompt": '["Hi?"]', "response_a": '["Bad."]', "response_b": '["Good."]'}
        | {"winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}
    ],
    "stack_exchange": [{"question": "Hi?", "response_j": "Good.", "response_k": "Bad."}],
    "nectar": [
        {
            "prompt": "\n\nHuman: Hi?\n\nAssistant: ",
            "answers": [{"answer": "Bad.", "rank": 2.0}, {"answer": "Good.", "rank": 1.0}],
        }
    ],
    "ultrafeedback": [
        {
            "instruction": "Hi?",
            "completions": [{"response": "Bad.", "overall_score": 3}, {"response": "Good.", "overall_score": 8.5}],
        }
    ],
    "openai_messages": [{"messages": turns("Hi?"), "chosen": turns("", "Good.")[1], "rejected": turns("", "Bad.")[1]}],
    "sharegpt": [
        {
            "conversations": [{"from": "human", "value": "Hi?"}],
            "chosen": {"from": "gpt", "value": "Good."},
            "rejected": {"from": "gpt", "value": "Bad."},
        }
    ],
    "kto_messages": [{"messages": turns("Hi?", "Good."), "label": True}],
    "kto_sharegpt": [
        {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Good."}], "kto_tag": True}
    ],
    "kto_alpaca": [{"instruction": "Hi?", "input": "", "output": "Good.", "kto_tag": True}],
    "argilla_prompt": [{"prompt": "Hi?", "chosen_response": "Good.", "rejected_response": "Bad."}],
    "argilla": [{"instruction": "Hi?", "chosen_response": "Good.", "rejected_response": "Bad."}],
    "alpaca": [{"instruction": "Hi?", "input": "", "chosen": "Good.", "rejected": "Bad."}],
    "icr": [{"input": "Hi?", "chosen": "Good.", "rejected": "Bad."}],
    "distilabel": [{"instruction": "Hi?", "generations": ["Bad.", "Good."], "ratings": [2, 5]}],
    "alpaca_output": [{"instruction": "Hi?", "input": "", "output": "Good."}],
    "conversations": [{"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Good."}]}],
    "steps": [{"prompt": "Hi?", "steps": [{"chosen": "Good.", "rejected": "Bad."}]}],
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
    "argilla/distilabel-intel-orca-dpo-pairs": (
        "icr",
        [
            {"system": "", "input": "Hi?", **_TEXTS, "generations": ["Good.", "Bad."], "order": ["A", "B"]}
            | {"rating": [9.0, 7.0], "status": "unchanged", "chosen_score": 9.0}
        ],
    ),
    "lmsys/chatbot_arena_conversations": (
        "arena",
        [{"question_id": "1", "model_a": "x", "model_b": "y", "judge": "j", "turn": 1} | FIXTURES["arena"][0]],
    ),
    "Dahoas/full-hh-rlhf": ("text", [{"prompt": "\n\nHuman: Hi?\n\nAssistant:", "response": "Good."} | _TEXTS]),
    "PKU-Alignment/PKU-SafeRLHF": (
        "safe_rlhf",
        [{"is_response_0_safe": True, "is_response_1_safe": True, "safer_response_id": 0} | FIXTURES["safe_rlhf"][0]],
    ),
    "Axolotl chatml.argilla": ("argilla", [{"system": ""} | FIXTURES["argilla"][0]]),
    "Axolotl chatml.icr": ("icr", [{"system": ""} | FIXTURES["icr"][0]]),
    "Axolotl chatml.ultra": ("turns", [{"system": "", "prompt": "Hi?", **_TURNS}]),
    "Axolotl chatml.argilla_chat": ("implicit", [_TURNS]),
    "LLaMA-Factory Alpaca with history": (
        "alpaca",
        [{"system": "", "history": [["Ho?", "Ha."]]} | FIXTURES["alpaca"][0]],
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

# Shapes of which a row may make several pairs or opinions, each of which may be a repetition.
SEVERAL = {
    "ranked", "nectar", "ultrafeedback", "distilabel", "steps", "step_labels", "step_rewards", "conversation",
    "conversations",
}  # fmt: skip
