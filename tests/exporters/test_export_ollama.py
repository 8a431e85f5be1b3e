"""Ollama: the Modelfile's template writes what Jinja writes, by Go's own interpreter where there is one."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny_tokenizers
from tiny_exports import known_tokenizer, trained_run
from tiny_models import write_model

from mlxdpo.config import DataConfig
from mlxdpo.data.template import probe
from mlxdpo.exporters import export
from mlxdpo.exporters.go_template import TurnTemplate, go_template, learn_template, random_conversations
from mlxdpo.exporters.modelfile import check_modelfile, modelfile, parse_modelfile
from mlxdpo.exporters.source import Choices
from mlxdpo.types import Message, UserError

needs_go = pytest.mark.skipif(shutil.which("go") is None, reason="the Go toolchain is not installed")
FAMILIES = ("chatml", "smollm", "llama3", "gemma", "thinking", "llama2", "headings")
GO = Path(__file__).parents[1] / "support" / "ollama_template.go"


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory):
    """Go's text/template, compiled once."""
    folder = tmp_path_factory.mktemp("go")
    subprocess.run(
        ["go", "build", "-o", folder / "fill", GO], check=True, env={"GOCACHE": str(folder), **_environment()}
    )
    return folder / "fill"


def _environment():
    import os

    return dict(os.environ)


def filled(interpreter, template: str, conversations) -> list[str]:
    turns = [[{"Role": turn.role, "Content": turn.content} for turn in one] for one in conversations]
    asked = json.dumps({"Template": template, "Conversations": turns})
    return json.loads(subprocess.run([interpreter], input=asked, capture_output=True, text=True, check=True).stdout)


def rendered(tokenizer):
    writer = probe(tokenizer, DataConfig(path="none"))
    return lambda turns: writer.render(turns, (), generate=True)


@needs_go
@pytest.mark.parametrize("family", FAMILIES)
def test_go_s_own_interpreter_writes_what_jinja_writes(family, interpreter):
    render = rendered(getattr(tiny_tokenizers, f"{family}_tokenizer")())
    learned = learn_template(render)
    conversations = random_conversations(200, learned, seed=1)
    assert any(len(one) > 3 for one in conversations)
    assert filled(interpreter, go_template(learned), conversations) == [render(one) for one in conversations]


@needs_go
def test_a_system_message_that_the_model_has_no_place_for_stands_before_the_question(interpreter):
    learned = learn_template(rendered(tiny_tokenizers.gemma_tokenizer()))
    assert learned.system is None
    text = filled(interpreter, go_template(learned), [[Message("system", "Be brief."), Message("user", "Why?")]])[0]
    assert "Be brief.\n\nWhy?" in text and "system" not in text


def test_a_template_that_does_more_is_refused_with_where():
    def render(turns):
        return (
            "".join(f"<{turn.role}>{turn.content}" for turn in turns) + ("!" if len(turns) > 5 else "") + "<assistant>"
        )

    with pytest.raises(UserError, match="does more than put text around turns"):
        learn_template(render)


def test_what_the_languages_would_read_is_quoted():
    odd = TurnTemplate("", None, ('{{ "\x07', "é\n"), ("a", "b"), '"""')
    text = modelfile(["FROM ./m.gguf"], odd, ["</s>", "<|im_end|>"])
    check_modelfile(text, odd, ["</s>", "<|im_end|>"])
    assert '{{ "{{ \\"\\U00000007" }}' in text
    read = parse_modelfile("# words\n" + text.replace("PARAMETER stop", "parameter  stop"))
    assert [one.name for one in read] == ["from", "template", "stop", "stop"] and read[0].value == "./m.gguf"
    for broken, sentence in (
        ("FORM x\n", "not an instruction"),
        ('FROM x\nSYSTEM """a\n', "has no end"),
        ("LICENSE x\n", "no FROM"),
    ):
        with pytest.raises(UserError, match=sentence):
            parse_modelfile(broken)


@pytest.mark.parametrize("base", [None, "llama3.2:1b"])
def test_an_export_is_a_folder_that_ollama_reads(base, tmp_path, cache):
    write_model(tmp_path / "llama", known_tokenizer(), vocab_size=320)
    done = export(
        trained_run(tmp_path, data={"template": "auto"}),
        ["ollama"],
        tmp_path / "out",
        choices=Choices(ollama_base=base),
    )
    target = done.targets["ollama"]
    weights = "adapter.gguf" if base else "model.gguf"
    assert target.kept and sorted(target.files) == sorted(["Modelfile", weights]) and "not asked" in target.note
    read = {
        one.name: one.value for one in parse_modelfile((tmp_path / "out" / "ollama" / "Modelfile").read_text("utf-8"))
    }
    assert read["stop"] == "<|im_end|>" and read["from"] == (base or "./model.gguf")
    assert read.get("adapter") == ("./adapter.gguf" if base else None)
    assert "{{ range $i, $_ := .Messages }}" in read["template"] and "<|im_start|>assistant\n" in read["template"]
