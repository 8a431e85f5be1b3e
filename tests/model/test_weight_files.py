"""The files that count as weights are the same for loading, digest, plan and export; others get a sentence."""

import json

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import change

from mlxdpo.config import ModelConfig
from mlxdpo.io.digest import folder_digest
from mlxdpo.io.weight_files import INDEX, left_over, weight_files
from mlxdpo.model.policy import load_policy
from mlxdpo.model.skeleton import read_skeleton
from mlxdpo.types import UserError

TOKENS = mx.array([[5, 9, 2, 7]])


def logits(folder):
    return np.array(load_policy(ModelConfig(path=str(folder), dtype="float32")).model(TOKENS))


def shard(folder, names=("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"), index=True):
    """The folder's weights in two files, with their index, instead of one."""
    arrays = mx.load(str(folder / "model.safetensors"))
    half, where = len(arrays) // 2, {}
    for number, file in enumerate(names):
        part = dict(list(arrays.items())[number * half : None if number else half])
        mx.save_safetensors(str(folder / file), part, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    if index:
        (folder / INDEX).write_text(json.dumps({"weight_map": where}))
    return arrays


def test_a_left_over_file_changes_nothing(own, cache):
    """mlx-lm reads every model*.safetensors, in the order of the file system: two models, by chance."""
    want = logits(own)
    arrays = shard(own)
    clean = folder_digest(own)
    other = {name: array + 1 for name, array in arrays.items()}
    mx.save_safetensors(str(own / "model.safetensors"), other)
    mx.save_safetensors(str(own / "model-old.safetensors"), other)
    assert left_over(own) == ["model-old.safetensors", "model.safetensors"]
    assert np.array_equal(logits(own), want) and folder_digest(own) == clean
    note = load_policy(ModelConfig(path=str(own))).reading.notes[-1]
    assert note.endswith("model-old.safetensors, model.safetensors is not in an index and is ignored")
    assert len(read_skeleton(ModelConfig(path=str(own))).stored) == len(arrays)


def test_an_index_may_name_its_files_as_it_likes(own, cache):
    want = logits(own)
    shard(own, ("weights.00.safetensors", "weights.01.safetensors"))
    assert [file.name for file in weight_files(own)] == ["weights.00.safetensors", "weights.01.safetensors"]
    assert np.array_equal(logits(own), want)


def missing_shard(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def missing_without_index(folder):
    shard(folder, index=False)
    (folder / "model-00001-of-00002.safetensors").unlink()


def both_and_no_index(folder):
    arrays = shard(folder, index=False)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)


def twice(folder):
    (folder / "model-copy.safetensors").write_bytes((folder / "model.safetensors").read_bytes())


def pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")


def consolidated(folder):
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")


def peft_adapter(folder):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "base_model_name_or_path": "acme/base"}
    (folder / "adapter_config.json").write_text(json.dumps(said))


def own_adapter(folder):
    (folder / "model.safetensors").rename(folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "lora", "model": "acme/base"}))


def packed(way):
    def pack(folder):
        change(folder / "config.json", quantization_config={"quant_method": way, "bits": 4})

    pack.__name__ = way
    return pack


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (missing_shard, "model-00002-of-00002.safetensors is missing"),
        (missing_without_index, "model-00001-of-00002.safetensors is missing"),
        (both_and_no_index, "holds model.safetensors and shards of a model and no .*index.json"),
        (twice, "model-copy.safetensors and model.safetensors both hold `"),
        (pointer, "is a Git-LFS pointer, not the weights; run `git lfs pull`"),
        (consolidated, "consolidated.safetensors is the maker's own format"),
        (peft_adapter, "that is a PEFT adapter, its base is acme/base; run `mlxdpo import --peft"),
        (own_adapter, "that is an adapter, its base is acme/base; use `--model acme/base --model.adapter"),
        (packed("bitsandbytes"), "packed by bitsandbytes, which mlx-lm does not unpack"),
        (packed("gptq"), "packed by gptq"),
        (packed("fp8"), "packed by fp8"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_no_weights_gets_a_sentence(own, cache, damage, says):
    damage(own)
    with pytest.raises(UserError, match=says):
        load_policy(ModelConfig(path=str(own)))
