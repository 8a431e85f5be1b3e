"""New preference pairs from a policy's own answers: draw, screen, rank, pair. `mlxdpo collect` is the command."""

from mlxdpo.online.collect.run import Ranker as Ranker
from mlxdpo.online.collect.run import collect as collect
from mlxdpo.online.prompts import Asked as Asked
from mlxdpo.online.prompts import PolicySource as PolicySource
from mlxdpo.online.prompts import Prompts as Prompts
from mlxdpo.online.prompts import read_prompts as read_prompts
from mlxdpo.online.prompts import source_of as source_of
