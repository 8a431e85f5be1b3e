"""Every architecture of mlx-lm at the level that docs/models.md gives it: values and gradients of the plain way."""

import re
from pathlib import Path

import pytest
from slow_cases import rest_slow

from benchmarks.models.architectures import architectures
from benchmarks.models.levels import NATS, SLOPE, measure

TABLE = Path(__file__).parents[2] / "docs" / "models.md"
# One for each class of cache, and of what a layer is given besides.
ONE_OF_EACH = {
    "llama": "packed",  # keys and values
    "gemma3": "packed",  # sliding windows, inside a wrapper
    "gemma4_text": "packed",  # keys shared between layers, which are handed on
    "gemma3n": "packed",  # the same through the cache of another layer; another function without caches
    "gpt_oss": "packed",  # sinks
    "qwen3_5": "prefix",  # delta rule
    "falcon_h1": "prefix",  # two caches in one layer
    "lfm2": "prefix",  # convolutions
    "deepseek_v3": "packed",  # scores in the mask
    "kimi_k3": "prefix",  # an object that layers change and hand on
}
LONG = ("deepseek_v3", "falcon_h1", "gemma3n", "gemma4_text", "kimi_k3")  # seconds each


def in_the_table():
    """(head, prefix, packing, checkpoint) of each architecture that docs/models.md says is trained."""
    text = TABLE.read_text("utf-8").partition("<!-- levels: begin")[2].partition("<!-- levels: end")[0]
    lines = re.findall(r"^\| `([^`]+)` \|(.*)\|$", text, re.M)
    cells = {kind: [cell.strip() == "yes" for cell in rest.split("|")[:4]] for kind, rest in lines}
    return {kind: tuple(found) for kind, found in cells.items()}


@pytest.mark.parametrize("kind", rest_slow(ONE_OF_EACH, [kind for kind in ONE_OF_EACH if kind not in LONG]))
def test_one_architecture_of_each_kind_of_cache(kind):
    found = measure(kind)
    assert found.level == ONE_OF_EACH[kind] and found.checkpoint, found
    assert found.nats <= NATS and found.slope <= SLOPE


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind, found in in_the_table().items() if any(found)])
def test_every_architecture_reaches_what_the_table_says(kind):
    found, reach = measure(kind), ("head", "prefix", "packed")
    held = tuple(found.level in reach[i:] for i in range(3))
    assert (*held, found.checkpoint) == in_the_table()[kind], found


def test_the_table_is_that_of_this_mlx_lm():
    assert set(in_the_table()) == set(architectures())
