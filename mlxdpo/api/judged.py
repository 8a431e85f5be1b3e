"""Evaluation and answers from Python: own judges are functions, prompts are texts."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlxdpo.api.tuned_run import TunedRun, open_run
from mlxdpo.runs import Run
from mlxdpo.types import Message, Text, UserError


def evaluate(
    run: Run | str | Path,
    *,
    judge: Any = "longest",
    data: Any = None,
    prompts: int = 100,
    samples: int = 2,
    max_tokens: int = 0,
    temperature: float = 1.0,
    seed: int = 0,
    retained: bool = False,
    limit: int | None = None,
    quiet: bool = False,
) -> Mapping[str, Any]:
    """Say whether a run's model is better than it was: held-out pairs, judged answers, drift, with intervals.

    `judge` is a name as for `mlxdpo eval --judge`, a function, or a list of these. A function of (prompt, answer) gives
    a number, higher is better; one of (prompt, first, second) gives a number above 0 where the first answer is better.
    `data` holds other held-out pairs, a path or rows. With `retained` the bundled checks are answered before and after
    too, `limit` of each area, and the results have them under `retained`. Returns the results as
    RUN/eval/results_*.json has them, with the `sentences` of the verdict; RUN/report.html shows them.

    Raises `UserError` for a run without adapter, an unknown judge, a `limit` without `retained` or below 1, or where
    nothing was held out.
    """
    from mlxdpo.training.given import rows_file
    from mlxdpo_eval.report.write import write_report
    from mlxdpo_eval.run import EvalOptions
    from mlxdpo_eval.run import evaluate as measure
    from mlxdpo_eval.sampling import Sampling

    if limit is not None and (limit < 1 or not retained):
        raise UserError(f"limit is {limit}: it is how many retained checks of each area; 1 or more, with retained=True")
    tuned = _as_run(run)
    judges = [
        _judge_of(one, tuned, number)
        for number, one in enumerate(judge if isinstance(judge, list | tuple) else [judge], 1)
    ]
    source = data if data is None or isinstance(data, str | Path) else rows_file(data, tuned.path.parent)
    found = measure(
        tuned,
        judges,
        Sampling(prompts, samples, max_tokens, temperature, seed),
        EvalOptions(None if source is None else str(source), retained=retained, limit=limit),
        (lambda text: None) if quiet else print,
    )
    write_report(tuned)
    return found.results


def _as_run(run: Run | str | Path) -> TunedRun:
    return open_run(run.path if isinstance(run, Run) else run)


def _judge_of(judge: Any, run: Run, number: int) -> Any:
    from mlxdpo_eval.judges import open_judge
    from mlxdpo_eval.judges.program import reward_judge

    if isinstance(judge, str):
        from mlxdpo.demo.rewards import REWARDS

        continued = run.config().data.template == "plain"
        rewards = {
            name: (lambda prompt, answer, own=own: own(prompt + answer if continued else answer))
            for name, own in REWARDS.items()
        }
        return open_judge(judge, rewards)
    if not callable(judge):
        if hasattr(judge, "ask") and hasattr(judge, "identity"):
            return judge
        raise UserError(f"judge is a {type(judge).__name__}; expected a name, a function or a list of these")
    function: Any = judge
    names = [p for p in inspect.signature(judge).parameters.values() if p.default is p.empty]
    name = getattr(judge, "__name__", type(judge).__name__)
    name = f"judge {number}" if name == "<lambda>" else name
    if len(names) == 2:
        return reward_judge(name, function)
    if len(names) == 3:
        return ComparingFunction(name, function)
    raise UserError(f"judge {name} takes {len(names)} arguments; expected (prompt, answer) or (prompt, first, second)")


class ComparingFunction:
    """A judge from a function of (prompt, first, second) that is above 0 where the first answer is better."""

    cached = False  # the function may change without its name

    def __init__(self, name: str, function: Callable[[str, str, str], float]):
        self.name, self._function = name, function
        code = getattr(getattr(function, "__code__", None), "co_code", b"")
        self.identity = {"kind": "program", "name": name, "digest": hashlib.sha256(code).hexdigest()}

    def ask(self, questions: Sequence[Any]) -> list[Any]:
        """One verdict for each question; what the function raises is no verdict, with the reason."""
        return [self._verdict(question) for question in questions]

    def _verdict(self, question: Any) -> Any:
        from mlxdpo_eval.judges.protocol import certain, invalid

        try:
            value = float(self._function(question.prompt, question.first, question.second))
        except UserError:
            raise
        except Exception as error:  # it is the user's code: whatever it raises is one comparison without a verdict
            return invalid(f"the judge raised {type(error).__name__}")
        return certain(value) if value == value else invalid("the judge gave no number")


def generate(
    run: Run | str | Path,
    prompts: Any,
    *,
    before: bool = False,
    strength: float = 1.0,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Any:
    """Answers of a run's model, tuned or as it was `before`: a list for a list of prompts, a text for one text.

    A prompt is a text or a list of messages ({"role": ..., "content": ...}). `strength` is how much of the tuning;
    `temperature` 0 takes the likeliest token; `max_tokens` bounds an answer. Raises `UserError` for a run without
    adapter and for an empty prompt.
    """
    from mlxdpo.inference.conversation import answer_prompts

    asked = [_as_text(one) for one in ([prompts] if isinstance(prompts, str) else prompts)]
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    texts = [text for text, _ in answer_prompts(_as_run(run), asked, before=before, strength=strength, **sampling)]
    return texts[0] if isinstance(prompts, str) else texts


def _as_text(prompt: Any) -> Text:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list | tuple) and prompt and all(isinstance(turn, Mapping) for turn in prompt):
        return tuple(Message(str(turn["role"]), str(turn["content"])) for turn in prompt)
    raise UserError(f"a prompt is a {type(prompt).__name__}; expected a text or a list of messages")
