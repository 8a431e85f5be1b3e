"""Tokenizers small enough to build in a test, with the habits of real families: a trap in each template."""

from __future__ import annotations

from typing import Any

# Merges across the borders that matter: a space and the next word, two newlines.
WORDS = (" blue", " red", " the", "user", "assistant", "ing", "er")

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Llama-3: writes BOS itself, trims, and prints the next header whether asked or not.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
    " + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
# Gemma: refuses a system turn, calls the assistant "model", writes a BOS that `encode` adds as well.
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim"
    " + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Qwen3: an empty thinking block in the last answer, and in the generation prompt when not thinking.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last and '</think>' not in m.content %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# Llama-2: a space before the end-of-sequence token; no header for the answer.
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Alpaca: headings, no end-of-turn token, newlines after the answer.
HEADINGS = (
    "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)


def byte_level(
    special: tuple[str, ...],
    *,
    template: str | None = None,
    eos: str | None,
    bos: str | None = None,
    emits_bos: bool = False,
    added: tuple[str, ...] = (),
) -> Any:
    """A byte-level BPE tokenizer (about 300 entries) that can write any text, with the given special tokens.

    `emits_bos`: encoding adds BOS by itself. `added`: added tokens that are not special.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary, merges = _merges()
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    # Newlines split off first, as in Llama-3 and Qwen; GPT-2's rule tears the last one of a run away.
    newlines = pre_tokenizers.Split(Regex(r"\s*[\r\n]+"), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([newlines, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(text, special=True) for text in special])
    core.add_tokens([AddedToken(text, normalized=False) for text in added])
    if emits_bos:
        ids = [(bos, core.token_to_id(bos))]
        core.post_processor = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = template
    return tokenizer


def _merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    from tokenizers import pre_tokenizers

    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in ("\u010a\u010a", *(word.replace(" ", "\u0120") for word in WORDS)):
        left = word[0]
        for letter in word[1:]:
            merges.append((left, letter))
            left += letter
            pieces.append(left)
    unique = list(dict.fromkeys(pieces))
    return {piece: i for i, piece in enumerate(unique)}, list(dict.fromkeys(merges))


def smollm_tokenizer() -> Any:
    """ChatML whose declared BOS is the header of every turn."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    return byte_level(special, template=CHATML, eos=special[2], bos=special[1])


def chatml_tokenizer() -> Any:
    """Special tokens <|endoftext|>, <|im_start|>, <|im_end|> (the EOS); no BOS."""
    return byte_level(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), template=CHATML, eos="<|im_end|>")


def llama3_tokenizer() -> Any:
    """Turns end in <|eot_id|> while the declared EOS is <|end_of_text|>."""
    special = (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    )
    return byte_level(special, template=LLAMA3, eos=special[1], bos=special[0], emits_bos=True)


def gemma_tokenizer() -> Any:
    """BOS from encoding and from the template; runs of newlines are added tokens that are not special."""
    special = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
    return byte_level(special, template=GEMMA, eos="<eos>", bos="<bos>", emits_bos=True, added=("\n\n\n",))


def thinking_tokenizer() -> Any:
    """ChatML with thinking blocks."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    return byte_level(special, template=THINKING, eos=special[2], added=("<think>", "</think>"))


def llama2_tokenizer() -> Any:
    """[INST] without special tokens; the answer ends in a space and </s>."""
    return byte_level(("<s>", "</s>"), template=LLAMA2, eos="</s>", bos="<s>", emits_bos=True)


def headings_tokenizer() -> Any:
    """A template that ends no turn; EOS has to be added."""
    return byte_level(("<|endoftext|>",), template=HEADINGS, eos="<|endoftext|>")


def base_tokenizer() -> Any:
    """No template; encoding adds a BOS."""
    return byte_level(("<s>", "</s>"), eos="</s>", bos="<s>", emits_bos=True)
