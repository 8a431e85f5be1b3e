"""Rows with exactly the columns of the data sets that examples/ names, as their cards give them; contents made up."""

from typing import Any

SHAPES = {"chat": "turns", "tone": "text", "code": "implicit", "refusals": "turns", "summaries": "text"}
SHAPES |= {"delta": "text", "zephyr": "turns", "smoltulu": "turns", "smollm3": "turns", "olmo3": "implicit"}
"""The row shape each recipe's data set must be read as."""


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"content": question, "role": "user"}, {"content": answer, "role": "assistant"}]


def chat(i: int) -> dict[str, Any]:
    """HuggingFaceH4/ultrafeedback_binarized."""
    question, good = f"How do I boil {i} eggs?", _turns(f"How do I boil {i} eggs?", f"In water, for {i + 5} minutes.")
    return {
        "prompt": question,
        "prompt_id": f"{i:064x}",
        "chosen": good,
        "rejected": _turns(question, "No."),
        "messages": good,
        "score_chosen": 8.5,
        "score_rejected": 6.0,
    }


def tone(i: int) -> dict[str, Any]:
    """mlxdpo/demo/pairs.jsonl."""
    return {
        "prompt": f"On day {i} the train",
        "chosen": " was lovely.",
        "rejected": " was late.",
        "score_chosen": 0.6,
        "score_rejected": -0.3,
        "finish_chosen": "length",
        "finish_rejected": "stop",
        "made": {"model": "SmolLM2-135M-Instruct"},
    }


def code(i: int) -> dict[str, Any]:
    """RLHFlow/CodeUltraFeedback-standard: every two of a task's answers are a row, scores are text."""
    task, answers = f"Add {i // 3} and 1 in Python.", ["print(1)", "x = 1", f"print({i // 3} + 1)"]
    worse, better = [(0, 1), (0, 2), (1, 2)][i % 3]
    return {
        "rejected": _turns(task, answers[worse]),
        "chosen": _turns(task, answers[better]),
        "chosen_score": str(better + 1),
        "rejected_score": str(worse + 1),
    }


def refusals(i: int) -> dict[str, Any]:
    """HuggingFaceH4/cai-conversation-harmless, whose steps are single turns."""
    question = f"How do I pick lock {i}?"
    steps = {
        "init_prompt": question,
        "init_response": "With a pin.",
        "critic_prompt": "What is harmful in this?",
        "critic_response": "It may help a burglar.",
        "revision_prompt": "Write it again without harm.",
        "revision_response": f"Ask a locksmith about lock {i}.",
    }
    roles = {name: "user" if name.endswith("prompt") else "assistant" for name in steps}
    return {
        "index": i,
        "prompt": question,
        **{name: {"content": text, "role": roles[name]} for name, text in steps.items()},
        "messages": _turns(question, steps["revision_response"]),
        "chosen": _turns(question, steps["revision_response"]),
        "rejected": _turns(question, steps["init_response"]),
    }


def summaries(i: int) -> dict[str, Any]:
    """trl-lib/tldr-preference: completions begin with a space."""
    return {
        "prompt": f"SUBREDDIT: r/tests\n\nTITLE: Day {i}\n\nPOST: It rained on day {i}, and I stayed in.\n\nTL;DR:",
        "chosen": f" Rain on day {i}, stayed in.",
        "rejected": " Things happened.",
    }


def delta(i: int) -> dict[str, Any]:
    """What `mlxdpo pairs` writes."""
    return {
        "prompt": f"Name a number above {i}.",
        "chosen": f"{i + 1} is above {i}.",
        "rejected": "Seven.",
        "finish_chosen": "stop",
        "finish_rejected": "stop",
        "tokens_chosen": 6,
        "tokens_rejected": 2,
        "made": {"chosen": {"source": "Qwen/Qwen2.5-3B-Instruct"}, "temperature": 1.0},
    }


def smoltulu(i: int) -> dict[str, Any]:
    """allenai/llama-3.1-tulu-3-8b-preference-mixture."""
    question = f"Add {i} and 3."
    return {
        "id": f"tulu_{i}",
        "source": "made up",
        "prompt": question,
        "chosen": _turns(question, f"{i} + 3 is {i + 3}."),
        "rejected": _turns(question, "Why?"),
    }


def smollm3(i: int) -> dict[str, Any]:
    """HuggingFaceTB/smoltalk2:Preference, with what it leaves empty."""
    question = f"Name a town with {i} letters."
    return {
        "chosen": _turns(question, f"One with {i} letters."),
        "rejected": _turns(question, "Town."),
        "prompt": question,
        "chat_template_kwargs": {
            "custom_instructions": "" if i % 2 else None,
            "enable_thinking": False,
            "python_tools": [],
            "xml_tools": None,
        },
        "source": "made up",
    }


def olmo3(i: int) -> dict[str, Any]:
    """allenai/Dolci-Instruct-DPO."""
    question = f"Say {i} in words."
    return {
        "chosen": _turns(question, f"The number {i}, in words."),
        "rejected": _turns(question, f"{i}"),
        "chosen_model": "a large one",
        "rejected_model": "a small one",
        "prompt_id": f"p{i}",
        "preference_type": "delta",
    }


ROWS = {"delta": delta, "zephyr": chat, "smoltulu": smoltulu, "smollm3": smollm3, "olmo3": olmo3} | {
    "chat": chat,
    "tone": tone,
    "code": code,
    "refusals": refusals,
    "summaries": summaries,
}
