"""The Compare tab without its page: one prompt, answers before and after tuning, several turns, numbers afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from mlxdpo.types import Text
from mlxdpo.ui.app_state import NOBODY, AppState
from mlxdpo.ui.compare.answers import Answer, Settings, answer_together, chat_prompt
from mlxdpo.ui.compare.columns import TUNED, Column, Exchange, columns_html
from mlxdpo.ui.compare.scores import score
from mlxdpo.ui.variants import RunVariants, Variant

PACE = 0.12  # seconds between two updates of the page
DRIFT = "Reward and KL say how far tuning moved the model on these words, not which answer is better: vote for that."


@dataclass(frozen=True)
class Chat:
    """A conversation with all variants at once. It belongs to one run and one third variant."""

    run: str = ""
    third: str = NOBODY
    system: str = ""
    columns: tuple[Column, ...] = ()


class ColumnVariants(NamedTuple):
    """The variants of the columns, and by which policy each column's answers are scored."""

    loaded: RunVariants
    variants: tuple[Variant, ...]
    judges: tuple[Variant, ...]


def column_variants(app: AppState, name: str | None, third: str) -> ColumnVariants:
    """Who answers: before, after, and perhaps a third. The first two are scored by the tuned model."""
    loaded = app.load(name)
    other = app.third(loaded, third)
    extra = (other,) if other else ()
    return ColumnVariants(loaded, (loaded.before, loaded.after, *extra), (loaded.after, loaded.after, *extra))


def empty_columns(answering: ColumnVariants) -> tuple[Column, ...]:
    """Columns in which nothing has been said."""
    base, run = answering.loaded.config.model, answering.loaded.run.path.name
    subtitles = [base.path + (f" with {base.adapter}" if base.adapter else ""), run]
    titles = ["Before tuning", TUNED]
    for variant in answering.variants[2:]:
        titles.append(f"{TUNED}: {variant.name}" if not variant.name.startswith("step-") else f"At {variant.name}")
        subtitles.append(run if variant.name.startswith("step-") else "another run")
    return tuple(Column(title, subtitle) for title, subtitle in zip(titles, subtitles, strict=True))


def converse(
    app: AppState,
    chat: Chat,
    name: str | None,
    third: str,
    text: str,
    system: str,
    settings: Settings,
    stopped: Callable[[], bool],
) -> Iterator[Chat]:
    """The chat as it grows by one exchange; the last one is scored. Raises `UserError` for a prompt it cannot take."""
    answering = column_variants(app, name, third)
    wanted = Chat(answering.loaded.run.path.name, third, system, empty_columns(answering))
    same = (chat.run, chat.third, chat.system) == (wanted.run, third, system)
    chat = chat if same and len(chat.columns) == len(answering.variants) else wanted
    prompts = [_next_prompt(answering.loaded, column, text, system) for column in chat.columns]

    def task() -> Iterator[tuple[Answer, ...]]:
        """What the engine's thread does: all columns, as far as they have come."""
        return answer_together(answering.loaded, answering.variants, prompts, settings, stopped=stopped)

    answers: tuple[Answer, ...] = ()
    for answers in app.engine.latest(task, PACE):
        yield _with(chat, text, answers)
    scores = [
        app.engine.call(lambda p=p: score(answering.loaded, *p)) for p in zip(answering.judges, answers, strict=True)
    ]
    grown = _with(chat, text, answers)
    scored = [
        column._replace(exchanges=(*column.exchanges[:-1], column.exchanges[-1]._replace(score=found)))
        for column, found in zip(grown.columns, scores, strict=True)
    ]
    yield replace(grown, columns=tuple(scored))


def _next_prompt(loaded: RunVariants, column: Column, text: str, system: str) -> Text:
    return chat_prompt(loaded, [(e.prompt, e.answer.text) for e in column.exchanges], text, system)


def _with(chat: Chat, text: str, answers: tuple[Answer, ...]) -> Chat:
    grown = [
        c._replace(exchanges=(*c.exchanges, Exchange(text, a))) for c, a in zip(chat.columns, answers, strict=True)
    ]
    return replace(chat, columns=tuple(grown))


def chat_html(chat: Chat) -> str:
    """What the page shows of a chat."""
    done = any(e.score for column in chat.columns for e in column.exchanges)
    return columns_html(chat.columns, DRIFT if done else "")
