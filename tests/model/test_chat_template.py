"""Chat templates wherever a model folder has them: several by name, a processor's file, and the day they are told."""

import datetime
import json
import types
from pathlib import Path

import pytest
from tiny_exports import known_tokenizer, trained_run
from tiny_models import change, write_model
from tiny_runs import finish, recipe, stop_after
from tiny_tokenizers import CHATML, chatml_tokenizer
from transformers import AutoTokenizer

from mlxdpo.config import DataConfig, load_config
from mlxdpo.data.encode import encode, encode_prompt
from mlxdpo.data.report import Report
from mlxdpo.data.template import NO_DATE, template_digest
from mlxdpo.exporters.record import outgoing
from mlxdpo.exporters.run import export
from mlxdpo.inference.trained_run import open_trained_run
from mlxdpo.model.policy import load_tokenizer
from mlxdpo.runs import Run
from mlxdpo.types import Message, Preference, UserError

TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
TOOL_USE = "{% for t in tools %}{{ t | tojson }}{% endfor %}" + CHATML
NAMED = {"default": CHATML, "tool_use": TOOL_USE}
LIST = [{"name": name, "template": text} for name, text in NAMED.items()]


def without_template(folder):
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return folder


def saved_by_transformers(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = NAMED
    tokenizer.save_pretrained(without_template(folder))
    assert (folder / "additional_chat_templates" / "tool_use.jinja").is_file()


PLACES = {
    "additional_chat_templates": saved_by_transformers,
    "list in tokenizer_config.json": lambda f: change(
        without_template(f) / "tokenizer_config.json", chat_template=LIST
    ),
    "list in chat_template.json": lambda f: (without_template(f) / "chat_template.json").write_text(
        json.dumps({"chat_template": LIST})
    ),
    "chat_template.json": lambda f: (without_template(f) / "chat_template.json").write_text(
        json.dumps({"chat_template": TOOL_USE.replace("in tools", "in tools or []")})
    ),
}


@pytest.fixture(params=PLACES)
def placed(request, tmp_path, cache):
    folder = write_model(tmp_path / "llama", known_tokenizer())
    PLACES[request.param](folder)
    return folder


def row(tools=()):
    answers = [(Message("assistant", words),) for words in ("So.", "No.")]
    return Preference((Message("user", "Why?"),), *answers, "p.jsonl:1", tools)


def prompt_text(tokenizer, row, data=DataConfig()):  # noqa: B008
    return tokenizer.decode(encode(row, tokenizer, data, Report()).prompt.tolist())


def test_rows_with_tools_are_written_by_the_template_for_tools(placed):
    tokenizer = load_tokenizer(placed, "m")
    assert prompt_text(tokenizer, row((TOOL,))).startswith('{"type": "function", "function": {"name": "clock"')
    assert prompt_text(tokenizer, row()).startswith("<|im_start|>user")
    assert (
        encode_prompt("Why?", tokenizer, DataConfig(), (TOOL,)).tolist()
        == encode(row((TOOL,)), tokenizer, DataConfig(), Report()).prompt.tolist()
    )


@pytest.mark.parametrize("placed", ["additional_chat_templates", "list in chat_template.json"], indirect=True)
def test_templates_are_exported_to_where_tokenizers_look(placed):
    run = trained_run(placed.parent, data={"template": "chat"}, train={"steps": 1})
    done = export(run, ["fused", "hf"], placed.parent / "out", pairs=4)
    ours, going = load_tokenizer(placed, "m"), {file.name for file in outgoing(placed.parent / "out")[0]}
    for target in done.targets.values():
        folder = done.out / target.folder
        theirs = AutoTokenizer.from_pretrained(folder)
        for tools in ((), (TOOL,)):
            assert prompt_text(theirs, row(tools)) == prompt_text(ours, row(tools))
        if isinstance(theirs.chat_template, dict) and (folder / "additional_chat_templates").is_dir():
            name = "additional_chat_templates/tool_use.jinja"
            assert {name, f"hf/{name}", f"fused/{name}"} & going


def test_each_template_is_in_the_digest_and_one_is_called_default():
    tokenizer, data = chatml_tokenizer(), DataConfig()
    found = set()
    for templates in (CHATML, NAMED, NAMED | {"tool_use": TOOL_USE + " "}):
        tokenizer.chat_template = templates
        found.add(template_digest(tokenizer, data))
    assert len(found) == 3
    tokenizer.chat_template = {"rag": CHATML, "tool_use": TOOL_USE}
    with pytest.raises(UserError, match=r"chat templates are rag, tool_use and none is called default"):
        encode(row(), tokenizer, data, Report())


# The day

ASKING = "{{ strftime_now('%d %b %Y') }}" + CHATML


@pytest.fixture
def asking(tmp_path, cache):
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = ASKING
    write_model(tmp_path / "llama", tokenizer)
    return tmp_path


def on(monkeypatch, year, month, day):
    clock = types.SimpleNamespace(date=types.SimpleNamespace(today=lambda: datetime.date(year, month, day)))
    monkeypatch.setattr("mlxdpo.training.run.datetime", clock)


def asked(run, folder):
    trained = open_trained_run(Run.open(run))
    prompt = encode_prompt("Why?", trained.policy.tokenizer, trained.config.data)
    return trained.policy.tokenizer.decode(prompt.tolist())


def test_a_run_tells_its_template_the_day_it_began(asking, monkeypatch):
    chat = {"data": {"template": "chat"}, "train": {"steps": 2, "save_every": 1}}
    on(monkeypatch, 2031, 5, 4)
    whole = finish(recipe(asking, "whole", **chat))
    finish(recipe(asking, "run", **chat), stop=stop_after(6))
    on(monkeypatch, 2031, 5, 5)
    run = Run.open(asking / "run")
    events = finish(run.config(), resume=run)
    assert run.manifest()["date"] == run.config().data.date == "2031-05-04"
    assert asked(run.path, asking).startswith("04 May 2031<|im_start|>user")
    last = [event.values["loss"] for event in events if event.kind == "step"]
    assert last == [event.values["loss"] for event in whole if event.kind == "step"][-len(last) :]
    finish(recipe(asking, "later", **chat))
    assert asked(asking / "later", asking).startswith("05 May 2031")
    assert Run.open(asking / "later").manifest()["template"] != run.manifest()["template"]


def test_the_recipe_names_the_day_and_one_that_nobody_asks_for_is_left_out(asking, tmp_path, monkeypatch):
    on(monkeypatch, 2031, 5, 4)
    finish(recipe(asking, "run", data={"template": "chat", "date": "2024-02-29"}, train={"steps": 1}))
    assert asked(asking / "run", asking).startswith("29 Feb 2024")
    write_model(tmp_path / "other" / "llama", chatml_tokenizer())
    finish(recipe(tmp_path / "other", "run", data={"template": "chat"}, train={"steps": 1}))
    run = Run.open(tmp_path / "other" / "run")
    assert run.config().data.date is None and "date" not in run.manifest()


def test_a_run_without_a_day_goes_on_with_the_one_that_was_told_before(asking, monkeypatch):
    monkeypatch.setattr("mlxdpo.training.run.on_day", lambda data, tokenizer, today: data)  # as runs of 0.1.0 were
    finish(recipe(asking, "run", data={"template": "chat"}), stop=stop_after(8))
    monkeypatch.undo()
    run = Run.open(asking / "run")
    finish(run.config(), resume=run)
    assert asked(run.path, asking).startswith(NO_DATE.strftime("%d %b %Y"))


@pytest.mark.parametrize("words", ["2026-13-01", "tomorrow"])
def test_a_day_that_is_none(words):
    with pytest.raises(UserError, match=r"`data\.date` is"):
        load_config(None, {"data": {"date": words}})


def test_a_day_out_of_yaml(tmp_path: Path):
    (tmp_path / "r.yaml").write_text("data:\n  date: 2026-12-01\n")
    assert load_config(tmp_path / "r.yaml").data.date == "2026-12-01"


@pytest.mark.parametrize("form", ["'%d %b %Y'", '"%A, %-d %B %y"', "'%Y' + '-%m-%d'"])
def test_the_day_in_any_form(form):
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = (
        "\n{% macro head(f) %}<{{ strftime_now(f) }}>{% endmacro %}{{ head(" + form + ") }}" + CHATML
    )
    found = tokenizer.decode(encode_prompt("Why?", tokenizer, DataConfig(date="2031-05-04")).tolist())
    wanted = datetime.date(2031, 5, 4).strftime(eval(form))
    assert found.startswith(f"\n<{wanted}><|im_start|>user")
