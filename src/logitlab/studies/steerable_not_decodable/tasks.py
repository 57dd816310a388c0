"""The twelve tasks: pairs of an input and its answers, and eight ways to ask for an answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from logitlab.studies.steerable_not_decodable.pairs import Pair, read_pairs, read_words

Category: TypeAlias = Literal["lexical", "factual", "morphological", "character", "compositional"]

STYLES = ("sentence", "sentence", "symbolic", "symbolic", "question", "question", "formal", "formal")
"""The style of each template of a task, by its place."""

LONGEST_REVERSED = 5
"""Letters of a word that is to be reversed, at most: a tokenizer may need one token for each."""


@dataclass(frozen=True)
class Task:
    """A task: what goes in, what should come out, and how it is asked.

    Attributes:
        name: its key in `TASKS`.
        category: what kind of knowledge it needs.
        pairs: ``(input, answers)``; the first answer is the main one, the others are right too. No input comes twice.
        templates: eight texts with one ``{X}`` each, where the input goes; their styles are `STYLES`. None ends
            with a space: a demonstration is the filled template, a space, and the main answer.
        new_tokens: tokens to generate before an answer is looked for.
        case_sensitive: whether an answer in other capitals is wrong.
        polarity: of each pair's answers, +1 for a good sentiment and -1 for a bad one; empty for a task without.

    Example:
        >>> task = TASKS["antonym"]
        >>> task.templates[0].replace("{X}", task.pairs[0][0])
        'The opposite of hot is'
    """

    name: str
    category: Category
    pairs: tuple[Pair, ...]
    templates: tuple[str, ...]
    new_tokens: int = 5
    case_sensitive: bool = False
    polarity: tuple[int, ...] = ()


def _derived(answer: Callable[[str], str], longest: int | None = None) -> tuple[Pair, ...]:
    """Pairs that a rule makes from the word list; ``longest`` in letters leaves longer words out."""
    return tuple((word, (answer(word),)) for word in read_words() if longest is None or len(word) <= longest)


_TO_NEGATIVE = read_pairs("sentiment_to_negative")
_TO_POSITIVE = read_pairs("sentiment_to_positive")

_ALL = (
    Task(
        name="antonym",
        category="lexical",
        pairs=read_pairs("antonym"),
        templates=(
            "The opposite of {X} is",
            "{X} is the opposite of",
            "antonym({X}) =",
            "opposite: {X} -->",
            "What is the antonym of {X}?",
            "Which word means the opposite of {X}?",
            "Antonym relation: {X} maps to",
            "Lexical opposition: {X} contrasts with",
        ),
    ),
    Task(
        name="synonym",
        category="lexical",
        pairs=read_pairs("synonym"),
        templates=(
            "A synonym for {X} is",
            "Another word for {X} is",
            "synonym({X}) =",
            "similar_word: {X} -->",
            "What is a synonym of {X}?",
            "Which word means the same as {X}?",
            "Synonym identification: {X} corresponds to",
            "Lexical equivalence: {X} is equivalent to",
        ),
    ),
    Task(
        name="hypernym",
        category="lexical",
        pairs=read_pairs("hypernym"),
        templates=(
            "{X} is a type of",
            "A {X} is a kind of",
            "hypernym({X}) =",
            "category: {X} -->",
            "What kind of thing is a {X}?",
            "Which category does a {X} belong to?",
            "Taxonomic classification: {X} is classified as",
            "Hypernym relation: {X} falls under",
        ),
    ),
    Task(
        name="country_capital",
        category="factual",
        pairs=read_pairs("country_capital"),
        templates=(
            "The capital of {X} is",
            "The government of {X} sits in the city of",
            "capital({X}) =",
            "country_capital: {X} -->",
            "What is the capital of {X}?",
            "Which city is the capital of {X}?",
            "Capital city identification: {X} has capital",
            "Geographic relation: {X} is governed from",
        ),
    ),
    Task(
        name="english_spanish",
        category="factual",
        pairs=read_pairs("english_spanish"),
        templates=(
            "The Spanish word for {X} is",
            "In Spanish, {X} is called",
            "translate_es({X}) =",
            "en_to_es: {X} -->",
            "How do you say {X} in Spanish?",
            "What is the Spanish translation of {X}?",
            "English-Spanish translation: {X} renders as",
            "Spanish lexical equivalent: {X} translates to",
        ),
    ),
    Task(
        name="object_color",
        category="factual",
        pairs=read_pairs("object_color"),
        templates=(
            "The color of a {X} is",
            "A typical {X} has the color",
            "color({X}) =",
            "object_color: {X} -->",
            "What color is a {X}?",
            "Which color does a {X} usually have?",
            "Color association: {X} corresponds to",
            "Typical color attribute: {X} has color",
        ),
    ),
    Task(
        name="past_tense",
        category="morphological",
        pairs=read_pairs("past_tense"),
        templates=(
            "The past tense of {X} is",
            "Today I {X}, and yesterday I",
            "past_tense({X}) =",
            "verb_past: {X} -->",
            "What is the past tense of {X}?",
            "How do you write {X} in the past tense?",
            "Past tense conjugation: {X} becomes",
            "Verb inflection, simple past: {X} yields",
        ),
    ),
    Task(
        name="plural",
        category="morphological",
        pairs=read_pairs("plural"),
        templates=(
            "The plural of {X} is",
            "First there was one {X}, then there were two",
            "plural({X}) =",
            "pluralize: {X} -->",
            "What is the plural of {X}?",
            "How do you write {X} in the plural?",
            "Plural formation: {X} becomes",
            "Noun inflection, plural number: {X} yields",
        ),
    ),
    Task(
        name="capitalize",
        category="character",
        pairs=_derived(str.upper),
        templates=(
            "{X} in uppercase is",
            "Written in capital letters, {X} is",
            "UPPERCASE({X}) =",
            "to_upper: {X} -->",
            "What is {X} in all capital letters?",
            "How do you write {X} in uppercase?",
            "Uppercase conversion: {X} becomes",
            "Letter case transformation: {X} is converted to",
        ),
        case_sensitive=True,
    ),
    Task(
        name="first_letter",
        category="character",
        pairs=_derived(lambda word: word[0]),
        templates=(
            "The first letter of {X} is",
            "The word {X} starts with the letter",
            "first_char({X}) =",
            "initial: {X} -->",
            "What letter does {X} start with?",
            "Which letter comes first in {X}?",
            "Initial letter extraction: {X} yields",
            "Leading character identification: {X} begins with",
        ),
        new_tokens=3,
    ),
    Task(
        name="reverse_word",
        category="character",
        pairs=_derived(lambda word: word[::-1], LONGEST_REVERSED),
        templates=(
            "{X} spelled backwards is",
            "Read from right to left, {X} is",
            "reverse({X}) =",
            "reversed: {X} -->",
            "What is {X} spelled in reverse?",
            "How do you spell {X} backwards?",
            "String reversal: {X} becomes",
            "Character order inversion: {X} yields",
        ),
    ),
    Task(
        name="sentiment_flip",
        category="compositional",
        pairs=_TO_NEGATIVE + _TO_POSITIVE,
        templates=(
            "Rewrite with opposite sentiment: {X} becomes",
            "With the opposite sentiment, {X} turns into",
            "flip_sentiment({X}) =",
            "sentiment_reverse: {X} -->",
            "What is the opposite sentiment of {X}?",
            "How would you say the opposite of {X}?",
            "Sentiment inversion: {X} transforms to",
            "Polarity reversal: {X} is mapped to",
        ),
        new_tokens=10,
        polarity=(-1,) * len(_TO_NEGATIVE) + (+1,) * len(_TO_POSITIVE),
    ),
)

TASKS: dict[str, Task] = {task.name: task for task in _ALL}
"""The tasks by name, in the order of the paper's table. The pairs are our own; of the templates, the
first, third, fifth and seventh of each task are the paper's, and the fourth as well but for ``plural``."""
