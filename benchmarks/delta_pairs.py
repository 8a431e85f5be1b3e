"""Pairs without a judge, in small: SmolLM2's answers over those of its own weights in three bits (delta learning).

    python -m benchmarks.delta_pairs --out runs/delta [--page docs/evidence/delta-pairs.md]

Needs xllamacpp and gguf (pip install 'mlxdpo[parity]'). llama.cpp serves both models, each in a process; `mlxdpo pairs`
asks both about functions of Python's standard library, and is killed 20 times on the way. What has to hold: every
answer that was on the disk at a kill is among the final ones, word for word. `mlxdpo train` then trains on the pairs,
and a judge that training never saw compares answers about other functions before and after: the share of the words of
the function's description that an answer has. Every part is kept: stopped at any time, the same command goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlxdpo  # noqa: F401  (the fast BLAS, before mlx.core)

import mlx.core as mx  # isort: skip
from benchmarks.audit import library
from benchmarks.constitution import figure, verdict
from benchmarks.objectives import into_page
from mlxdpo.cli import run as command_line
from mlxdpo.commands.eval import named_rewards
from mlxdpo.config import DataConfig
from mlxdpo.exporters.gguf import convert_to_gguf
from mlxdpo.inference.trained_run import distinct_prompts, open_trained_run
from mlxdpo.io.atomic import write_json, write_text
from mlxdpo.io.json_file import read_json
from mlxdpo.model.builtin import smollm2_folder
from mlxdpo.online.collect.run import report_file, samples_file
from mlxdpo.online.contrast.run import answers_in
from mlxdpo.runs import Run
from mlxdpo.types import Preference
from mlxdpo_eval.judged_answers import judge_answers, win_rate
from mlxdpo_eval.judges import open_judge
from mlxdpo_eval.results import write_lines
from mlxdpo_eval.sampling import Sampling, first_answers, sample_before_after

QUESTIONS = ("What does Python's {} do?", "In one sentence, when would I use {} in Python?")
HELDOUT, PROMPTS, KILLS, BITS, TOKENS = 100, 1_150, 20, 3, 24
MODELS = ("smollm2", "three-bit")
JUDGE = '''"""Scores an answer by the share of the words of the function's own description that it has."""

import json
import re
from pathlib import Path

TEXTS = json.loads((Path(__file__).parent / "descriptions.json").read_text("utf-8"))
words = lambda text: set(re.findall("[a-z]{3,}", text.lower()))


def overlap(prompt: str, completion: str) -> float:
    wanted = words(next(text for name, text in TEXTS.items() if name in prompt))
    return len(wanted & words(completion)) / len(wanted)
'''


def write_prompts(out: Path) -> list[str]:
    """The prompts of the pairs and, of other functions, the held-out ones, which are given back."""
    listed = [(name, text) for name, text, _ in library()]
    asked = [form.format(name) for form in QUESTIONS for name, _ in listed[HELDOUT:]][:PROMPTS]
    write_lines(out / "prompts.jsonl", [{"prompt": prompt} for prompt in asked])
    # The longest name first: one name can be the beginning of another.
    texts = sorted(listed[:HELDOUT], key=lambda one: -len(one[0]))
    write_json(out / "descriptions.json", dict(texts))
    write_text(out / "judge.py", JUDGE)
    return [QUESTIONS[0].format(name) for name, _ in listed[:HELDOUT]]


def write_models(out: Path) -> None:
    """GGUF files of SmolLM2 and of its weights rounded to three bits, 64 of them to a scale."""
    source, rounded = smollm2_folder(), out / "rounded"
    if not (out / f"{MODELS[0]}.gguf").exists():
        convert_to_gguf(source, out / "part.gguf", "q8_0", MODELS[0])
        (out / "part.gguf").rename(out / f"{MODELS[0]}.gguf")
    if not (out / f"{MODELS[1]}.gguf").exists():
        shutil.copytree(source, rounded, dirs_exist_ok=True)
        arrays: dict[str, Any] = mx.load(str(source / "model.safetensors"))  # type: ignore[assignment]
        for name, array in arrays.items():
            if array.ndim == 2:
                arrays[name] = mx.dequantize(*mx.quantize(array, 64, BITS), group_size=64, bits=BITS)
        mx.save_safetensors(str(rounded / "model.safetensors"), arrays, {"format": "pt"})
        convert_to_gguf(rounded, out / "part.gguf", "q8_0", MODELS[1])
        (out / "part.gguf").rename(out / f"{MODELS[1]}.gguf")
        shutil.rmtree(rounded)


def serve(file: Path, port: int) -> None:
    """Serve a GGUF file by llama.cpp until stopped; says when it is ready."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.port = str(file), port
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = 2048, 8, 0
    parameters.cpuparams.n_threads = 1
    server = xllamacpp.Server(parameters)
    print("serving", server.listening_address, flush=True)
    signal.pause()


@contextlib.contextmanager
def servers(out: Path, port: int) -> Iterator[list[str]]:
    """Both models served, each by a process of llama.cpp; gives the sources' names once both can answer."""
    started: list[subprocess.Popen[str]] = []
    try:
        for number, name in enumerate(MODELS):
            command = [sys.executable, "-m", "benchmarks.delta_pairs", "--serve", str(out / f"{name}.gguf")]
            with (out / f"{name}.log").open("w") as log:
                own = [*command, "--port", str(port + number)]
                started.append(subprocess.Popen(own, stdout=subprocess.PIPE, stderr=log, text=True))
        for process, name in zip(started, MODELS, strict=True):
            assert process.stdout is not None
            if not any(line.startswith("serving ") for line in process.stdout):
                raise SystemExit(f"llama.cpp did not start; see {out / f'{name}.log'}")
        yield [f"http://127.0.0.1:{port + number}/v1#{name}" for number, name in enumerate(MODELS)]
    finally:
        for process in started:
            process.kill()
            process.wait()


def answers_so_far(file: Path) -> dict[str, Any]:
    """The answers of both sides on the disk, by side and prompt."""
    _, found = answers_in(file)
    return {f"{side} {key}": line for side, lines in found.items() for key, line in lines.items()}


def make_pairs(out: Path, port: int) -> None:
    """`mlxdpo pairs`, killed at evenly spaced answers; OUT/kills.json counts what was lost by it."""
    pairs, partial = out / "pairs.jsonl", out / "pairs.jsonl.partial"
    kills, expected = out / "kills.json", 2 * PROMPTS
    found = read_json(kills) if kills.exists() else {"kills": 0, "saved": 0, "lost": 0}
    with servers(out, port) as (chosen, rejected):
        command = [sys.executable, "-m", "mlxdpo.cli", "pairs", "--chosen", chosen, "--rejected", rejected]
        command += ["--prompts", str(out / "prompts.jsonl"), "--out", str(pairs), "--max-tokens", str(TOKENS)]
        command += ["--unfinished", "keep", "--requests", "8"]
        while not pairs.exists():
            before = answers_so_far(partial) if partial.exists() else {}
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            if found["kills"] < KILLS:
                while process.poll() is None and count_lines(partial) < (found["kills"] + 1) * expected // (KILLS + 1):
                    time.sleep(0.05)
                process.send_signal(signal.SIGKILL)
            status = process.wait()
            if status > 0:
                raise SystemExit(status)
            here = samples_file(pairs) if pairs.exists() else partial
            after = answers_so_far(here)
            found["lost"] += sum(after.get(key) != line for key, line in before.items())
            found["saved"] = len(after)
            found["kills"] += status == -signal.SIGKILL
            write_json(kills, found)


def count_lines(file: Path) -> int:
    """Lines of a file, none where there is none."""
    return file.read_bytes().count(b"\n") if file.exists() else 0


def trained_run(out: Path) -> Run:
    """A run on the pairs, by mlxdpo's defaults but adapters in the last 8 blocks."""
    folder = out / "run"
    if not (folder / "adapter").exists():
        new = ["--model", "smollm2", "--data", str(out / "pairs.jsonl"), "--lora.layers", "8", "--out", str(folder)]
        again = ["--resume", str(folder)]
        if status := command_line(["train", *(again if (folder / "manifest.json").exists() else new)]):
            raise SystemExit(status)
    return Run.open(folder)


def judged(out: Path, heldout: Sequence[str]) -> dict[str, Any]:
    """The win rate of the tuned over the untuned model on held-out prompts, two samples each."""
    rows = distinct_prompts([Preference(prompt, "", "", prompt) for prompt in heldout], len(heldout))
    sampling = Sampling(samples=2, max_tokens=2 * TOKENS, temperature=0.7, batch_size=16)
    before, after, control = sample_before_after(open_trained_run(trained_run(out)), rows, sampling)
    judge = open_judge(f"{out / 'judge.py'}:overlap", named_rewards(DataConfig()))
    untuned = first_answers(before)
    return {
        "tuned against untuned": figure(win_rate(judge, judge_answers(judge, before, after), before, after)),
        "untuned against untuned (control)": figure(
            win_rate(judge, judge_answers(judge, untuned, control), untuned, control)
        ),
    }


def page(figures: Mapping[str, Any]) -> str:
    """What was found, in Markdown."""
    kills, pairs = figures["kills"], figures["report"]
    text = [
        f"{kills['saved']:,} answers of two servers to {pairs['prompts']:,} prompts, killed {kills['kills']} times: "
        f"{kills['lost']} answers lost; {pairs['rows']:,} pairs.",
        "",
        "| comparison | n | preferred | 95 % interval | verdict |",
        "|---|---|---|---|---|",
    ]
    for name, found in figures["judged"].items():
        low, high = found["interval"]
        rate = f"{found['rate']:.1%} | {low:.1%} to {high:.1%}"
        text.append(f"| {name} | {found['n']} | {rate} | {verdict(found)} |")
    return "\n".join(text) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask, kill, train, judge, write; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/delta"))
    parser.add_argument("--port", type=int, default=8790, help="of the first server; the second takes the next one")
    parser.add_argument("--page", type=Path, help="Markdown page with the marks, to be filled")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.serve is not None:
        serve(given.serve, given.port)
    given.out.mkdir(parents=True, exist_ok=True)
    heldout = write_prompts(given.out)
    if not (given.out / "pairs.jsonl").exists():
        write_models(given.out)
        make_pairs(given.out, given.port)
    report = read_json(report_file(given.out / "pairs.jsonl"))
    figures = {"kills": read_json(given.out / "kills.json"), "report": report, "judged": judged(given.out, heldout)}
    write_json(given.out / "figures.json", figures)
    print(page(figures))
    if given.page is not None:
        into_page(given.page, page(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
