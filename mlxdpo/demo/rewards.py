"""Named rewards that score a text without a network: the demo ranks with one and checks with another.

Both read sentiment from a word list. They are crude and know nothing of the model, which is what a
demonstration of the machinery needs: the truth is known, and training never sees `textblob`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from mlxdpo.types import UserError

Reward = Callable[[str], float]
"""Text -> sentiment in [-1, 1]; 0 is neutral."""


def vader(text: str) -> float:
    """VADER's compound score in [-1, 1] (Hutto and Gilbert, ICWSM 2014)."""
    return float(_vader().polarity_scores(text)["compound"])


def textblob(text: str) -> float:
    """TextBlob's polarity in [-1, 1]: the mean over the words of its own lexicon that occur."""
    return float(_late("textblob").TextBlob(text).sentiment.polarity)


REWARDS: dict[str, Reward] = {"vader": vader, "textblob": textblob}


@functools.cache
def _vader() -> Any:
    return _late("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()


def _late(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"this reward needs {error.name}, which is not installed; run `pip install 'mlxdpo[demo]'`"
        ) from None
