"""Beginnings of short texts for the demo: five to eight neutral words; the continuation sets the mood.

Hand-written templates times hand-written subjects. Some subjects are held out with all their openings, so a
held-out text is about something that no training text is about.
"""

from __future__ import annotations

from typing import NamedTuple

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
