"""What becomes of one key of another trainer's recipe, and the few rules that most keys follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from mlxdpo.io.synonyms import SYNONYMS

Keys = Mapping[str, Any]
"""All keys of a recipe of theirs, with their values."""


class KeyOutcome(NamedTuple):
    """`settings` are ours, by dotted name, which a key of theirs sets; `note` says what it was, why it is not needed,
    or what leaving it out changes."""

    kind: Literal["taken", "not needed", "not supported"]
    note: str = ""
    settings: Mapping[str, Any] = {}


Rule = Callable[[str, Any, Keys], KeyOutcome]
"""What becomes of a key: its name, its value, and all keys beside it."""


class Tool(NamedTuple):
    """A trainer: how its files are recognised, what each key becomes, and what it does where a key is absent.

    `usual` are settings of ours with the value that the tool has where the file is silent. `marks` are keys that other
    tools do not have.
    """

    name: str
    title: str
    marks: frozenset[str]
    rules: Mapping[str, Rule]
    usual: Callable[[Keys], Mapping[str, Any]]


def taken(settings: Mapping[str, Any], note: str = "") -> KeyOutcome:
    """A key that sets something here."""
    return KeyOutcome("taken", note, settings)


def to(setting: str, convert: Callable[[Any], Any] = lambda value: value) -> Rule:
    """The same setting under our name; its value through `convert`. A null leaves it unset."""

    def rule(key: str, value: Any, keys: Keys) -> KeyOutcome:
        """The value under our name."""
        return KeyOutcome("not needed", "unset") if value is None else taken({setting: convert(value)})

    return rule


def by_synonym(names: str, convert: Callable[[Any], Any] = lambda value: value) -> dict[str, Rule]:
    """Rules of keys that `io.synonyms` has, with the value through `convert`."""
    return {name: to(SYNONYMS[name], convert) for name in names.split()}


def needless(why: str) -> Rule:
    """The rule of a key that nothing here depends on."""
    return lambda key, value, keys: KeyOutcome("not needed", why)


def effect_of(effect: str) -> Rule:
    """The rule of a key without counterpart: unset, false or 0 it changes nothing, else `effect` is said."""

    def rule(key: str, value: Any, keys: Keys) -> KeyOutcome:
        """Nothing for a key that is off."""
        off = value is None or value is False or value in (0, "", "none", "no", [], {})
        return KeyOutcome("not needed", "off, as here") if off else KeyOutcome("not supported", effect)

    return rule


def unneeded(names: str, why: str) -> dict[str, Rule]:
    """`needless` for several keys."""
    return dict.fromkeys(names.split(), needless(why))


def lost(names: str, effect: str) -> dict[str, Rule]:
    """`effect_of` for several keys."""
    return dict.fromkeys(names.split(), effect_of(effect))


def unknown_key(key: str, value: Any, keys: Keys) -> KeyOutcome:
    """A key that no table has: nothing is made of it, and where it is off nothing is lost."""
    if value is None or value is False:
        return KeyOutcome("not needed", "off")
    return KeyOutcome("not supported", "unknown to import-recipe; its effect is unknown")
