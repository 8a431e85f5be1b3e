"""Answers of the app are those of `mlxdpo generate`: shared weights say what models loaded one by one say."""

import os
import re
import threading
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from tiny_desk import SHORT, desk_over, finished_run

from mlxdpo.inference.generate import generate
from mlxdpo.inference.trained_run import prompt_text
from mlxdpo.model.adapters import load_run, load_start
from mlxdpo.runs import Run
from mlxdpo.types import Message, UserError
from mlxdpo.ui.compare.answers import (
    LONGEST_PROMPT,
    Settings,
    TokenPiece,
    answer_together,
    chat_prompt,
    ids_of,
    score,
    settings_from,
    token_pieces,
)
from mlxdpo.ui.compare.columns import Column, Exchange, columns_html, heat
from mlxdpo.ui.compare.tab import Chat, chat_html, converse, recolour
from mlxdpo.ui.engine import CHECKPOINT, NOBODY, OTHER

METHODS = {
    "lora": {},
    "dora": {"lora": {"method": "dora"}},
    "full": {"lora": {"method": "full"}, "optim": {"lr": 1e-2}},
}
PROMPT = "q3 red the:"
EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)> ${alert(1)} {{7*7}} \"'& [a](javascript:alert(1))"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two runs on one model: `one` with three checkpoints, `two` with another rank."""
    folder = tmp_path_factory.mktemp("runs")
    finished_run(folder, "one")
    finished_run(folder, "two", lora={"rank": 2}, train={"seed": 5})
    return folder


@pytest.fixture(scope="module")
def desk(place):
    return desk_over(place)


def alone(policy, ids, settings):
    """What `mlxdpo generate` answers with a model of its own."""
    return tuple(generate(policy.model, [list(ids)], eos_ids=policy.eos_ids, **settings.model_dump())[0].tokens)


def together(desk, cast, voices, prompt=PROMPT, settings=SHORT):
    task = lambda: answer_together(cast, voices, [prompt] * len(voices), settings)  # noqa: E731
    return list(desk.engine.stream(task))[-1]


@pytest.mark.parametrize("method", METHODS)
def test_shared_weights_answer_like_models_of_their_own(method, tmp_path, cache):
    run = finished_run(tmp_path, "one", **METHODS[method])
    desk = desk_over(tmp_path)
    cast = desk.load("one")
    before, after = together(desk, cast, [cast.before, cast.after])
    ids = ids_of(cast, PROMPT, 8)
    assert before.tokens == alone(load_start(run), ids, SHORT)
    assert after.tokens == alone(load_run(run), ids, SHORT)
    assert before.tokens != after.tokens, "the run must have moved, or the test shows nothing"


def test_a_checkpoint_and_another_run_in_the_third_column(desk, place):
    cast = desk.load("one")
    one, two = Run.open(place / "runs/one"), Run.open(place / "runs/two")
    step = desk.third(cast, CHECKPOINT + "step-000002")
    guest = desk.third(cast, OTHER + "two")
    answers = together(desk, cast, [cast.before, step, guest, cast.after])
    ids = ids_of(cast, PROMPT, 8)
    assert answers[1].tokens == alone(load_run(one, checkpoint=one.checkpoints / "step-000002"), ids, SHORT)
    assert answers[2].tokens == alone(load_run(two), ids, SHORT)
    assert answers[0].tokens == alone(load_start(one), ids, SHORT)
    assert answers[3].tokens == alone(load_run(one), ids, SHORT)


def test_the_base_is_untouched_by_the_voices(desk):
    cast, rows = desk.load("one"), mx.array([[1, 2, 3]])

    def bare():
        return np.array(cast.policy.model(rows))

    first = desk.engine.call(bare)
    together(desk, cast, [cast.before, cast.after, desk.third(cast, OTHER + "two")])
    assert np.array_equal(first, desk.engine.call(bare))


def test_one_base_serves_both_runs(desk):
    assert desk.load("one").policy is desk.load("two").policy


def test_an_adapter_that_changed_is_loaded_again(tmp_path, cache):
    run, desk = finished_run(tmp_path, "one"), desk_over(tmp_path)
    old = desk.load("one").after.digest
    file = run.adapter / "adapters.safetensors"
    mx.save_safetensors(str(file), {k: v * 0 for k, v in mx.load(str(file)).items()})
    cast = desk.load("one")
    before, after = together(desk, cast, [cast.before, cast.after])
    assert cast.after.digest != old and before.tokens == after.tokens


def test_scores_are_the_log_ratios_of_two_models(desk, place):
    cast = desk.load("one")
    answer = together(desk, cast, [cast.after])[0]
    found = desk.engine.call(lambda: score(cast, cast.after, answer))
    row = [*answer.prompt, *answer.tokens]
    ends = [min(cast.policy.eos_ids)] if answer.finish == "stop" else []
    logps = []
    run = Run.open(place / "runs/one")
    for policy in (load_run(run), load_start(run)):
        policy.model.eval()
        logits = np.array(policy.model(mx.array([row + ends])).astype(mx.float32))[0].astype(np.float64)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        logps.append(logits)
    at, targets = np.arange(len(answer.prompt) - 1, len(row + ends) - 1), [*answer.tokens, *ends]
    ratios = logps[0][at, targets] - logps[1][at, targets]
    kl = (np.exp(logps[0][at]) * (logps[0][at] - logps[1][at])).sum()
    assert found.ratio == pytest.approx(ratios.sum(), abs=1e-4) and found.kl == pytest.approx(kl, abs=1e-4)
    assert found.reward == pytest.approx(0.1 * ratios.sum(), abs=1e-5)
    assert sum(p.ratio for p in found.pieces) + (found.end or 0) == pytest.approx(found.ratio)
    assert "".join(p.text for p in found.pieces) == answer.text


def test_a_token_that_adds_no_text_is_shown_with_the_next():
    """A first blank that decoding drops would be the only tab stop of its answer, and nowhere to be seen."""
    written = [" ", "a", "", " b"]
    tokenizer = SimpleNamespace(decode=lambda ids: "".join(written[i] for i in ids).lstrip(" "))
    found = token_pieces(tokenizer, (0, 1, 2, 3), np.array([1.0, 2.0, 4.0, 8.0]), np.full(4, -1.0))
    assert found == (TokenPiece("a", 3.0, -2.0), TokenPiece(" b", 12.0, -2.0))


def test_a_chat_goes_on_with_what_each_column_said(desk):
    chat = Chat()
    for said in (PROMPT, " and q4:"):
        *_, chat = converse(desk, chat, "one", NOBODY, said, "", SHORT, lambda: False)
    for column in chat.columns:
        first, second = column.exchanges
        text = PROMPT + first.answer.text + " and q4:"
        assert second.answer.prompt == ids_of(desk.load("one"), text, 8)
        assert first.score is not None and second.score is not None
    *_, other = converse(desk, chat, "one", CHECKPOINT + "step-000002", PROMPT, "", SHORT, lambda: False)
    assert [len(column.exchanges) for column in other.columns] == [1, 1, 1]


def test_the_slider_recolours_what_was_said_and_writes_the_next_answer(desk):
    *_, chat = converse(desk, Chat(), "one", NOBODY, PROMPT, "", SHORT, lambda: False)
    ratios = lambda chat: [column.exchanges[0].score.ratio for column in chat.columns]  # noqa: E731
    assert ratios(recolour(desk, chat, 1.0)) == ratios(chat)
    zero, double = recolour(desk, chat, 0.0), recolour(desk, chat, 2.0)
    assert ratios(zero) == [0.0, 0.0] and ratios(double) != ratios(chat)
    assert [c.exchanges[0].answer for c in double.columns] == [c.exchanges[0].answer for c in chat.columns]
    *_, at_zero = converse(desk, chat, "one", NOBODY, PROMPT, "", SHORT, lambda: False, 0.0)
    before, after = (column.exchanges for column in at_zero.columns)
    assert len(after) == 1 and after[0].answer.tokens == before[0].answer.tokens
    assert at_zero.columns[1].subtitle == "one at strength 0" and chat.columns[1].subtitle == "one"
    with pytest.raises(UserError, match="expected 0"):
        recolour(desk, chat, -1.0)


def test_a_run_with_weights_of_its_own_says_where_its_strength_is(tmp_path, cache):
    finished_run(tmp_path, "one", lora={"method": "dora"})
    desk = desk_over(tmp_path)
    with pytest.raises(UserError, match=r"lora\.method dora trains row magnitudes"):
        desk.at_strength(desk.load("one"), 0.5)


def test_chat_models_get_turns(tmp_path, cache):
    finished_run(tmp_path, "one", data={"template": "chat"})
    cast = desk_over(tmp_path).load("one")
    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    assert cast.chat and chat_prompt(cast, [("a", "b")], "c") == turns
    assert chat_prompt(cast, [], "c", "be brief") == (Message("system", "be brief"), Message("user", "c"))


def test_stop_keeps_what_was_said(desk):
    cast, steps = desk.load("one"), iter(range(4))
    task = lambda: answer_together(  # noqa: E731
        cast, [cast.before], [PROMPT], Settings(max_tokens=500), stopped=lambda: next(steps, None) is None
    )
    answer = list(desk.engine.stream(task))[-1][0]
    assert answer.finish in ("stopped", "stop") and 1 <= len(answer.tokens) <= 4


def test_two_users_at_once_get_what_each_gets_alone(desk):
    prompts = [PROMPT, "q7 blue string:"]
    alone = [list(converse(desk, Chat(), "one", NOBODY, p, "", SHORT, lambda: False))[-1] for p in prompts]
    found = {}

    def user(prompt):
        found[prompt] = list(converse(desk, Chat(), "one", NOBODY, prompt, "", SHORT, lambda: False))[-1]

    users = [threading.Thread(target=user, args=(p,)) for p in prompts]
    [thread.start() for thread in users]
    [thread.join() for thread in users]
    words = lambda chat: [[e.answer.tokens for e in c.exchanges] for c in chat.columns]  # noqa: E731
    assert [words(found[p]) for p in prompts] == [words(chat) for chat in alone]


REFUSED = {
    "../two": "no run called '../two'",
    "/etc": "no run called '/etc'",
    "": "no run is chosen; make one with `mlxdpo demo`",
    "three": "there are",
}


@pytest.mark.parametrize("name", REFUSED)
def test_runs_are_named_by_the_scan_alone(desk, name):
    with pytest.raises(UserError, match=re.escape(REFUSED[name])):
        desk.load(name)
    with pytest.raises(UserError):
        desk.third(desk.load("one"), OTHER + name)
    with pytest.raises(UserError, match="no checkpoint"):
        desk.third(desk.load("one"), CHECKPOINT + "../../two/adapter")


def test_mistakes_are_sentences(desk):
    cast = desk.load("one")
    with pytest.raises(UserError, match="the prompt is empty"):
        chat_prompt(cast, [], "  ")
    with pytest.raises(UserError, match=r"50,000,000 characters; at most 20,000"):
        chat_prompt(cast, [], "x" * 50_000_000)
    assert LONGEST_PROMPT == 20_000
    with pytest.raises(UserError, match="the model reads"):
        desk.engine.call(lambda: ids_of(cast, "red " * 3000, 2000))
    with pytest.raises(UserError, match="`max_tokens` is 10000"):
        settings_from(temperature=1, top_p=1, max_tokens=10_000, seed=0)
    with pytest.raises(UserError, match="`temperature`"):
        settings_from(temperature=None, top_p=1, max_tokens=10, seed=0)


def test_a_random_prompt_is_another_one_and_brings_its_text(desk):
    from mlxdpo.ui.compare.tab import another

    rows, now = desk.gallery("one").heldout, None
    for _ in range(20):
        before, (now, text, pair) = now, another(desk, "one", now)
        assert (
            (now != before or len(rows) == 1)
            and text == prompt_text(rows[int(now)].prompt)
            and "Chosen in the data" in pair
        )
    with pytest.raises(UserError, match="choose a run first"):
        another(desk, None, None)


def test_the_page_takes_every_value_that_its_own_lists_offer(desk):
    """The gate before the handlers (`kinds.problem`) and the numbers of prompts, which nothing but a browser sends."""
    import gradio as gr

    from mlxdpo.ui.compare.tab import picked_prompt, prompt_choices
    from mlxdpo.ui.guard import problem

    choices, _ = prompt_choices(desk, "one")
    with gr.Blocks():
        pick = gr.Dropdown(choices, value=None)
    assert choices and [problem(pick, value) for _, value in choices] == [None] * len(choices)
    assert all(picked_prompt(desk, "one", value)[0] for _, value in choices)
    for odd in ("-1", str(len(choices)), "x", "", None):
        assert picked_prompt(desk, "one", odd) == ("", "")


def test_a_run_without_an_adapter_says_so(tmp_path, cache):
    run = finished_run(tmp_path, "one")
    (run.adapter / "adapters.safetensors").unlink()
    desk = desk_over(tmp_path)
    assert desk.names() == []
    with pytest.raises(UserError, match="no adapter there yet"):
        desk.load("one")


def test_nothing_anyone_says_becomes_markup(desk):
    """Tags in the result are ours alone, whatever stands in prompt, answer, token or run name."""
    cast = desk.load("one")
    answer = together(desk, cast, [cast.after])[0]
    pieces = (TokenPiece(EVIL, 0.5, -1.0), TokenPiece("</span>", -0.5, -1.0))
    found = desk.engine.call(lambda: score(cast, cast.after, answer))._replace(pieces=pieces)
    exchange = Exchange(EVIL, answer.__class__(**{**answer.__dict__, "text": EVIL}), found)
    page = columns_html([Column(EVIL, EVIL, (exchange, exchange._replace(score=None)))], EVIL)
    tags, attributes, text = parsed(page)
    assert tags <= {"div", "section", "h2", "p", "span", "em", "sub"}
    assert attributes <= {"class", "aria-busy", "aria-label", "aria-hidden", "role", "title", "tabindex", "style"}
    assert text.count(EVIL) >= 4


def parsed(page):
    """Tags, names of attributes and text, as a browser reads them."""
    tags, attributes, text = set(), set(), []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.add(tag)
            attributes.update(name for name, _ in attrs)

        def handle_data(self, data):
            text.append(data)

    Reader().feed(page)
    return tags, attributes, "".join(text)


def test_heat_is_readable_without_colours():
    page = heat((TokenPiece(" good", 0.693147, -1.0), TokenPiece("\n", -0.1, -2.0)), 1.0)
    assert 'aria-label="good: +0.69 nats, 2 times likelier than before"' in page
    assert page.count('tabindex="0"') == 1 and "0, 114, 178" in page and "213, 94, 0" in page
    assert escape('<a href="x">') == "&lt;a href=&quot;x&quot;&gt;"


def test_an_empty_chat_shows_nothing_odd():
    assert chat_html(Chat()).startswith('<div class="voices"')


@pytest.mark.slow
def test_memory_does_not_grow_over_100_generations(desk):
    """What MLX holds after 20 and after 120 exchanges is the same; the process gains less than 15 MB."""

    def talk(count):
        for _ in range(count):
            for _ in converse(desk, Chat(), "one", NOBODY, PROMPT, "", Settings(max_tokens=3), lambda: False):
                pass
        pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
        return desk.engine.call(mx.get_active_memory), pages * os.sysconf("SC_PAGE_SIZE")

    (held, resident), (later, grown) = talk(20), talk(100)
    assert later <= held and grown - resident < 15e6
