"""Questions with one right answer among four: arithmetic, generated, and facts, from tables of things that go together.

The wrong answers of a calculation are near misses of the kind people make; those of a fact are the right answers of
other
rows of its table, so that all four are of one kind and about one length.
"""

from __future__ import annotations

import random

from mlxdpo_eval.retained.check import RetainedCheck

EACH = 15  # calculations of each kind
OPTIONS = 4

Calculation = tuple[str, int, tuple[int, ...]]
"""Question, right answer, and wrong ones that people arrive at."""


def arithmetic_checks(draw: random.Random) -> list[RetainedCheck]:
    """Calculations of eight kinds, each asked once."""
    found: dict[str, RetainedCheck] = {}
    for kind in (_sum, _difference, _product, _quotient, _next_number, _share_of, _purchase, _remainder):
        for _ in range(EACH):
            question, right, near = kind(draw)
            while question in found:
                question, right, near = kind(draw)
            wrong = [
                n for n in dict.fromkeys((*near, right + 1, right + 2, right + 10, right - 1)) if n not in (right,)
            ]
            options = (right, *[n for n in wrong if n >= 0][: OPTIONS - 1])
            text = f"{question} Answer with the number only."
            found[question] = RetainedCheck("arithmetic", text, tuple(map(str, options)))
    return list(found.values())


def _sum(draw: random.Random) -> Calculation:
    a, b = draw.randint(12, 89), draw.randint(12, 89)
    return f"What is {a} + {b}?", a + b, (a + b - 10, a + b + 1, a + b + 10)


def _difference(draw: random.Random) -> Calculation:
    a, b = draw.randint(50, 99), draw.randint(11, 48)
    return f"What is {a} - {b}?", a - b, (a - b + 10, a - b - 1, a + b)


def _product(draw: random.Random) -> Calculation:
    a, b = draw.randint(3, 12), draw.randint(3, 12)
    return f"What is {a} times {b}?", a * b, (a * (b + 1), a * b - 2, a + b)


def _quotient(draw: random.Random) -> Calculation:
    a, b = draw.randint(3, 12), draw.randint(3, 12)
    return f"What is {a * b} divided by {b}?", a, (a + 1, a - 1, a + 2)


def _next_number(draw: random.Random) -> Calculation:
    start, step = draw.randint(1, 20), draw.randint(2, 9)
    shown = [start + i * step for i in range(4)]
    right = start + 4 * step
    return f"Which number comes next: {', '.join(map(str, shown))}?", right, (right + 1, right - 1, right + step)


def _share_of(draw: random.Random) -> Calculation:
    percent, whole = draw.choice((10, 20, 25, 50)), 20 * draw.randint(2, 20)
    right = percent * whole // 100
    return f"What is {percent} % of {whole}?", right, (right * 2, right + 5, right + 10)


def _purchase(draw: random.Random) -> Calculation:
    count, price, thing = draw.randint(2, 9), draw.randint(2, 9), draw.choice(("pens", "cups", "maps", "hats", "lamps"))
    paid = count * price + draw.randint(1, 20)
    right = paid - count * price
    asked = f"{count} {thing} cost {price} coins each. You pay with {paid} coins. How many coins do you get back?"
    return asked, right, (paid - price, right + 1, count * price)


def _remainder(draw: random.Random) -> Calculation:
    size, boxes, left = draw.randint(4, 9), draw.randint(3, 9), draw.randint(1, 3)
    total = size * boxes + left
    asked = f"{total} eggs go into boxes of {size}. How many eggs are left over after the last full box?"
    return asked, left, (left + 1, left + 2, boxes)


TABLES: dict[str, str] = {
    "What is the capital of {}?": """France Paris; Italy Rome; Japan Tokyo; Egypt Cairo; Spain Madrid; Greece Athens;
        Norway Oslo; Kenya Nairobi; Peru Lima; Cuba Havana; Austria Vienna; Ireland Dublin; Poland Warsaw; Russia
        Moscow;
        Portugal Lisbon; Sweden Stockholm; Hungary Budapest; Thailand Bangkok; Canada Ottawa; Germany Berlin""",
    "What is the chemical symbol of {}?": """hydrogen H; helium He; carbon C; nitrogen N; oxygen O; sodium Na; iron Fe;
        copper Cu; silver Ag; gold Au; lead Pb; tin Sn; zinc Zn; calcium Ca; potassium K; mercury Hg""",
    "What is a young {} called?": """dog puppy; cat kitten; cow calf; sheep lamb; horse foal; pig piglet; goat kid;
        bear cub; deer fawn; duck duckling; goose gosling; frog tadpole; swan cygnet; chicken chick""",
    "What is the opposite of {}?": """hot cold; big small; fast slow; light dark; early late; full empty; hard soft;
        high low; happy sad; open closed; rich poor; young old; wet dry; strong weak; loud quiet; near far; true false;
        thick thin; clean dirty; cheap expensive""",
    "What is the past tense of the verb {}?": """go went; see saw; take took; write wrote; eat ate; run ran; buy bought;
        think thought; sing sang; fly flew; begin began; know knew; drive drove; teach taught; swim swam; break
        broke""",
    "What is the plural of {}?": """mouse mice; child children; foot feet; tooth teeth; man men; goose geese; leaf
        leaves;        knife knives; woman women; wolf wolves; ox oxen; shelf shelves; city cities; box boxes""",
    "On which continent is {}?": """France Europe; Japan Asia; Kenya Africa; India Asia; Egypt Africa; Poland Europe;
        Nigeria Africa; Vietnam Asia; Sweden Europe; Ghana Africa; Nepal Asia; Greece Europe; Chile America; Canada
        America""",
    "Which sense uses the {}?": """eye sight; ear hearing; nose smell; tongue taste; skin touch""",
    "How many sides does a {} have?": """triangle three; square four; pentagon five; hexagon six; octagon eight""",
    "Which day comes right after {}?": """Monday Tuesday; Tuesday Wednesday; Wednesday Thursday; Thursday Friday;
        Friday Saturday; Saturday Sunday; Sunday Monday""",
    "Which month comes right after {}?": """January February; March April; April May; June July; August September;
        September October; October November; November December""",
    "What does a person who works as a {} mainly work with?": """baker bread; butcher meat; tailor clothes; carpenter
        wood;        dentist teeth; florist flowers; librarian books; plumber pipes; pilot aircraft; mason stone""",
}  # fmt: skip


def fact_checks(draw: random.Random) -> list[RetainedCheck]:
    """A question on every row of every table, three answers of other rows beside the right one."""
    return [check for asked, table in TABLES.items() for check in _table_checks(asked, table, draw)]


def _table_checks(asked: str, table: str, draw: random.Random) -> list[RetainedCheck]:
    pairs = [tuple(row.split()) for row in table.split(";")]
    answers = sorted({answer for _, answer in pairs})
    checks: list[RetainedCheck] = []
    for subject, right in pairs:
        wrong = draw.sample([a for a in answers if a not in (right, subject)], min(OPTIONS - 1, len(answers) - 1))
        checks.append(RetainedCheck("facts", asked.format(subject), (right, *wrong)))
    return checks
