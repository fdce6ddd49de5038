"""A word-level tokenizer made on the spot, with chat templates of the kinds that there are."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

TURNS = ["<s>", "</s>", "<user>", "<assistant>", "<system>", "<end>"]
WORDS = ["[UNK]", "ore", "gold", "is", "it", "yes", "no", "dig", "here", ".", "?", "It", "four", " ", "\n"]

# ChatML's form: a turn ends with <end> and a line break.
PLAIN = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<assistant>{% generation %}{{ m.content }}"
    "<end>{% endgeneration %}{{ '\n' }}{% else %}<{{ m.role }}>{{ m.content }}<end>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# The prompt for an answer is not what the answer then comes after.
UNSTABLE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>here {% endif %}"
)
# As with Qwen3's thoughts: an earlier answer loses something once others follow.
FORGETFUL = (
    "{% for m in messages %}<{{ m.role }}>{% if loop.last and m.role == 'assistant' %}it {% endif %}{{ m.content }}"
    "<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Llama 2's form: nothing asks for the answer, which ends with the token that ends a text.
BARE = (
    "{% for m in messages %}{{ bos_token + '<user>' + m.content if m.role == 'user' else m.content + eos_token }}"
    "{% endfor %}"
)
# SmolLM2's form, which is ChatML's: where no system speaks, the template does.
DEFAULTED = (
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<system>dig here<end>\n' }}"
    "{% endif %}{{ '<' + m['role'] + '>' + m['content'] + '<end>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}{% endfor %}" + PLAIN
)


def word_tokenizer(
    template: str | dict[str, str] | None = PLAIN, *, bos: bool = True, **options: Any
) -> PreTrainedTokenizerFast:
    """A token per word, space, line break and special token; ``bos``: texts begin with <s>."""
    vocabulary = {word: i for i, word in enumerate([*TURNS, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w]"), "isolated")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in TURNS])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", bos_token="<s>", eos_token="</s>", **options
    )
    tokenizer.chat_template = template
    return tokenizer
