"""Instructions whose keeping a few lines of code decide: how to write an answer, and in which format."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable

from mlxdpo_eval.retained.check import RetainedCheck

EACH = 20  # items of each kind

Passes = Callable[[str], bool]
Task = tuple[str, Passes]
"""The request, and what reads the answer."""

QUESTIONS = (
    "What colour is grass?", "Name an animal that can fly.", "What do people do in a library?",
    "Why do people wear coats?", "What is a bridge for?", "Name a fruit.", "What happens when ice gets warm?",
    "Where do fish live?", "What do bees make?", "Why do we sleep?", "What is a clock for?", "Name a tool.",
    "What is a map for?", "Name a musical instrument.", "What do firemen do?", "Why do plants need rain?",
    "What is honey used for?", "Name a thing made of wood.", "Where do people buy stamps?", "What is a pen for?",
)  # fmt: skip
WORDS = ("river", "apple", "window", "garden", "paper", "silver", "mountain", "candle", "orange", "bottle", "forest",
         "button", "ladder", "yellow", "harbour", "pencil", "copper", "island", "kettle", "meadow")  # fmt: skip
SENTENCES = (
    "The boat left the harbour at noon.", "Two cups stand on the table.", "Rain fell on the old roof.",
    "She found a key under the mat.", "The train was eleven minutes late.", "His coat is dark green.",
    "We planted seven trees last spring.", "A bell rang twice in the tower.", "The soup needs more salt.",
    "They walked home along the river.", "The lamp in the hall is broken.", "Nine geese crossed the road.",
    "My brother repairs old radios.", "The bakery opens at six.", "Snow covered the narrow path.",
    "A letter arrived from Lisbon.", "The cat slept on the warm stove.", "We ate lunch under the oak.",
    "The museum is closed on Mondays.", "Her bicycle has a red bell.",
)  # fmt: skip
YES_OR_NO = (
    "Is water wet?", "Is fire cold?", "Do cats bark?", "Is a week longer than a day?", "Can stones swim?",
    "Is snow white?", "Do cars have wheels?", "Is ten less than two?", "Do birds lay eggs?", "Is the sun a planet?",
    "Is honey sweet?", "Do fish have feathers?", "Is an hour shorter than a minute?", "Can a horse fly?",
    "Is a lemon sour?", "Do trees have roots?", "Is iron a metal?", "Is the moon made of cheese?", "Do dogs bark?",
    "Is a mouse bigger than a cow?",
)  # fmt: skip


AVOIDED = (
    ("the sea", "water"), ("winter", "cold"), ("a dog", "animal"), ("the sun", "light"), ("a school", "learn"),
    ("a baker", "bread"), ("a garden", "plants"), ("a train", "rails"), ("sugar", "sweet"), ("a friend", "person"),
    ("a lake", "water"), ("a desert", "sand"), ("a library", "books"), ("a kitchen", "food"), ("a farm", "animals"),
    ("a bicycle", "wheels"), ("the moon", "night"), ("a piano", "music"), ("a doctor", "sick"), ("a bird", "wings"),
)  # fmt: skip


def words_in(text: str) -> list[str]:
    """The words of a text, without punctuation."""
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text)


def instruction_checks(draw: random.Random) -> list[RetainedCheck]:
    """Sixteen ways in which an answer may be asked for, and twelve formats, most of them read by other programs."""
    tasks = [kind(draw, i) for kind in (*INSTRUCTIONS, *FORMATS) for i in range(EACH)]
    return [RetainedCheck("instructions and formats", asked, passes=passes) for asked, passes in tasks]


def _question(draw: random.Random, i: int) -> str:
    return QUESTIONS[i % len(QUESTIONS)]


def _capitals(draw: random.Random, i: int) -> Task:
    asked = f"{_question(draw, i)} Write your whole answer in capital letters."
    return asked, lambda text: text.isupper()


def _lowercase(draw: random.Random, i: int) -> Task:
    asked = f"{_question(draw, i)} Write your whole answer in lowercase, without a single capital letter."
    return asked, lambda text: text.islower()


def _one_word(draw: random.Random, i: int) -> Task:
    return f"{_question(draw, i)} Answer with exactly one word.", lambda text: len(words_in(text)) == 1


def _word_count(draw: random.Random, i: int) -> Task:
    count = draw.randint(3, 6)
    return f"{_question(draw, i)} Answer with exactly {count} words.", lambda text: len(words_in(text)) == count


def _opening_word(draw: random.Random, i: int) -> Task:
    word = draw.choice(("Indeed", "Usually", "Often", "Well", "Normally"))
    return f'{_question(draw, i)} Begin your answer with the word "{word}".', lambda text: text.startswith(word)


def _without_comma(draw: random.Random, i: int) -> Task:
    asked = f"{_question(draw, i)} Answer in one sentence and use no comma."
    return asked, lambda text: bool(text) and "," not in text


def _with_word(draw: random.Random, i: int) -> Task:
    word = WORDS[i]
    asked = f'Write one short sentence about a holiday. It must contain the word "{word}".'
    return asked, lambda text: word in map(str.lower, words_in(text))


def _word_twice(draw: random.Random, i: int) -> Task:
    word = WORDS[-1 - i]
    asked = f'Write one short sentence that contains the word "{word}" exactly two times.'
    return asked, lambda text: list(map(str.lower, words_in(text))).count(word) == 2


def _yes_or_no(draw: random.Random, i: int) -> Task:
    return f"{YES_OR_NO[i]} Answer only yes or no.", lambda text: text.lower().strip(" .!\"'") in ("yes", "no")


def _repeat(draw: random.Random, i: int) -> Task:
    sentence = SENTENCES[i]
    return f"Repeat this sentence exactly and write nothing else: {sentence}", lambda text: text.strip('"') == sentence


def _reverse(draw: random.Random, i: int) -> Task:
    given = draw.sample(WORDS, 3)
    asked = f"Write these three words in reverse order, separated by spaces, and nothing else: {' '.join(given)}"
    return asked, lambda text: words_in(text) == given[::-1]


def _alphabetical(draw: random.Random, i: int) -> Task:
    given = draw.sample(WORDS, 3)
    asked = f"Sort these three words by the alphabet. Write only the words, separated by commas: {', '.join(given)}"
    return asked, lambda text: words_in(text) == sorted(given)


def _quoted(draw: random.Random, i: int) -> Task:
    asked = f"{_question(draw, i)} Put your whole answer in double quotes."
    return asked, lambda text: len(text) > 2 and text[0] in '"“' and text[-1] in '"”'


def _as_question(draw: random.Random, i: int) -> Task:
    return f"Ask me one question about the word: {WORDS[i]}. Write only it.", lambda text: text.endswith("?")


def _avoided_word(draw: random.Random, i: int) -> Task:
    thing, avoided = AVOIDED[i]
    asked = f'Describe {thing} in one short sentence without the word "{avoided}".'
    return asked, lambda text: bool(text) and avoided not in map(str.lower, words_in(text))


def _closing_words(draw: random.Random, i: int) -> Task:
    closing = draw.choice(("That is all.", "End of answer.", "Thank you."))
    asked = f"{_question(draw, i)} Answer in one short sentence, then end with exactly these words: {closing}"
    return asked, lambda text: text.endswith(closing) and len(text) > len(closing)


INSTRUCTIONS = (
    _capitals, _lowercase, _one_word, _word_count, _opening_word, _without_comma, _with_word, _word_twice, _yes_or_no,
    _repeat, _reverse, _alphabetical, _quoted, _as_question, _avoided_word, _closing_words,
)  # fmt: skip


def parsed_json(text: str) -> object:
    """The JSON value of an answer, also inside a code fence; None for anything else."""
    inside = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text.strip(), re.DOTALL)
    try:
        return json.loads(inside[1] if inside else text)
    except ValueError:
        return None


def _json_object(draw: random.Random, i: int) -> Task:
    name, age = draw.choice(("Ana", "Ben", "Chloe", "David")), draw.randint(20, 60)
    asked = f'Write a JSON object with the keys "name" and "age" for {name}, who is {age}. Write only the JSON.'
    return asked, lambda text: parsed_json(text) == {"name": name, "age": age}


def _json_list(draw: random.Random, i: int) -> Task:
    given = draw.sample(WORDS, 3)
    asked = f"Write these words as a JSON list of strings, and nothing else: {', '.join(given)}"
    return asked, lambda text: parsed_json(text) == given


def _csv_line(draw: random.Random, i: int) -> Task:
    given = draw.sample(WORDS, 4)
    asked = f"Write these words as one CSV line with semicolons and no spaces, and nothing else: {' '.join(given)}"
    return asked, lambda text: text == ";".join(given)


def _numbered_list(draw: random.Random, i: int) -> Task:
    count, things = 2 + i // 5, ("animals", "colours", "fruits", "tools", "cities")[i % 5]
    asked = f"Write a numbered list of exactly {count} {things}, one on each line. Write only the list."
    lines = re.compile(rf"(?:\d+[.)] [^\n]+\n?){{{count}}}")
    return asked, lambda text: lines.fullmatch(text) is not None


def _bullets(draw: random.Random, i: int) -> Task:
    count, things = 3 + i // 5, ("birds", "sports", "drinks", "games", "flowers")[i % 5]
    asked = f'Write a list of exactly {count} {things}, one on each line, each line beginning with "- ". Only the list.'
    lines = re.compile(rf"(?:- [^\n]+\n?){{{count}}}")
    return asked, lambda text: lines.fullmatch(text) is not None


MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
          "November", "December")  # fmt: skip


def _iso_date(draw: random.Random, i: int) -> Task:
    day, year = draw.randint(1, 28), draw.randint(1950, 2020)
    asked = f"Write {day} {MONTHS[i % 12]} {year} as YYYY-MM-DD and nothing else."
    return asked, lambda text: text == f"{year}-{i % 12 + 1:02}-{day:02}"


def _clock(draw: random.Random, i: int) -> Task:
    hour, minute = draw.randint(1, 11), draw.randint(10, 59)
    return (
        f"Write {hour}:{minute} pm as 24-hour time HH:MM and nothing else.",
        lambda text: text == f"{hour + 12}:{minute}",
    )


def _two_decimals(draw: random.Random, i: int) -> Task:
    number = draw.randint(2, 80)
    return f"Write the number {number} with two decimals and nothing else.", lambda text: text == f"{number}.00"


def _heading(draw: random.Random, i: int) -> Task:
    word = WORDS[i]
    asked = f'Write the word "{word}" as a Markdown heading of level two and nothing else.'
    return asked, lambda text: text.lower() == f"## {word}"


def _tagged(draw: random.Random, i: int) -> Task:
    asked = f"{_question(draw, i)} Write your answer between <answer> and </answer>."
    return asked, lambda text: re.fullmatch(r"<answer>[^<]+</answer>", text) is not None


def _dashes(draw: random.Random, i: int) -> Task:
    digits = str(draw.randint(1000, 9999))
    return (
        f"Write the digits of {digits} with dashes between them and nothing else.",
        lambda text: text == "-".join(digits),
    )


def _key_value(draw: random.Random, i: int) -> Task:
    word, count = WORDS[i], draw.randint(2, 9)
    asked = f"Write two lines and nothing else. The first is item: {word}. The second is count: {count}."
    return asked, lambda text: [line.strip(" .") for line in text.splitlines()] == [f"item: {word}", f"count: {count}"]


FORMATS = (
    _json_object, _json_list, _csv_line, _numbered_list, _bullets, _iso_date, _clock, _two_decimals, _heading, _tagged,
    _dashes, _key_value,
)  # fmt: skip
