"""The tasks of the study: every pair against a rule or a table that is written down here a second time."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

import pytest

from logitlab.studies.steerable_not_decodable.pairs import read_pairs, read_words
from logitlab.studies.steerable_not_decodable.tasks import STYLES, TASKS, Task

CATEGORIES = {
    "antonym": "lexical",
    "synonym": "lexical",
    "hypernym": "lexical",
    "country_capital": "factual",
    "english_spanish": "factual",
    "object_color": "factual",
    "past_tense": "morphological",
    "plural": "morphological",
    "capitalize": "character",
    "first_letter": "character",
    "reverse_word": "character",
    "sentiment_flip": "compositional",
}
ALTERNATIVES = {"antonym", "synonym", "hypernym", "object_color"}

PASTS = """
go went come came see saw eat ate drink drank run ran write wrote speak spoke take took give gave get got make made
do did have had say said tell told think thought know knew find found buy bought bring brought teach taught
catch caught fight fought sell sold hold held stand stood understand understood sit sat win won lose lost leave left
feel felt keep kept sleep slept meet met feed fed lead led send sent spend spent build built lend lent break broke
choose chose freeze froze steal stole wake woke drive drove ride rode rise rose begin began swim swam sing sang
ring rang grow grew throw threw fly flew draw drew blow blew fall fell forget forgot become became hear heard pay paid
shake shook wear wore tear tore swear swore shoot shot mean meant
"""
DOUBLED = {"stop", "drop", "plan", "shop", "hug"}
"""Verbs of one closed, stressed syllable: the last letter is doubled."""

PLURALS = """
child children man men woman women person people foot feet tooth teeth goose geese mouse mice ox oxen wolf wolves
knife knives wife wives life lives leaf leaves half halves shelf shelves thief thieves loaf loaves calf calves
potato potatoes tomato tomatoes hero heroes echo echoes crisis crises cactus cacti
"""

COLORS = {"yellow", "red", "orange", "green", "blue", "purple", "violet", "white", "black", "brown", "gray", "grey"}
COLORS |= {"pink", "silver"}


def table(text: str) -> dict[str, str]:
    words = text.split()
    return dict(zip(words[::2], words[1::2], strict=True))


def past(verb: str) -> str:
    """The regular past tense in American spelling, but for consonants that are doubled."""
    if verb in DOUBLED:
        return verb + verb[-1] + "ed"
    if verb.endswith("e"):
        return verb + "d"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ied"
    return verb + "ed"


def plural(noun: str) -> str:
    """The regular plural."""
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def answers(name: str) -> dict[str, tuple[str, ...]]:
    return dict(TASKS[name].pairs)


def texts(task: Task) -> Iterator[str]:
    for given, right in task.pairs:
        yield given
        yield from right


def test_the_twelve_tasks_in_their_order() -> None:
    assert {name: task.category for name, task in TASKS.items()} == CATEGORIES
    assert list(TASKS) == list(CATEGORIES)
    assert [task.name for task in TASKS.values()] == list(TASKS)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_inputs_are_many_and_distinct(task: Task) -> None:
    inputs = [given.casefold() for given, _ in task.pairs]
    assert len(inputs) >= (80 if task.name == "sentiment_flip" else 110)
    assert [given for given, times in Counter(inputs).items() if times > 1] == []


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_texts_are_clean(task: Task) -> None:
    for text in texts(task):
        assert text
        assert text == " ".join(text.split())
        assert not set(text) & set(':;,|{}"_\t\ufeff')
    for given, right in task.pairs:
        assert right, given
        assert len({answer.casefold() for answer in right}) == len(right), given


@pytest.mark.parametrize("task", [t for t in TASKS.values() if t.name != "first_letter"], ids=lambda task: task.name)
def test_an_echo_of_the_input_is_no_answer(task: Task) -> None:
    """Answers are looked for inside of what a model writes, so no input may hold its own."""
    for given, right in task.pairs:
        for answer in right:
            found = answer in given if task.case_sensitive else answer.casefold() in given.casefold()
            assert not found, (given, answer)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_templates(task: Task) -> None:
    assert len(task.templates) == len(STYLES) == 8
    assert len(set(task.templates)) == 8
    for template, style in zip(task.templates, STYLES, strict=True):
        assert template.count("{X}") == 1
        assert template.replace("{X}", "").count("{") == template.replace("{X}", "").count("}") == 0
        assert template == template.strip()
        assert template.endswith("?") == (style == "question")
        assert template.endswith(("({X}) =", ": {X} -->")) == (style == "symbolic")
    assert all(": {X}" in template for template in task.templates[6:])


def test_templates_are_distinct_over_all_tasks() -> None:
    every = [template for task in TASKS.values() for template in task.templates]
    assert len(every) == len(set(every)) == 96


def test_how_answers_are_scored() -> None:
    assert {name: task.new_tokens for name, task in TASKS.items() if task.new_tokens != 5} == {
        "first_letter": 3,
        "sentiment_flip": 10,
    }
    assert [name for name, task in TASKS.items() if task.case_sensitive] == ["capitalize"]
    assert {name for name in ALTERNATIVES if max(len(right) for _, right in TASKS[name].pairs) > 1} == ALTERNATIVES


def test_words_are_plain() -> None:
    words = read_words()
    assert list(words) == sorted(set(words))
    assert all(word.isascii() and word.isalpha() and word.islower() and len(word) > 1 for word in words)
    # Every letter that begins some common short words is there.
    assert {word[0] for word in words} >= set("abcdefghijklmnopqrstuvwyz")


def test_derived_tasks() -> None:
    words = read_words()
    upper = {chr(code): chr(code - 32) for code in range(ord("a"), ord("z") + 1)}
    assert answers("capitalize") == {word: ("".join(upper[letter] for letter in word),) for word in words}
    assert answers("first_letter") == {word: (next(iter(word)),) for word in words}
    expected: dict[str, tuple[str, ...]] = {}
    for word in words:
        backwards = ""
        for letter in word:
            backwards = letter + backwards
        if len(word) <= 5:
            expected[word] = (backwards,)
    assert answers("reverse_word") == expected


def test_past_tense_is_the_rule_or_in_the_table_of_irregular_verbs() -> None:
    irregular = table(PASTS)
    assert set(irregular) <= set(answers("past_tense"))
    for verb, right in answers("past_tense").items():
        assert right[0] == irregular.get(verb, past(verb))
    assert {verb: right[1:] for verb, right in answers("past_tense").items() if right[1:]} == {"travel": ("travelled",)}


def test_plural_is_the_rule_or_in_the_table_of_irregular_nouns() -> None:
    irregular = table(PLURALS)
    assert set(irregular) <= set(answers("plural"))
    for noun, right in answers("plural").items():
        assert right[0] == irregular.get(noun, plural(noun))
    assert {noun: right[1:] for noun, right in answers("plural").items() if right[1:]} == {
        "person": ("persons",),
        "cactus": ("cactuses",),
    }


def test_antonyms_go_both_ways() -> None:
    opposite = answers("antonym")
    for word, right in opposite.items():
        if right[0] in opposite:
            assert word in opposite[right[0]], (word, right)


def test_synonyms_go_both_ways_and_are_no_antonyms() -> None:
    same, opposite = answers("synonym"), answers("antonym")
    for word, right in same.items():
        if right[0] in same:
            assert word in same[right[0]], (word, right)
        assert not set(right) & set(opposite.get(word, ())), word


def test_colors_are_colors() -> None:
    used = {color for right in answers("object_color").values() for color in right}
    assert used == COLORS
    for right in answers("object_color").values():
        assert ("gray" in right) == ("grey" in right)


def test_nouns_take_the_article_of_the_templates() -> None:
    for name in ("hypernym", "object_color"):
        assert [given for given in answers(name) if given[0] in "aeiou"] == []


def test_capitals_and_countries_are_names() -> None:
    pairs = answers("country_capital")
    mains = [right[0] for right in pairs.values()]
    assert len(set(mains)) == len(mains)
    for name in [*pairs, *mains]:
        assert name[0].isupper()
        assert name.isascii()
    known = {"France": "Paris", "Australia": "Canberra", "Brazil": "Brasilia", "Kenya": "Nairobi", "Canada": "Ottawa"}
    assert {country: pairs[country][0] for country in known} == known


def test_spanish_keeps_its_accents() -> None:
    pairs = answers("english_spanish")
    known = {"sugar": "azúcar", "tree": "árbol", "year": "año", "tomorrow": "mañana", "river": "río", "day": "día"}
    assert {word: pairs[word][0] for word in known} == known
    assert pairs["car"] == ("coche", "carro", "auto")
    for right in pairs.values():
        for word in right:
            assert set(word) <= set("abcdefghijlmnopqrstuvxyzáéíóúüñk")
            assert word.replace("ñ", "n").isascii() or sum(letter in "áéíóú" for letter in word) == 1


def test_sentiments_are_balanced_and_agree_with_each_other() -> None:
    """A word that an answer brings in has one sentiment throughout, and so has one that it takes out."""
    task = TASKS["sentiment_flip"]
    assert len(task.polarity) == len(task.pairs)
    assert set(task.polarity) == {-1, 1}
    assert abs(sum(task.polarity)) <= len(task.pairs) // 10
    good: set[str] = set()
    bad: set[str] = set()
    for (given, right), polarity in zip(task.pairs, task.polarity, strict=True):
        for answer in right:
            before, after = set(given.lower().split()), set(answer.lower().split())
            assert before & after, (given, answer)
            (good if polarity > 0 else bad).update(after - before)
            (bad if polarity > 0 else good).update(before - after)
    assert good & bad - {"a", "an"} == set()
    assert {"love", "great", "delicious", "friendly", "honest"} <= good
    assert {"hate", "terrible", "disgusting", "rude", "dishonest"} <= bad


@pytest.mark.parametrize("name", [name for name in TASKS if name != "sentiment_flip"])
def test_no_polarity_elsewhere(name: str) -> None:
    assert TASKS[name].polarity == ()


def test_reads_one_pair_a_line() -> None:
    assert read_pairs("english_spanish")[:2] == (("house", ("casa",)), ("dog", ("perro",)))
    with pytest.raises(FileNotFoundError):
        read_pairs("nothing")


def test_tasks_import_nothing_heavy() -> None:
    code = (
        "import sys; import logitlab.studies.steerable_not_decodable.tasks;"
        "print(sorted({'torch', 'transformers', 'pandas', 'xarray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
