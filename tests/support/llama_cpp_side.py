"""The other side of the comparison for GGUF: llama.cpp's own server, inside this process, from the xllamacpp wheel."""

import json
import math
import urllib.request

import mlx.core as mx
import xllamacpp

FLOAT32 = 0  # ggml's number for it


class LlamaCpp:
    """A GGUF file behind llama.cpp's HTTP server on a free port of this machine; a context manager."""

    def __init__(self, file, lora=None):
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(file)
        parameters.n_ctx, parameters.n_parallel, parameters.warmup = 512, 1, False
        parameters.cpuparams.n_threads, parameters.n_gpu_layers, parameters.no_op_offload = 1, 0, True
        parameters.port = 0
        # As shipped it keeps keys and values in 16 bits, and its fused attention rounds: 3e-3 nats on SmolLM2.
        parameters.cache_type_k = parameters.cache_type_v = FLOAT32
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if lora is not None:
            one = xllamacpp.CommonAdapterLoraInfo()
            one.path, one.scale = str(lora), 1.0
            parameters.lora_adapters = [one]
        self.server = xllamacpp.Server(parameters)

    def __enter__(self):
        return self

    def __exit__(self, *problem):
        del self.server

    def ask(self, path, **body):
        request = urllib.request.Request(
            f"{self.server.listening_address}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)

    def tokens(self, text):
        """The ids of `text`; special tokens in it are themselves."""
        return self.ask("tokenize", content=text, add_special=True, parse_special=True)["tokens"]

    def greedy(self, prompts, count):
        """The likeliest `count` tokens after each row of ids; ends of turns do not stop it."""
        settings = {"n_predict": count, "temperature": 0, "return_tokens": True, "ignore_eos": False, "stop": []}
        return [self.ask("completion", prompt=ids, samplers=["temperature"], **settings)["tokens"] for ids in prompts]

    def likeliest(self, ids, count, drawn):
        """{id: log-prob} of the `count` likeliest tokens after a row of ids.

        `drawn` is a token that is a whole letter and no end, which it is made to draw: of others the server is silent.
        """
        settings = {"n_predict": 1, "temperature": 0, "logit_bias": [[drawn, 1e3]]}
        answer = self.ask("completion", prompt=ids, n_probs=count, **settings)
        return {entry["id"]: entry["logprob"] for entry in answer["completion_probabilities"][0]["top_logprobs"]}


def gelu_by_table(x):
    """GELU's tanh form as llama.cpp's CPU kernels look it up: from float16 to float16, 5e-4 of each value."""
    half = x.astype(mx.float16).astype(mx.float32)
    made = 0.5 * half * (1 + mx.tanh(math.sqrt(2 / math.pi) * half * (1 + 0.044715 * half * half)))
    return mx.where(mx.abs(x) >= 10, mx.maximum(x, 0), made.astype(mx.float16).astype(mx.float32))
