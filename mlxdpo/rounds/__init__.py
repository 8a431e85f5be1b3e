"""Tuning in rounds: collect, train, measure, again; each round is a run whose parent is the one before."""

from mlxdpo.rounds.story import Hands as Hands
from mlxdpo.rounds.story import iterate as iterate
