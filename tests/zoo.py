"""Tiny random models of many families, made so that a wrong tail gives visibly wrong numbers.

Norm weights and biases are perturbed (a norm applied twice then shows), scales and caps are not at
their defaults, and weights are large enough that a soft-cap bends the logits.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 300
WIDTH = 32

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
}
_GROUPED = _COMMON | {"num_key_value_heads": 2}
_SIZED = _GROUPED | {"head_dim": 8}
_GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": WIDTH,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _SIZED),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _SIZED | {"final_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _SIZED),
    "cohere": ("CohereForCausalLM", "CohereConfig", _GROUPED | {"logit_scale": 0.25}),
    "granite": (
        "GraniteForCausalLM",
        "GraniteConfig",
        _GROUPED | {"logits_scaling": 8.0, "residual_multiplier": 0.22, "embedding_multiplier": 3.0},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _COMMON),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {k: v for k, v in _COMMON.items() if k != "intermediate_size"} | {"ffn_dim": 48, "word_embed_proj_dim": 16},
    ),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 3, "state_size": 4, "eos_token_id": 2},
    ),
    "bert": ("BertForMaskedLM", "BertConfig", _COMMON),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": WIDTH,
            "num_layers": 3,
            "num_heads": 4,
            "d_kv": 8,
            "d_ff": 48,
            "decoder_start_token_id": 0,
        },
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": WIDTH,
            "encoder_layers": 3,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 64,
            "forced_eos_token_id": None,
        },
    ),
    # beyond the families that the contract names
    "albert": ("AlbertForMaskedLM", "AlbertConfig", _COMMON | {"embedding_size": 16}),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": 3, "n_head": 4},
    ),
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4},
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", _GROUPED | {"num_local_experts": 4}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _GROUPED),
    "phi": ("PhiForCausalLM", "PhiConfig", _COMMON),
}

# The thirteen families that the test contract names; the others come on top.
FAMILIES = tuple(name for name in CONFIGS if name not in ("albert", "bloom", "falcon", "mixtral", "olmo2", "phi"))
ALL = tuple(CONFIGS)


def build(name: str, seed: int = 0, **changes: Any) -> Any:
    """A fresh tiny model of a family; ``changes`` replace configuration values."""
    class_name, config_name, values = CONFIGS[name]
    config = getattr(transformers, config_name)(**(values | changes))
    torch.manual_seed(seed)
    model = getattr(transformers, class_name)(config).eval()
    perturb(model)
    return model


def hooks(module: Any) -> int:
    """Number of hooks on a model but for those that Transformers leaves there to collect hidden states."""
    found = [h for m in module.modules() for h in [*m._forward_hooks.values(), *m._forward_pre_hooks.values()]]
    return sum(getattr(h, "__module__", "") != "transformers.utils.output_capturing" for h in found)


def perturb(model: Any) -> None:
    """Make norms, biases and weights far from their initial values."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "A_log" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif parameter.ndim == 2:
                parameter.mul_(5)
        for name, buffer in model.named_buffers():
            if name.endswith("final_logits_bias"):
                buffer.copy_(torch.randn_like(buffer))


@cache
def shared(name: str) -> Any:
    """One model of a family for tests that only read it."""
    return build(name)


def ids(n: int = 7, seed: int = 5) -> list[int]:
    """Token ids without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, VOCABULARY, (n,), generator=generator).tolist()


def forward(model: Any, tokens: list[int], encoder: list[int] | None = None) -> torch.Tensor:
    """The model's own logits [tokens, V], by a plain call."""
    with torch.no_grad():
        if encoder is not None:
            return model(input_ids=torch.tensor([encoder]), decoder_input_ids=torch.tensor([tokens])).logits[0]
        return model(input_ids=torch.tensor([tokens])).logits[0]


def encoder_decoder(name: str) -> bool:
    """Whether a family has an encoder."""
    return name in ("t5", "bart")


_TEXT = """The capital of France is Paris. The capital of Japan is Tokyo, and the capital of Italy is Rome.
Once upon a time there was a little girl who loved to read about the stars, the sea and the wind."""


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer with at most `VOCABULARY` entries, trained on two sentences."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(_TEXT.splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def save(folder: Any, name: str = "llama", **changes: Any) -> Any:
    """Write a tiny model and its tokenizer as a checkpoint folder."""
    model = build(name, **changes)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
