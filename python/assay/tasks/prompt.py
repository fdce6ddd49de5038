"""A question about a document, as tokens: the document may be cut, the question never is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

PLACE = "{document}"
"""Where a question has its document."""

ASK_LLM = (
    "###\n{document}\n###\n\n"
    "Does the previous paragraph demarcated within ### and ### contain informative signal for pre-training a "
    "large-language model? An informative datapoint should be well-formatted, contain some usable knowledge of the "
    "world, and strictly NOT have any harmful, racist, sexist, etc. content.\n\n"
    "OPTIONS:\n- yes\n- no"
)
"""Ask-LLM's question (2402.09668, page 4)."""

CUE = "\n\nANSWER:"
"""What a model that only goes on with a text needs behind a question, for an answer to be what comes next."""

_ROOM = 16  # tokens that a document has at least: less says nothing of it


class Asked(NamedTuple):
    """A question as tokens, and how many characters of its document it has."""

    ids: list[int]
    read: int


class _Tokens(NamedTuple):
    """Token numbers, and which characters each is."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class Prompt:
    """Documents to batches of ``Judge``.

    A document that does not fit loses tokens from its end until it does, and is asked about as if it ended there; no
    part of the question is ever cut. A document in which the tokenizer finds special tokens (one that ends a text or a
    turn, say) is refused: it could end its own question.

    Args:
        tokenizer: of transformers, a fast one.
        question: has ``{document}`` once. A model without chat or instructions needs something at its end that an
            answer follows: ``ASK_LLM + CUE``.
        yes, no: the answers. All tokens that are one of them but for case and the space around it are counted; answers
            that are several tokens are not.
        chat: the question is what the user says, in the tokenizer's chat template, and the assistant's turn begins; a
            function puts it into a template itself.
        judge: what the batches are for. Of a tokenizer that ends texts with a token of its own this must be said, if
            there is no ``chat``: an ``encoder_decoder`` reads that token, and a ``decoder`` would answer behind it,
            where the text is over, so that it gets none.
        max_length: the most tokens of a question with its document.

    Attributes:
        yes, no: the tokens that are counted, ascending.

    Raises:
        ValueError: a question without one place for the document, or for which ``max_length`` has no room; an answer
            that is no single token; a tokenizer that has no template, or does not tell which characters a token is, or
            that ends texts, and no ``judge``.
    """

    def __init__(
        self,
        tokenizer: Any,
        question: str = ASK_LLM,
        yes: str = "yes",
        no: str = "no",
        *,
        chat: bool | Callable[[str], str] = False,
        judge: Literal["decoder", "encoder_decoder"] | None = None,
        max_length: int = 1024,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"Prompt: the tokenizer ({type(tokenizer).__name__}) does not tell which characters a token is; take "
                "one with a tokenizer.json"
            )
        check_question(question)
        render = chat if callable(chat) else _template(tokenizer) if chat else None
        self.question = question if render is None else render(question)
        if self.question.count(PLACE) != 1:
            raise ValueError(
                f"Prompt: the chat template makes {self.question.count(PLACE)} places of the document's one"
            )
        self._before, self._after = self.question.split(PLACE)
        self._tokenizer, self._max_length, self._ends = tokenizer, max_length, render is None
        self._behind = self._added_behind(judge)
        self._special = _special(tokenizer)
        self.yes, self.no = spellings(tokenizer, yes), spellings(tokenizer, no)
        if set(self.yes) & set(self.no):
            raise ValueError(f"Prompt: {yes!r} and {no!r} are the same answer; expected two")
        bare = self._tokens([""])[0]
        self._own = self._specials(bare.ids)
        if len(bare.ids) + _ROOM > max_length:
            raise ValueError(
                f"max_length is {max_length}, and the question alone has {len(bare.ids)} tokens; expected at least "
                f"{len(bare.ids) + _ROOM}"
            )

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Documents -> a batch of ``Judge``. ValueError for one that has special tokens, by its place."""
        asked = [self.ask(text) for text in texts]
        refused = [i for i, own in enumerate(asked) if isinstance(own, str)]
        if refused:
            raise ValueError(f"text {refused[0]}: {asked[refused[0]]}")
        return self.collate([own.ids for own in asked if not isinstance(own, str)])

    def collate(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Token numbers of B questions -> ``input_ids`` and ``attention_mask``, (B, T), ``yes`` and ``no``, (B, n)."""
        ids = torch.zeros(len(rows), max(map(len, rows), default=0), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.as_tensor(row)
            mask[i, : len(row)] = 1
        yes, no = (torch.tensor(own).repeat(len(rows), 1) for own in (self.yes, self.no))
        return {"input_ids": ids, "attention_mask": mask, "yes": yes, "no": no}

    def ask(self, text: str) -> Asked | str:
        """The question about a document, or why it cannot be asked."""
        return self.ask_all([text])[0]

    def ask_all(self, texts: Sequence[str]) -> list[Asked | str]:
        """``ask`` of each."""
        return [self._fitted(text, own) for text, own in zip(texts, self._tokens(texts), strict=True)]

    def _fitted(self, text: str, encoded: _Tokens) -> Asked | str:
        if found := self._specials(encoded.ids) - self._own:
            named = sorted(self._tokenizer.convert_ids_to_tokens(list(found)))
            return f"has tokens of its own that are special to the judge ({', '.join(map(repr, named))})"
        while (over := len(encoded.ids) - self._max_length) > 0:
            begin, end = len(self._before), len(self._before) + len(text)
            starts = [a for a, b in encoded.offsets if begin <= a < b <= end]
            cut = starts[-over] - begin if over <= len(starts) else 0
            text = text[: min(cut, len(text) - 1)]
            (encoded,) = self._tokens([text])
        return Asked(encoded.ids, len(text))

    def _specials(self, ids: Sequence[int]) -> Counter[int]:
        return Counter(i for i in ids if i in self._special)

    def _tokens(self, texts: Sequence[str]) -> list[_Tokens]:
        """Of each question, without what is added behind it and no judge reads."""
        cut = [(own, len(own.ids) - self._behind) for own in self._encoded(texts)]
        return [_Tokens(own.ids[:end], own.offsets[:end]) for own, end in cut]

    def _encoded(self, texts: Sequence[str]) -> list[Any]:
        whole = [f"{self._before}{text}{self._after}" for text in texts]
        encoded = self._tokenizer(whole, add_special_tokens=self._ends, return_offsets_mapping=True)
        return [encoded.encodings[i] for i in range(len(whole))]

    def _added_behind(self, judge: str | None) -> int:
        """How many tokens the tokenizer adds behind a question that are none of it."""
        (encoded,) = self._encoded([""])
        owners = encoded.sequence_ids[::-1]
        added = next((i for i, owner in enumerate(owners) if owner is not None), len(owners))
        if added and judge is None:
            end = self._tokenizer.convert_ids_to_tokens(encoded.ids[-1])
            raise ValueError(
                f"Prompt: the tokenizer ends every text with {end!r}, which an encoder–decoder reads, and behind which "
                "a decoder has nothing to answer; expected judge='encoder_decoder' or judge='decoder'"
            )
        return 0 if judge == "encoder_decoder" else added


def check_question(question: str) -> None:
    """ValueError unless a question has one place for its document."""
    if question.count(PLACE) != 1:
        raise ValueError(f"has {PLACE} {question.count(PLACE)} times; expected the place of the document once")


def spellings(tokenizer: Any, answer: str) -> list[int]:
    """The tokens that are an answer but for case and the space around it, ascending. ValueError if there is none."""
    special = _special(tokenizer)
    ids = sorted(i for i in set(tokenizer.get_vocab().values()) if i not in special)
    texts = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    wanted = answer.strip().casefold()
    found = [i for i, text in zip(ids, texts, strict=True) if wanted and text.strip().casefold() == wanted]
    if not found:
        raise ValueError(
            f"the tokenizer has no token that is {answer!r}; expected an answer that is one token, as yes and no are "
            "for most"
        )
    return found


def _special(tokenizer: Any) -> frozenset[int]:
    """Tokens that are no text; what stands for unknown text is, if it is nothing else."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    return frozenset(special - ({tokenizer.unk_token_id} - ends))


def _template(tokenizer: Any) -> Callable[[str], str]:
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("Prompt: the tokenizer has no chat template; expected chat=False")

    def render(question: str) -> str:
        messages = [{"role": "user", "content": question}]
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text

    return render
