"""Recipes as users of other trainers write them: imported in one go, every key accounted for, trained."""

import dataclasses
import re

import pytest
import yaml
from slow_cases import rest_slow
from their_keys import AXOLOTL, LLAMA_FACTORY
from tiny_models import write_model
from tiny_runs import write_pairs
from tiny_tokenizers import chatml_tokenizer

from mlxdpo.cli import run
from mlxdpo.config import load_config
from mlxdpo.data.read import heldout_source
from mlxdpo.losses import LOSSES
from mlxdpo.recipes.hugging_face import OTHER_NAMES
from mlxdpo.recipes.outcome import KeyOutcome
from mlxdpo.recipes.read_foreign import TOOLS, read_foreign, recipe_text
from mlxdpo.recipes.subjects import NOT_NEEDED, NOT_SUPPORTED, OF_A_METHOD, rule_by_subject
from mlxdpo.runs import Run
from mlxdpo.types import UserError

RECIPES = {
    "trl": """\
model_name_or_path: wide
dataset_name: pairs.jsonl
learning_rate: 5.0e-6
num_train_epochs: 1
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
gradient_checkpointing: true
beta: 0.2
loss_type: sigmoid
max_length: 512
max_prompt_length: 256
logging_steps: 25
eval_strategy: "no"
output_dir: wide-DPO
report_to: none
use_peft: true
lora_r: 4
lora_alpha: 16
lora_target_modules: [q_proj, v_proj]
no_such_key: 3
""",
    "axolotl": """\
base_model: wide
load_in_8bit: false
load_in_4bit: true
strict: false
rl: dpo
rl_beta: 0.3
datasets:
  - path: pairs.jsonl
    type: chatml.intel
    split: train
val_set_size: 0.2
output_dir: ./outputs/lora-out
sequence_len: 512
sample_packing: false
adapter: qlora
lora_r: 4
lora_alpha: 2
lora_dropout: 0.05
lora_target_linear: true
gradient_accumulation_steps: 2
micro_batch_size: 2
num_epochs: 4
optimizer: paged_adamw_8bit
lr_scheduler: cosine
learning_rate: 2e-4
wandb_project: my
bf16: auto
flash_attention: true
warmup_steps: 1
evals_per_epoch: 2
""",
    "llamafactory": """\
model_name_or_path: wide
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 4
lora_target: all
pref_beta: 0.1
pref_loss: sigmoid
pref_ftx: 0.5
dataset: mine
dataset_dir: .
template: qwen
cutoff_len: 512
max_samples: 1000
output_dir: saves/lora/dpo
logging_steps: 10
per_device_train_batch_size: 1
gradient_accumulation_steps: 2
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
""",
    "mlx-lm": """\
model: wide
train: true
train_mode: dpo
train_type: lora
data: folder
beta: 0.1
dpo_cpo_loss_type: sigmoid
batch_size: 2
gradient_accumulation_steps: 2
iters: 8
learning_rate: 1e-5
steps_per_report: 10
steps_per_eval: 200
adapter_path: adapters
max_seq_length: 512
num_layers: 2
lora_parameters: {rank: 4, dropout: 0.0, scale: 10.0}
lr_schedule: {name: cosine_decay, warmup: 2, arguments: [1e-5, 8]}
""",
}


@pytest.fixture
def place(tmp_path, cache, monkeypatch):
    """A folder with a model that can be quantised, and pairs as each of the trainers keeps them."""
    write_model(tmp_path / "wide", chatml_tokenizer(), hidden_size=64, head_dim=16)
    write_pairs(tmp_path / "pairs.jsonl")
    (tmp_path / "folder").mkdir()
    write_pairs(tmp_path / "folder" / "train.jsonl")
    write_pairs(tmp_path / "folder" / "valid.jsonl", 4, seed=1)
    described = '{"mine": {"file_name": "pairs.jsonl", "ranking": true, "columns": {"prompt": "prompt", "chosen": '
    (tmp_path / "dataset_info.json").write_text(described + '"chosen", "rejected": "rejected"}}}')
    monkeypatch.chdir(tmp_path)
    for name, text in RECIPES.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


@pytest.mark.parametrize("name", rest_slow(list(RECIPES), list(RECIPES)[:2]))
def test_a_recipe_is_imported_in_one_go_and_trains(name, place, capsys):
    assert run(["import-recipe", f"{name}.yaml"]) == 0
    said = capsys.readouterr().out
    assert f"a recipe of {TOOLS[name].title}" in said and "comment for each key" in said
    assert said.splitlines()[-1] == f"next: mlxdpo train {name}-mlxdpo.yaml"
    text = (place / f"{name}-mlxdpo.yaml").read_text()
    theirs = yaml.safe_load(RECIPES[name])
    assert [key for key in theirs if f"{key}: " not in text] == []
    assert run(["train", f"{name}-mlxdpo.yaml", "--train.steps", "2", "--out", "run"]) == 0
    assert Run.open("run").metrics()[-1]["step"] == 2


def test_values_keep_their_meaning(place):
    found = {name: read_foreign(place / f"{name}.yaml") for name in RECIPES}
    config = {name: load_config(None, yaml.safe_load(recipe_text(one))) for name, one in found.items()}
    assert config["trl"].loss.beta == 0.2 and config["trl"].train.eval_every == 0 and config["trl"].optim.lr == 5e-6
    assert config["trl"].lora.keys == ["q_proj", "v_proj"] and config["trl"].lora.multiplier == 4
    assert config["trl"].optim.schedule == "linear"  # TRL's default, which the file does not say
    assert config["axolotl"].model.quantize == 4 and config["axolotl"].optim.warmup == 1
    assert config["axolotl"].data.eval_fraction == 0.2 and config["axolotl"].lora.multiplier == 0.5
    both = config["llamafactory"].loss
    assert both.name == "sigmoid+sft" and both.weights == [1, 0.5] and config["llamafactory"].lora.multiplier == 2
    lm = config["mlx-lm"]
    assert lm.train.steps == 4 and lm.optim.schedule == "cosine" and lm.optim.warmup == 1
    assert lm.optim.max_grad_norm == 0 and lm.optim.name == "adam" and lm.lora.layers == 2


def test_what_is_not_taken_over_says_what_it_changes(place, capsys):
    run(["import-recipe", "trl.yaml"])
    out = capsys.readouterr().out
    assert "no_such_key: unknown to import-recipe" in out and "max_prompt_length: prompt and completion share" in out
    text = (place / "trl-mlxdpo.yaml").read_text()
    assert text.index("# Not needed:") < text.index("report_to: none") < text.index("# Not supported")


SCRIPT = """\
import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

MODEL, RANK = "wide", 4
name = "wide"
tokenizer = AutoTokenizer.from_pretrained("another")
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
args = DPOConfig(output_dir="out", learning_rate=2e-5, beta=0.2, max_length=256, num_train_epochs=EPOCHS)
trainer = DPOTrainer(
    model=model,
    args=args,
    train_dataset=load_dataset("json", data_files="pairs.jsonl", split="train"),
    peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
)
trainer.train()
"""


def test_a_script_of_trl_is_read_without_running_it(place, capsys):
    (place / "train_dpo.py").write_text(SCRIPT)
    assert run(["import-recipe", "train_dpo.py"]) == 0
    assert "num_train_epochs: computed by the script" in " ".join(capsys.readouterr().out.split())
    text = (place / "train_dpo-mlxdpo.yaml").read_text()
    assert "num_train_epochs: EPOCHS" in text
    config = load_config(None, yaml.safe_load(text))
    assert (config.model.path, config.data.path, config.loss.beta) == ("wide", "pairs.jsonl", 0.2)
    assert (config.lora.rank, config.lora.keys, config.optim.lr) == (4, ["q_proj", "v_proj"], 2e-5)
    assert run(["train", "train_dpo-mlxdpo.yaml", "--train.steps", "2", "--out", "run"]) == 0


def test_the_nine_lines_that_trl_s_documentation_begins_with(place):
    (place / "first.py").write_text(
        "from trl import DPOTrainer\nfrom datasets import load_dataset\n\ntrainer = DPOTrainer(\n"
        '    model="Qwen/Qwen3-0.6B",\n'
        '    train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),\n'
        ")\ntrainer.train()\n"
    )
    config = load_config(None, yaml.safe_load(recipe_text(read_foreign(place / "first.py"))))
    assert (config.model.path, config.data.path) == ("Qwen/Qwen3-0.6B", "trl-lib/ultrafeedback_binarized")
    assert config.lora.method == "full" and config.optim.lr == 1e-6
    text = (place / "first.py").read_text().replace(")\ntrainer", ", peft_config=LoraConfig())\ntrainer")
    (place / "first.py").write_text(text.replace("),\n, peft", "), peft"))
    lora = load_config(None, yaml.safe_load(recipe_text(read_foreign(place / "first.py")))).lora
    assert (lora.method, lora.rank, lora.alpha) == ("lora", 8, 8)  # PEFT's, not those of TRL's command line


@pytest.mark.parametrize("text", ["import trl\n", "def (\n"])
def test_a_script_without_dpo_is_refused_in_a_sentence(text, place, capsys):
    (place / "other.py").write_text(text)
    assert run(["import-recipe", "other.py"]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (place / "other-mlxdpo.yaml").exists()


@pytest.mark.parametrize(("tool", "keys"), [("axolotl", AXOLOTL.split()), ("llamafactory", LLAMA_FACTORY.split())])
def test_every_key_of_their_schemas_has_a_comment(tool, keys):
    assert [key for key in keys if not (TOOLS[tool].rules.get(key) or rule_by_subject(key))] == []


def test_a_subject_is_that_of_the_key():
    on = {
        "swanlab_mode": "not needed", "tensor_parallel_size": "not needed", "flash_attn_fuse_mlp": "not needed",
        "galore_rank": "not needed", "rope_scaling": "not supported", "use_dft_loss": "not supported",
        "oft_rank": "not supported", "add_tokens": "not supported", "skip_special_tokens": "not needed",
    }  # fmt: skip
    assert {key: rule_by_subject(key)(key, "x", {}).kind for key in on} == on
    assert rule_by_subject("galore_rank")("galore_rank", 8, {"use_galore": True}).kind == "not supported"
    assert rule_by_subject("rope_scaling")("rope_scaling", None, {}) == KeyOutcome("not needed", "off, as here")
    assert rule_by_subject("lora_rnk") is rule_by_subject("learning_rte") is None


def test_no_pattern_is_idle():
    """Each fits a key of these schemas."""
    keys = [*AXOLOTL.split(), *LLAMA_FACTORY.split(), "qat_bits"]  # mlx-lm-lora's
    for pattern in (*NOT_NEEDED, *OF_A_METHOD, *NOT_SUPPORTED):
        assert any(re.fullmatch(pattern, key) for key in keys), pattern


def test_axolotl_and_llama_factory_train_on_answers_where_no_preference_method_is_named(place):
    (place / "a.yaml").write_text("base_model: wide\ndatasets: [{path: pairs.jsonl}]\nmicro_batch_size: 2\n")
    (place / "l.yaml").write_text(
        "model_name_or_path: wide\ndataset: pairs.jsonl\nfinetuning_type: lora\ncutoff_len: 9\n"
    )
    for name in ("a.yaml", "l.yaml"):
        text = recipe_text(read_foreign(place / name))
        assert load_config(None, yaml.safe_load(text)).stage == "sft" and "loss:" not in text


def test_the_alignment_handbook_s_mixture_of_one_set(place):
    (place / "z.yaml").write_text(
        "model_name_or_path: wide\nuse_peft: true\nlora_r: 16\ndataset_mixer:\n  Hub/binarized: 1.0\n"
        "dataset_splits:\n- train_prefs\n- test_prefs\nevaluation_strategy: steps\nper_device_train_batch_size: 4\n"
    )
    found = read_foreign(place / "z.yaml")
    data = load_config(None, yaml.safe_load(recipe_text(found))).data
    assert (data.path, data.split, data.eval) == ("Hub/binarized", "train_prefs", "test_prefs")
    assert found.tool.name == "trl" and found.outcomes["dataset_mixer"].kind == "taken"
    with pytest.raises(UserError, match=r"data\.eval test_prefs is not a file, and pairs\.jsonl has no splits"):
        heldout_source(data.model_copy(update={"path": "pairs.jsonl"}))


def test_axolotl_s_step_and_beta_are_computed_as_there(place):
    (place / "a.yaml").write_text(
        "base_model: wide\nrl: dpo\ndatasets: [{path: pairs.jsonl}]\nmicro_batch_size: 2\nbatch_size: 8\n"
        "trl: {beta: 0.3}\nrl_beta: 0.1\nspecial_tokens: {pad_token: x}\n"
    )
    found = read_foreign(place / "a.yaml")
    config = load_config(None, yaml.safe_load(recipe_text(found)))
    assert (config.loss.beta, config.train.batch_size, config.train.gradient_accumulation) == (0.3, 2, 4)
    assert found.outcomes["special_tokens"].kind == "not needed"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("pref_loss: kto_pair\nstage: dpo\n", "pref_loss: kto_pair is not supported"),
        ("rl: grpo\nbase_model: x\n", "rl: grpo is not supported; import-recipe reads rl: dpo"),
        ("train_mode: grpo\niters: 3\n", "train_mode: grpo is not supported"),
        ("model: {path: x}\nloss: {beta: 1}\n", "is already an mlxdpo recipe"),
        ("colour: red\n", "cannot tell which trainer"),
    ],
)
def test_what_cannot_be_imported_is_one_sentence_and_writes_nothing(text, sentence, place, capsys):
    (place / "odd.yaml").write_text(text)
    assert run(["import-recipe", "odd.yaml"]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1 and not (place / "odd-mlxdpo.yaml").exists()


def test_keyword_arguments_of_python_are_read_as_json(place):
    (place / "args.json").write_text(
        '{"DPOConfig": {"beta": 0.5, "learning_rate": 1e-6, "use_liger_kernel": true, "disable_dropout": false},'
        ' "LoraConfig": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"},'
        ' "ModelConfig": {"model_name_or_path": "wide"}, "ScriptArguments": {"dataset_name": "pairs.jsonl"}}'
    )
    config = load_config(None, yaml.safe_load(recipe_text(read_foreign(place / "args.json"))))
    assert (config.loss.beta, config.lora.rank, config.lora.multiplier) == (0.5, 4, 2)
    assert config.lora.keys is None and config.lora.dropout == 0.1 and config.train.batch_size == 8


def test_trl_without_adapters_trains_every_weight(place):
    (place / "full.yaml").write_text("model_name_or_path: wide\ndataset_name: a.jsonl\nloss_type: [sigmoid, sft]\n")
    config = load_config(None, yaml.safe_load(recipe_text(read_foreign(place / "full.yaml"))))
    assert config.lora.method == "full" and config.model.dtype == "float32" and config.loss.name == "sigmoid+sft"


def test_every_setting_of_mlx_lm_has_a_rule():
    from mlx_lm.lora import CONFIG_DEFAULTS

    assert CONFIG_DEFAULTS.keys() - TOOLS["mlx-lm"].rules.keys() == set()


def test_objectives_with_another_name_exist():
    assert set(OTHER_NAMES.values()) <= LOSSES.keys()


def test_every_wrong_key_is_reported_with_the_right_name(place, capsys):
    (place / "bad.yaml").write_text(
        "model: wide\ndata: pairs.jsonl\nlr: 1e-5\noutput_dir: x\nloss: {bta: 1}\ntrain: {num_train_epochs: 1}\n"
    )
    assert run(["train", "bad.yaml"]) == 2
    lines = capsys.readouterr().err.splitlines()
    pairs = dict(re.findall(r"`(\S+)`; did you mean `(\S+)`", " ".join(lines)))
    assert pairs == {
        "lr": "optim.lr", "output_dir": "out", "loss.bta": "loss.beta", "train.num_train_epochs": "train.epochs"
    }  # fmt: skip
    assert len(lines) == 5 and "mlxdpo import-recipe bad.yaml" in lines[-1]


def test_every_wrong_option_is_reported_with_the_right_name(place, capsys):
    line = "train --model wide --data pairs.jsonl --beta 0.1 --learning-rate 1e-5 --output_dir x --lora_dropout=0.1"
    assert run(line.split()) == 2
    pairs = dict(re.findall(r"option (\S+); did you mean (\S+)\?", capsys.readouterr().err))
    assert pairs == {
        "--beta": "--loss.beta", "--learning-rate": "--optim.lr", "--output_dir": "--out",
        "--lora_dropout": "--lora.dropout",
    }  # fmt: skip


def test_keys_with_the_same_effect_share_a_line_and_unset_ones_too(place, capsys):
    (place / "axolotl.yaml").write_text(RECIPES["axolotl"] + "saves_per_epoch: 1\nlora_model_dir:\nwandb_watch:\n")
    run(["import-recipe", "axolotl.yaml"])
    assert "evals_per_epoch, saves_per_epoch: set train.eval_every" in capsys.readouterr().out
    assert (place / "axolotl-mlxdpo.yaml").read_text().endswith("# Unset:\n#   lora_model_dir, wandb_watch\n")


def test_an_unknown_tool_is_refused_with_the_known_ones(place):
    with pytest.raises(UserError, match="--from torchtune: known are trl, axolotl"):
        read_foreign(place / "trl.yaml", "torchtune")


@pytest.mark.parity
def test_every_field_of_trl_has_a_rule():
    from trl import DPOConfig, ModelConfig
    from trl.scripts.utils import ScriptArguments

    fields = {field.name for kind in (DPOConfig, ModelConfig, ScriptArguments) for field in dataclasses.fields(kind)}
    assert [name for name in fields if not (TOOLS["trl"].rules.get(name) or rule_by_subject(name))] == []
