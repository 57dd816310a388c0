"""Steerable but not decodable: function vectors against the logit lens (arXiv 2604.02608), as a study."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from logitlab.studies.study import Claim, Parameter, Picture, Step, Study


def _later(module: str, name: str) -> Callable[..., Any]:
    """A function that is imported when it is called: to declare a study imports nothing heavy."""

    def call(*args: Any) -> Any:
        return getattr(import_module(f"{__package__}.{module}"), name)(*args)

    call.__name__ = name
    return call


def _step(name: str, function: str, units: str | None = "tasks") -> Step:
    return Step(name, _later("steps", function), None if units is None else _later("steps", units))


ALL = (
    "antonym",
    "synonym",
    "hypernym",
    "country_capital",
    "english_spanish",
    "object_color",
    "past_tense",
    "plural",
    "capitalize",
    "first_letter",
    "reverse_word",
    "sentiment_flip",
)
SMOKE = ("plural", "capitalize")

PARAMETERS = {
    "tasks": Parameter(ALL, "which tasks (paper: twelve)", smoke=SMOKE),
    "templates": Parameter(
        tuple(range(1, 9)), "which templates of each task, from 1 (paper: eight)", small=(1, 3, 5), smoke=(3, 5)
    ),
    "layer_step": Parameter(2, "every how many layers is looked at (paper: 2)", smoke=10),
    "shots": Parameter(5, "examples in a prompt (paper: 5)"),
    "shown": Parameter(20, "pairs for examples; the paper draws from all pairs but the query", smoke=8, ours=True),
    "queries": Parameter(15, "inputs whose states vectors are made of (paper: 15)", smoke=6),
    "choosing": Parameter(
        15, "inputs on which layer and strength are chosen; the paper's: testing", smoke=6, ours=True
    ),
    "testing": Parameter(50, "inputs on which all is measured (paper: 50)", small=40, smoke=10),
    "strengths": Parameter(
        (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0),
        "what vectors are multiplied with (paper: these)",
        smoke=(0.5, 1.0, 2.0),
    ),
    "randoms": Parameter(3, "random vectors of the same length beside each vector", smoke=1, ours=True),
    "neutral": Parameter(6, "neutral texts whose perplexity is measured", smoke=1, ours=True),
    "gate": Parameter(0.10, "by how much examples must help for the model to be able to do a task", ours=True),
    "threshold": Parameter(0.10, "steerable, decodable: above this share (paper: 0.10)"),
    "selectivity": Parameter(0.05, "by how much the MLP probe must beat its control (paper: 0.05)"),
    "projected": Parameter(50, "tokens that a vector is projected to (paper: 50)"),
    "high": Parameter(0.90, "steering accuracy from which coherence is asked for (paper: 0.90)", small=0.5),
    "lens_epochs": Parameter(200, "steps of the tuned lens, at most (paper: 200)", smoke=50),
    "probe_hidden": Parameter(1024, "hidden size of the MLP probe (paper: 1024)", smoke=64),
    "probe_epochs": Parameter(30, "epochs of the MLP probe (paper: 30)", smoke=10),
    "transfer_inputs": Parameter(50, "inputs of each transfer (paper: 50)", small=20, smoke=5),
    "transfer_strengths": Parameter(
        (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0), "strengths of transfers (paper: these)", small=(0.5, 1.0, 2.0)
    ),
    "failed_transfer": Parameter(0.40, "a transfer below this share has failed (paper: 0.40)"),
    "patched_pairs": Parameter(60, "pairs of templates that are patched, at most (paper: 60)", smoke=2),
    "patched_per_task": Parameter(5, "of each task, at most (paper: 5)"),
    "patched_inputs": Parameter(15, "inputs of each pair (paper: 15)", smoke=4),
    "permutations": Parameter(1000, "permutations of the regression's test (paper: 1,000)", smoke=100),
    "heads": Parameter(10, "heads that are summed for Todd et al.'s kind of function vector (theirs: 10)", ours=True),
    "control_seeds": Parameter(5, "constructed models of each kind", smoke=1, ours=True),
    "control_steps": Parameter(500, "training steps of a constructed model", smoke=350, ours=True),
}

STEPS = (
    _step("constructed", "constructed", "control_units"),
    _step("abilities", "abilities"),
    _step("vectors", "vectors"),
    _step("steering", "steering"),
    _step("heads", "heads"),
    _step("decodability", "decodability"),
    _step("tuned-lens", "tuned_lens", None),
    _step("tuned", "tuned"),
    _step("probe", "probe"),
    _step("polarity", "polarity", None),
    _step("after-steering", "after_steering"),
    _step("transfer", "transfer"),
    _step("patching", "patching", None),
    _step("summary", "summary", None),
    _step("regression", "regression", None),
)

CLAIMS = (
    Claim(
        name="controls-are-classified",
        statement="The audit puts models of which the answer is known into the right cell of the 2 x 2 table.",
        paper="not in the paper: a check of the audit itself",
        test="number of tasks of constructed models in a wrong cell; none",
        threshold=0.5,
        measure=_later("claims", "controls_classified"),
        side="below",
    ),
    Claim(
        name="function-vectors-steer",
        statement="A function vector makes the model do the task on bare questions.",
        paper="steering accuracies above 0.90 (abstract)",
        test="number of tasks that the model can do from examples (these help by the gate, in the template that steers "
        "best on the inputs for choosing) in which steering gains over bare questions, over random vectors of the "
        "same length, and over its texts held against other inputs' answers, all with 95 % intervals above 0; at "
        "least 3",
        threshold=2.5,
        measure=_later("claims", "vectors_steer"),
    ),
    Claim(
        name="steerable-not-decodable-occurs",
        statement="Steering works where the logit lens reads nothing.",
        paper="in every model family; 14 cells (abstract, README)",
        test="number of tasks that the model can do, in which steering gains as above, and whose answer no layer and "
        "template of the lens has among its first tokens in more than the threshold of the inputs; at least 1",
        threshold=0.5,
        measure=_later("claims", "steerable_not_decodable"),
    ),
    Claim(
        name="reverse-is-rare",
        statement="The reverse, decodable and not steerable, is rarer.",
        paper="3 of 72 cells, all of one family (abstract)",
        test="share of tasks that are steerable and not decodable, minus the share of the reverse, of those that the "
        "model can do; interval over tasks",
        threshold=0.0,
        measure=_later("claims", "reverse_is_rare"),
    ),
    Claim(
        name="steering-exceeds-reading",
        statement="Steering is more accurate than reading.",
        paper="largest difference of readability and steering -0.91 (abstract)",
        test="lens top-10 accuracy (best layer) minus steering accuracy, mean over templates of the tasks that the "
        "model can do; interval over tasks",
        threshold=0.0,
        measure=_later("claims", "steering_exceeds_reading"),
        side="below",
    ),
    Claim(
        name="tuned-lens-does-not-help",
        statement="A diagonal tuned lens leaves most of these cells unreadable.",
        paper="13 of 14 cells persist, 93 % (abstract)",
        test="share of steerable, not decodable tasks that the tuned lens does not read either, with its exact "
        "interval; at least 3 such tasks",
        threshold=0.5,
        measure=_later("claims", "tuned_lens_persists"),
    ),
    Claim(
        name="probe-reads-some",
        statement="A nonlinear probe reads some of the cells that no lens reads.",
        paper="closes 5 of 10 (abstract)",
        test="share that the MLP probe reads, with selectivity, of steerable tasks that neither lens reads and whose "
        "held-out labels mostly occur in its training part, with its exact interval; at least 3 such tasks",
        threshold=0.1,
        measure=_later("claims", "probe_reads_some"),
    ),
    Claim(
        name="vectors-are-incoherent",
        statement="Vectors that steer well do not project to the task's answers.",
        paper="near zero where steering is above 0.90 (abstract)",
        test="share of the projection's first tokens that begin an answer, at the site that steers; mean over the "
        "templates that steer well, of at least 4 tasks; interval over tasks",
        threshold=0.10,
        measure=_later("claims", "vectors_incoherent"),
        side="below",
    ),
    Claim(
        name="cosine-says-little",
        statement="How alike two templates' vectors are says little of whether they transfer.",
        paper="R² gains at most 0.011 (abstract)",
        test="gain of R² by the cosine after the task's difficulty, over pairs of templates and layers; interval over "
        "tasks",
        threshold=0.011,
        measure=_later("claims", "cosine_says_little"),
        side="below",
    ),
    Claim(
        name="steering-makes-readable",
        statement="After steering the answer can be read in later layers.",
        paper="gain of the lens up to +0.91 in Mistral, about 0 in Llama and Gemma (README)",
        test="largest gain of lens top-10 accuracy in layers above the vector's and below the last, minus that after a "
        "random vector; mean over tasks that steer; interval over tasks",
        threshold=0.10,
        measure=_later("claims", "steering_makes_readable"),
    ),
    Claim(
        name="patching-recovers",
        statement="Where vectors that look alike do not transfer, the source's own state gives the answer.",
        paper="values not given",
        test="share of tasks in most of whose pairs some layer but the last gives half of the source's accuracy more "
        "than the bare question and another input's state do, with its exact interval; at least 4 tasks",
        threshold=0.5,
        measure=_later("claims", "patching_recovers"),
    ),
)

PICTURES = (
    Picture(
        "cells",
        "Each task: the share that a vector steers (in the template that is best on other inputs) against the share "
        "whose answer the logit lens has among its first tokens (the best of all templates and layers). Lines: "
        "thresholds.",
        _later("pictures", "cells"),
    ),
    Picture(
        "steering",
        "Right answers to bare questions, in the template that steers best on other inputs: as the model is, with "
        "random vectors of the same length, the steered texts held against other inputs' answers, with another task's "
        "vector, with the vector, and after examples. 95 % intervals.",
        _later("pictures", "steering"),
    ),
    Picture(
        "ladder",
        "What reads each task: logit lens, tuned lens (best layer and template), MLP probe and its control (best "
        "layer).",
        _later("pictures", "ladder"),
    ),
    Picture(
        "sweep",
        "Right answers by layer and strength on the inputs for choosing, mean over templates, by task.",
        _later("pictures", "sweep"),
    ),
    Picture(
        "after-steering",
        "Lens top-10 accuracy in the layers after the vector was added, minus that without: with the vector, and with "
        "a random vector of the same length. A line a task, in the template that steers best.",
        _later("pictures", "after_steering"),
    ),
    Picture(
        "transfer",
        "Transfers between templates: accuracy by the length of the vector, and by its cosine with the target's own.",
        _later("pictures", "transfer"),
    ),
    Picture(
        "matrices",
        "Transfers between templates: right answers at the best site and strength, on the inputs that they are best "
        "on.",
        _later("pictures", "matrices"),
    ),
)

STUDY = Study(
    name="steerable-not-decodable",
    title="Steerable but not decodable: function vectors and the logit lens",
    paper='"Steerable but Not Decodable", arXiv 2604.02608 (v2)',
    summary=(
        "If what a model is about to do lay in its states as a direction that its unembedding reads, a vector that "
        "makes it do a task could be read there too. The study takes function vectors of twelve tasks, steers bare "
        "questions with them, and tries to read the answers from the same questions: through the logit lens, a tuned "
        "lens, and a nonlinear probe with its control. Models that are made on the spot check the audit itself."
    ),
    data=(
        "Pairs and most templates are written for this study (package data); the paper's own wording of the templates "
        "is kept where it is known. Neutral texts are written for it as well."
    ),
    parameters=PARAMETERS,
    steps=STEPS,
    claims=CLAIMS,
    pictures=PICTURES,
    defects=(
        "Examples are drawn from pairs that no result is measured on; the paper's prompts can show test inputs. Of "
        "pairs that answer each other one is used.",
        "Layer and strength are chosen on other inputs than those of the result; the paper takes the best of the sweep "
        "on the test inputs. Its refinement around the best strength is left out.",
        "The last real token is read and steered, also in batches; the paper's code takes position -1 of padded ones.",
        "Both variants of an answer's first token count in the lens, with and without a space before it.",
        "Steering stands beside random vectors of the same length, another task's vector, the same texts held against "
        "other inputs' answers, and perplexity on neutral text; the paper's rule for a cell asks for none of them.",
        "An answer counts as a whole word, and a single letter where it begins the text; the paper looks for it "
        "anywhere.",
        "The answers of sentiment_flip mostly begin as their inputs do: its first tokens tell nothing, and it has no "
        "cell.",
        "Difficulty is taken from steering in the vectors' own templates, not from the transfers that it has to "
        "explain.",
        "The paper's polarity measure for it is right half of the time by chance, and its threshold is 0.10. A measure "
        "after it is in the tables, and in no claim.",
        "A probe that is split by input cannot know labels that its training part lacks; nothing is said where most "
        "are such.",
        "The last layer is left out where patching is judged: its state is the source's own answer.",
    ),
    requires=("probes", "figures"),
)
