"""`mlxdpo data check D [--model M]`: the data doctor."""

from __future__ import annotations

import json as jsonlib
from typing import Annotated, Any

from cyclopts import Parameter

from mlxdpo.config import DataConfig, ModelConfig, Section


class CheckConfig(Section):
    """What is checked, with which tokenizer."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()


NOTHING = CheckConfig()  # no setting given


def run(path: str, /, *, config: Annotated[CheckConfig, Parameter(name="*")] = NOTHING, json: bool = False) -> int:
    """Say what is in preference data and what is wrong with it; with a model also lengths in tokens and one pair.

    Exit status 2 when a bad row would stop `mlxdpo train`.

    Parameters
    ----------
    path
        File, folder or Hub dataset id.
    config
        Settings.
    json
        Machine-readable.
    """
    from mlxdpo.data.check import examine, lines
    from mlxdpo.data.load import read_split, token_counts
    from mlxdpo.data.reasons import NO_PREFERENCE
    from mlxdpo.types import Preference

    data = config.data.model_copy(update={"path": path, "on_bad_row": "skip"})
    rows, heldout, reports = read_split(data, seed=0)
    everything = rows if "held-out data" in reports else [*rows, *heldout]
    encoded = _encoded(everything, data, config.model) if config.model.path else None
    examples = encoded["examples"] if encoded else []
    found = examine(
        everything,
        reports["data"],
        path,
        heldout if "held-out data" in reports else None,
        token_counts(examples) or None,
        data.max_length if examples else None,
    )
    bad = sum(n for reason, n in found.refused.items() if reason not in NO_PREFERENCE)
    if json:
        first = {"first_pair": encoded["shown"]._asdict()} if encoded else {}
        print(jsonlib.dumps(found.as_dict() | {"would_stop": bad} | first, indent=2, ensure_ascii=False))
        return 2 if bad else 0
    _show(lines(found), encoded, isinstance(everything[0], Preference))
    if bad:
        from mlxdpo.commands.screen import console

        console.print(f"{bad} bad rows: mend them, or train with --data.on-bad-row skip", style="yellow")
    return 2 if bad else 0


def _encoded(rows: list, data: DataConfig, model: ModelConfig) -> dict[str, Any]:
    from mlxdpo.data.encode import describe, encode_all
    from mlxdpo.model.policy import find_model, load_tokenizer

    tokenizer = load_tokenizer(find_model(model.path, model.revision), model.path)
    # The tokens as they are before any limit, so that rows over it can be counted.
    unlimited, _ = encode_all(rows, tokenizer, data.model_copy(update={"max_length": 10**9}))
    limited, report = encode_all(rows, tokenizer, data)
    return {"examples": unlimited, "report": report, "shown": describe(limited[0], tokenizer)}


def _show(sentences: list[str], encoded: dict[str, Any] | None, pairs: bool) -> None:
    from mlxdpo.commands.screen import console, show_pair

    for sentence in sentences:
        console.print(sentence)
    if encoded is None:
        console.print("Pass --model to see lengths in tokens and the first pair as the model sees it.")
        return
    for line in encoded["report"].lines():
        console.print(f"encoding: {line}", style="yellow")
    console.print("The first pair, as the model sees it (scored tokens underlined, or between [[ ]]):")
    show_pair(encoded["shown"])
