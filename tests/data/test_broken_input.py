"""What fuzzing found, one by one: input that was a traceback, or passed in silence, is now one sentence or a count."""

import asyncio
import contextlib
import json
import math

import pytest
from small_export import small_export
from tiny_models import change

from mlxdpo.config import Config, ModelConfig, dump_config, load_config
from mlxdpo.data.dataset import Spool
from mlxdpo.data.report import BadRow
from mlxdpo.data.sources import read_rows
from mlxdpo.exporters.record import read_record
from mlxdpo.exporters.run import export
from mlxdpo.exporters.sections import FORMATS, read_card_numbers
from mlxdpo.exporters.source import hub_name
from mlxdpo.io.atomic import append_line
from mlxdpo.model.adapters import read_settings
from mlxdpo.model.policy import find_model, load_policy
from mlxdpo.runs import Run
from mlxdpo.types import Extras, Message, Preference, UnpairedExample, UserError
from mlxdpo.ui.guard import Gate, problem
from mlxdpo.ui.runs.curves import Tail, follow_metrics
from mlxdpo.ui.runs.run_list import summary_rows
from mlxdpo.ui.runs.tab import charts, checkpoints, headline
from mlxdpo.ui.train.recipe_form import entered, knobs, to_config
from mlxdpo.ui.vote.tab import standing_html
from mlxdpo_eval.judges import open_judge
from mlxdpo_eval.judges.ladder import NO_COMPLETION, read_label_odds, read_reply
from mlxdpo_eval.judges.program import reward_judge
from mlxdpo_eval.judges.protocol import Question, Verdict, invalid
from mlxdpo_eval.judges.votes import problem_with, read_ballots

LONG = "x" * 300  # longer than a file system's names
NAMES = ["\0", "\ud800", LONG, "\n"]


@pytest.fixture
def run(tmp_path):
    """A run directory with a recipe, and nothing else."""
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(Config()))
    return Run.open(folder)


def test_a_sentence_is_one_printable_line_whatever_it_quotes():
    said = str(UserError(f"a\nb\x1b[31m\ud800 {'y' * 5_000} next step"))
    assert said.isprintable() and len(said) < 500 and said.encode()
    assert said.startswith("a\\nb\\x1b[31m\\ud800 yyy") and said.endswith("yyy next step") and " … " in said
    assert str(UserError("pairs.jsonl:37: é is fine")) == "pairs.jsonl:37: é is fine"


@pytest.mark.parametrize("name", NAMES)
def test_names_that_no_file_can_have(name):
    for look in (load_config, find_model, Run.open, lambda n: list(read_rows(n)), lambda n: open_judge(f"votes:{n}")):
        with pytest.raises(UserError):
            look(name)


def parquet(file, **columns):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(columns), file)
    return pa


def test_a_parquet_column_whose_name_is_no_text(tmp_path):
    file = tmp_path / "a.parquet"
    parquet(file, prompt=["p"], chosen=["a"], rejected=["b"])
    file.write_bytes(file.read_bytes().replace(b"prompt", b"pr\xe5mpt"))
    with pytest.raises(UserError, match=r"a\.parquet: not a readable Parquet file \("):
        list(read_rows(str(file)))


def test_a_date_beyond_the_years_of_python_is_a_bad_row(tmp_path):
    pa = pytest.importorskip("pyarrow")
    when = pa.array([0, 2**62], pa.timestamp("us"))
    parquet(tmp_path / "a.parquet", prompt=["p", "q"], when=when)
    first, second = (row for _, row in read_rows(str(tmp_path / "a.parquet")))
    assert first["prompt"] == "p" and isinstance(second, BadRow) and "cannot be read" in second.sentence


def test_a_home_that_nobody_has():
    with pytest.raises(UserError, match="no such file or folder"):
        read_rows("~nobody-has-this-name/pairs.jsonl")


@pytest.mark.parametrize(
    "text",
    [
        "out: 2001-99-99",
        'out: !!int ""',
        "out: !!timestamp x",
        "out: !!bool x",
        "[" * 3_000,
        "? [a]\n: b",
        "a: &x [*x]",
    ],
)
def test_yaml_that_breaks_its_reader(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=r"r\.yaml: "):
        load_config(tmp_path / "r.yaml")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("knob", [("loss", "alphapo_alpha"), ("train", "epochs"), ("optim", "lr")])
def test_no_setting_is_infinite_or_no_number(knob, value):
    """alphapo_alpha: nan was taken, and every loss was NaN."""
    section, name = knob
    with pytest.raises(UserError, match="finite number"):
        load_config(None, {section: {name: value}})


def parse_completion(body):
    found = read_reply(body)
    return invalid(NO_COMPLETION) if found is None else read_label_odds(found)


def reply(content="A", top=None):
    logprobs = None if top is None else {"content": [{"top_logprobs": [{"token": t, "logprob": p} for t, p in top]}]}
    return json.dumps({"choices": [{"message": {"content": content}, "logprobs": logprobs}]}).encode()


def test_minus_9999_is_how_some_servers_write_never():
    """exp(-9999) is 0, whose log broke; A is surely worse."""
    verdict = parse_completion(reply(top=[("A", -9999.0), ("B", 0.0)]))
    assert verdict.logit == pytest.approx(-9999.0) and verdict.probability == 0.0
    assert Verdict(9999.0).probability == 1.0 and Verdict(0.0).probability == 0.5


@pytest.mark.parametrize("content", [["A"], {"text": "A"}, 1])
def test_an_answer_that_is_no_text_is_no_verdict(content):
    assert parse_completion(reply(content)).reason == "the reply is not a chat completion"


def test_log_probs_above_0_are_none():
    assert parse_completion(reply("B", [("A", 1e308), ("B", 5.0)])).logit == -10.0, "the text says B"
    assert parse_completion(b"[" * 100_000).reason == "the reply is not a chat completion"


@pytest.mark.parametrize("url", ["http://[::1", "http://h:x", "http://h:99999999"])
def test_addresses_that_are_none(url):
    with pytest.raises(UserError, match="expected endpoint:MODEL@URL"):
        open_judge(f"endpoint:m@{url}")


def test_a_reward_beyond_reason_is_no_verdict():
    """Its square overflowed in the interval."""
    judge = reward_judge("odd", lambda prompt, answer: 1e308 if answer == "a" else 0.0)
    assert judge.ask([Question("p", "a", "b")])[0].reason == "the reward is 1e+308"


VOTE = {"prompt": "Hi?", "a": "one", "b": "two", "winner": "a", "tuned": "a"}


def test_a_vote_whose_winner_is_a_list_is_counted(tmp_path):
    file = tmp_path / "votes.jsonl"
    bad = [VOTE | {"winner": ["a"]}, VOTE | {"winner": {}}]
    file.write_bytes(b"".join(json.dumps(v).encode() + b"\n" for v in [VOTE, *bad]) + b"[" * 100_000 + b"\n")
    ballots = read_ballots(file)
    assert len(ballots.votes) == 1 and sum(ballots.left_out.values()) == 3
    assert "3 lines of votes.jsonl are not votes and are skipped." in standing_html(file)
    assert problem_with(VOTE) is None and "winner" in problem_with(bad[0])


def test_a_damaged_line_of_metrics_is_named_and_the_page_counts_it(run):
    for step in (1, 2):
        append_line(run.path / "metrics.jsonl", {"step": step, "loss": 0.5})
    file = run.path / "metrics.jsonl"
    file.write_bytes(
        file.read_bytes() + b'{"step": 3, "lo\n{"loss": 1}\n{"step": 4, "loss": NaN}\n[]\n{"step": 5, "loss": 0.1}\n'
    )
    with pytest.raises(UserError, match=r"metrics\.jsonl:3: not JSON"):
        run.metrics()
    tail = Tail(file)
    follow_metrics(tail)
    assert [line["step"] for line in tail.steps] == [1, 2, 5] and tail.damaged == 4
    assert "4 lines of metrics.jsonl are corrupted and skipped." in charts(tail, {})


def test_text_among_the_metrics_is_named_and_not_formatted(run):
    append_line(
        run.path / "metrics.jsonl", {"step": 1, "loss": 0.5, "eval_loss": 1.0, "eval_rewards/accuracies": "high"}
    )
    with pytest.raises(UserError, match="`eval_rewards/accuracies` is not a number"):
        run.metrics()
    assert summary_rows(run.path.parent)[0][5:7] == ["0.5000", "–"]


@pytest.mark.parametrize("text", ["a\x85b", "a\u2028b", "\ufeff", "é", "null", "1e-5", "a\nb"])
def test_a_saved_recipe_says_what_the_recipe_said(tmp_path, text):
    """A next-line sign in a path came back as a blank: another file."""
    config = Config(out=text)
    (tmp_path / "r.yaml").write_text(dump_config(config), "utf-8")
    assert load_config(tmp_path / "r.yaml") == config


def test_values_that_no_field_of_the_page_sends():
    for name, value in (("optim.betas", True), ("lora.keys", {"a": 1}), ("data.columns", 3), ("log.trackers", True)):
        with pytest.raises(UserError):
            to_config({name: entered(next(knob for knob in knobs() if knob.name == name), value)})


class Widget:
    """What `problem` asks of a Gradio component."""

    label, minimum, maximum, multiselect = "it", 0, 10, None

    def __init__(self, name, multiselect=None):
        self.name, self.multiselect = name, multiselect

    def get_block_name(self):
        return self.name


@pytest.mark.parametrize(
    ("name", "sound", "odd"),
    [
        ("dropdown", ["one", "", None], [["one"], {}, 1, "\ud800"]),
        ("slider", [0, 10, 2.5, None], [-1, 11, math.nan, 10**400, True, "5"]),
        ("checkbox", [True, None], [1, "yes", []]),
        ("state", [object()], []),
    ],
)
def test_the_app_takes_from_a_widget_what_it_can_send(name, sound, odd):
    assert not [value for value in sound if problem(Widget(name), value)]
    assert all(problem(Widget(name), value) for value in odd)
    assert problem(Widget("dropdown", True), ["a"]) is None and problem(Widget("dropdown", True), "a")


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_no_number_is_no_json(run, word):
    """A report drew a histogram of nothing."""
    (run.path / "metrics.jsonl").write_text(f'{{"step": 1, "loss": {word}}}\n')
    with pytest.raises(UserError, match=rf"metrics\.jsonl:1: not JSON \({word} is not JSON"):
        run.metrics()


def test_a_line_without_a_step_is_named(run):
    append_line(run.path / "metrics.jsonl", {"loss": 0.5})
    with pytest.raises(UserError, match=r"metrics\.jsonl:1: has no step"):
        run.metrics()


@pytest.mark.parametrize("text", ["{", "[]", '{"winrates": 3, "headline": 4}', '{"winrates": [{"rate": "x"}]}', "\xff"])
def test_a_damaged_evaluation_does_not_take_the_list_of_runs_down(run, text):
    (run.path / "eval").mkdir()
    (run.path / "eval" / "results_1.json").write_bytes(text.encode("latin-1"))
    (run.path / "checkpoints" / "step-abc").mkdir(parents=True)
    assert summary_rows(run.path.parent)[0][0] == "one"
    assert isinstance(headline(run.path), str) and checkpoints(run.path, Tail(run.path / "metrics.jsonl")) == []


def test_an_evaluation_of_another_layout_is_named_by_the_card(run):
    (run.path / "eval").mkdir()
    file = run.path / "eval" / "results_1.json"
    for wrong in ({"pairs": {"rewards": "none"}}, {"winrates": 3}, {"drift": [1]}):
        file.write_text(json.dumps({"format": FORMATS[-1], **wrong}))
        with contextlib.suppress(UserError):
            assert read_card_numbers(run) is not None


@pytest.mark.parametrize("raw", [b"{", b"[]", b"\xff", b'{"model": "x"}', b'{"model": {"digest": 3}}', b"[" * 100_000])
def test_a_damaged_manifest_is_named(run, raw):
    (run.path / "manifest.json").write_bytes(raw)
    with pytest.raises(UserError, match=r"manifest\.json: "):
        run.manifest()


@pytest.mark.parametrize(
    "raw", ["{", "[]", '{"lora_parameters": 3}', '{"num_layers": "x"}', '{"fine_tune_type": "magic"}']
)
def test_damaged_adapter_settings_are_named(tmp_path, raw):
    (tmp_path / "adapter_config.json").write_text(raw)
    (tmp_path / "adapters.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"adapter_config\.json: "):
        read_settings(tmp_path)


def test_an_exported_adapter_is_one_to_start_from(trained, tmp_path):
    """Its settings had the seal of the run's file and one key more: they counted as damaged."""
    out = export(trained, ["mlx"], tmp_path / "out", pairs=1).out
    assert read_settings(out / "mlx") == read_settings(trained.adapter)


@pytest.mark.parametrize("values", [{"targets": 3}, {"targets": {"mlx": {}}}, {"beta_": 1}])
def test_a_damaged_export_record_is_named(tmp_path, values):
    small_export(tmp_path)
    change(tmp_path / "export.json", **values)
    with pytest.raises(UserError, match=r"export\.json: is not what mlxdpo wrote .*; export again"):
        read_record(tmp_path)


@pytest.mark.parametrize("head", ["a: [", "- a", "a: 2001-99-99", "base_model: 3", "\xff"])
def test_a_card_whose_head_is_broken_says_nothing(tmp_path, head):
    (tmp_path / "README.md").write_bytes(f"---\n{head}\n---\n".encode("latin-1"))
    assert hub_name(str(tmp_path), tmp_path) == tmp_path.name


@pytest.mark.parametrize(
    ("file", "values", "sentence"),
    [
        ("tokenizer_config.json", {"chat_template_type": "no_such"}, "cannot be loaded"),
        ("tokenizer_config.json", {"tool_parser_type": "../x"}, "cannot be loaded"),
        ("config.json", {"model_type": "cache"}, "cannot be loaded"),
        ("config.json", {"hidden_size": "many"}, "cannot be loaded"),
        ("config.json", {"quantization": {"bits": 4}}, "cannot be loaded"),
        ("config.json", {"eos_token_id": {"a": 1}}, "says `eos_token_id` .*, expected the id of a token"),
    ],
)
def test_settings_of_a_model_that_break_its_loader(own, file, values, sentence):
    change(own / file, **values)
    with pytest.raises(UserError, match=sentence):
        load_policy(ModelConfig(path=str(own)))


def test_weights_that_are_cut_off(own):
    file = own / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: not a readable safetensors file"):
        load_policy(ModelConfig(path=str(own)))


@pytest.mark.parametrize("size", [b"abc", b"-1", b"\xb2", b"9" * 5_000])
def test_a_content_length_that_is_no_length(size):
    sent = []

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"h"), (b"origin", b"http://h"), (b"cookie", b"mlxdpo_page_1=n"), (b"content-length", size)]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers, "server": ("h", 1)}
    asyncio.run(Gate(None, nonce="n", hosts=("h",))(scope, None, send))
    assert sent[0]["status"] in (400, 413)


def test_rows_come_out_of_the_spool_as_they_went_in(tmp_path):
    """It was a pickle."""
    turns = (Message("user", "é\ud800", {"name": "x", "tool_calls": [{"a": [1, None]}]}),)
    answer = (Message("assistant", "yes"),)
    rows = [
        Preference(turns, answer, (Message("assistant", "no"),), "a:1", ({"type": "function"},), {}, Extras(0.75, 2.0)),
        Preference("p", " a", " b\n", "a:2"),
        UnpairedExample("p", "c", False, "a:3"),
    ]
    spool = Spool(tmp_path)
    list(spool.filling(rows))
    assert list(spool.rows()) == rows and spool.count == 3
