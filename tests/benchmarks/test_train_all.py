"""The program that trains every architecture of mlx-lm's tests, on a file of tests like theirs."""

import pytest

from benchmarks.models.train_all import main

TESTS = """
import importlib, unittest

CONFIGS = [
    {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32,
     "num_attention_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 32},
    {"model_type": "gpt_neox", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
     "vocab_size": 12, "max_position_embeddings": 64, "layer_norm_eps": 1e-5, "layer_norm_epsilon": 1e-5,
     "rotary_emb_base": 10000, "rotary_pct": 0.25, "use_parallel_residual": True},
]

class TestModels(unittest.TestCase):
    def test_all_models(self):
        for config in CONFIGS:
            arch = importlib.import_module("mlx_lm.models." + config["model_type"])
            model = arch.Model(arch.ModelArgs.from_dict(config))
            self.model_test_runner(model, config["model_type"], config["vocab_size"], 2)

    def test_something_else(self):
        raise AssertionError("is not asked")
"""


@pytest.mark.parametrize("kinds", [[], ["llama"]])
def test_each_is_trained_or_gets_a_sentence(tmp_path, cache, capsys, kinds):
    (tmp_path / "test_models.py").write_text(TESTS)
    assert main([str(tmp_path / "test_models.py"), *kinds]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "llama: trained" in lines
    refused = [line for line in lines if line.startswith("gpt_neox: refused (")]
    assert lines[-1] == ("1 trained, 1 refused" if not kinds else "1 trained") and len(refused) == (not kinds)
