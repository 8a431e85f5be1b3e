"""A model that writes plain words and little else: for what reads its answers. Random weights, 40 words, one end."""

from pathlib import Path

from tiny_models import write_model

WORDS = [
    *("good", "bad", "great", "awful", "happy", "sad", "lovely", "horrible", "nice", "poor", "the", "a", "cat", "dog"),
    *("house", "tree", "runs", "sleeps", "sings", "falls", "and", "or", "with", "of", "to", "in", "on", "by", "red"),
    *("blue", "green", "old", "new", "small", "big", "day", "night", "sun"),
]


def words_tokenizer():
    """One token per word; <end> is the end of an answer, <pad> stands for what is unknown."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<end>", "<pad>", *(f"▁{word}" for word in WORDS)]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    core.add_special_tokens([AddedToken(name, special=True) for name in names[:2]])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<end>", unk_token="<pad>", clean_up_tokenization_spaces=False
    )


def write_words(folder: Path, seed: int = 0) -> Path:
    """The model's folder."""
    tokenizer = words_tokenizer()
    return write_model(folder, tokenizer, seed=seed, vocab_size=len(tokenizer))
