"""What a widget cannot send is refused before a handler sees it: its API takes any JSON, from whoever has the cookie.

Gradio checks some widgets' values and not others'; a list where a name belongs would break a handler half-way.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

LARGEST = 1e15  # what a browser's numbers hold without rounding; NaN is not below it
TEXTS, NUMBERS = ("textbox", "dropdown", "radio"), ("slider", "number")


def check_inputs(page: Any) -> None:
    """Put `problem` in front of every handler of a page."""
    for block in page.fns.values():
        if block.fn is not None:
            block.fn = _checked_handler(block.fn, tuple(block.inputs))


def problem(widget: Any, value: Any) -> str | None:
    """Why a widget cannot have sent `value`, or None."""
    name = widget.get_block_name()
    if value is None or (name not in TEXTS and name not in (*NUMBERS, "checkbox")):
        return None
    if getattr(widget, "multiselect", None):
        fits, wanted = isinstance(value, list) and all(isinstance(one, str) for one in value), "a list of text"
    elif name in TEXTS:
        fits, wanted = isinstance(value, str) and _is_unicode(value), "text"
    elif name in NUMBERS:
        fits, wanted = _in_range(widget, value), "a number in the widget's range"
    else:
        fits, wanted = isinstance(value, bool), "yes or no"
    return None if fits else f"{widget.label or name} is {type(value).__name__}, expected {wanted}"


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold it: no half characters, which no file takes."""
    return text == text.encode("utf-8", "ignore").decode()


def _in_range(widget: Any, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -LARGEST < value < LARGEST:
        return False
    least, most = (getattr(widget, name, None) for name in ("minimum", "maximum"))
    return (least is None or value >= least) and (most is None or value <= most)


def _checked_handler(function: Callable[..., Any], widgets: Sequence[Any]) -> Callable[..., Any]:
    """A handler that refuses values of other kinds; a generator stays one, as Gradio tells by the function."""
    import gradio as gr

    def check(values: Sequence[Any]) -> None:
        """Raise `gr.Error` for the first value that its widget cannot have sent."""
        sent = [value for value in values if not isinstance(value, gr.Request | gr.Progress | gr.EventData)]
        for widget, value in zip(widgets, sent, strict=False):
            if (why := problem(widget, value)) is not None:
                raise gr.Error(f"This request was refused: {why}.", print_exception=False)

    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def steps(*values: Any) -> Any:
            """The handler, step by step."""
            check(values)
            yield from function(*values)

        return steps

    @functools.wraps(function)
    def handler(*values: Any) -> Any:
        """The handler."""
        check(values)
        return function(*values)

    return handler
