"""`mlxdpo generate RUN "..." [--before]`"""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators

from mlxdpo.runs import Run
from mlxdpo.types import UserError

Temperature = Annotated[float, Parameter(validator=validators.Number(gte=0))]
TopP = Annotated[float, Parameter(validator=validators.Number(gt=0, lte=1))]
Strength = Annotated[float, Parameter(validator=validators.Number(gte=0))]
Count = Annotated[int, Parameter(validator=validators.Number(gte=1))]


def run(
    path: Path,
    /,
    *prompts: Annotated[str, Parameter(allow_leading_hyphen=False)],
    prompt: list[str] | None = None,
    before: bool = False,
    strength: Strength = 1.0,
    max_tokens: Count = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Answer prompts with a run's model.

    Args:
        path: Run directory.
        prompts: Prompts to answer; several are answered at once.
        prompt: The same as an option; repeat it for several.
        before: Answer with the model before tuning.
        strength: How much of the tuning: 0 is the model before it, 1 as trained, 2 twice as far.
        max_tokens: Maximum answer length, tokens.
        temperature: 0 is greedy; 1 samples from the model's distribution.
        top_p: Sample from the most likely tokens that sum to this probability.
        seed: Sampling seed; the same seed gives the same noise before and after tuning.
        json: One JSON object per prompt.
    """
    from mlxdpo.commands.terminal import console
    from mlxdpo.inference.conversation import answer_prompts

    asked = [*prompts, *(prompt or [])]
    if not asked:
        raise UserError(f'no prompt given: mlxdpo generate {path} "Name a fruit."')
    if before and strength != 1:
        raise UserError(f"--before is strength 0; drop it or --strength {strength:g}")
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    answers = answer_prompts(Run.open(path), asked, before=before, strength=strength, **sampling)
    for text, (written, answer) in zip(asked, answers, strict=True):
        if json:
            row = {"prompt": text, "text": written, "tokens": len(answer.tokens), "finish": answer.finish}
            print(jsonlib.dumps(row, ensure_ascii=False))
        else:
            if len(asked) > 1:
                console.print(text, style="bold", markup=False)
            console.print(written, markup=False)
