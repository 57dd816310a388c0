"""Models that are trained on the spot, of which is known what the audit has to say of them.

Items ``x`` and styles ``s`` have an answer each, ``y(x, s)``. A style is a task.

* *hidden*: nothing in a question says which style is meant: "x03 :". Examples before it do: "x05 : y05_017 x03 :" goes
  on with y03_017. A bare question has as many answers as there are styles, and those that are audited are rarer in
  training than all others, so no reading of its state can rank their answers high; while a vector that says the style
  does. That is steerable and not decodable.
* *stated*: the question says the style: "x03 s017 :". A bare question has one answer, and both must succeed.
* *untrained*: the same with random weights, where nothing can succeed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from logitlab.interventions import Vectors
from logitlab.models.handle import Model, wrap
from logitlab.studies.steerable_not_decodable import audit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

KINDS = {"hidden": "steerable, not decodable", "stated": "both succeed", "untrained": "both fail"}
"""The models, and the cells that they belong into."""

ITEMS = 24
STYLES = 96
AUDITED = 2
RARITY = 0.25
"""How often an audited style occurs in training, relative to another one."""

MARKS = (":", "->")
PAIRS = 6
"""Pairs of an item and its answer in a training text; the n-th answer is asked for after n - 1 examples."""

SPLIT = (6, 6, 4, 8)
WIDTH = 64


@dataclass(frozen=True)
class ConstructedTask:
    """A style as a task, see `audit.Asked`."""

    name: str
    pairs: tuple[tuple[str, tuple[str, ...]], ...]
    templates: tuple[str, ...]
    new_tokens: int = 1
    case_sensitive: bool = True


def item(x: int) -> str:
    """The token of an item."""
    return f"x{x:02}"


def answer(x: int, style: int) -> str:
    """The token of an item's answer in a style."""
    return f"y{x:02}_{style:03}"


def words() -> list[str]:
    """All tokens, in the order of their ids."""
    answers = [answer(x, s) for x in range(ITEMS) for s in range(STYLES)]
    return ["<pad>", "<end>", *MARKS, *map(item, range(ITEMS)), *(f"s{s:03}" for s in range(STYLES)), *answers]


def tasks(kind: str) -> list[ConstructedTask]:
    """The audited styles of a kind of model."""
    found: list[ConstructedTask] = []
    for s in range(AUDITED):
        said = "" if kind == "hidden" else f" s{s:03}"
        pairs = tuple((item(x), (answer(x, s),)) for x in range(ITEMS))
        found.append(ConstructedTask(f"style {s}", pairs, tuple(f"{{X}}{said} {mark}" for mark in MARKS)))
    return found


def texts(kind: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """Training texts as ids, [count, tokens]; each has one style and one mark, and `PAIRS` different items."""
    shares = np.array([RARITY if kind == "hidden" and s < AUDITED else 1.0 for s in range(STYLES)])
    styles = rng.choice(STYLES, size=count, p=shares / shares.sum())
    marks = rng.integers(len(MARKS), size=count) + 2
    items = rng.permuted(np.tile(np.arange(ITEMS), (count, 1)), axis=1)[:, :PAIRS]
    first_item = 2 + len(MARKS)
    first_style = first_item + ITEMS
    first_answer = first_style + STYLES
    answers = first_answer + items * STYLES + styles[:, None]
    columns = [
        first_item + items,
        *([np.broadcast_to(first_style + styles[:, None], items.shape)] * (kind != "hidden")),
    ]
    columns += [np.broadcast_to(marks[:, None], items.shape), answers]
    return np.stack(columns, axis=-1).reshape(count, -1)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word; words stand apart."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {word: i for i, word in enumerate(words())}
    made = Tokenizer(models.WordLevel(known, unk_token="<pad>"))  # noqa: S106
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>")  # noqa: S106


def train(kind: str, seed: int, steps: int, batch: int = 128) -> tuple[Model, float]:
    """A model of a kind, from scratch.

    Args:
        kind: one of `KINDS`.
        seed: of weights and texts.
        steps: optimiser steps.
        batch: texts of a step.

    Returns:
        The model, and its mean loss over the last answers of the last steps, in nats.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(words()),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = LlamaForCausalLM(config)
    if kind == "untrained":
        return wrap(module, tokenizer(), name=f"{kind}-{seed}"), float("nan")
    rng = np.random.default_rng([seed, list(KINDS).index(kind)])
    optimiser = torch.optim.AdamW(module.parameters(), lr=4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=4e-3, total_steps=steps, pct_start=0.1)
    size = 4 if kind == "stated" else 3
    last: list[float] = []
    module.train()
    for _ in range(steps):
        ids = torch.from_numpy(texts(kind, batch, rng))
        states = module.model(input_ids=ids).last_hidden_state[:, size - 2 :: size]  # where an answer comes next
        logits = module.lm_head(states)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, size - 1 :: size].flatten(), reduction="none")
        optimiser.zero_grad()
        loss.mean().backward()
        optimiser.step()
        schedule.step()
        last.append(float(loss.detach().view(batch, PAIRS)[:, -1].mean()))
    return wrap(module, tokenizer(), name=f"{kind}-{seed}"), float(np.mean(last[-20:]))


@dataclass(frozen=True)
class Verdict:
    """What the audit says of one task of a constructed model.

    Attributes:
        steering: share of right answers with the vector, the best template.
        random: the same with a random vector of the same length, at the best template's place.
        plain: without any.
        few: after examples.
        reading: share of prompts whose answer a lens has among the first ten; the best template and layer.
        cell: of the 2 x 2 table.
    """

    steering: float
    random: float
    plain: float
    few: float
    reading: float
    cell: str


def audited(model: Model, task: ConstructedTask, strengths: tuple[float, ...], threshold: float, seed: int) -> Verdict:
    """Run the audit of the study on a constructed model."""
    split = audit.Split.of(task.pairs, SPLIT, np.random.default_rng(seed))
    sites = audit.sites_of(model, 1)
    best = (-1.0, 0.0, 0.0, 0.0)
    reading = 0.0
    for template in range(len(task.templates)):
        examples = audit.examples_of(task, split, template, " ")
        vectors: Vectors = audit.vectors_of(model, examples, split, sites, 5, seed)
        found = audit.steered(
            model, task, examples, split, vectors, strengths, other=None, neutral=None, randoms=3, seed=seed
        )
        few = audit.written(model, task, audit.few_shot(examples, split.testing, 5, seed), split.testing).mean()
        best = max(best, (found.rate().value, found.rate("random").value, found.rate("plain").value, float(few)))
        prompts = [examples.bare(x) for x, _ in split.testing]
        states = audit.states_of(model, prompts, sites)
        read = audit.readout(model, states.stacked(sites), sites, task, split.testing)
        reading = max(reading, float(read.top(audit.TOP).max()))
    return Verdict(*best, reading, audit.cell(best[0], reading, threshold))
