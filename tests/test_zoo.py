"""The zoo made from configurations: what it builds runs, is small, repeatable, and says why it cannot build the rest.

The whole lists are swept elsewhere; here is a sample of them that differs in kind.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, JambaConfig, LlamaConfig, MixtralConfig, PreTrainedConfig
from transformers.models.auto import modeling_auto

from logitlab import zoo
from logitlab.errors import InputError
from logitlab.zoo.shrink import EXPERTS, LABELS, LAYERS, SPECIAL, VOCABULARY, WIDTH, shrink

SAMPLE = [
    ("causal-lm", "gpt2"),  # learned positions, one matrix for query, key and value
    ("causal-lm", "cohere"),  # a factor on the scores
    ("causal-lm", "gemma2"),  # capped scores, two kinds of attention
    ("causal-lm", "gemma4_text"),  # single layers of other sizes
    ("causal-lm", "deepseek_v3"),  # low-rank attention, experts
    ("causal-lm", "mamba2"),  # no attention
    ("causal-lm", "jamba"),  # kinds of layers by a period
    ("causal-lm", "nemotron_h"),  # kinds of layers by a list
    ("causal-lm", "qwen3_5"),  # the text part of a composite type
    ("masked-lm", "albert"),  # one block for all layers, a narrow embedding
    ("masked-lm", "funnel"),  # layers in stages
    ("seq2seq-lm", "t5"),
    ("seq2seq-lm", "nllb-moe"),
    ("sequence-classification", "deberta-v2"),
    ("token-classification", "xlnet"),
]


def logits(task: str, model: Any) -> torch.Tensor:
    """The scores of a few tokens, by a plain call."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(10, 260, (1, 7), generator=generator)
    with torch.no_grad():
        if task == "seq2seq-lm":
            return model(input_ids=ids[:, :5], decoder_input_ids=ids).logits
        return model(input_ids=ids).logits


@pytest.mark.parametrize(("task", "kind"), SAMPLE)
def test_a_type_is_built_small_and_repeatably_and_runs(task: str, kind: str) -> None:
    before = torch.get_rng_state()
    model = zoo.build(task, kind)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    scores = logits(task, model)
    assert scores.shape[-1] == (LABELS if "classification" in task else VOCABULARY)
    assert torch.isfinite(scores).all()
    assert 0.01 < float(scores.std()) < 30
    assert torch.equal(logits(task, zoo.build(task, kind)), scores)
    assert not torch.allclose(logits(task, zoo.build(task, kind, seed=1)), scores, atol=1e-2)


@pytest.mark.parametrize(("task", "kind"), SAMPLE)
def test_no_norm_or_bias_has_a_value_that_does_nothing(task: str, kind: str) -> None:
    for name, parameter in zoo.build(task, kind).named_parameters():
        if parameter.ndim == 1 and parameter.numel() >= 16 and "A_log" not in name:
            assert float(parameter.detach().std()) > 0.1, name


def test_every_list_of_transformers_is_one_task() -> None:
    for name, task in zoo.TASKS.items():
        assert task.name == name
        assert zoo.types(name) == list(getattr(modeling_auto, task.mapping))


def test_an_unknown_task_or_type_is_an_input_error() -> None:
    with pytest.raises(InputError, match="there is no task 'poetry': use one of causal-lm, masked-lm"):
        zoo.types("poetry")
    with pytest.raises(InputError, match="there is no task 'poetry'"):
        zoo.build("poetry", "gpt2")
    with pytest.raises(
        InputError, match=re.escape("the task 'causal-lm' has no model type 'vit': logitlab.zoo.types(")
    ):
        zoo.build("causal-lm", "vit")


def test_a_type_that_cannot_be_built_says_why_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(zoo.CannotBuild, match=r"^gemma4_assistant: every layer reads the attention states of another"):
        zoo.build("causal-lm", "gemma4_assistant")

    def broken(config: PreTrainedConfig, extra: Any = None) -> PreTrainedConfig:
        raise ImportError("it needs a package\n\n  that is   not here")

    monkeypatch.setattr(zoo, "shrink", broken)
    with pytest.raises(zoo.CannotBuild, match=r"^gpt2: ImportError: it needs a package that is not here$"):
        zoo.build("causal-lm", "gpt2")


def test_shrinking_keeps_relations_between_sizes() -> None:
    small: Any = shrink(LlamaConfig(num_attention_heads=32, num_key_value_heads=8))
    assert small.hidden_size == WIDTH == small.num_attention_heads * small.head_dim
    assert (small.num_attention_heads, small.num_key_value_heads, small.num_hidden_layers) == (4, 2, LAYERS)
    assert shrink(LlamaConfig()).num_key_value_heads == 4  # as many as there are heads, as before
    assert shrink(LlamaConfig(num_key_value_heads=1)).num_key_value_heads == 1


def test_shrinking_keeps_values_that_were_given() -> None:
    small: Any = shrink(LlamaConfig(tie_word_embeddings=True, rms_norm_eps=1e-3))
    assert small.tie_word_embeddings
    assert small.rms_norm_eps == 1e-3


def test_shrinking_moves_special_tokens_into_the_vocabulary_and_keeps_them_apart() -> None:
    small: Any = shrink(LlamaConfig(vocab_size=100_000, bos_token_id=90_000, eos_token_id=[90_001, 2], pad_token_id=0))
    assert small.vocab_size == VOCABULARY
    assert small.pad_token_id == 0
    assert small.eos_token_id[1] == 2
    assert small.bos_token_id != small.eos_token_id[0]
    assert SPECIAL <= small.bos_token_id < VOCABULARY
    assert SPECIAL <= small.eos_token_id[0] < VOCABULARY


def test_shrinking_keeps_a_layer_of_every_kind() -> None:
    assert set(Gemma2Config().layer_types) == set(shrink(Gemma2Config()).layer_types)
    jamba: Any = shrink(JambaConfig())
    assert set(jamba.layers_block_type) == set(JambaConfig().layers_block_type)
    assert set(jamba.layers_num_experts) == {1, EXPERTS}
    gemma: Any = zoo.configure("causal-lm", "gemma4_text")
    sizes = {gemma.layer_types[index]: gemma.per_layer_config[index].head_dim for index in range(LAYERS)}
    assert sizes == {"sliding_attention": 8, "full_attention": 16}


def test_shrinking_sets_factors_and_caps_of_the_scores() -> None:
    assert shrink(Gemma2Config()).final_logit_softcapping == 2.0
    assert zoo.configure("causal-lm", "cohere").logit_scale == 0.25
    assert zoo.configure("causal-lm", "granite").logits_scaling == 8.0


def test_experts_and_labels() -> None:
    small: Any = shrink(MixtralConfig())
    assert (small.num_local_experts, small.num_experts_per_tok) == (EXPERTS, 2)
    assert small.num_labels == LABELS == len(small.id2label)
