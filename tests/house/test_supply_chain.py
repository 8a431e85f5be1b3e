"""No pickle, no code of strangers, no name that leads out of its folder, no login in what is written or said."""

import ast
import json
import logging
import os
from functools import partial
from pathlib import Path

import fake_hub
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_export import NAME, base_of, exported, small_export
from tiny_models import change

from mlxdpo.config import Config, ModelConfig
from mlxdpo.exporters.hub import push
from mlxdpo.exporters.pull import localised, pull_run
from mlxdpo.exporters.record import read_record
from mlxdpo.io.names import is_plain_name
from mlxdpo.model.adapters import read_settings
from mlxdpo.model.policy import load_policy
from mlxdpo.model.skeleton import read_skeleton
from mlxdpo.types import UserError

ROOT = Path(__file__).parents[2]
SHIPPED = sorted([*(ROOT / "mlxdpo").rglob("*.py"), *(ROOT / "eval").rglob("*.py"), ROOT / "app.py"])
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
RUNS_TEXT = {"eval", "exec", "compile", "__import__"}
FORBIDDEN = {"torch.load", "pandas.read_pickle", "pd.read_pickle", "os.system", "os.popen", "tempfile.mktemp"}
SAFE_LOADERS = {"_Loader", "SafeLoader", "yaml.SafeLoader"}  # _Loader is recipe.py's, of yaml.SafeLoader


def dangers(tree):
    """What in a file could run code that came as data."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (name for name in names if name.split(".")[0] in PICKLES)
        if not isinstance(node, ast.Call):
            continue
        called, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called in FORBIDDEN or (isinstance(node.func, ast.Name) and called in RUNS_TEXT):
            yield called
        if called in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
            yield "np.load(allow_pickle)"
        if called == "yaml.load" and given.get("Loader") not in SAFE_LOADERS:
            yield "yaml.load"
        if called.startswith("yaml.") and called.split(".")[1] in ("unsafe_load", "full_load", "load_all"):
            yield called
        for knob in ("trust_remote_code", "shell"):
            if given.get(knob) == "True":
                yield f"{knob}=True"


def test_nothing_that_is_read_can_run():
    found = {path: list(dangers(ast.parse(path.read_text("utf-8")))) for path in SHIPPED}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from joblib import load", "eval('1')", "exec(x)", "__import__(x)", "torch.load(f)",
        "np.load(f, allow_pickle=True)", "yaml.load(f)", "yaml.load(f, Loader=yaml.Loader)", "yaml.unsafe_load(f)",
        "load_model(f, trust_remote_code=True)", "run(x, shell=True)",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(code):
    assert len(list(dangers(ast.parse(code)))) == 1


def test_harmless_calls_are_not_found():
    code = "mx.eval(x)\nmodel.eval()\nmx.compile(f)\nnp.load(f)\nyaml.load(f, Loader=_Loader)\nyaml.safe_load(f)"
    assert list(dangers(ast.parse(code))) == []


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
@pytest.mark.parametrize("open_it", [load_policy, read_skeleton])
def test_pickled_weights_are_refused(own, name, open_it):
    (own / "model.safetensors").rename(own / name)
    with pytest.raises(UserError, match=rf"{name} is a pickle and could run code, convert it to safetensors first"):
        open_it(ModelConfig(path=str(own)))


def test_pickled_adapters_are_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match=r"adapter_model\.bin is a pickle"):
        read_settings(tmp_path)


def test_code_of_a_model_runs_only_when_it_is_trusted(own):
    mark = own / "it ran"
    (own / "custom.py").write_text(
        f"from mlx_lm.models.llama import Model, ModelArgs\nopen({str(mark)!r}, 'w').close()\n"
    )
    change(own / "config.json", model_file="custom.py")
    with pytest.raises(UserError, match=r"needs Python code .* set model\.trust_remote_code true if you trust it"):
        load_policy(ModelConfig(path=str(own)))
    assert not mark.exists()
    trusted = load_policy(ModelConfig(path=str(own), trust_remote_code=True))
    assert mark.exists()
    (own / "custom.py").write_text((own / "custom.py").read_text() + "# changed\n")
    again = load_policy(ModelConfig(path=str(own), trust_remote_code=True))
    assert again.identity["digest"] != trusted.identity["digest"], "the code is part of what the model is"


def test_code_of_a_tokenizer_runs_only_when_it_is_trusted(own, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks on the terminal"))
    mark = own / "it ran"
    (own / "custom.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Odd: pass\n")
    change(own / "tokenizer_config.json", tokenizer_class="Odd", auto_map={"AutoTokenizer": ["custom.Odd", None]})
    with pytest.raises(UserError, match=r"set model\.trust_remote_code true"):
        load_policy(ModelConfig(path=str(own)))
    assert not mark.exists()


def test_trust_is_off_and_does_not_come_with_a_pulled_recipe(tmp_path):
    assert Config().model.trust_remote_code is False
    theirs = Config(model=ModelConfig(path="smollm2", trust_remote_code=True))
    manifest = {"model": {"dtype": "float32"}}
    assert localised(theirs, manifest, tmp_path, tmp_path, None, "a/b").model.trust_remote_code is False


OUT_OF_IT = [
    "../x.safetensors",
    "/etc/passwd",
    "a/b.safetensors",
    "..",
    "x\0y",
    "C:\\x",
    "con.safetensors",
    "x" * 256,
    "",
]


@pytest.mark.parametrize("name", OUT_OF_IT)
def test_an_index_cannot_lead_out_of_the_models_folder(own, name):
    (own / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"a": name}}))
    with pytest.raises(UserError, match="is not the name of a file in the same folder"):
        read_skeleton(ModelConfig(path=str(own)))


@pytest.mark.parametrize("name", [name for name in OUT_OF_IT if name])
def test_an_export_record_cannot_lead_out_of_its_folder(tmp_path, name):
    small_export(tmp_path)
    raw = json.loads((tmp_path / "export.json").read_text())
    for bad in ({"folder": name}, {"files": {name: 3}}):
        if name == "a/b.safetensors":  # a folder within is one
            continue
        (tmp_path / "export.json").write_text(json.dumps(raw | {"targets": {"mlx": raw["targets"]["mlx"] | bad}}))
        with pytest.raises(UserError, match="points outside the export"):
            read_record(tmp_path)


PIECE = st.sampled_from(["..", ".", "/", "\\", "\0", "a", "CON", "nul", ":", " ", "\n", "é", "x" * 300, "~", "*"])


@given(name=st.text(max_size=8) | st.lists(PIECE, max_size=4).map("".join))
def test_a_plain_name_stays_in_its_folder(name):
    if is_plain_name(name):
        assert os.path.dirname(os.path.normpath(f"/here/{name}")) == "/here"
        assert not set(name) & set('/\\:*?"<>|') and name.isprintable() and len(name.encode()) <= 255
        assert name.split(".")[0].upper() not in ("CON", "NUL", "COM1")


@pytest.mark.parametrize("token", ["hf_" + "PlantedToken" * 3, "sk-another-kind-of-secret-0123456789"])
def test_the_login_is_in_nothing_that_is_written_or_said(token, trained, tmp_path, monkeypatch, caplog, capsys):
    """Push, pull, and a refusal of each that repeats the token: files, logs, terminal, exceptions."""
    from huggingface_hub.utils import logging as hub_logging

    caplog.set_level(logging.DEBUG)
    hub_logging.set_verbosity_debug()
    monkeypatch.setattr(fake_hub, "TOKEN", token)
    said = []
    for hub in fake_hub.connected(tmp_path, monkeypatch):
        out = exported(trained, tmp_path / "out")
        push(out, NAME, say=said.append)
        pull_run(NAME, out=tmp_path / "back", base=base_of(trained), say=said.append)
        for path, act in (
            ("/tree/", partial(pull_run, NAME, out=tmp_path / "no", base=base_of(trained), say=said.append)),
            (f"/api/models/{NAME}", partial(push, out, NAME, say=said.append)),
        ):
            hub.fail("GET", path, 422, message=f"what is {token} doing here?")
            with pytest.raises(UserError) as caught:
                act()
            said += [str(caught.value), repr(caught.value.__cause__), repr(caught.value.args)]
        sent = [content for repo in hub.repos.values() for content in repo.files().values()]
    hub_logging.set_verbosity_warning()
    written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file() and not file.is_symlink()]
    assert len(written) > 10 and len(sent) > 4 and len(said) > 6
    # The transport's own trace repeats what the server said; nobody sees it who does not ask for it.
    logged = [record.getMessage() for record in caplog.records if not record.name.startswith("httpcore")]
    spoken = [*said, *logged, *capsys.readouterr()]
    assert not [text for text in spoken if token in text] and not [
        raw for raw in written + sent if token.encode() in raw
    ]
