"""The client itself is asked: greedy answers to held-out prompts through its own interface, held against the run's.

`mlx_lm.server` for MLX folders, llama.cpp's server for GGUF (the `xllamacpp` package, or `llama-server` on the PATH),
transformers with PEFT where torch is installed. A client that is not here is not asked, and the record says so.

An answer is compared token by token with what the run would have said: texts that are equal, and the worst difference
of log-probabilities over the tokens up to the first that differs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxdpo.exporters import gguf
from mlxdpo.exporters.modelfile import writer_of
from mlxdpo.exporters.source import ExportSource
from mlxdpo.inference.generate import generate
from mlxdpo.types import Example, Message, Preference, UserError

TOKENS = 32  # of each answer
ALWAYS_ASKED, PROMPTS = ("server",), 20
PATIENCE = 300.0  # seconds until a server has loaded the model
MOST_APART = 0.5  # nats: an answer whose log-probs differ by less is the run's, rounded otherwise


class ClientPrompt(NamedTuple):
    """A held-out prompt: `text`, or the `turns` that a chat client sends; `ids` as the run is asked."""

    turns: tuple[Message, ...] | None
    text: str
    ids: tuple[int, ...]


class ClientAnswer(NamedTuple):
    """What a client said: token ids, their log-probs (nats; NaN where it tells none), and the text."""

    ids: tuple[int, ...]
    logps: tuple[float, ...]
    text: str


class ClientReport(NamedTuple):
    """How a client answered: `equal` of `prompts` greedy texts, the worst difference of log-probs in nats (None where
    the client tells none), and how many prompts were answered unlike the run: another text, log-probs `MOST_APART` off.
    """

    client: str
    prompts: int
    equal: int
    worst_logp: float | None
    unlike: int

    @property
    def reason(self) -> str | None:
        """Why this is not the run, in a sentence; None when it is."""
        if 2 * self.unlike <= self.prompts:
            return None
        return f"{self.client} answered {self.unlike} of {self.prompts} prompts differently from the run"


Client = Callable[[ClientPrompt], ClientAnswer]


def questions_of(source: ExportSource, rows: Sequence[Preference], examples: Sequence[Example]) -> list[ClientPrompt]:
    """Held-out prompts as clients are asked them."""
    chat = source.trained.config.data.template != "plain" and writer_of(source).chat
    found: dict[tuple[int, ...], ClientPrompt] = {}
    for row, example in zip(rows, examples, strict=True):
        ids = tuple(int(i) for i in example.prompt)
        turns = (Message("user", row.prompt),) if isinstance(row.prompt, str) else row.prompt
        text = row.prompt if isinstance(row.prompt, str) else ""
        found.setdefault(ids, ClientPrompt(turns if chat else None, text, ids))
    return list(found.values())


def own_answers(source: ExportSource, questions: Sequence[ClientPrompt]) -> list[tuple[int, ...]]:
    """The run's own greedy answers, as token ids."""
    policy, prompts = source.trained.policy, [question.ids for question in questions]
    made = generate(policy.model, prompts, max_tokens=TOKENS, eos_ids=policy.eos_ids, temperature=0)
    return [tuple(one.tokens) for one in made]


def asker(
    source: ExportSource, questions: Sequence[ClientPrompt], count: int
) -> Callable[[str, Path], ClientReport | None]:
    """What asks the client of a target, written in a folder, `count` of the questions; it gives None where the client
    is not asked, or not on this machine.

    The clients of `ALWAYS_ASKED` are asked `PROMPTS` of them when `count` is 0. The run is asked once for all.
    """
    own = functools.cache(lambda: own_answers(source, questions[: count or PROMPTS]))

    def ask_of(name: str, folder: Path) -> ClientReport | None:
        """How the client of target `name` answers."""
        chosen = questions[: count or (PROMPTS if name in ALWAYS_ASKED else 0)]
        found = CLIENTS[name](source, folder) if name in CLIENTS and chosen else None
        if found is None:
            return None
        client, opened = found
        with opened as answer:
            answers = [answer(question) for question in chosen]
        return compare_answers(source, client, chosen, answers, own())

    return ask_of


def compare_answers(
    source: ExportSource,
    client: str,
    questions: Sequence[ClientPrompt],
    answers: Sequence[ClientAnswer],
    own: Sequence[Sequence[int]],
) -> ClientReport:
    """A client's answers beside the run's own greedy ones."""
    policy = source.trained.policy
    equal, unlike, worst = 0, 0, []
    for question, answer, said in zip(questions, answers, own, strict=False):
        said_ids = [token for token in said if token not in policy.eos_ids]
        text = policy.tokenizer.decode(said_ids, skip_special_tokens=True)
        kept = [token for token in answer.ids if token not in policy.eos_ids]
        same = kept == said_ids if answer.ids else answer.text.strip() == text.strip()
        apart = _worst_difference(source, question, answer, said)
        equal += same
        unlike += not same and (apart is None or apart > MOST_APART)
        worst += [] if apart is None else [apart]
    return ClientReport(client, len(questions), equal, max(worst, default=None), unlike)


def _worst_difference(
    source: ExportSource, question: ClientPrompt, answer: ClientAnswer, own: Sequence[int]
) -> float | None:
    """The worst difference of log-probs over a client's tokens up to the first that the run would not have said."""
    count = min(len(answer.ids), len(answer.logps))
    first = next((i for i in range(min(count, len(own))) if answer.ids[i] != own[i]), count - 1)
    ids = answer.ids[: min(count, first + 1)]
    if not ids:
        return None
    rows = mx.array([[*question.ids, *ids]])
    logits = source.trained.policy.model(rows[:, :-1])[0, len(question.ids) - 1 :].astype(mx.float32)
    logps = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))[np.arange(len(ids)), list(ids)]
    apart = np.abs(logps - np.array(answer.logps[: len(ids)]))
    return None if np.isnan(apart).all() else float(np.nanmax(apart))


Opened = tuple[str, contextlib.AbstractContextManager[Client]]


def _mlx_server(source: ExportSource, folder: Path) -> Opened:
    return "mlx_lm.server", _serve_mlx(source, server_arguments(source, folder, str(source.folder)))


def server_arguments(source: ExportSource, folder: Path, base: str) -> list[str]:
    """What `mlx_lm.server` is started with for an exported folder: an adapter goes onto `base`."""
    adapter = (folder / "adapters.safetensors").is_file()
    arguments = ["--model", base, "--adapter-path", str(folder)] if adapter else ["--model", str(folder)]
    template = writer_of(source).template or ""
    if "enable_thinking" in template:
        thinking = {"enable_thinking": source.trained.config.data.thinking}
        arguments += ["--chat-template-args", json.dumps(thinking)]
    return arguments


@contextlib.contextmanager
def _serve_mlx(source: ExportSource, arguments: list[str]) -> Iterator[Client]:
    with contextlib.ExitStack() as stack:
        port = free_port()
        command = [sys.executable, "-m", "mlx_lm", "server", "--host", "127.0.0.1", "--port", str(port), *arguments]
        stack.enter_context(_server_process(command, f"http://127.0.0.1:{port}/health"))
        yield lambda question: _ask_openai(f"http://127.0.0.1:{port}/v1", question, "default_model")


def _ask_openai(address: str, question: ClientPrompt, model: str) -> ClientAnswer:
    """One greedy answer by the chat or completion call that OpenAI's clients make."""
    body: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": TOKENS, "logprobs": True}
    if question.turns is None:
        choice = _post_to_client(f"{address}/completions", body | {"prompt": question.text})["choices"][0]
        text = choice["text"]
    else:
        messages = [turn.as_dict() for turn in question.turns]
        choice = _post_to_client(f"{address}/chat/completions", body | {"messages": messages})["choices"][0]
        text = choice["message"].get("content") or ""
    told = (choice.get("logprobs") or {}).get("content") or []
    return ClientAnswer(tuple(one["id"] for one in told), tuple(one["logprob"] for one in told), text)


def _llama_cpp(source: ExportSource, folder: Path) -> Opened | None:
    serve = _xllamacpp if importlib.util.find_spec("xllamacpp") is not None else _llama_server
    if serve is _llama_server and shutil.which("llama-server") is None:
        return None
    if (folder / gguf.FILE).is_file():
        return "llama.cpp", serve(folder / gguf.FILE, None)
    return "llama.cpp", _on_base(source, folder / gguf.LORA_FILE, serve)


@contextlib.contextmanager
def _on_base(source: ExportSource, adapter: Path, serve: Callable[..., Any]) -> Iterator[Client]:
    """An adapter on top of its base, which is written as GGUF for as long as it is asked."""
    with tempfile.TemporaryDirectory(dir=adapter.parent, prefix=".base-") as name:
        gguf.convert_to_gguf(source.base, Path(name, gguf.FILE), "auto", source.base_name)
        with serve(Path(name, gguf.FILE), adapter) as client:
            yield client


@contextlib.contextmanager
def _xllamacpp(file: Path, adapter: Path | None) -> Iterator[Client]:
    """llama.cpp's server inside this process; keys and values in float32, or they alone cost 3e-3 nats."""
    library = importlib.import_module("xllamacpp")
    settings = library.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = str(file), 2048, 1, False
    settings.port, settings.cache_type_k, settings.cache_type_v = 0, 0, 0
    settings.flash_attn_type = library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.use_jinja = True
    if adapter is not None:
        one = library.CommonAdapterLoraInfo()
        one.path, one.scale = str(adapter), 1.0
        settings.lora_adapters = [one]
    server = library.Server(settings)  # it ends with its last reference
    yield lambda question: _ask_llama_cpp(server.listening_address, question)


@contextlib.contextmanager
def _llama_server(file: Path, adapter: Path | None) -> Iterator[Client]:
    port = free_port()
    numbers = ["--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off", "--ctx-size", "2048"]
    command = ["llama-server", "-m", str(file), "--host", "127.0.0.1", "--port", str(port), "--jinja", *numbers]
    command += ["--lora", str(adapter)] if adapter is not None else []
    with _server_process(command, f"http://127.0.0.1:{port}/health"):
        yield lambda question: _ask_llama_cpp(f"http://127.0.0.1:{port}", question)


def _ask_llama_cpp(address: str, question: ClientPrompt) -> ClientAnswer:
    """One greedy answer to the prompt that llama.cpp writes by the template in the file."""
    prompt = question.text
    if question.turns is not None:
        messages = [turn.as_dict() for turn in question.turns]
        prompt = _post_to_client(f"{address}/apply-template", {"messages": messages})["prompt"]
    settings = {"n_predict": TOKENS, "temperature": 0, "samplers": ["temperature"], "return_tokens": True, "n_probs": 1}
    told = _post_to_client(f"{address}/completion", settings | {"prompt": prompt})
    probabilities, logps = list(told.get("completion_probabilities", ())), []
    for token in told["tokens"]:  # it is silent on tokens that are half a letter
        found = bool(probabilities) and probabilities[0]["id"] == token
        logps.append(probabilities.pop(0)["logprob"] if found else float("nan"))
    return ClientAnswer(tuple(told["tokens"]), tuple(logps), told["content"])


def _torch(source: ExportSource, folder: Path) -> Opened | None:
    adapter = (folder / "adapter_config.json").is_file()
    if any(importlib.util.find_spec(name) is None for name in ("torch", "peft") if adapter or name == "torch"):
        return None
    return "transformers + PEFT" if adapter else "transformers", _on_torch(source, folder, adapter)


@contextlib.contextmanager
def _on_torch(source: ExportSource, folder: Path, adapter: bool) -> Iterator[Client]:
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    where = str(source.base if adapter else folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
    if adapter:
        model = importlib.import_module("peft").PeftModel.from_pretrained(model, str(folder))
    tokenizer = transformers.AutoTokenizer.from_pretrained(where)
    writer = writer_of(source)

    def answer(question: ClientPrompt) -> ClientAnswer:
        """Greedy, on the prompt as the exported tokenizer and template write it, until one of the model's ends."""
        if question.turns is None:
            ids = tokenizer(question.text)["input_ids"]
        else:
            turns = [turn.as_dict() for turn in question.turns]
            settings = {"enable_thinking": writer.thinking, "add_generation_prompt": True}
            ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, **settings)["input_ids"]
        with torch.no_grad():
            made = model.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                do_sample=False,
                max_new_tokens=TOKENS,
                eos_token_id=sorted(source.trained.policy.eos_ids),
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        said = [int(i) for i in made.sequences[0, len(ids) :]]
        logps = [float(z[0].float().log_softmax(-1)[i]) for z, i in zip(made.logits, said, strict=True)]
        kept = [i for i in said if i not in source.trained.policy.eos_ids]
        return ClientAnswer(tuple(said), tuple(logps), tokenizer.decode(kept, skip_special_tokens=True))

    yield answer


CLIENTS: dict[str, Callable[[ExportSource, Path], Opened | None]] = {
    "mlx": _mlx_server,
    "server": _mlx_server,
    "fused": _mlx_server,
    "quantized": _mlx_server,
    "gguf": _llama_cpp,
    "gguf-lora": _llama_cpp,
    "peft": _torch,
    "hf": _torch,
}


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def _server_process(command: list[str], health: str) -> Iterator[None]:
    """A server that runs while the context lasts. Raises `UserError` with its last words when it does not start."""
    with tempfile.TemporaryFile() as words:
        running = subprocess.Popen(command, stdout=words, stderr=subprocess.STDOUT)
        try:
            _wait_for(running, health, words)
            yield
        finally:
            running.terminate()
            running.wait(30)


def _wait_for(running: subprocess.Popen, health: str, words: Any) -> None:
    until = time.monotonic() + PATIENCE
    while running.poll() is None and time.monotonic() < until:
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(health, timeout=5).close()
            return
        time.sleep(0.2)
    words.seek(0)
    last = words.read().decode("utf-8", "replace").strip().splitlines()[-1:] or ["no message"]
    raise UserError(f"{Path(str(running.args[0])).name} did not start: {last[0][:200]}")  # type: ignore[index]


def _post_to_client(address: str, body: dict[str, Any]) -> Any:
    asked = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(asked, timeout=PATIENCE) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        told = error.read().decode("utf-8", "replace")[:200]
        raise UserError(f"the client answered {error.code} to a prompt: {told}") from None
