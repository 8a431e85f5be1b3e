"""The model card: every number is the evaluation's own, with its interval; what is not known is said; nothing leaks."""

import json
import re

import pytest
import yaml
from fake_hub import TOKEN
from hub_rules import check_metadata
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_judges import Planted, coin
from small_export import PASSED, record
from tiny_runs import finish, recipe

from mlxdpo import Run, UserError
from mlxdpo.config import Config, load_config
from mlxdpo.exporters.card import BEGIN, END, OFFER, write_card
from mlxdpo.exporters.hub import push
from mlxdpo.exporters.record import command, outgoing, public_config, public_name, without_paths
from mlxdpo.exporters.sections import Licences, cell, read_card_numbers
from mlxdpo.io.atomic import write_json
from mlxdpo_eval.run import evaluate
from mlxdpo_eval.sampling import Sampling


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A tiny run and its evaluation's results."""
    folder = tmp_path_factory.mktemp("evaluated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXDPO_CACHE", str(folder / "cache"))
        config = recipe(folder, data={"eval_fraction": 0.4}, train={"eval_every": 2})
        finish(config)
        run = Run.open(config.out)
        results = evaluate(run, [Planted(coin)], Sampling(prompts=6, samples=2, max_tokens=5)).results
    return run, results


@pytest.fixture
def out(evaluated, tmp_path):
    """An export of it, before its card."""
    run, _ = evaluated
    (tmp_path / "out").mkdir()
    for name in ("adapters.safetensors", "adapter_config.json"):
        (tmp_path / "out" / name).write_bytes((run.adapter / name).read_bytes())
    record(tmp_path / "out", {"mlx": "."})
    return tmp_path / "out"


def bare(run, folder):
    """The same run without its evaluation."""
    folder.mkdir()
    for name in ("config.yaml", "manifest.json", "metrics.jsonl"):
        (folder / name).write_bytes((run.path / name).read_bytes())
    (folder / "adapter").symlink_to(run.adapter)
    return Run.open(folder)


def metadata(card):
    return yaml.safe_load(card.read_text().split("---\n")[1])


def test_numbers_are_the_evaluations_own(evaluated, out):
    """Value and interval of each metric in the model-index, against the results file by hand."""
    run, results = evaluated
    (entry,) = metadata(write_card(run, out))["model-index"]
    found = {m["type"]: m for r in entry["results"] for m in r["metrics"]}
    rewards, drift, judged = results["pairs"]["rewards"], results["drift"], results["winrates"][0]
    expected = {
        "accuracy": (rewards["accuracy"], rewards["accuracy_interval"]),
        "reward_margin": (rewards["margin"]["mean"], rewards["margin"]["interval"]),
        "chosen_log_ratio": (rewards["displacement"]["mean"], rewards["displacement"]["interval"]),
        "kl": (drift["kl"], drift["kl_interval"]),
        "length_ratio": (drift["length_ratio"]["value"], drift["length_ratio"]["interval"]),
        "win_rate": (judged["rate"], judged["interval"]),
    }
    for name, (value, interval) in expected.items():
        assert found[name]["value"] == value, name
        bounds = found[name].get("args", {})
        assert (bounds.get("low"), bounds.get("high")) == (
            (None, None) if interval is None else (interval["low"], interval["high"])
        ), name
    assert found["accuracy"]["args"]["n"] == f"{rewards['n']} of {results['pairs']['prompts']} prompts"


def test_every_number_stands_in_the_text_with_interval_and_n(evaluated, out):
    run, _ = evaluated
    text = write_card(run, out).read_text()
    findings = read_card_numbers(run)
    assert len(findings.findings) >= 12
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    for f in findings.findings:
        (row,) = [line for line in rows if line.startswith(f"| {cell(f.name)} |")]
        bounds = "none" if f.low is None else f"{f.low:.4g} to {f.high:.4g}"
        assert f"| {f.value:.4g} | {bounds} | {f.n} |" in row


def test_what_the_issue_asks_for_is_there(evaluated, out, laid_out):
    run, results = evaluated
    text = write_card(run, out, repo="jane/tiny").read_text()
    manifest, config = run.manifest(), run.config()
    for part in (
        "org/base", "adapter", manifest["model"]["digest"], manifest["data"]["digest"], "arXiv 2305.18290", "beta 0.1",
        manifest["machine"]["system"], f"mlx {manifest['versions']['mlx']}", "![loss", "Judge: ", "prefers the longer",
        "same winner in both orders", "Not safety evaluated", "KL to the reference", "length, after / before",
        "Fidelity of the export", "1.0000", results["headline"]["sentence"], "mlxdpo pull jane/tiny",
        command(config), "reference of the rewards", f"| seed | {manifest['seed']} |",
    ):  # fmt: skip
        assert part in text, part
    assert text.count("unknown") == 2  # both licences
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")


def test_metadata_is_what_the_hub_takes(evaluated, out, hub):
    from huggingface_hub import ModelCard

    run, _ = evaluated
    card = write_card(run, out, Licences("apache-2.0", "cc-by-4.0"))
    found = metadata(card)
    assert check_metadata(found) == []
    assert found["base_model"] == "org/base" and found["base_model_relation"] == "adapter"
    assert (found["license"], found["library_name"], found["pipeline_tag"]) == ("apache-2.0", "mlx", "text-generation")
    push(out, "jane/tiny")  # the client asks the Hub to validate the card before it sends anything
    assert [r.status for r in hub.asked("POST", "validate-yaml")] and all(
        r.status == 200 for r in hub.asked("POST", "validate-yaml")
    )
    again = ModelCard(card.read_text()).data
    assert again.model_name == "tiny" and {r.metric_type for r in again.eval_results} >= {"accuracy", "win_rate", "kl"}
    assert "cc-by-4.0" in card.read_text()


def test_a_base_that_is_only_a_folder_is_not_claimed_to_be_on_the_hub(evaluated, out):
    record(out, {"mlx": "."}, base="llama")
    found = metadata(write_card(evaluated[0], out))
    assert "base_model" not in found and "datasets" not in found


def test_a_run_that_was_not_evaluated_says_so(evaluated, out, tmp_path):
    text = write_card(bare(evaluated[0], tmp_path / "bare"), out).read_text()
    assert "It has not been evaluated" in text and "model-index" not in text and "Not safety evaluated" in text


def test_the_demos_own_measurement(evaluated, out, tmp_path):
    run = bare(evaluated[0], tmp_path / "bare")
    interval = {"estimate": 0.3, "low": 0.2, "high": 0.4, "clusters": 120}
    demo = {"rewards": {"vader": {"before": None, "change": interval}}, "accuracy": interval, "kl": None}
    write_json(run.path / "eval" / "demo.json", demo)
    card = write_card(run, out)
    (entry,) = metadata(card)["model-index"]
    assert [(m["type"], m["value"]) for m in entry["results"][0]["metrics"]] == [("reward", 0.3), ("accuracy", 0.3)]
    assert "| vader score, change | 0.3 | 0.2 to 0.4 | 120 prompts |" in card.read_text()
    assert "vader score, before" not in card.read_text()  # not known is no row, never a zero


def test_results_of_another_format_are_not_guessed_at(evaluated, out, tmp_path):
    run = bare(evaluated[0], tmp_path / "bare")
    write_json(run.path / "eval" / "results_2030.json", {"format": 99})
    with pytest.raises(UserError, match="format is 99, expected 3"):
        write_card(run, out)
    (run.path / "eval" / "results_2031.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        write_card(run, out)


def test_the_users_part_survives(evaluated, out):
    run, _ = evaluated
    card = write_card(run, out)
    mine = "I use it for *limericks* | only.\n\nSecond paragraph: \\1 --- <b>bold</b>"
    card.write_text(card.read_text().replace(OFFER, mine))
    record(out, {"mlx": "."}, PASSED._replace(token_kl=0.5))
    text = write_card(run, out).read_text()
    assert f"{BEGIN}\n\n{mine}\n\n{END}" in text and "5.00e-01" in text
    assert write_card(run, out).read_text() == text


@pytest.mark.parametrize(
    "damage", [lambda t: t.replace(END, ""), lambda t: t.replace(BEGIN, ""), lambda t: "# My own\n"]
)
def test_a_card_without_its_marks_is_not_overwritten(evaluated, out, damage):
    card = write_card(evaluated[0], out)
    card.write_text(damage(card.read_text()))
    before = card.read_text()
    with pytest.raises(UserError, match="restore them or move it"):
        write_card(evaluated[0], out)
    assert card.read_text() == before


def test_a_target_that_failed_is_shown_as_failed(evaluated, out):
    record(out, {"mlx": "."}, PASSED._replace(passed=False, reason="slope 0.31", slope=None, forced=True))
    assert "**failed**: slope 0.31" in write_card(evaluated[0], out).read_text()


def test_no_path_and_no_token_anywhere(evaluated, out, monkeypatch):
    run, _ = evaluated
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    card = write_card(run, out)
    card.write_text(card.read_text().replace(OFFER, f"my token {TOKEN}"))
    write_card(run, out)
    for file in (p for p in out.rglob("*") if p.is_file()):
        content = file.read_bytes()
        assert TOKEN.encode() not in content, file
        if file.suffix != ".safetensors":
            assert not re.search(rb"/tmp/|/home/|/Users/|/root/", content), file
    assert {f.name for f in outgoing(out)[0]} >= {"README.md", "training.png", "run/config.yaml", "run/manifest.json"}


@given(st.text(max_size=30))
def test_a_cell_stays_a_cell(text):
    line = f"| {cell(text)} |"
    assert "\n" not in line and len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 2 and "<" not in line


@given(
    st.sampled_from(["/home/jane/", "/Users/jane/my-data/", "~/x/", "C:\\data\\", "/a/"]),
    st.from_regex(r"[a-z]{1,8}\.jsonl", fullmatch=True),
)
def test_paths_in_sentences_lose_their_folders(folder, name):
    assert without_paths({"a": [f"the 10 % of {folder}{name} held out"]}) == {"a": [f"the 10 % of {name} held out"]}


def test_what_is_no_path_stays():
    for text in ("after / before", "https://host/v1/x", "and/or", "org/name", "1/2", "a: b/c", "Linux 6.1 x86_64"):
        assert without_paths(text) == text


def test_names():
    given_names = ("org/name", "runs/demo/data/pairs.jsonl", "/a/llama/", "smollm2", "d/pairs.jsonl")
    assert [public_name(n) for n in given_names] == ["org/name", "pairs.jsonl", "llama", "smollm2", "pairs.jsonl"]


def parsed(line):
    """The recipe that a `mlxdpo train` command line gives, by the command line's own parser."""
    import shlex

    from cyclopts import App

    from mlxdpo.commands.train import run as train

    app = App(name="train")
    app.default(train)
    bound = app.parse_args(shlex.split(line)[2:], exit_on_error=False, print_error=False)[1]
    return load_config(None, bound.arguments["config"].model_dump(exclude_unset=True)) if bound.arguments else Config()


CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "stage": st.sampled_from(["dpo", "sft"]),
        "model": st.fixed_dictionaries({"path": st.just("org/m")}, optional={"quantize": st.sampled_from([4, 8])}),
        "data": st.fixed_dictionaries(
            {"path": st.sampled_from(["my pairs.jsonl", "org/d"])},
            optional={"thinking": st.booleans(), "columns": st.just({"prompt": "the q"}), "eval": st.just("h.csv")},
        ),
        "lora": st.fixed_dictionaries(
            {}, optional={"keys": st.just(["self_attn.q_proj", "mlp.up_proj"]), "rank": st.integers(1, 99)}
        ),
        "optim": st.fixed_dictionaries(
            {}, optional={"betas": st.just((0.8, 0.95)), "lr": st.sampled_from([5e-6, 1e-4])}
        ),
        "train": st.fixed_dictionaries(
            {}, optional={"steps": st.integers(1, 9), "gradient_checkpointing": st.booleans()}
        ),
        "log": st.fixed_dictionaries({}, optional={"trackers": st.just(["wandb", "trackio"])}),
    },
)  # fmt: skip


@settings(max_examples=40)
@given(CHANGES)
def test_the_command_gives_the_recipe(changes):
    config = load_config(None, changes)
    assert parsed(command(config)) == public_config(config)


def test_the_command_of_the_defaults():
    assert command(Config()) == "mlxdpo train"


def test_results_file_is_plain_json(evaluated):
    run, results = evaluated
    (file,) = (run.path / "eval").glob("results_*.json")
    assert json.loads(file.read_text()) == results
