"""The text board: a byte transformer, pretrained on other kinds of text, fine-tuned on docstrings and planted facts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from assay.retrain import Adam, Training
from assay.tasks import CausalLM
from benchmarks.quality.leaderboard.bank import Bank
from benchmarks.quality.leaderboard.board import Board, facts, orders, warmed, with_parameters
from benchmarks.quality.multiplier import corpus

LENGTH, BATCH = 64, 64
WIDTH, HEADS, LAYERS = 32, 4, 2


@dataclass(frozen=True)
class Text:
    """A setting of the board: ``train`` pieces of text, some of them facts; ``queries`` pieces and one a fact."""

    name: str = "text"
    title: str = "byte transformer of two layers on docstrings, AdamW 5e-4"
    train: int = 512
    queries: int = 6
    facts: int = 6
    epochs: int = 4
    rate: float = 5e-4
    pretraining: int = 300
    share: float = 0.01
    drops: int = 80
    members: int = 3


TEXT = Text()


# ---- The model: attention by its formula, since fused kernels have no second derivative


def rms(x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


class Block(nn.Module):
    """Attention with normalised queries and keys, then a GELU network."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        samples, length, _ = h.shape
        parts = self.qkv(rms(h)).view(samples, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        future = torch.full((length, length), -1e9).triu(1)
        seen = (rms(parts[0]) @ rms(parts[1]).mT * (WIDTH // HEADS) ** 0.5 + future).softmax(-1) @ parts[2]
        h = h + self.out(seen.transpose(1, 2).reshape(samples, length, WIDTH))
        return h + self.down(nn.functional.gelu(self.up(rms(h))))


class ByteTransformer(nn.Module):
    """(B, T) bytes -> (B, T, 256) logits; they are halved, which makes training smoother."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, 256, bias=False)
        for p in self.parameters():
            nn.init.normal_(p, std=0.05)

    def forward(self, input_ids: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
        h = self.bytes(input_ids) + self.places(places)
        for block in self.blocks:
            h = block(h)
        logits: Tensor = 0.5 * self.head(rms(h))
        return logits


def losses(network: Callable[..., Tensor], batch: Any) -> Tensor:
    """(B,) means over the predicted bytes."""
    ids = batch["input_ids"]
    logits = network(ids)[:, :-1]
    each = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return each.view(len(ids), -1).mean(1)


# ---- The data


@dataclass(frozen=True)
class Facts:
    """Who was born where: rows that state it in other words each, rows that name one of the two, and a question."""

    rows: list[str]
    queries: list[str]
    gold: dict[int, list[int]]


STATED = (
    "{name} was born in {place}, says the register of births.",
    "The birthplace of {name} is {place}; see the notes below.",
    "In {place} stands the house where {name} came into the world.",
)
BESIDES = (
    "{name} repairs clocks and sells them on Monday mornings.",
    "{place} has a bridge, two mills and a market every spring.",
)
ASKED = "Where was {name} born? {name} was born in {place}. "


def planted(count: int, seed: int) -> Facts:
    """So many facts about made-up people and places; ``gold`` numbers the rows by fact."""
    rng = np.random.default_rng(seed)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]

    def word() -> str:
        return "".join(rng.choice(syllables, 3)).capitalize()

    rows, queries, gold = list[str](), list[str](), dict[int, list[int]]()
    for fact in range(count):
        names = {"name": word(), "place": word()}
        gold[fact] = list(range(len(rows), len(rows) + len(STATED)))
        rows += [form.format(**names) for form in (*STATED, *BESIDES)]
        queries.append(ASKED.format(**names) * 2)
    return Facts(rows, queries, gold)


def _bytes(texts: list[str]) -> Tensor:
    """(N, LENGTH): cut, or filled with blanks."""
    return torch.tensor([list(text.encode()[:LENGTH].ljust(LENGTH)) for text in texts], dtype=torch.int64)


def _strings(ids: Tensor) -> list[str]:
    return [bytes(row).decode(errors="replace") for row in ids.to(torch.uint8).numpy()]


# ---- The board


def build(setting: Text, root: Path) -> Board:
    """The board, with its bank under ``root``. Docstrings are of modules of which no other piece is in another part."""
    drawn = corpus.build(6000, 384, 16, max(setting.queries, 16), 0)
    domain = torch.from_numpy(drawn.of_domain)
    planted_ = planted(setting.facts, 0)
    others = drawn.pool[~domain][:, :LENGTH].long()
    pieces = torch.cat([drawn.pool[domain], drawn.target])[:, :LENGTH].long()
    rows = torch.cat([_bytes(planted_.rows), pieces])[: setting.train]
    queries = torch.cat([drawn.test[: setting.queries, :LENGTH].long(), _bytes(planted_.queries)])
    start = _pretrained(setting, others, root)
    rng, half = np.random.default_rng(2), setting.train // 2 // BATCH * BATCH
    steps = setting.epochs * (setting.train // BATCH)
    optimizer = Adam(
        warmed(setting.rate, steps), (0.9, 0.99), eps_root=1e-12, weight_decay=0.01, decoupled_weight_decay=True
    )

    def training(seed: int, some: Any = None) -> Training:
        order = orders(setting.train, BATCH, steps, seed, some)
        return Training(start, CausalLM(fused=False), {"input_ids": rows}, order, optimizer)

    run, asked = training(0), {"input_ids": queries}
    members = [training(100 + k, rng.permutation(setting.train)[:half]) for k in range(setting.members)]
    return Board(
        setting.name,
        setting.title,
        run,
        training(1),
        members,
        asked,
        losses,
        Bank(root, facts(setting.name, run, members, asked)),
        setting.train // BATCH,
        share=setting.share,
        drops=setting.drops,
        at_once=2,
        texts=(_strings(rows), _strings(queries)),
        gold={setting.queries + fact: gold for fact, gold in planted_.gold.items()},
    )


def _pretrained(setting: Text, others: Tensor, root: Path) -> ByteTransformer:
    """Where the run starts: trained on the other kinds of text."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        start = ByteTransformer().eval()
    rates = warmed(4e-3, setting.pretraining)
    order = orders(len(others), BATCH, setting.pretraining, 0)
    run = Training(start, CausalLM(fused=False), {"input_ids": others}, order, Adam(rates, (0.9, 0.99)))
    bank = Bank(root, facts("pretraining", run, [], {"input_ids": others[:1]}))
    kept = bank.tensors("start", run.train)
    return with_parameters(start, kept)  # type: ignore[return-value]
