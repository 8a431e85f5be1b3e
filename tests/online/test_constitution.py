"""Constitutional AI: what is asked, soft labels that forget the order, rows that train, runs that go on, filters."""

import json
from html import unescape

import mlx.core as mx
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit
from slow_cases import rest_slow
from tiny_models import write_model
from tiny_runs import stop_after
from tiny_words import WORDS

from mlxdpo.cli import run
from mlxdpo.config import DataConfig, load_config
from mlxdpo.data.batching import collate
from mlxdpo.data.encode import encode_all
from mlxdpo.data.read import read_pairs
from mlxdpo.forward.choose_forward import forward_fns
from mlxdpo.forward.logprobs import score_pairs
from mlxdpo.forward.next_token import next_logits
from mlxdpo.losses import resolve
from mlxdpo.model.policy import load_policy
from mlxdpo.online.collect import Asked, Prompts, read_prompts
from mlxdpo.online.constitution import Constitution, Feedback, SamplingSettings, apply_constitution, load_constitution
from mlxdpo.online.constitution import conversations as labelling
from mlxdpo.online.constitution.conversations import (
    COPIED,
    ECHO,
    SAME,
    TOO_LONG,
    ChatModel,
    Label,
    drawn_principle,
    label_pair,
    revised,
    shared_next_logits,
)
from mlxdpo.online.constitution.run import label_position_bias, pair_of
from mlxdpo.online.constitution.schema import (
    Principle,
    Worked,
    comparison_turns,
    critique_turns,
    dump_constitution,
    revision_turns,
)
from mlxdpo.online.prompts import policy_source
from mlxdpo.types import Message, UserError
from mlxdpo.ui.constitution import tab
from mlxdpo.ui.constitution.tab import LEFT, PAIRED, TalkFilter

TEMPLATE = (
    "{% for m in messages %}{{ m.role + ' ' + m.content + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)
RULES = Constitution(
    principles=[
        Principle(name="red", critique="the red cat", revision="a red tree", comparison="red cat or dog"),
        Principle(name="blue", critique="the blue cat", revision="a blue tree", comparison="blue cat or dog and house"),
        Principle(name="old", critique="the old cat", revision="an old tree", comparison="old sun"),
    ]
)
HOW = {"max_tokens": 6, "unfinished": "keep"}
REVISING = HOW | {"critique_tokens": 5}


def talking_tokenizer():
    """One token per word, letters among them, and a chat template."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<end>", "<pad>", *(f"▁{word}" for word in [*WORDS, "A", "B", "user", "assistant", "system", *"pqxyz"])]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    core.normalizer = normalizers.Replace(Regex(r"[\n\[\].,]+"), " ")  # or a word after a line's end is unknown
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    core.add_special_tokens([AddedToken(name, special=True) for name in names[:2]])
    own = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<end>", unk_token="<pad>", clean_up_tokenization_spaces=False
    )
    own.chat_template = TEMPLATE
    return own


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("m") / "model", talking_tokenizer(), max_position_embeddings=4096)


@pytest.fixture(scope="module")
def policy(folder):
    return load_policy(load_config(None, {"model": {"path": str(folder)}}).model)


@pytest.fixture
def speaker(policy):
    return policy_source(policy, DataConfig(), "tiny", None)


@pytest.fixture
def prompts():
    draw = np.random.default_rng(0)
    texts = dict.fromkeys(" ".join(draw.choice(WORDS, 4)) for _ in range(40))
    return Prompts([Asked(text, f"p:{n}") for n, text in enumerate(texts)], {})


def finish(*args, **more):
    return [event.kind for event in apply_constitution(*args, **more)]


def lines_of(file):
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


# what is asked


def test_conversations_golden():
    """Written out by hand: system turn first, the worked example next, then prompt, answer, request; and so on."""
    rules = Constitution(
        principles=RULES.principles,
        examples=[
            Worked(prompt="P", answer="X", critique_request="C?", critique="C", revision_request="R?", revision="R")
        ],
    )
    prompt = (Message("system", "be {kind}"), Message("user", "hi"))
    turns = revision_turns(rules, rules.principles[0], prompt, "hello", "too short")
    assert [(turn.role, turn.content) for turn in turns] == [
        ("system", "be {kind}"),
        *(("user", "P"), ("assistant", "X"), ("user", "C?"), ("assistant", "C"), ("user", "R?"), ("assistant", "R")),
        ("user", "hi"),
        ("assistant", "hello"),
        ("user", "the red cat"),
        ("assistant", "too short"),
        ("user", "a red tree"),
    ]
    assert critique_turns(rules, rules.principles[0], prompt, "hello") == turns[:-2]
    (question,) = comparison_turns(RULES.principles[2], prompt, "{one}", "two")
    assert question.role == "user"
    assert question.content == (
        "Here is a conversation, and two answers to its last message.\n\n[System]\nbe {kind}\n\n[User]\nhi\n\n"
        "[Answer A]\n{one}\n\n[Answer B]\ntwo\n\nold sun The order of the answers means nothing. Reply with one"
        " letter, A or B."
    )


def test_the_own_constitution_is_whole_and_reads_back():
    rules = load_constitution()
    assert len(rules.principles) >= 5 and len(rules.examples) >= 1
    assert Constitution.model_validate(yaml.safe_load(dump_constitution(rules))) == rules
    changed = rules.model_copy(update={"examples": []})
    assert changed.digest != rules.digest == load_constitution().digest


ONE = {"name": "a", "critique": "c", "revision": "r", "comparison": "q"}
BAD = {
    "principles: []": "`principles` is []: List should have at least 1 item",
    "examples: []": "`principles` is missing",
    "principels: []": "did you mean `principles`",
    json.dumps({"principles": [{**ONE, "critic": "x"}]}): "unknown key `principles.1.critic`; did you mean `critique`?",
    json.dumps({"principles": [ONE, {**ONE, "name": "b", "revision": " "}]}): "`principles.2.revision` is ' ': String",
    json.dumps({"principles": [ONE, ONE]}): "two principles are called 'a'; rename one",
    json.dumps({"principles": [{**ONE, "comparison": 3}]}): "`principles.1.comparison` is 3",
    "principles: [": "not valid YAML",
    "- a": "expected `key: value` lines",
}


@pytest.mark.parametrize("text", BAD)
def test_a_malformed_constitution_is_one_sentence(text, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        load_constitution(tmp_path / "mine.yaml")
    assert BAD[text] in str(error.value) and "mine.yaml" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"no\.yaml: no such constitution; give"):
        load_constitution(tmp_path / "no.yaml")


def test_principles_are_drawn_by_seed_and_prompt_and_all_get_their_turn():
    keys = [bytes([n, 7] * 8) for n in range(60)]
    drawn = [drawn_principle(RULES, key, 0).name for key in keys]
    assert drawn == [drawn_principle(RULES, key, 0).name for key in keys]
    assert drawn != [drawn_principle(RULES, key, 1).name for key in keys]
    assert min(drawn.count(one.name) for one in RULES.principles) >= 10  # 60 of 3: below 10 has probability 2e-3 x 3


# soft labels

ODDS = st.floats(-30, 30, allow_nan=False)


@given(st.lists(st.tuples(ODDS, ODDS), min_size=1, max_size=5))
def test_swapping_the_samples_negates_everything_to_the_bit(odds):
    there = Label(*zip(*odds, strict=True))
    back = there.swapped()
    assert back.logits == tuple(-x for x in there.logits) and back.lead == -there.lead
    assert back.probabilities == pytest.approx([1 - p for p in there.probabilities], abs=1e-15)
    assert back.swapped() == there


@given(st.lists(st.tuples(ODDS, ODDS), min_size=1, max_size=5), st.floats(-20, 20))
def test_a_liking_for_a_place_drops_out(odds, liking):
    """What is added to the log-odds of whatever is shown as A: y1 gains it in one order and loses it in the other."""
    first, second = zip(*odds, strict=True)
    biased = Label(tuple(x + liking for x in first), tuple(x - liking for x in second))
    assert biased.probability == pytest.approx(Label(first, second).probability, abs=1e-9)


def test_label_golden():
    """Two principles. l = ((3-1)/2, (0+2)/2) = (1, 1) and (2, -2): mean of sigmoids, not sigmoid of the mean."""
    assert Label((3.0, 0.0), (-1.0, 2.0)).probability == pytest.approx(expit(1))
    found = Label((3.0, -2.0), (1.0, 0.0))
    assert found.logits == (2.0, -1.0)
    assert found.probability == pytest.approx((expit(2) + expit(-1)) / 2)


def test_a_models_label_is_antisymmetric_to_the_bit_and_is_what_the_letters_say(policy):
    data, prompt, texts = DataConfig(), "the cat sings", ("red dog", "blue tree and sun")
    there, back = (label_pair(policy, data, RULES, prompt, *order) for order in (texts, texts[::-1]))
    assert back == there.swapped() and back.lead == -there.lead != 0
    letters = [labelling.spellings(policy.tokenizer, letter) for letter in "AB"]
    for k, principle in enumerate(RULES.principles):
        row = labelling.encode_prompt(comparison_turns(principle, prompt, *texts), policy.tokenizer, data).tolist()
        z = np.array(policy.model(mx.array([row]))[0, -1])
        assert there.shown_first[k] == pytest.approx(z[letters[0][0]] - z[letters[1][0]], abs=1e-4)


def test_a_shared_beginning_changes_no_logit(policy):
    draw = np.random.default_rng(1)
    start = draw.integers(2, 40, 9).tolist()
    rows = [start + draw.integers(2, 40, n).tolist() for n in (1, 5, 3)]
    for some in (rows, rows[:1], [[*row[9:], 1] for row in rows], [start, start]):
        assert shared_next_logits(policy.model, some, [3, 4]) == pytest.approx(
            next_logits(policy.model, some, [3, 4]), abs=2e-4
        )


def test_a_tokenizer_without_the_letters_is_refused():
    class Spelled:
        def encode(self, text, add_special_tokens):
            return [1, 2]

    with pytest.raises(UserError, match="no single token for A"):
        labelling.spellings(Spelled(), "A")


# runs


@pytest.mark.parametrize("pairs", rest_slow(["revisions", "samples"], ["samples"]))
def test_a_stopped_run_goes_on_to_the_same_bytes(pairs, speaker, prompts, tmp_path):
    settings = REVISING if pairs == "revisions" else HOW
    how = SamplingSettings(pairs=pairs, **settings)
    assert finish(speaker, prompts, RULES, how, tmp_path / "straight")[-1] == "done"
    stopped = tmp_path / "stopped"
    assert finish(speaker, prompts, RULES, how, stopped, should_stop=stop_after(60))[-1] == "interrupted"
    assert 0 < len(lines_of(stopped / "talks.jsonl")) < len(prompts.asked) and not (stopped / "pairs.jsonl").exists()
    with (stopped / "talks.jsonl").open("r+b") as file:  # killed while the last line was being written
        file.truncate(file.seek(0, 2) - 20)
    assert finish(speaker, prompts, RULES, how, stopped)[-1] == "done"
    for name in ("talks.jsonl", "pairs.jsonl", "report.json", "constitution.yaml", "settings.json"):
        assert (stopped / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name
    other = SamplingSettings(pairs=pairs, **(settings | {"seed": 1}))
    refusal = r"started with a different asking\.seed \(0 then, 1 now\); restore it, or choose another --out"
    with pytest.raises(UserError, match=refusal):
        finish(speaker, prompts, RULES, other, stopped)
    finish(speaker, prompts, RULES, other, tmp_path / "other")
    assert (tmp_path / "other/talks.jsonl").read_bytes() != (stopped / "talks.jsonl").read_bytes()


def test_every_prompt_is_a_pair_or_counted_with_its_reason(speaker, prompts, tmp_path):
    finish(speaker, prompts, RULES, SamplingSettings(**REVISING), tmp_path / "o")
    talks, rows = lines_of(tmp_path / "o/talks.jsonl"), lines_of(tmp_path / "o/pairs.jsonl")
    report = json.loads((tmp_path / "o/report.json").read_text())
    assert report["rows"] + sum(report["left_out"].values()) == report["prompts"] == len(talks) == len(prompts.asked)
    assert report["rows"] == len(rows) > 0
    assert any("empty" in why for why in report["left_out"])
    by_id = {talk["prompt_id"]: talk for talk in talks}
    for row in rows:
        talk = by_id[row["prompt_id"]]
        assert not talk["left_out"] and row["chosen"] == talk["revision"]["text"]
        assert row["rejected"] == talk["initial"]["text"] and row["principle"] == talk["principle"]
        assert 0 < row["probability"] < 1 and row["made"]["seed"] == 0
        assert row["probability"] == pytest.approx(np.mean(list(row["by_principle"].values())))
    for talk in talks:  # a conversation ends at its first fault
        if talk["left_out"].startswith("initial answer"):
            assert "critique" not in talk and "votes" not in talk
    assert report["critiques_cut"] == sum(t.get("critique", {}).get("finish") == "length" for t in talks)


def test_no_pair_at_all_is_a_sentence_with_the_reasons(speaker, prompts, tmp_path):
    """A random model hardly ends what it has begun."""
    with pytest.raises(
        UserError, match=r"no prompt gave a pair \(.* initial answer: unfinished: no end within"
    ) as error:
        finish(speaker, prompts, RULES, SamplingSettings(**(HOW | {"unfinished": "drop"})), tmp_path / "o")
    assert "talks.jsonl" in str(error.value) and not (tmp_path / "o/pairs.jsonl").exists()


class Scripted(ChatModel):
    """Says what it is told, round by round."""

    def __init__(self, speaker, script):
        super().__init__(speaker, SamplingSettings(), lambda: False)
        self.script = iter(script)

    def reply(self, asked, max_tokens):
        said = next(self.script)
        assert len(said) == len(asked)
        return [{"text": text, "tokens": 1, "finish": "stop", "fault": fault} for text, fault in said]


def test_filters_by_hand(speaker, prompts):
    """The first answer is empty, the third critique is; the others revise: the answer again, well, the critique again
    but for its case, a worked example's revision."""
    said = {"critique_request": "C", "critique": "C", "revision_request": "R", "revision": "I am it."}
    example = Worked(prompt="P", answer="X", **said)
    rules = RULES.model_copy(update={"examples": [example]})
    script = [
        [("", "empty"), *((text, "") for text in ("same", "three", "four", "five", "six"))],
        [
            ("c2", "unfinished: no end within max_tokens"),
            ("", "empty"),
            *((text, "") for text in ("c4", "so it is", "c6")),
        ],
        [("same", ""), ("new", ""), ("So it is!", ""), ("I am it.", "")],
    ]
    lines = revised(Scripted(speaker, script), prompts.asked[:6], rules)
    expected = ["initial answer: empty", SAME, "critique: empty", "", ECHO, COPIED]
    assert [line["left_out"] for line in lines] == expected
    assert lines[1]["critique"]["fault"] == ""  # a critique that was cut off still criticises


def test_what_the_model_cannot_hold_is_left_out(policy, speaker, prompts):
    chat = ChatModel(speaker, SamplingSettings(**REVISING), lambda: False)
    chat.room = 12
    long = (Message("user", "red " * 20),)
    said = chat.reply([(long, ()), ((Message("user", "red"),), ())], 6)
    assert said[0]["fault"] == TOO_LONG and said[1]["fault"] != TOO_LONG


def test_of_two_samples_the_likelier_is_chosen(speaker):
    how = SamplingSettings(pairs="samples")
    identity = {"source": {"model": {"digest": "d"}}, "constitution": "c" * 64}
    line = {"prompt": [], "first": {"text": "one"}, "second": {"text": "two"}, "sampling": {}, "prompt_id": "x"}
    line |= {"probability": 0.25, "votes": {"red": {"probability": 0.25}}}
    row = pair_of(line, identity, how)
    assert (row["chosen"], row["rejected"], row["probability"], row["by_principle"]) == (
        "two",
        "one",
        0.75,
        {"red": 0.75},
    )
    row = pair_of(line | {"probability": 0.75, "votes": {"red": {"probability": 0.75}}}, identity, how)
    assert (row["chosen"], row["probability"]) == ("one", 0.75)


def test_position_golden():
    """(3, 1) prefers the answer in both orders, (2, -4) the place: bias (1 + 3) / 2, half consistent."""
    votes = {"a": {"shown_first": 3.0, "shown_second": 1.0}, "b": {"shown_first": 2.0, "shown_second": -4.0}}
    assert label_position_bias([{"votes": votes}, {}]) == {"bias": 2.0, "consistent": 0.5, "comparisons": 2}
    assert label_position_bias([{}]) is None


def test_soft_labels_reach_the_loss(speaker, policy, prompts, tmp_path):
    """-p ls(beta d) - (1 - p) ls(-beta d), arXiv 2305.18290 eq. 7 in expectation over the label."""
    finish(speaker, prompts, RULES, SamplingSettings(pairs="samples", **HOW), tmp_path / "o")
    config = load_config(tmp_path / "o/recipe.yaml")
    rows, report = read_pairs(config.data)
    written = lines_of(tmp_path / "o/pairs.jsonl")
    assert report.kept == len(written) > 4
    assert [row.extras.label for row in rows] == [row["probability"] for row in written]
    examples, _ = encode_all(rows, policy.tokenizer, config.data, eos_ids=policy.eos_ids)
    batch = collate(examples, tuple(range(4)), 4)
    pairs = score_pairs(policy.model, batch, forward_fns(policy.model).score)
    found = np.array(resolve(config.loss, config.data.columns)(pairs))
    d = np.array((pairs.chosen - pairs.ref_chosen) - (pairs.rejected - pairs.ref_rejected), np.float64)
    p = np.array([row["probability"] for row in written[:4]])
    ls = lambda x: -np.logaddexp(0, -x)  # noqa: E731
    assert found == pytest.approx(-p * ls(0.1 * d) - (1 - p) * ls(-0.1 * d), rel=1e-5)
    assert np.abs(found + ls(0.1 * d)).max() > 1e-3  # and a hard label would be something else


def test_another_model_may_compare(folder, speaker, prompts, tmp_path):
    other = write_model(tmp_path / "judge", talking_tokenizer(), seed=5, max_position_embeddings=4096)
    judge = load_policy(load_config(None, {"model": {"path": str(other)}}).model)
    few, how = prompts._replace(asked=prompts.asked[:16]), SamplingSettings(pairs="samples", **HOW)
    finish(speaker, few, RULES, how, tmp_path / "a")
    finish(speaker, few, RULES, how, tmp_path / "b", Feedback(judge, {"digest": judge.identity["digest"]}))
    own, others = (lines_of(tmp_path / name / "talks.jsonl") for name in "ab")
    assert [t["first"] for t in own] == [t["first"] for t in others]
    assert [t.get("votes") for t in own] != [t.get("votes") for t in others]


# the command


def test_command_to_training(folder, tmp_path, cache, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules.yaml").write_text(dump_constitution(RULES))
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"the {w} cat"}) + "\n" for w in WORDS[:30]))
    line = f"constitution {folder} --prompts p.jsonl --out o --constitution rules.yaml --pairs samples --max-tokens 6"
    line += " --unfinished keep"
    assert run(line.split()) == 0
    said = capsys.readouterr().out
    assert "pairs from 30 prompts" in said and "mean label" in said
    assert run([*line.split(), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == 30
    train = f"train o/recipe.yaml --model {folder} --out r --train.steps 1 --data.eval-fraction 0 --lora.rank 2"
    assert run(train.split()) == 0
    assert read_prompts(DataConfig(), "o/pairs.jsonl").asked  # its prompts can be asked again
    for wrong, sentence in {
        f"constitution {folder} --prompts p.jsonl --out r": "r holds",
        f"constitution {folder} --prompts p.jsonl --out n --labels none --feedback x": "no effect with --labels none",
        f"constitution {folder} --prompts p.jsonl --out n --pairs samples --critique-tokens 9": "9 has no effect",
        f"constitution {folder} --prompts p.jsonl --out n --before": "--before is for runs",
        f"constitution {folder} --prompts p.jsonl --out n --pairs samples --labels none": "leaves two samples unjudged",
        f"constitution {folder} --prompts p.jsonl --out n --pairs samples --temperature 0": "the same sample twice",
        f"constitution {folder} --prompts p.jsonl --out n --constitution no.yaml": "no.yaml: no such constitution",
        "constitution nope --prompts p.jsonl --out n": "nope: no such folder",
    }.items():
        capsys.readouterr()
        assert run(wrong.split()) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "n").exists()


# the page


@pytest.fixture
def there(tmp_path, monkeypatch, speaker, prompts):
    """A working folder with a finished run, one of its texts hostile."""
    monkeypatch.chdir(tmp_path)
    finish(speaker, prompts, RULES, SamplingSettings(**REVISING), tmp_path / "cai")
    talks = lines_of(tmp_path / "cai/talks.jsonl")
    talks[0]["initial"]["text"] = "<script>alert(1)</script>"
    talks[0]["prompt"][0]["content"] = "<img src=x onerror=alert(1)>"
    (tmp_path / "cai/talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    return tmp_path


def test_the_page_lists_filters_and_opens(there):
    runs = there / "runs"
    assert list(tab.found(runs, there)) == ["cai"]
    talks = tab.open_talks(there / "cai")
    paired, left = (tab.matching_talks(talks, TalkFilter(kind=kind)) for kind in (PAIRED, LEFT))
    assert sorted([*paired, *left]) == list(range(len(talks))) and paired and left
    red = tab.matching_talks(talks, TalkFilter(principle="red"))
    assert red == [at for at, talk in enumerate(talks) if talk["principle"] == "red"]
    html, page = tab.listed(runs, 0, "cai", "", "all", "any principle", 0, 0)
    assert page == 0 and f"Conversations 1 to 20 of {len(talks)} found" in html
    assert tab.listed(runs, 5, "cai", "", "all", "any principle", 0, 0)[1] == (len(talks) - 1) // 20
    assert "No conversation matches" in tab.listed(runs, 0, "cai", "zebra", "all", "any principle", 0, 0)[0]
    number = paired[0] + 1
    shown = unescape(tab.read(runs, "cai", number))
    talk = talks[number - 1]
    for part in ("initial", "critique", "revision"):
        assert talk[part]["text"] in shown
    assert next(one for one in RULES.principles if one.name == talk["principle"]).critique in shown
    assert f"{talk['probability']:.3f}" in shown
    assert "No pair: " in tab.read(runs, "cai", left[-1] + 1)
    assert "there is no conversation 99" in tab.read(runs, "cai", 99)
    assert "pairs from" in tab.summary_html(there / "cai")


def test_the_page_escapes_and_opens_nothing_else(there):
    runs = there / "runs"
    listed = tab.listed(runs, 0, "cai", "", "all", "any principle", 0, 0)[0]
    for html in (listed, tab.read(runs, "cai", 1)):
        assert "<script" not in html and "<img" not in html and "&lt;" in html
    for name in ("../x", "<b>", str(there / "cai")):
        answer = tab.read(runs, name, 1)
        assert "there is no such folder" in answer and "<b>" not in answer


def test_the_tab_is_built(there):
    gradio = pytest.importorskip("gradio")
    with gradio.Blocks() as page:
        tab.build(there / "runs", lambda request: None)
    wanted = {"constitution-folder", "constitution-rows", "constitution-number", "constitution-talk"}
    assert wanted <= {getattr(block, "elem_id", None) for block in page.blocks.values()}


@pytest.mark.real
def test_four_prompts_on_the_real_model(tmp_path):
    policy = load_policy(load_config(None, {"model": {"path": "smollm2"}}).model)
    asked = ["Name three fruits.", "What do bees make?", "Say hello to a new neighbour.", "Is the moon a star?"]
    prompts = Prompts([Asked(text, f"p:{n}") for n, text in enumerate(asked)], {})
    how = SamplingSettings(max_tokens=24, critique_tokens=24, unfinished="keep", temperature=0.7)
    rules = load_constitution()
    rules = rules.model_copy(update={"principles": rules.principles[:2]})
    assert (
        finish(policy_source(policy, DataConfig(), "smollm2", None), prompts, rules, how, tmp_path / "o")[-1] == "done"
    )
    rows = lines_of(tmp_path / "o/pairs.jsonl")
    assert rows and all(set(row["by_principle"]) == {"truth", "harm"} for row in rows)
    # Shown alone, it nearly always says A: the average of both orders must not.
    report = json.loads((tmp_path / "o/report.json").read_text())
    assert report["position"]["bias"] > 0.5 and all(0.2 < row["probability"] < 0.8 for row in rows)
