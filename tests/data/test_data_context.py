"""Every column of every shape is used, refused by name, or listed; LLaMA-Factory's and mlx-lm's folders."""

import json

import pytest
from row_shapes import FIXTURES, items_of, turns
from tiny_tokenizers import chatml_tokenizer, llama2_tokenizer

from mlxdpo.config import DataConfig
from mlxdpo.data import reasons
from mlxdpo.data.encode import encode_all
from mlxdpo.data.fields import Row
from mlxdpo.data.formats import FORMATS, convert, detect
from mlxdpo.data.read import heldout_source, read_preferences
from mlxdpo.data.report import BadRow
from mlxdpo.types import Message, UnpairedExample, UserError

SHAPES = pytest.mark.parametrize("name", FORMATS)
OWN_HISTORY = {name for name, shape in FORMATS.items() if "history" in shape.columns}


def with_columns(name, **columns):
    return [row | columns for row in FIXTURES[name]]


def answers(item):
    return (item.completion,) if isinstance(item, UnpairedExample) else (item.chosen, item.rejected)


def converted(name, rows, **options):
    shape = FORMATS[name]
    return convert(shape, [Row("x:1", shape.flattened(row)) for row in rows], DataConfig(**options))


def refusal(name, rows, **options):
    with pytest.raises(BadRow) as caught:
        converted(name, rows, **options)
    return caught.value.reason, caught.value.sentence


@SHAPES
@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_column_is_a_turn_in_every_shape(name, column):
    if name == "system" and column == "system_prompt":
        return
    [bare] = items_of(with_columns(name, **{"system": None} if name == "system" else {}), name)
    [item] = items_of(with_columns(name, **{column: "MARK"}), name)
    before = bare.prompt if isinstance(bare.prompt, tuple) else (Message("user", bare.prompt),)
    assert item.prompt == (Message("system", "MARK"), *before)
    assert all(isinstance(text, tuple) and text[-1].role == "assistant" for text in answers(item))
    assert column not in item.columns


@SHAPES
def test_tools_and_history_are_used_in_every_shape(name):
    tool = {"type": "function", "function": {"name": "MARK"}}
    for value in ([tool], json.dumps([tool]), [json.dumps(tool)], tool):
        [item] = items_of(with_columns(name, tools=value), name)
        assert item.tools == (tool,)
    if name in OWN_HISTORY:
        return
    said = (Message("user", "MARK 1"), Message("assistant", "MARK 2"))
    for value in ([["MARK 1", "MARK 2"]], json.dumps([["MARK 1", "MARK 2"]]), turns("MARK 1", "MARK 2")):
        [item] = items_of(with_columns(name, history=value), name)
        assert [turn for turn in item.prompt if "MARK" in turn.content] == [*said]
        roles = [turn.role for turn in item.prompt]
        assert (
            roles.index("user") == (1 if name == "system" else 0) and item.prompt.index(said[0]) < len(item.prompt) - 2
        )


@SHAPES
def test_what_no_text_model_reads_is_refused_in_every_shape(name):
    for column in ("image", "images", "videos", "audio"):
        assert refusal(name, with_columns(name, **{column: ["MARK.png"]}))[0] == reasons.NOT_TEXT
        assert len(items_of(with_columns(name, **{column: []}), name)) == 1
    reason, sentence = refusal(name, with_columns(name, chat_template_kwargs={"enable_thinking": True}))
    assert (reason, sentence) == (
        reasons.CONTEXT,
        '"chat_template_kwargs" asks for enable_thinking true; set data.thinking to true',
    )
    rows = with_columns(name, chat_template_kwargs='{"enable_thinking": true}')
    assert len(converted(name, rows, thinking=True)) == 1
    _, sentence = refusal(name, with_columns(name, chat_template_kwargs={"MARK": 1}))
    assert sentence == '"chat_template_kwargs" asks for MARK 1; take it out'


@SHAPES
def test_any_other_column_is_listed_with_its_rows(name, tmp_path):
    rows = [row | {"MARK": value} for row, value in zip(FIXTURES[name], ("said", None), strict=False)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    _, report = read_preferences(DataConfig(path=str(tmp_path / "a.jsonl")))
    expected = {"verbosity": 2} if name == "ratings" else {}
    assert report.unread == {"MARK": 1} | expected
    assert "unused columns: " in report.lines()[-1] and "MARK (1 rows)" in report.lines()[-1]


def test_system_prompts_that_disagree_are_refused():
    row = {"prompt": [{"role": "system", "content": "A"}, *turns("Hi?")], "chosen": "a", "rejected": "b"}
    assert refusal("messages", [row | {"system": "B"}])[0] == reasons.CONTEXT
    [item] = converted("messages", [row | {"system": " A "}])
    assert item.prompt == (Message("system", "A"), Message("user", "Hi?"))
    assert refusal("messages", [row | {"system": "B", "system_prompt": "C"}])[0] == reasons.CONTEXT
    text = FIXTURES["text"][0] | {"system": "B"}
    assert "data.template to chat" in refusal("text", [text], template="plain")[1]


def test_history_stands_between_system_prompt_and_prompt():
    row = FIXTURES["alpaca"][0] | {"system": "S", "history": [["Q", "A"], ["R", "B"]]}
    [item] = converted("alpaca", [row])
    assert [turn.content for turn in item.prompt] == ["S", "Q", "A", "R", "B", "Hi?"]
    for value in ([["Q"]], "text", 7, [["Q", None]]):
        assert refusal("alpaca", [row | {"history": value}])[0] == reasons.WRONG_TYPE


def test_alpacas_input_is_the_next_line_of_its_instruction():
    [item] = items_of([FIXTURES["alpaca"][0] | {"input": "MARK"}])
    assert item.prompt == "Hi?\nMARK"


def test_an_empty_prompt_is_for_plain_text_alone():
    row = FIXTURES["text"][0] | {"prompt": ""}
    assert refusal("text", [row])[0] == reasons.EMPTY_PROMPT
    [item] = converted("text", [row], template="plain")
    assert item.prompt == ""


def test_base_models_go_on_from_a_beginning_or_from_nothing():
    """A prompt that begins the answer, and one without a word: behind a BOS there is something to go on from."""
    rows = [{"prompt": prompt, "chosen": " blue.", "rejected": " red."} for prompt in ("The sky is", "")]
    pairs = [pair for row in rows for pair in converted("text", [row], template="plain")]
    data = DataConfig(template="plain", on_bad_row="skip")
    tokenizer = llama2_tokenizer()
    (begun, bare), _ = encode_all(pairs, tokenizer, data)
    assert tokenizer.decode(begun.prompt.tolist()) == "<s>The sky is"
    assert bare.prompt.tolist() == [tokenizer.bos_token_id]
    assert tokenizer.decode(bare.chosen.tolist()) == tokenizer.decode(begun.chosen.tolist()) == " blue.</s>"
    kept, report = encode_all(pairs, chatml_tokenizer(), data)
    assert len(kept) == 1 and report.refused == {"empty prompt": 1}


PARTS = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "?", "image_url": None}, "!"]


def test_content_in_parts_is_text_and_what_is_no_text_is_refused():
    row = {"prompt": [{"role": "user", "content": PARTS}], "chosen": "Good.", "rejected": "Bad."}
    [item] = items_of([row])
    assert item.prompt == (Message("user", "Hi?!"),)
    for part in ({"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": None}, 7, None):
        row["prompt"][0]["content"] = [*PARTS, part]
        assert refusal("messages", [row])[0] == reasons.NOT_TEXT


def test_sharegpt_function_calls_are_tool_calls():
    call = {"name": "f", "arguments": {"a": 1}}
    asked = [{"from": "human", "value": "Hi?"}, {"from": "function_call", "value": json.dumps(call)}]
    row = FIXTURES["sharegpt"][0] | {"conversations": [*asked, {"from": "observation", "value": "1"}]}
    [item] = items_of([row])
    expected = {"tool_calls": [{"type": "function", "function": call}]}
    assert item.prompt[1:] == (Message("assistant", "", expected), Message("tool", "1"))
    row["conversations"][1]["value"] = "no call"
    with pytest.raises(BadRow, match="the tool calls of turn 2"):
        items_of([row])


@pytest.mark.parametrize(
    ("winner", "chosen"), [("model_a", "Bad."), ("B", "Good."), ("response_a", "Bad."), ("tie (bothbad)", None)]
)
def test_winners_of_battles(winner, chosen):
    rows = with_columns("battle", winner=winner)
    if chosen is None:
        assert refusal("battle", rows)[0] == reasons.TIED
    else:
        assert items_of(rows)[0].chosen == chosen
    assert refusal("battle", with_columns("battle", winner="nobody knows"))[0] == reasons.WRONG_TYPE


TIES = {
    "helpsteer3": {"overall_preference": 0}, "webgpt": {"score_0": 0.5}, "alpaca_farm": {"preference": 1.5},
    "arena": {"winner": "tie"}, "battle": {"winner": "both bad"}, "distilabel": {"ratings": [1, 1]},
    "arena_flags": {"winner_model_b": 0, "winner_tie": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", TIES)
def test_ties_are_no_pairs(name):
    assert refusal(name, with_columns(name, **TIES[name]))[0] == reasons.TIED


def test_a_number_that_names_no_answer_is_refused():
    assert refusal("safe_rlhf", with_columns("safe_rlhf", better_response_id=2))[0] == reasons.WRONG_TYPE


def lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_mlx_lms_folder_holds_out_its_valid_split_and_says_so(tmp_path):
    for name in ("train", "valid", "test"):
        lines(tmp_path / f"{name}.jsonl", [FIXTURES["text"][0] | {"prompt": name}])
    data = DataConfig(path=str(tmp_path))
    assert heldout_source(data) == (str(tmp_path), "valid")
    rows, report = read_preferences(data, *heldout_source(data))
    assert [row.prompt for row in rows] == ["valid"]
    assert report.lines() == [f'using split "valid" (next to train in {tmp_path}) as held-out pairs']
    assert read_preferences(data)[1].lines() == []
    assert heldout_source(data.model_copy(update={"eval": "test"})) == (str(tmp_path), "test")
    assert heldout_source(data.model_copy(update={"eval_fraction": 0.0})) is None
    (tmp_path / "train.jsonl").unlink()
    assert heldout_source(data) is None


def test_a_folder_may_hold_files_of_several_shapes(tmp_path):
    lines(tmp_path / "a.jsonl", FIXTURES["text"])
    lines(tmp_path / "b.jsonl", FIXTURES["openai"])
    rows, report = read_preferences(DataConfig(path=str(tmp_path)))
    assert (len(rows), report.format, report.kept) == (2, "text, openai", 2)


INFO = {
    "mine": {"file_name": "a.json", "ranking": True, "formatting": "sharegpt"}
    | {"columns": {"messages": "talk", "chosen": "good", "rejected": "bad", "system": "sys"}}
    | {"tags": {"role_tag": "who", "content_tag": "says", "user_tag": "me", "assistant_tag": "it"}},
    "other": {"file_name": "b.json", "ranking": True}
    | {"columns": {"prompt": "q", "query": "", "chosen": "chosen", "rejected": "rejected"}},
    "liked": {"file_name": "c.json", "columns": {"prompt": "q", "response": "a", "kto_tag": "like"}},
    "sft": {"file_name": "d.json"},
    "far": {"hf_hub_url": "o/n", "ranking": True},
}


@pytest.fixture
def described(tmp_path):
    say = lambda who, text: {"who": who, "says": text}  # noqa: E731
    row = {"talk": [say("me", "Hi?")], "good": say("it", "Good."), "bad": say("it", "Bad."), "sys": "S"}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    (tmp_path / "b.json").write_text(json.dumps([{"q": "Hi?", "chosen": "Good.", "rejected": "Bad."}]))
    (tmp_path / "c.json").write_text(json.dumps([{"q": "Hi?", "a": "Good.", "like": True}]))
    (tmp_path / "d.json").write_text(json.dumps(FIXTURES["alpaca_output"]))
    (tmp_path / "e.json").write_text("[never read")
    (tmp_path / "dataset_info.json").write_text(json.dumps(INFO))
    return tmp_path


def test_llama_factorys_folder_is_read_as_its_dataset_info_says(described):
    rows, report = read_preferences(DataConfig(path=str(described)))
    assert report.format == "sharegpt, alpaca, kto_alpaca" and report.unread == {}
    assert rows[0].prompt == (Message("system", "S"), Message("user", "Hi?"))
    assert (rows[0].chosen, rows[1].rejected) == ((Message("assistant", "Good."),), "Bad.")
    for path, name in ((f"{described}:other", "alpaca"), (described / "dataset_info.json:mine", "sharegpt")):
        assert read_preferences(DataConfig(path=str(path)))[1].format == name
    assert read_preferences(DataConfig(path=str(described / "b.json")))[1].format == "alpaca"
    assert read_preferences(DataConfig(path=f"{described}:sft"))[1].format == "alpaca_output"


def test_a_sample_that_llama_factory_would_draw_is_refused(described):
    entries = INFO | {"mine": INFO["mine"] | {"num_samples": 50}}
    (described / "dataset_info.json").write_text(json.dumps(entries))
    for path in (f"{described}:mine", str(described / "a.json")):
        with pytest.raises(UserError, match=r'"num_samples": 50 of mine cannot be followed; remove it to train on all'):
            read_preferences(DataConfig(path=path))


def test_data_sets_that_llama_factory_has_elsewhere(described):
    with pytest.raises(UserError, match="no data set named nope; it has mine, other, liked, sft, far"):
        read_preferences(DataConfig(path=f"{described}:nope"))
    with pytest.raises(UserError, match="far has no file_name; give its Hub dataset id"):
        read_preferences(DataConfig(path=f"{described}:far"))


def test_a_dataset_info_of_datasets_describes_no_files(tmp_path):
    lines(tmp_path / "a.jsonl", FIXTURES["text"])
    (tmp_path / "dataset_info.json").write_text('{"features": {"file_name": {"dtype": "string"}}, "splits": {}}')
    assert len(read_preferences(DataConfig(path=str(tmp_path)))[0]) == 1


def test_prompt_and_answers_of_the_hosted_format_with_tools():
    tool = {"type": "function", "function": {"name": "f"}}
    row = FIXTURES["openai"][0]
    row = row | {"input": row["input"] | {"tools": [tool], "parallel_tool_calls": True}}
    assert detect(row) is FORMATS["openai"]
    [item] = items_of([row])
    assert item.tools == (tool,)
