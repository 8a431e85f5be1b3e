"""How well `mlxdpo data audit` finds flipped labels: planted in small sets of different kinds.

    python -m benchmarks.audit --model smollm2 --pairs 120

tone       the demo's pairs: two continuations by SmolLM2, the happier one chosen (VADER)
relevance  what a function of Python's standard library does: its own first paragraph, or another one's
code       a function of the standard library, or the same lines in another order
sentiment, refusal, length   tasks of `benchmarks.planted_tasks`

A fifth of the labels is turned round, by five seeds; nothing of that is in what the audit reads. Reported: AUROC of
the probability that a label is wrong, its log loss (nats; by the share of flips alone: 0.50), the share of flips that
is flagged and of sound labels that is flagged beside them, and flags on the same sets without any flip. Writes
.bench/audit.jsonl, a line for each set.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.planted_tasks import sound_pairs
from mlxdpo.config import DataConfig, ModelConfig
from mlxdpo.data.encode import encode
from mlxdpo.data.findings import DUPLICATE, FLIP, AuditInput, audit_pairs
from mlxdpo.data.report import Report
from mlxdpo.demo.material import bundled
from mlxdpo.inference.pair_states import audit_input
from mlxdpo.io.atomic import append_line
from mlxdpo.model.policy import Policy, load_policy
from mlxdpo.types import Preference

OUT = Path(".bench/audit.jsonl")
SHARE, SEEDS, FOLDS, LONGEST = 0.2, 5, 5, 192
MODULES = [
    "statistics", "textwrap", "random", "fractions", "heapq", "bisect", "string", "shutil", "os.path", "json", "csv",
    "calendar", "datetime", "difflib", "copy", "collections", "functools", "itertools", "pathlib", "re", "glob",
    "tempfile", "inspect", "ast", "tokenize", "zipfile", "tarfile", "gzip", "socket", "http.client", "urllib.parse",
    "email.utils", "html", "base64", "binascii", "hashlib", "hmac", "secrets", "math", "cmath", "decimal", "operator",
    "types", "typing", "dataclasses", "enum", "argparse", "logging", "threading", "subprocess", "queue", "contextlib",
    "unittest.mock", "locale", "gettext", "struct", "codecs", "unicodedata", "stat", "filecmp", "fileinput",
    "fnmatch", "linecache", "pickle", "zlib", "bz2", "lzma", "configparser", "plistlib", "platform", "io", "os",
    "time", "getpass", "sched", "select", "signal", "mimetypes", "wave", "colorsys", "shlex", "cmd", "doctest", "pdb",
    "timeit", "trace", "dis", "numbers", "ipaddress", "uuid",
]  # fmt: skip


def tone(count: int) -> list[Preference]:
    """The demo's pairs."""
    return [Preference(r["prompt"], r["chosen"], r["rejected"], f"tone:{i}") for i, r in enumerate(bundled("pairs"))][
        :count
    ]


@functools.cache
def library() -> list[tuple[str, str, Any]]:
    """(name, first paragraph, function) of the standard library, each paragraph once, in a fixed random order."""
    found: dict[str, tuple[str, str, Any]] = {}
    for module in MODULES:
        for name, value in sorted(vars(importlib.import_module(module)).items()):
            text = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split()) if callable(value) else ""
            if not name.startswith("_") and 30 < len(text) < 200 and "(" not in text[:20]:
                found.setdefault(text, (f"{module}.{name}", text, value))
    listed = list(found.values())
    random.Random(1).shuffle(listed)
    return listed


def relevance(count: int) -> list[Preference]:
    """Whether a description is of the function that was asked for."""
    listed, draw = library(), random.Random(2)
    pairs = [(name, text, draw.choice([t for _, t, _ in listed if t != text])) for name, text, _ in listed[:count]]
    return [Preference(f"What does Python's {name} do?", own, other, f"relevance:{name}") for name, own, other in pairs]


def code(count: int) -> list[Preference]:
    """Whether the lines of a function are in their order."""
    draw, rows = random.Random(3), []
    for name, _, function in library():
        try:
            lines = [line for line in inspect.getsource(function).splitlines() if line.strip()][:8]
        except (OSError, TypeError):  # written in C
            continue
        if len(set(lines)) < 5:
            continue
        other = lines[1:]
        while other == lines[1:]:
            draw.shuffle(other)
        answers = "\n".join(lines), "\n".join([lines[0], *other])
        rows.append(Preference(f"Write the Python function {name}.", *answers, f"code:{name}"))
        if len(rows) == count:
            break
    return rows


def planted(name: str, count: int) -> list[Preference]:
    """Pairs of a planted task, at most as many as it has prompts, about 190."""
    rows = sound_pairs(name, random.Random(name), 200)[:count]
    return [Preference(r["prompt"], r["chosen"], r["rejected"], f"{name}:{i}") for i, r in enumerate(rows)]


SETS: dict[str, tuple[Callable[[int], list[Preference]], str]] = {
    "tone": (tone, "plain"),
    "relevance": (relevance, "chat"),
    "code": (code, "chat"),
    **{
        name: (functools.partial(planted, name), "plain")
        for name in ("sentiment", "refusal", "length", "format", "language")
    },
}


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive has a higher score than a negative, ties one half."""
    above = scores[positive][:, None] - scores[~positive][None]
    return float((above > 0).mean() + (above == 0).mean() / 2)


def turned(given: AuditInput, flipped: np.ndarray) -> AuditInput:
    """The same with the two answers of some pairs exchanged, in all that depends on their order."""
    size = given.differences.shape[1]
    prompt, chosen, rejected = (given.embeddings[:, part * size : (part + 1) * size] for part in range(3))
    swap = flipped[:, None]
    sides = [np.where(swap, b, a) for a, b in ((chosen, rejected), (rejected, chosen))]
    return AuditInput(
        np.concatenate([prompt, *sides], axis=1),
        np.where(swap, -given.differences, given.differences),
        given.ches,  # of the order that was given; no flag follows from it
        np.where(swap, given.reference[:, ::-1], given.reference),
        np.where(swap, given.lengths[:, ::-1], given.lengths),
    )


def exchanged_rows(rows: Sequence[Preference], flipped: np.ndarray) -> list[Preference]:
    """The rows with the answers of some exchanged."""
    swap = lambda row: Preference(row.prompt, row.rejected, row.chosen, row.where)  # noqa: E731
    return [swap(row) if one else row for row, one in zip(rows, flipped.tolist(), strict=True)]


def measure(policy: Policy, name: str, count: int, batch_size: int) -> dict[str, Any]:
    """Figures of one set, means over the seeds with the least and the largest AUROC."""
    make, template = SETS[name]
    data = DataConfig(template=template, max_length=LONGEST)  # type: ignore[arg-type]
    report = Report()
    found = [(row, encode(row, policy.tokenizer, data, report, eos_ids=policy.eos_ids)) for row in make(count)]
    rows = [row for row, example in found if example is not None]
    examples = [example for _, example in found if example is not None]
    given = audit_input(policy, None, examples, data.group, batch_size)
    clean = audit_pairs(rows, given, FOLDS)
    scores, caught, beside, losses = [], [], [], []
    for seed in range(SEEDS):
        flipped = np.random.default_rng(seed).random(len(rows)) < SHARE
        audit = audit_pairs(exchanged_rows(rows, flipped), turned(given, flipped), FOLDS, seed=seed)
        right = np.array([one["probability"] for one in audit.rows])
        scores.append(auroc(1 - right, flipped))
        losses.append(-np.log(np.maximum(np.where(flipped, 1 - right, right), 1e-4)).mean())
        flagged = np.array([FLIP in one["flags"] for one in audit.rows])
        caught.append(flagged[flipped].mean())
        beside.append(flagged[~flipped].mean())
    return {
        "set": name,
        "pairs": len(rows),
        "auroc": float(np.mean(scores)),
        "auroc_range": [min(scores), max(scores)],
        "log_loss": float(np.mean(losses)),
        "flips_flagged": float(np.mean(caught)),
        "sound_flagged": float(np.mean(beside)),
        "clean_flagged": clean.summary["flags"][FLIP] / len(rows),
        "clean_duplicates": clean.summary["flags"][DUPLICATE] / len(rows),
        "clean_agreement": clean.summary["agreement"],
        "form_accuracy": clean.summary["form_accuracy"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the sets named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", default=list(SETS))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--pairs", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args(arguments)
    policy = load_policy(ModelConfig(path=options.model))
    for name in options.sets:
        found = measure(policy, name, options.pairs, options.batch_size)
        append_line(OUT, {"model": options.model, **found})
        print(found, flush=True)


if __name__ == "__main__":
    main()
