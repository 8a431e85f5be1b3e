"""A base model ends texts with one token and turns with another: everybody stops at both."""

import pytest
from tiny_models import write_model
from tiny_tokenizers import CHATML, GEMMA, HEADINGS, LLAMA2, LLAMA3, byte_level

from mlxdpo.config import ModelConfig
from mlxdpo.model.ends import end_tokens, turn_end
from mlxdpo.model.policy import load_policy

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>",
           "<start_of_turn>", "<end_of_turn>", "<s>", "</s>")  # fmt: skip


def tokenizer_with(template, eos="<|endoftext|>"):
    return byte_level(SPECIAL, template=template, eos=eos, bos="<s>")


@pytest.mark.parametrize(
    ("template", "end"),
    [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot_id|>"), (GEMMA, "<end_of_turn>"), (LLAMA2, "<|endoftext|>"),
     (HEADINGS, None), (None, None), ("{{ raise_exception('never') }}", None), ("{{ nothing.at.all }}", None)],
    ids=["chatml", "llama3", "gemma", "llama2", "headings", "none", "refusing", "broken"],
)  # fmt: skip
def test_the_end_of_a_turn(template, end):
    tokenizer = tokenizer_with(template)
    assert turn_end(tokenizer) == (end and tokenizer.convert_tokens_to_ids(end))


def test_ends_of_a_base_model(tmp_path, cache):
    """Training scored <|im_end|>, and sampling ran on after it: config.json knows <|endoftext|> alone."""
    tokenizer = tokenizer_with(CHATML)
    folder = write_model(tmp_path / "model", tokenizer)
    policy = load_policy(ModelConfig(path=str(folder)))
    want = frozenset(tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]))
    assert policy.eos_ids == want == frozenset(policy.tokenizer.eos_token_ids)


def test_all_that_files_name():
    tokenizer = tokenizer_with(CHATML)
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_tokens(tokenizer, {"eos_token_id": [7, 8]}) == {7, 8, turn}
    assert end_tokens(tokenizer, {"text_config": {"eos_token_id": 9}}) == {9, turn}
    assert end_tokens(tokenizer, {"eos_token_id": None}) == {tokenizer.eos_token_id, turn}
