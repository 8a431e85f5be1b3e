"""What handlers of the page have in common: errors as sentences, the session's name."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from mlxdpo.types import UserError
from mlxdpo.ui.heat import plain


@contextmanager
def said() -> Iterator[None]:
    """A `UserError` becomes the page's message. Gradio renders messages as HTML, so the sentence is escaped."""
    import gradio as gr

    try:
        yield
    except UserError as error:
        raise gr.Error(plain(str(error)), title="This did not work", duration=8, print_exception=False) from None


def saying(function: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose `UserError`s the page shows."""

    @wraps(function)
    def handler(*args: Any, **kwargs: Any) -> Any:
        """The function, its errors said."""
        with said():
            return function(*args, **kwargs)

    return handler


def sorry(error: UserError) -> str:
    """An error where the answers would be: it says what to do, and stays until something is done."""
    return f'<p class="empty" role="alert">{plain(str(error))}</p>'


def session_of(request: Any) -> str:
    """The name of a browser tab's session."""
    return str(request.session_hash or "")
