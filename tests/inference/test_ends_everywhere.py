"""A base model whose config.json ends at one token and whose template at another, after SFT: all stop at the turn's.

The model learns to answer "ok" and to end its turn with <|im_end|>; config.json and the tokenizer know <|endoftext|>.
"""

import json

import pytest
from tiny_exports import END, TURN, run_with_two_ends
from transformers import AutoTokenizer

from mlxdpo.baselines.rollouts import draw_completions
from mlxdpo.cli import run as cli
from mlxdpo.data.encode import encode_prompt
from mlxdpo.exporters.run import export
from mlxdpo.inference.trained_run import open_trained_run
from mlxdpo.online.constitution.conversations import ChatModel
from mlxdpo.online.constitution.schema import SamplingSettings
from mlxdpo.online.prompts import source_of
from mlxdpo.types import Message, Preference
from mlxdpo.ui.compare.answers import Settings, answer_together, score
from mlxdpo.ui.variants import LoadedVariants
from mlxdpo_eval.sampling import Sampling, sample_answers

MOST = 12  # tokens: enough to run on after the answer


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    """The finished run."""
    folder = tmp_path_factory.mktemp("ends")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXDPO_CACHE", str(folder / "cache"))
        return run_with_two_ends(folder)


@pytest.fixture(scope="module")
def trained(sft):
    return open_trained_run(sft)


@pytest.fixture
def ids(trained):
    return [
        encode_prompt(text, trained.policy.tokenizer, trained.config.data).tolist() for text in ("red 3?", "blue 4?")
    ]


def test_config_knows_one_end_and_the_run_both(sft, trained):
    said = json.loads((sft.path.parent / "llama" / "config.json").read_text("utf-8"))
    tokens = trained.policy.tokenizer.convert_tokens_to_ids([END, TURN])
    assert said["eos_token_id"] == tokens[0] and trained.policy.eos_ids == set(tokens)


def test_generate(sft, capsys):
    assert (
        cli(["generate", str(sft.path), "--prompt", "red 3?", "--prompt", "red 9?", "--json", "--max-tokens", "12"])
        == 0
    )
    for line in capsys.readouterr().out.splitlines():
        assert (json.loads(line)["text"], json.loads(line)["finish"]) == ("ok", "stop")


def test_eval(trained):
    row = Preference("red 3?", "ok", "no", "p:1")
    answers = sample_answers(trained, trained.policy.model, [row], 2, Sampling(max_tokens=MOST, temperature=0.0))
    assert answers.texts == ["ok", "ok"] and answers.stopped == [True, True]


def test_collect(sft, tmp_path, capsys):
    """Every answer is the same word and none is cut off: of 16, each prompt's first is kept, and 14 repeat it."""
    (tmp_path / "q.jsonl").write_text('{"prompt": "red 3?"}\n{"prompt": "blue 9?"}\n')
    words = ["collect", str(sft.path), "--prompts", str(tmp_path / "q.jsonl"), "--reward", "longest"]
    assert cli([*words, "--out", str(tmp_path / "p.jsonl"), "--max-tokens", str(MOST), "--temperature", "0.1"]) == 2
    wanted = "(14 answers: nearly identical to an earlier answer to the prompt; 2 prompts with fewer than two usable"
    assert wanted in capsys.readouterr().err


def test_constitution(sft):
    chat = ChatModel(source_of(sft), SamplingSettings(temperature=0.01, unfinished="drop"), lambda: False)
    (reply,) = chat.reply([([Message("user", "red 3?")], ())], MOST)
    assert (reply["text"], reply["finish"], reply["fault"]) == ("ok", "stop", "")


def test_app(sft, trained):
    loaded = LoadedVariants().load(sft)
    settings = Settings(temperature=0.0, max_tokens=MOST)
    (answer,) = list(answer_together(loaded, [loaded.after], ["red 3?"], settings))[-1]
    assert (answer.text, answer.finish) == ("ok", "stop")
    pieces = score(loaded, loaded.after, answer)
    assert pieces.end is not None and pieces.end > 1, "the end that was taught, not the one of config.json"


def test_rollouts(trained, ids):
    drawn = draw_completions(trained.policy.model, ids, MOST, trained.policy.eos_ids, 0, 4)
    assert drawn.ended.all()
    assert [trained.policy.tokenizer.decode(tokens) for tokens in drawn.completions] == ["ok" + TURN] * 2


def test_exports_stop_in_mlx_lm(sft, trained, ids, tmp_path):
    from mlx_lm import load, stream_generate

    done = export(sft, ["fused", "hf"], tmp_path / "out", pairs=4, data=str(sft.path.parent / "heldout.jsonl"))
    for target in done.targets.values():
        model, tokenizer = load(str(done.out / target.folder))
        last = list(stream_generate(model, tokenizer, ids[0], max_tokens=MOST))[-1]
        assert last.finish_reason == "stop" and last.generation_tokens <= 3
        ends = json.loads((done.out / target.folder / "generation_config.json").read_text("utf-8"))["eos_token_id"]
        assert set(ends) == trained.policy.eos_ids
        assert AutoTokenizer.from_pretrained(done.out / target.folder).eos_token == END


@pytest.mark.processes
def test_mlx_lm_s_server_stops_at_the_turn_s_end(sft, tmp_path):
    heldout = str(sft.path.parent / "heldout.jsonl")
    asked = export(sft, ["server"], tmp_path / "out", data=heldout).targets["server"].asked
    assert asked["client"] == "mlx_lm.server" and asked["equal"] == asked["prompts"] == 4


def test_lm_studio_is_told_both_ends(sft, tmp_path):
    heldout = str(sft.path.parent / "heldout.jsonl")
    out = export(sft, ["lmstudio"], tmp_path / "out", data=heldout).out
    preset = json.loads((out / "lmstudio" / "run.preset.json").read_text("utf-8"))
    stops = next(f["value"] for f in preset["operation"]["fields"] if f["key"] == "llm.prediction.stopStrings")
    assert set(stops) == {END, TURN}
