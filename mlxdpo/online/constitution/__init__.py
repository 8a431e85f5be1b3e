"""Constitutional AI (arXiv 2212.08073) on one machine: answers that a model revises or compares by written principles.
`mlxdpo constitution` is the command."""

from mlxdpo.online.constitution.run import Feedback as Feedback
from mlxdpo.online.constitution.run import apply_constitution as apply_constitution
from mlxdpo.online.constitution.schema import Constitution as Constitution
from mlxdpo.online.constitution.schema import SamplingSettings as SamplingSettings
from mlxdpo.online.constitution.schema import load_constitution as load_constitution
