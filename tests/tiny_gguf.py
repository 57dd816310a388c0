"""A GGUF file of a tiny Llama with a tokenizer, so that conversion takes no time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests import zoo


def write(path: Path, seed: int = 0) -> Any:
    """Write the file; return the model whose weights are in it, unquantised."""
    model, tokenizer = zoo.build("llama", seed), zoo.tokenizer()
    config: Any = model.config
    out = gguf.GGUFWriter(str(path), "llama")
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_dimension_count(config.head_dim)
    out.add_rope_freq_base(10000.0)
    out.add_vocab_size(config.vocab_size)
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    tokens += [f"[unused{i}]" for i in range(len(tokens), config.vocab_size)]
    out.add_tokenizer_model("gpt2")
    out.add_token_list(tokens)
    out.add_token_types([3 if i < 3 else 1 for i in range(len(tokens))])
    out.add_token_merges([" ".join(pair) for pair in state["merges"]])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_pad_token_id(0)
    out.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        base, _, ending = name.rpartition(".")
        values = tensor.float().numpy()
        if base.endswith(("q_proj", "k_proj")):  # the format interleaves the halves of each head
            heads = config.num_attention_heads if base.endswith("q_proj") else config.num_key_value_heads
            split = values.reshape(heads, 2, len(values) // heads // 2, -1)
            values = split.swapaxes(1, 2).reshape(values.shape)
        out.add_tensor(f"{names.get_name(base)}.{ending}", np.ascontiguousarray(values))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return model
