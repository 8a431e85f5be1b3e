"""Pairs without a judge: the chosen answer from one source, the rejected one from another. `mlxdpo pairs`."""

from mlxdpo.online.contrast.run import AnswerSettings as AnswerSettings
from mlxdpo.online.contrast.run import contrast_sources as contrast_sources
from mlxdpo.online.contrast.sources import AnswerSource as AnswerSource
from mlxdpo.online.contrast.sources import SourceAnswer as SourceAnswer
from mlxdpo.online.contrast.sources import open_file as open_file
from mlxdpo.online.contrast.sources import open_model as open_model
