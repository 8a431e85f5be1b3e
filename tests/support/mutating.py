"""Real rows and files, changed in the ways in which files go wrong, or are made to: bytes, JSON values, names."""

import copy
import json
import os
from functools import cache
from importlib.resources import files
from pathlib import Path

from hypothesis import strategies as st
from row_shapes import FIXTURES

SEEDS = st.integers(0, 2**32 - 1)
SPECIAL = [
    "<|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>", "<|eot_id|>", "<|begin_of_text|>", "<bos>",
    "<eos>", "</s>",
    "<s>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<<SYS>>", "<think>", "</think>", "<unk>",
    "<pad>",
    "<0x0A>", "{{ x }}", "{% if %}", "{{ messages }}",
]  # fmt: skip
ODD_TEXTS = [
    "", " ", "\n", "\r\n\t", "\0", "\x1b[31mred", "\ud800", "\udfff\ud800", "\ufeff", "\u202eabc", "\u200b", "\u2028",
    "é", "e\u0301", "👩‍👩‍👧", "🏳️‍🌈" * 20, "Z͑ͫ̓ͪ̂ͫ̽͏̴̙" * 5, "नमस्ते", "漢" * 300, "\U0010ffff", "ﷺ" * 50,
    "a" * 20_000, "<script>alert(1)</script>",
    "\N{OBJECT REPLACEMENT CHARACTER}", "NaN", "null", "true", "1e999", "-0", "\\u0000", '"', "'; --", "\x85", "\x1c",
]  # fmt: skip
ODD_NAMES = [
    "..", ".", "../x", "../../etc/passwd", "/etc/passwd", "a/../../b", "~/x", "~root", "C:\\x", "..\\x",
    "\\\\host\\share",
    "CON", "nul.txt", "aux", "COM1", "a:b", "a\0b", "a\nb", " a", "a ", "a.", "x" * 300, "x/" * 2_000, "*", "?", "|",
    "\ud800", "%2e%2e%2f", "file:///etc/passwd", "$HOME", "-rf", "--help", "a b", "é" * 200, "//", "\u2215",
]  # fmt: skip
ODD_VALUES = [
    None, True, False, 0, -1, 1, 2**63, 10**30, -(10**400), 1e308, 5e-324, float("nan"), float("inf"), float("-inf"),
    [], {}, [[]], [None], [{}], {"a": 1}, {"": None}, [1, "a", None], "x", *ODD_TEXTS, *ODD_NAMES, *SPECIAL,
]  # fmt: skip
ODD_BYTES = [
    b"\0", b"\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r", b"\n\n", b"{", b"}", b"[", b"]", b'"', b",",
    b"\\", b"\\u", b"\xed\xa0\x80",
    b"9" * 5_000, b"[" * 3_000, b'{"a":' * 3_000, b"NaN", b"Infinity", b"1e999", b"\x80\x04\x95",
    b"PK\x03\x04", b"\x1f\x8b\x08", b"PAR1",
    b"!!python/object/apply:os.system ['true']\n", b"&a [*a]\n", b"- " * 2_000, b": ", b"? ", b"<<: *x\n",
    b"2001-99-99", b"\t",
]  # fmt: skip


def mutate_bytes(rng, raw, most=3):
    """`raw` with one to `most` accidents: flipped, cut out, doubled, overwritten, cut off, swapped."""
    raw = bytearray(raw)
    for _ in range(rng.randint(1, most)):
        at, size = rng.randint(0, len(raw)), rng.choice([1, 2, 8, 64])
        act = rng.randrange(7)
        if act == 0 and raw:
            raw[min(at, len(raw) - 1)] ^= 1 << rng.randrange(8)
        elif act == 1:
            del raw[at : at + size]
        elif act == 2:
            raw[at:at] = raw[at : at + size]
        elif act == 3:
            raw[at:at] = rng.choice(ODD_BYTES)
        elif act == 4:
            raw[at : at + size] = rng.choice(ODD_BYTES)
        elif act == 5 and rng.random() < 0.3:
            del raw[at:]
        else:
            lines = raw.split(b"\n")
            rng.shuffle(lines)
            raw = bytearray(b"\n".join(lines))
    return bytes(raw)


def mutate_value(rng, value, most=2, odd=ODD_VALUES):
    """A copy of a JSON value with one to `most` places replaced, removed, renamed, doubled, or wrapped."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, most)):
        value = _changed(rng, value, odd)
    return value


def _changed(rng, value, odd):
    if isinstance(value, dict) and value and rng.random() < 0.85:
        name = rng.choice(list(value))
        act = rng.random()
        if act < 0.15:
            del value[name]
        elif act < 0.25:
            value[rng.choice(["x", "", "role", "prompt", name + " ", *ODD_NAMES[:4]])] = value.pop(name)
        elif act < 0.3:
            value[rng.choice(["extra", "prompt", "chosen", "step"])] = rng.choice(odd)
        else:
            value[name] = _changed(rng, value[name], odd)
        return value
    if isinstance(value, list) and value and rng.random() < 0.85:
        at, act = rng.randrange(len(value)), rng.random()
        if act < 0.2:
            del value[at]
        elif act < 0.4:
            value.insert(at, rng.choice(odd))
        elif act < 0.5:
            value.append(copy.deepcopy(value[at]))
        else:
            value[at] = _changed(rng, value[at], odd)
        return value
    if isinstance(value, str) and rng.random() < 0.4:
        at = rng.randint(0, len(value))
        return value[:at] + rng.choice([*SPECIAL, *ODD_TEXTS]) + value[at + rng.randint(0, 3) :]
    if rng.random() < 0.1:
        return rng.choice([[value], {"a": value}, [value, value], str(value)])
    return rng.choice(odd)


@cache
def corpus():
    """Real rows: every row shape's own, the demo's pairs, and the JSONL files that MLXDPO_FUZZ_CORPUS names."""
    sets = {name: list(rows) for name, rows in FIXTURES.items()}
    named = os.environ.get("MLXDPO_FUZZ_CORPUS", "").split(os.pathsep)
    for file in (files("mlxdpo.demo").joinpath("pairs.jsonl"), *(Path(name) for name in named if name)):
        lines = file.read_text("utf-8").split("\n")[:200]
        sets[file.name] = [json.loads(line) for line in lines if line]
    return sets


def some_rows(rng, most=5):
    """A few rows of one set, as they stand."""
    rows = rng.choice(list(corpus().values()))
    return [copy.deepcopy(rng.choice(rows)) for _ in range(rng.randint(1, most))]


def mutated_rows(rng, most=5):
    """A few rows of one set, about half of them changed."""
    return [mutate_value(rng, row) if rng.random() < 0.5 else row for row in some_rows(rng, most)]


def dumped(value):
    """JSON as other programs write it, half characters and NaN among them."""
    return json.dumps(value).encode()
