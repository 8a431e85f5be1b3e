"""Makes the demo's preference pairs: sample, score, best against worst. The output ships with mlxdpo.

    python -m benchmarks.demo_pairs --seed 0

SmolLM2 continues each opening eight times at temperature 1 (24 tokens, plain text, no chat turn); VADER
scores opening and continuation together; the highest is chosen and the lowest rejected if they lie far enough
apart. One pair per opening: none weighs more than another. It is the DPO paper's controlled sentiment
generation in small (arXiv 2305.18290, section 6.1). About 10 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlxdpo.demo.rewards import REWARDS
from mlxdpo_eval.results import write_lines

SAMPLES, MAX_TOKENS, TEMPERATURE = 8, 24, 1.0
MIN_GAP = 0.5  # of VADER's range of 2: below it the words hardly differ in mood
REWARD = "vader"
BATCH_SIZE = 64

# Beginnings of short texts: five to eight neutral words; the continuation sets the mood. Hand-written templates times
# hand-written subjects. Some subjects are held out with all their openings, so a held-out text is about something
# that no training text is about.
HOLD_OUT_EVERY = 4  # of each group's subjects, beginning with the last one

# No word here may be in a sentiment lexicon: a test asks every reward about every opening.
GROUPS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        (
            "The {} they opened on our street",
            "On Tuesday I went to the {}",
            "An hour at the {} and I",
            "The people who run the {}",
        ),
        "bakery, hotel, gym, library, hardware store, barber shop, campsite, museum, "
        "swimming pool, coffee bar, bookshop, garage, garden centre, youth hostel, pharmacy, "
        "flower shop, cinema, restaurant, train station, zoo",
    ),
    (
        (
            "I bought this {} last month and",
            "After two weeks with the {} I",
            "The {} came in the mail and",
            "My brother looked at my {} and",
        ),
        "laptop, bicycle, blender, backpack, camera, desk lamp, tent, kettle, keyboard, raincoat, "
        "toaster, radio, umbrella, phone case, drill, sofa, ladder, printer, guitar, wristwatch",
    ),
    (
        (
            "Last night I finished the {} and",
            "The middle part of the {} is",
            "The people who made this {} must",
            "In the last minutes of the {}",
        ),
        "film, diary, podcast, documentary, album, photo book, ballet, television series, "
        "audiobook, puppet show, concert, opera, fairy tale, biography, cartoon, musical, "
        "radio report, history lecture, radio drama, travel guide",
    ),
    (
        (
            "When I told my {} about it",
            "The {} looked at me and said",
            "My {} turned out to be",
            "This morning the {} called me and",
        ),
        "neighbour, teacher, doctor, landlord, manager, dentist, roommate, plumber, cousin, "
        "driving instructor, lawyer, accountant, aunt, hairdresser, coach, editor, piano teacher, "
        "babysitter, electrician, grandmother",
    ),
    (
        (
            "When the {} was over we all",
            "On the morning of the {} I",
            "I had waited weeks for the {}",
            "What I remember of the {} is",
        ),
        "wedding, final exam, school trip, job interview, ferry crossing, birthday dinner, "
        "city marathon, move, family reunion, parents' evening, chess tournament, train journey, "
        "choir rehearsal, harvest, board meeting, camping weekend, night flight, house viewing, "
        "driving test, street market",
    ),
    (
        (
            "The {} we had for lunch",
            "I ordered the {} again because",
            "My sister made {} for everyone and",
            "The waiter brought the {} and we",
        ),
        "tomato soup, fish curry, pancakes, mushroom risotto, apple pie, noodle salad, "
        "lentil stew, pizza, scrambled eggs, rice pudding, roast potatoes, pumpkin bread, "
        "cheese plate, onion tart, ravioli, vegetable lasagne, bean burger, carrot cake, tacos, "
        "seafood pasta",
    ),
)


class Openings(NamedTuple):
    """All openings, each once; the two lists share no subject."""

    train: list[str]
    heldout: list[str]


def openings() -> Openings:
    """The demo's openings in a fixed order that mixes the groups."""
    result = Openings([], [])
    for templates, subjects in GROUPS:
        for i, subject in enumerate(reversed(subjects.split(", "))):
            part = result.train if i % HOLD_OUT_EVERY else result.heldout
            part.extend(template.format(subject) for template in templates)
    return result


class Continuation(NamedTuple):
    """One continuation as text, with why it ended ("stop" or "length") and its reward."""

    text: str
    finish: str
    score: float


class RankedPairs(NamedTuple):
    """Pairs as rows, and how many openings gave none for which reason."""

    rows: list[dict[str, Any]]
    left_out: dict[str, int]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write `pairs.jsonl`, `heldout.jsonl` and `prompts.jsonl` into mlxdpo/demo (or --out)."""
    parser = argparse.ArgumentParser(description="Make the demo's preference pairs.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "mlxdpo" / "demo")
    chosen = parser.parse_args(arguments)
    train, heldout = openings()
    samples = sample_continuations([*train, *heldout], chosen.seed)
    for name, part in (("pairs", train), ("heldout", heldout)):
        ranked = best_against_worst(((prompt, samples[prompt]) for prompt in part), provenance(chosen.seed))
        write_lines(chosen.out / f"{name}.jsonl", ranked.rows)
        print(f"{name}: {len(ranked.rows)} pairs of {len(part)} openings; left out: {ranked.left_out or 'none'}")
    write_lines(chosen.out / "prompts.jsonl", [{"prompt": prompt} for prompt in heldout])


def provenance(seed: int) -> dict[str, Any]:
    """What a row was made of."""
    from mlxdpo.model.builtin import NAME

    settings = {"samples": SAMPLES, "max_tokens": MAX_TOKENS, "temperature": TEMPERATURE}
    return {"model": NAME, "reward": REWARD, "seed": seed, **settings}


def sample_continuations(prompts: Sequence[str], seed: int) -> dict[str, list[Continuation]]:
    """`SAMPLES` scored continuations of each prompt; what is not plain text is left out and counted."""
    from mlxdpo.config import ModelConfig
    from mlxdpo.inference.generate import finished
    from mlxdpo.model.policy import load_policy

    policy = load_policy(ModelConfig(path="smollm2", dtype="float32"))
    model, tokenizer = policy.model, policy.tokenizer
    repeated = [prompt for prompt in prompts for _ in range(SAMPLES)]
    ids = {prompt: tokenizer.encode(prompt) for prompt in prompts}
    result: dict[str, dict[int, Continuation]] = {prompt: {} for prompt in prompts}
    left_out: dict[str, int] = {}
    stream = finished(
        model,
        [ids[prompt] for prompt in repeated],
        max_tokens=MAX_TOKENS,
        eos_ids=tokenizer.eos_token_ids,
        temperature=TEMPERATURE,
        seed=seed,
        batch_size=BATCH_SIZE,
    )
    for done, (i, completion) in enumerate(stream, 1):
        text = tokenizer.decode(completion.tokens).rstrip()
        if "\N{REPLACEMENT CHARACTER}" in text:
            _count(left_out, "cut inside a character")
        elif not set(completion.tokens).isdisjoint(tokenizer.all_special_ids):
            _count(left_out, "a special token")
        else:
            score = round(REWARDS[REWARD](repeated[i] + text), 4)
            result[repeated[i]][i] = Continuation(text, completion.finish, score)
        if done % (10 * BATCH_SIZE) == 0:
            print(f"{done} of {len(repeated)} continuations", file=sys.stderr)
    print(f"continuations left out: {left_out or 'none'}", file=sys.stderr)
    # Rows finish in any order; the order of the samples must not depend on it, or ties would.
    return {prompt: [by_index[i] for i in sorted(by_index)] for prompt, by_index in result.items()}


def best_against_worst(
    samples: Iterable[tuple[str, Sequence[Continuation]]], made_of: Mapping[str, Any]
) -> RankedPairs:
    """Best against worst of each prompt; the first wins a tie. Prompts without a clear pair are counted."""
    ranked = RankedPairs([], {})
    for prompt, candidates in samples:
        written = [c for c in candidates if c.text]
        best = max(written, key=lambda c: c.score, default=None)
        worst = min(written, key=lambda c: c.score, default=None)
        if best is None or worst is None:
            _count(ranked.left_out, "no text was sampled")
        elif best.score - worst.score < MIN_GAP:
            _count(ranked.left_out, f"rewards less than {MIN_GAP} apart")
        else:
            ranked.rows.append(_demo_row(prompt, best, worst, made_of))
    return ranked


def _count(counts: dict[str, int], reason: str) -> None:
    counts[reason] = counts.get(reason, 0) + 1


def _demo_row(prompt: str, chosen: Continuation, rejected: Continuation, made_of: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "chosen": chosen.text,
        "rejected": rejected.text,
        "score_chosen": chosen.score,
        "score_rejected": rejected.score,
        "finish_chosen": chosen.finish,
        "finish_rejected": rejected.finish,
        "made": dict(made_of),
    }


if __name__ == "__main__":
    main()
