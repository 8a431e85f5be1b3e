"""Constitutional AI (arXiv 2212.08073) on one machine: answers that a model revises or compares by written principles.
`mlxdpo constitution` is the command."""

from mlxdpo.constitution.schema import Constitution as Constitution
from mlxdpo.constitution.schema import load_constitution as load_constitution
from mlxdpo.constitution.settings import Asking as Asking
from mlxdpo.constitution.story import Feedback as Feedback
from mlxdpo.constitution.story import apply as apply
