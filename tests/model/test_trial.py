"""Templates, patterns and numbers of a stranger's model: a sentence within seconds, whatever they would do."""

import json

import pytest
from tiny_models import change
from tiny_runs import write_pairs

from mlxdpo.cli import run as cli
from mlxdpo.machine.limited import LimitReached, call_limited
from mlxdpo.model import trial

pytestmark = pytest.mark.processes


@pytest.fixture(autouse=True)
def strangers(monkeypatch):
    """Tokenizers are tried, as they are outside of the tests."""
    monkeypatch.setattr("mlxdpo.model.policy.try_tokenizer", trial.try_tokenizer)
    monkeypatch.setattr(trial, "SECONDS", 1)


TEMPLATES = {
    "a loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x",
    "a text of 10 GB": "{{ ('a' * 10000000000) | length }}{{ messages[0].content }}",
    "a loop for long talks": "{% if messages|length > 50 %}{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% endfor %}{% endfor %}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_hostile_template_is_ended(own, cache, capsys, name):
    (own / "chat_template.jinja").write_text(TEMPLATES[name])
    assert cli(["data", "check", str(write_pairs(own / "p.jsonl")), "--model", str(own)]) == 2
    assert "its tokenizer or chat template took" in capsys.readouterr().err
    assert not list(cache.glob("tried/*")), "and is tried again the next time"


@pytest.mark.parametrize("pattern", ["(a+)+$|x", "(.*)*!\\1x"])
def test_a_hostile_pattern_is_ended(own, cache, capsys, pattern):
    file = own / "tokenizer.json"
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    rules = json.loads(file.read_text("utf-8"))
    change(file, pre_tokenizer={"type": "Sequence", "pretokenizers": [split, rules["pre_tokenizer"]]})
    status = cli(["data", "check", str(write_pairs(own / "p.jsonl")), "--model", str(own)])
    assert (status, "its tokenizer or chat template took" in capsys.readouterr().err) == (2, True)


def test_a_good_one_is_tried_once(own, cache, monkeypatch):
    tried = []
    monkeypatch.setattr(trial, "call_limited", lambda *arguments: tried.append(arguments))
    for _ in range(2):
        trial.try_tokenizer(own, "m")
    assert len(tried) == 1
    change(own / "tokenizer_config.json", chat_template="{{ messages[0].content }} changed")
    trial.try_tokenizer(own, "m")
    assert len(tried) == 2, "another template was not seen before"


HOLD = """
from mlxdpo.machine.limited import start_limits

def hold(kind):
    start_limits(1, 100)
    while kind == "time":
        pass
    if kind == "memory":
        return len(bytearray(1 << 30))
    if kind == "crash":
        import ctypes
        ctypes.string_at(0)
    print("this goes nowhere")
    return [kind, 1, None]
"""


def held(folder, monkeypatch, kind):
    (folder / "held.py").write_text(HOLD)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return call_limited("held:hold", kind, 1, 100)


@pytest.mark.parametrize("kind, said", [("time", "more than 1 s"), ("memory", "more than 100 MB"), ("crash", "down")])
def test_limits(kind, said, tmp_path, monkeypatch):
    with pytest.raises(LimitReached, match=said):
        held(tmp_path, monkeypatch, kind)


def test_a_value_comes_back(tmp_path, monkeypatch):
    assert held(tmp_path, monkeypatch, "none") == ["none", 1, None]
