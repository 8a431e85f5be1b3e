"""Tuning in rounds: collect, train, measure, again; each round is a run whose parent is the one before."""

from mlxdpo.online.rounds.run import Stages as Stages
from mlxdpo.online.rounds.run import iterate as iterate
