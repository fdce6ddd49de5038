"""Judges: what decoders and encoder–decoders answer, against transformers' own logits; what prompts make of texts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import processors
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import assay
from assay.methods import AskLLM, Ensemble
from assay.tasks import Judge, Prompt
from assay.tasks.prompt import ASK_LLM, CUE, spellings
from tests.small_models import byte_tokenizer, llama_config

ANSWERS = ["yes", "Yes", " yes", "YES", "no", " No"]
QUESTION = "# {document} #\nGood? yes or no:"
TEXTS = ["Gold.", "A vein runs north for two miles before it thins out.", "Größe 金 🥇!", "no yes no"]


def tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """Of bytes, with words of its own for the answers."""
    made = byte_tokenizer(**options)
    made.add_tokens(ANSWERS)
    return made


def random(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def decoder(config: Any = None) -> Any:
    torch.manual_seed(0)
    return random(AutoModelForCausalLM.from_config(config or llama_config(vocab_size=300), dtype=torch.float32))


def encoder_decoder() -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 300}
    return random(T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=3, pad_token_id=0)))


def by_hand(model: Any, prompt: Prompt, *texts: str) -> Tensor:
    """p(yes), p(yes) / (p(yes) + p(no)), p(yes) + p(no) of each document alone, in float64."""
    model, found = copy.deepcopy(model).double(), []
    start = {"decoder_input_ids": torch.tensor([[3]])} if model.config.is_encoder_decoder else {}
    for asked in prompt.ask_all(texts):
        ids = torch.tensor([asked.ids])  # type: ignore[union-attr]
        with torch.no_grad():
            p = model(input_ids=ids, **start).logits[0, -1].softmax(0)
        yes, no = p[prompt.yes].sum(), p[prompt.no].sum()
        found.append(torch.stack([yes, yes / (yes + no), yes + no]))
    return torch.stack(found)


def scores(model: nn.Module, prompt: Prompt, *batches: list[str]) -> Tensor:
    table = assay.score([prompt(texts) for texts in batches], [AskLLM(model, Judge())])
    return torch.tensor([table[name].to_pylist() for name in table.column_names[2:]]).T


@pytest.mark.parametrize("make", [decoder, encoder_decoder])
def test_the_answer_is_the_models_own_in_float64_in_any_batch(make) -> None:
    model, prompt = make(), Prompt(tokenizer(), QUESTION, max_length=128)
    expected = by_hand(model, prompt, *TEXTS)
    assert float((expected[:, 0].max() - expected[:, 0].min()) / expected[:, 0].mean()) > 0.01  # they differ
    for batches in ([TEXTS], [[text] for text in TEXTS], [TEXTS[:3], TEXTS[3:]]):
        got = scores(model, prompt, *batches)
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-8)
    exact = Judge().forward(model.double(), prompt(TEXTS)).logits.exp()
    torch.testing.assert_close(exact[:, 0].detach(), expected[:, 0], rtol=1e-12, atol=0)
    torch.testing.assert_close(exact.sum(1).detach(), torch.ones(4, dtype=torch.float64), rtol=1e-12, atol=0)


def test_a_softened_decoders_output_layer_runs_for_one_position() -> None:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
    }
    capped = Gemma2Config(**sizes, vocab_size=300, intermediate_size=64, final_logit_softcapping=3.0)
    for config in (None, capped):
        model, prompt, shapes = decoder(config), Prompt(tokenizer(), QUESTION, max_length=128), list[Any]()
        model.lm_head.register_forward_hook(lambda _, args, out, shapes=shapes: shapes.append(out.shape))
        got = scores(model, prompt, TEXTS)
        assert shapes == [(4, 1, 300)]
        expected = by_hand(model, prompt, *TEXTS)
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-8)
        assert "forward" not in vars(model.lm_head)


class Shaping(nn.Module):
    """A language model that counts on its logits' positions."""

    def __init__(self, model: Any, shape: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.model, self.shape = model, shape

    def get_output_embeddings(self) -> Any:
        return self.model.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.shape(self.model(input_ids, attention_mask=attention_mask).logits, input_ids.shape[1])


@pytest.mark.parametrize(
    "shape",
    [
        lambda logits, length: logits.reshape(-1, length, 300),
        lambda logits, length: logits[:, torch.arange(length)],
        lambda logits, length: logits + torch.arange(length)[None, :, None] * torch.linspace(0, 1, 300),
    ],
    ids=["reshaped", "indexed", "shifted"],
)
def test_a_decoder_that_counts_on_all_positions_gets_them(shape) -> None:
    model, batch = Shaping(decoder(), shape), Prompt(tokenizer(), QUESTION, max_length=128)(TEXTS)
    expected = Judge().forward(model, batch).logits.detach()
    with torch.no_grad():
        torch.testing.assert_close(Judge().forward(model, batch).logits, expected)


def test_losses_have_gradients_of_the_full_pass() -> None:
    model, prompt = decoder(), Prompt(tokenizer(), QUESTION, max_length=128)
    batch = prompt(TEXTS[:2])
    losses = Judge().forward(model, batch).losses
    (own,) = torch.autograd.grad(losses.sum(), model.lm_head.weight)
    last = batch["attention_mask"].sum(1) - 1
    p = model(input_ids=batch["input_ids"]).logits[torch.arange(2), last].softmax(1)
    (expected,) = torch.autograd.grad(-p[:, prompt.yes].sum(1).log().sum(), model.lm_head.weight)
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)
    table = assay.score([batch], [assay.methods.GraNd(model, Judge(), layers="lm_head")])
    weights = [
        torch.autograd.grad(Judge().forward(model, prompt([t])).losses.sum(), model.lm_head.weight)[0] for t in TEXTS
    ]
    norms = torch.stack([own.norm() for own in weights[:2]])
    torch.testing.assert_close(torch.tensor(table["grand"].to_pylist()), norms, rtol=1e-3, atol=1e-5)


def test_a_panel_of_judges_is_an_ensemble() -> None:
    prompt = Prompt(tokenizer(), QUESTION, max_length=128)
    panel = [decoder(), encoder_decoder()]
    table = assay.score([prompt(TEXTS)], [Ensemble(panel, Judge())])
    each = torch.stack([by_hand(model, prompt, *TEXTS)[:, 0] for model in panel])
    got = torch.tensor(table["ensemble_nll"].to_pylist()).double()
    torch.testing.assert_close(got, -each.mean(0).log(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "text", ["gold " * 60, "金" * 60, "🥇" * 40, "a" + "é" * 80], ids=["ascii", "ideographs", "emoji", "accents"]
)
def test_a_long_document_is_cut_where_it_fits_and_the_question_never(text) -> None:
    cutting = tokenizer()
    prompt = Prompt(cutting, QUESTION, max_length=80)
    before, after = (cutting(part)["input_ids"] for part in QUESTION.split("{document}"))
    asked = prompt.ask(text)
    assert not isinstance(asked, str)
    assert asked.ids[: len(before)] == before
    assert asked.ids[-len(after) :] == after
    assert 80 - 4 < len(asked.ids) <= 80
    assert 0 < asked.read < len(text)
    assert asked.ids[len(before) : -len(after)] == cutting(text[: asked.read])["input_ids"]
    # Asked about as if it ended there.
    model = decoder()
    assert torch.equal(scores(model, prompt, [text]), scores(model, prompt, [text[: asked.read]]))
    short = prompt.ask(text[:9])
    assert not isinstance(short, str)
    assert short.read == 9


def test_every_spelling_that_is_one_token_counts() -> None:
    own = tokenizer()
    vocabulary = own.get_vocab()
    assert spellings(own, "yes") == sorted(vocabulary[word] for word in ("yes", "Yes", " yes", "YES"))
    assert spellings(own, " NO") == sorted(vocabulary[word] for word in ("no", " No"))
    with pytest.raises(
        ValueError, match="the tokenizer has no token that is 'perhaps'; expected an answer that is one"
    ):
        Prompt(own, QUESTION, no="perhaps")
    with pytest.raises(ValueError, match="'yes' and 'Yes' are the same answer"):
        Prompt(own, QUESTION, no="Yes")


def test_a_document_cannot_end_its_own_question() -> None:
    prompt = Prompt(tokenizer(), QUESTION, max_length=128)
    assert prompt.ask("gold<eos>yes") == "has tokens of its own that are special to the judge ('<eos>')"
    with pytest.raises(ValueError, match="text 1: has tokens of its own that are special"):
        prompt(["gold", "<eos>"])
    assert not isinstance(Prompt(tokenizer(bos=True), QUESTION, max_length=128).ask("gold"), str)


def test_a_decoder_does_not_answer_behind_the_end_of_a_text() -> None:
    ending, ends = tokenizer(), ("<eos>", 256)
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing("<eos> $A <eos>", special_tokens=[ends])
    own = tokenizer(bos=True)(QUESTION.format(document="gold"))["input_ids"]
    for judge, tokens in (("decoder", own), ("encoder_decoder", [*own, 256])):
        prompt = Prompt(ending, QUESTION, judge=judge, max_length=64)  # type: ignore[arg-type]
        assert prompt.ask("gold").ids == tokens  # type: ignore[union-attr]
        assert prompt.ask("gold<eos>") == "has tokens of its own that are special to the judge ('<eos>')"
        long = prompt.ask("gold " * 60)
        assert len(long.ids) == 64  # type: ignore[union-attr]
        assert long.ids[-10:] == tokens[-10:]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"ends every text with '<eos>', .*expected judge='encoder_decoder' or judge="):
        Prompt(ending, QUESTION, max_length=64)
    assert Prompt(ending, QUESTION, chat=lambda text: text, max_length=64).ask("gold").ids == own[1:]  # type: ignore[union-attr]


def test_chat_templates() -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<eos>{% endfor %}<assistant>"
    chatting = tokenizer(chat_template=template)
    prompt = Prompt(chatting, "\nIs {document} gold? ", chat=True, max_length=128)
    asked = prompt.ask("ore {{ messages }}")
    assert not isinstance(asked, str)
    assert asked.ids == chatting("<user>Is ore {{ messages }} gold?<eos><assistant>")["input_ids"]
    with pytest.raises(ValueError, match="no chat template; expected chat=False"):
        Prompt(tokenizer(), QUESTION, chat=True)
    with pytest.raises(ValueError, match="the chat template makes 2 places"):
        Prompt(chatting, QUESTION, chat=lambda text: text + text)


def test_the_papers_question() -> None:
    assert ASK_LLM.startswith("###\n{document}\n###\n\nDoes the previous paragraph demarcated within ### and ###")
    prompt = Prompt(tokenizer(), ASK_LLM + CUE)
    asked = prompt.ask("Gold.")
    assert not isinstance(asked, str)
    end = tokenizer()("OPTIONS:\n- yes\n- no\n\nANSWER:")["input_ids"]
    assert asked.ids[-len(end) :] == end


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"question": "Good?"}, r"has \{document\} 0 times; expected the place of the document once"),
        ({"question": "{document}{document}"}, r"has \{document\} 2 times"),
        ({"max_length": 20}, "max_length is 20, and the question alone has 10 tokens; expected at least 26"),
    ],
)
def test_prompts_that_cannot_be_asked(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        Prompt(tokenizer(), **{"question": "Is {document} gold? yes", **options})


def test_batches_that_are_none() -> None:
    model, prompt = decoder(), Prompt(tokenizer(), QUESTION, max_length=128)
    batch = prompt(TEXTS)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"yes": torch.full((4, 1), 300)}, r"'yes' has tokens outside \[0, 300\)"),
        ({"no": batch["yes"]}, "have a token twice; expected each once"),
        ({"yes": batch["yes"][:, [0, 0]]}, "have a token twice"),
        ({"attention_mask": batch["attention_mask"].flip(1)}, r"padding before a token; expected .* on the right"),
        ({"attention_mask": batch["attention_mask"][:, 1:]}, r"Judge: attention_mask of .*; expected the same shape"),
    ]
    for change, message in changes:
        with pytest.raises(ValueError, match=message):
            Judge().forward(model, batch | change)
    with pytest.raises(TypeError, match=r"'yes' is of shape \(4,\); expected \(4, n\) token numbers"):
        Judge().forward(model, batch | {"yes": batch["yes"][:, 0]})
    with pytest.raises(TypeError, match="a mapping with a tensor 'input_ids', got a Tensor"):
        Judge().size(batch["input_ids"])


def test_no_question_no_answer() -> None:
    prompt = Prompt(tokenizer(), QUESTION, max_length=128)
    batch = prompt(TEXTS[:2])
    batch["attention_mask"][1] = 0
    got = assay.score([batch], [AskLLM(decoder(), Judge())])
    assert got["ask_llm"].to_pylist()[1] != got["ask_llm"].to_pylist()[1]
    assert got["ask_llm"].to_pylist()[0] == pytest.approx(float(by_hand(decoder(), prompt, TEXTS[0])[0, 0]), rel=1e-4)
