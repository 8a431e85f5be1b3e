"""Local servers that behave like those people run: what each takes, refuses, ignores, and in which words.

A behaviour is a function of the request's body that gives (status, reply). All of them know the model `judge`, and
prefer the answer with the word `good` or `four`; the words of their errors are those of the servers.
"""

import http.server
import json
import math
import threading
from contextlib import contextmanager

MODEL = "judge"
STATUS = {400: "Bad Request", 404: "Not Found"}


def says_first(body):
    """Whether the first answer shown is the better one; None for a question about one answer alone."""
    text = body["messages"][0]["content"]
    if "[Answer B]" not in text:
        return None
    first = text.split("[Answer A]")[1].split("[Answer B]")[0]
    return any(word in first for word in ("good", "four"))


def is_good(body):
    return any(word in body["messages"][0]["content"].split("[Answer")[-1] for word in ("good", "four"))


def completion(text, *, finish="stop", logprobs=None, used=7, **message):
    """A chat completion, with what a kind of server adds to its message."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    if logprobs is not None:
        top = [{"token": token, "logprob": p} for token, p in logprobs.items()]
        choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
    usage = {"prompt_tokens": 50, "completion_tokens": used, "total_tokens": 50 + used}
    return 200, {"object": "chat.completion", "model": MODEL, "choices": [choice], "usage": usage}


def odds(body, prefix=""):
    """Log-probs of 3 to 1 for the better answer, which drop a place preferred by log 2."""
    first = math.log(3 if says_first(body) else 1 / 3) + math.log(2)
    p = 1 / (1 + math.exp(-first))
    return {f"{prefix}A": math.log(0.9 * p), f"{prefix}B": math.log(0.9 * (1 - p)), "The": math.log(0.1)}


def chat_answer(body):
    """What an obedient model writes: an object, a letter, or reasons with an end."""
    text, first = body["messages"][0]["content"], says_first(body)
    if first is None:
        points = 9 if is_good(body) else 2
        return (
            json.dumps({"reasons": "It is so.", "points": points}) if "object" in text else f"Fine.\nPoints: {points}"
        )
    label = "A" if first else "B"
    if "object" in text:
        return json.dumps({"verdict": label})
    return label if "one letter" in text else f"Answer {label} is right.\nVerdict: {label}"


def refusal(message, param=None, code=None, status=400, kind="invalid_request_error"):
    """OpenAI's shape of an error."""
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


def openai_chat(body):
    """The older chat models: everything the judge asks for."""
    if body["model"] != MODEL:
        return refusal(f"The model `{body['model']}` does not exist", None, "model_not_found", 404)
    if body.get("logprobs"):
        assert body["top_logprobs"] <= 20 and body["max_tokens"] == 1
        return completion("A" if says_first(body) else "B", logprobs=odds(body), finish="length", used=1)
    return completion(chat_answer(body))


def openai_reasoning(body):
    """The newer ones: another name of the budget, no temperature, no log-probs, tokens spent before the answer."""
    if body["model"] != MODEL:
        return refusal(f"The model `{body['model']}` does not exist", None, "model_not_found", 404)
    if "max_tokens" in body:
        words = (
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
        )
        return refusal(words, "max_tokens", "unsupported_parameter")
    if body.get("temperature", 1) != 1:
        words = "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is "
        words += "supported."
        return refusal(words, "temperature", "unsupported_value")
    if body.get("logprobs"):
        return refusal("You are not allowed to request logprobs from this model", None, None, 403)
    spent = {"completion_tokens_details": {"reasoning_tokens": 640}}
    short = body.get("max_completion_tokens", 10**6) < 700
    status, reply = completion("" if short else chat_answer(body), finish="length" if short else "stop", used=650)
    reply["usage"] |= spent
    return status, reply


def ollama(body):
    """Ignores log-probs, as it did for long; forces objects."""
    if body["model"] != MODEL:
        words = f'model "{body["model"]}" not found, try pulling it first'
        return 404, {"error": {"message": words, "type": "api_error", "param": None, "code": None}}
    if body.get("max_tokens") == 1:
        return completion("Answer", finish="length", used=1)
    return completion(chat_answer(body))


def lm_studio(body):
    """Errors are plain text; log-probs are null; any model that is loaded answers to any name but a missing one."""
    if body["model"] != MODEL:
        return 400, {"error": f'Invalid model identifier "{body["model"]}". Please specify a valid downloaded model.'}
    if body.get("response_format", {}).get("type") not in (None, "json_schema", "text"):
        return 400, {"error": "'response_format.type' must be 'json_schema' or 'text'"}
    status, reply = completion("**" if body.get("max_tokens") == 1 else chat_answer(body))
    reply["choices"][0]["logprobs"] = None
    return status, reply


def vllm(body):
    """Allows five alternatives where the operator says so."""
    if body["model"] != MODEL:
        words = f"The model `{body['model']}` does not exist."
        return 404, {"object": "error", "message": words, "type": "NotFoundError", "param": "model", "code": 404}
    if body.get("top_logprobs", 0) > 5:
        words = f"Requested sample logprobs of {body['top_logprobs']}, which is greater than max allowed: 5"
        return 400, {"object": "error", "message": words, "type": "BadRequestError", "param": None, "code": 400}
    if body.get("logprobs"):
        return completion("A", logprobs=odds(body), finish="length", used=1)
    return completion(chat_answer(body))


def mlx_server(body):
    """`mlx_lm.server`: eleven alternatives, raw tokens, errors as plain text."""
    if body["model"] != MODEL:
        return 404, {"error": f"Repository Not Found for url: https://hub.example/{body['model']}"}
    if body.get("top_logprobs", -1) > 11:
        return 400, {"error": "top_logprobs must be at most 11"}
    if body.get("logprobs"):
        return completion("A", logprobs=odds(body, "Ġ"), finish="length", used=1)
    return completion(chat_answer(body))


def thinking(body):
    """A reasoning model whose server leaves its thoughts in the answer, and ignores formats."""
    if body["model"] != MODEL:
        return 404, {"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}}
    if body.get("logprobs"):
        return completion("<think>", logprobs={"<think>": -0.01, "A": -9.0}, finish="length", used=1)
    thought = "Verdict: B? No, points: 1? Let me see ..."
    if max(body.get(name, 0) for name in ("max_tokens", "max_completion_tokens")) < 2000:
        return completion(f"<think>{thought}", finish="length", used=600)
    return completion(f"<think>{thought}</think>\n\n{chat_answer(body)}", used=900)


KINDS = {
    "openai, chat": openai_chat,
    "openai, reasoning": openai_reasoning,
    "ollama": ollama,
    "lm studio": lm_studio,
    "vllm": vllm,
    "mlx_lm.server": mlx_server,
    "thinking": thinking,
}


class JudgeServer(http.server.ThreadingHTTPServer):
    """Serves `behave`; `seen` are the bodies and headers of all requests, `listed` the models it admits to."""

    daemon_threads = True

    def __init__(self, behave):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave, self.seen, self.listed = behave, [], [MODEL, "other"]

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        """A client that gave up is no news."""


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with (status, JSON or bytes or parts of bytes, headers)."""

    def do_GET(self):
        self.answer(200, {"object": "list", "data": [{"id": n, "object": "model"} for n in self.server.listed]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((body, self.headers))
        self.answer(*self.server.behave(body))

    def answer(self, status, reply, headers=()):
        parts = (
            [json.dumps(reply).encode()] if isinstance(reply, dict) else [reply] if isinstance(reply, bytes) else reply
        )
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.writelines(parts)

    def log_message(self, *args):
        pass


@contextmanager
def serving(behave):
    """A server on the loopback that behaves so."""
    server = JudgeServer(behave)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
