"""New preference pairs from a policy's own answers: draw, screen, rank, pair. `mlxdpo collect` is the command."""

from mlxdpo.collect.prompts import Asked as Asked
from mlxdpo.collect.prompts import Prompts as Prompts
from mlxdpo.collect.prompts import read_prompts as read_prompts
from mlxdpo.collect.story import Ranker as Ranker
from mlxdpo.collect.story import Source as Source
from mlxdpo.collect.story import collect as collect
from mlxdpo.collect.story import source_of as source_of
