"""What the shrinker cannot tell from a configuration alone: the only place of the zoo that names model types.

A key is a model type (``config.model_type``) or the class name of a configuration, for a part of a composite
model as for a whole one. The values are keyed by field; a dotted key (``text_config.num_hidden_layers``)
reaches into a part. Each entry says why structure could not tell.
"""

from __future__ import annotations

from typing import Any

# What a configuration has to be given before it can be made at all: its own defaults are invalid.
_MROPE: dict[str, Any] = {  # the code's default for the sections is as long as a head of full size
    "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [16, 24, 24]}}
}
_MROPE_HALF: dict[str, Any] = {
    "text_config": {"rope_parameters": _MROPE["text_config"]["rope_parameters"] | {"partial_rotary_factor": 0.5}}
}
START: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "ernie4_5_vl_moe",
            "glm46v",
            "glm4v",
            "hunyuan_vl",
            "paddleocr_vl",
            "qwen2_5_omni_thinker",
            "qwen2_5_vl",
            "qwen2_vl",
        ),
        _MROPE,
    ),
    **dict.fromkeys(("glm4v_moe", "glm_ocr", "glmga"), _MROPE_HALF),
}

_BLOCKS = [
    [[3, 16, 16, 1, False]],
    [[3, 16, 16, 1, False]],
    [[3, 16, 32, 2, False]],
    [[3, 32, 48, 2, False]],
    [[5, 48, 64, 2, True]],
]
_FOUR_STAGES: dict[str, Any] = {
    "backbone_config.out_features": ["stage1", "stage2", "stage3", "stage4"],
    "backbone_config.stem_channels": (3, 8, 16),
}
_INTRACLASS: dict[str, Any] = {  # of each convolution: kernel, stride, padding
    "kernel_list": [3, 2, 2],
    "scale_factor_list": [1, 2, 4, 8],
    "intraclass_block_config": {
        "reduce_channel": [1, 1, 0],
        "return_channel": [1, 1, 0],
        **{
            f"{direction}_{ratio}ratio": [
                [size if high else 1, size if wide else 1],
                1,
                [high * size // 2, wide * size // 2],
            ]
            for direction, high, wide in (
                ("vertical_long_to_small_conv", 1, 0),
                ("horizontal_small_to_long_conv", 0, 1),
                ("symmetric_conv_long", 1, 1),
            )
            for ratio, size in (("long", 7), ("mid", 5), ("short", 3))
        },
    },
}

# Values that replace what the shrinker chose.
OVERRIDES: dict[str, dict[str, Any]] = {
    # what the image and the text are projected to is as wide as the image's last channels, narrowed by a coefficient
    "align": {"projection_dim": 80},
    # the code wants a quarter of the text's width
    "fun_asr_nano": {"adaptor_config.intermediate_size": 8},
    # no default: scales of the backbone's states, without which there are none
    "lw_detr": {"projector_scale_factors": (1.0,)},
    # no defaults: what a region's score is held against, and the order of its kinds
    "pp_doclayout_v2": {
        "class_thresholds": [0.01] * 7,
        "class_order": list(range(7)),
        "reading_order_config.max_2d_position_embeddings": 1024,  # the code counts the page in thousandths
    },
    # no default: the place of the image in the text
    "blip-2": {"image_token_index": 310},
    "instructblip": {"image_token_index": 310},
    "instructblipvideo": {"video_token_index": 310},
    # no default: which tokens stand for entries of the image's codebook
    "chameleon": {"vocabulary_map": {"<image>": 310, "IMGIMGAZ": 311, "IMGIMGBZ": 312}},
    "emu3": {"vocabulary_map": {"<image>": 310, "<|visual token 000000|>": 311, "<|visual token 000001|>": 312}},
    # no defaults: which layers have experts, and how many
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", "sparse", "sparse"],
        "text_config.num_experts_per_tok": 2,
    },
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 48,
    },
    # no defaults: from which layers of the image to which of the text
    "granite4_vision": {
        "vision_config.hidden_size": 64,  # its code makes heads of 64
        "deepstack_layer_map": [[-2, 0]],
        "spatial_target_layers": [1, 1, 2, 2],
        "downsample_rate": "1/2",
    },
    # the first two sections are interleaved, so they are as long as each other
    "ernie4_5_vl_moe": {
        "text_config.rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    },
    # fewer layers than factors of the patch's size need a package for their assignment
    "inkling_mm_model": {"vision_config.num_hidden_layers": 6},
    # the encoder that takes the place of timm's has no such field
    "perception_lm": {"vision_config.model_args": {"embed_dim": 32}},
    # layers of another part
    "molmo2": {"adapter_config.vision_feature_layer": [2, 1]},
    # no default, although its layers have a window
    "step3p7": {"text_config.sliding_window": 4},
    # text detectors take four stages, each half the size of the one before; backbones by default are for lines of text
    "pp_ocrv5_mobile_det": {"backbone_config.block_configs": _BLOCKS, "backbone_config.scale": 1.0},
    "pp_ocrv6_small_det": {
        "backbone_config.block_configs": _BLOCKS[1:],
        "layer_list_out_channels": (16, 32, 48, 64),
        **_FOUR_STAGES,
    },
    "pp_ocrv6_medium_det": {"backbone_config.block_configs": _BLOCKS[1:], **_FOUR_STAGES, **_INTRACLASS},
    "pp_ocrv5_server_det": dict(_INTRACLASS),
    # the default has no attention layer, and the code fails without one
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    # a state is as large as the code's rounding, up to multiples of 64, of half the width
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    # the language of the adapters is an input, or this default
    "xmod": {"default_language": "en_XX"},
    # the default has no rotary parameters, and the code looks them up
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            "full_attention": {"rope_type": "default", "rope_theta": 50000.0, "mrope_section": [2, 1, 1]},
        },
    },
    # its code reads a field that its configuration does not have
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    # a head's dimension is the sum of its two parts, in the layers where one of them is larger
    "dots3_note_text": {"head_dim": 24},
    # its cache counts layers that only the parts have
    "blt": {"use_cache": False},
    # two axes take the rotated dimensions by fours
    "neomme": {"head_dim": 16},
    # layers by pairs, in a notation of its own
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    # which layers are convolutions, or look at few tokens, is not in the default
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    # sizes that have no default
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 300,
        "split_ngram_parts": 4,
    },
    # the positions' two factors sum to the width, and their product is the longest text
    "reformer": {"axial_pos_shape": (8, 8), "axial_pos_embds_dim": (8, 24), "max_position_embeddings": 64},
    # the attention layers share their weights: it takes two of them
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
    },
    # checkpoints have it, the default does not
    "t5": {"decoder_start_token_id": 0},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    # the width is divided by 4, then by the size of a box, then by 2
    "bros": {"hidden_size": 64},
    # four coordinates and two sides of a box make the width
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    # six coordinates of a box make the width
    "lilt": {"hidden_size": 48},
    # ids of tags, not of tokens
    "markuplm": {"tag_pad_id": 216, "subs_pad_id": 1001},
    # its code halves the image four times, whatever the patch size says, and twice more between the stages
    "levit": {"patch_size": 16, "image_size": 64},
    # its code reads a field that its configuration does not have
    "moonshine_streaming": {"num_key_value_heads": 4},
    # the tokens of its two answers are no fields, and the code's defaults are outside a small vocabulary
    "shieldgemma2": {"yes_token_index": 11, "no_token_index": 12},
}

# Values that a task asks for, where the configuration has such a field.
TASK_FIELDS: dict[str, dict[str, Any]] = {
    # encoders are causal only when they are told so
    "causal-lm": {"is_decoder": True},
    # the size of a head that a base model does without
    "ctc": {"vocab_size": 320},
    # the text goes through the layers that are only made when this is said
    "zero-shot-image-classification": {"qformer_config.use_qformer_text_input": True, "image_token_index": None},
}

# Reasons why a type cannot be made, where the library's own message does not say it.
_ASSISTANT = "every layer reads the attention states of another model, and the library refuses to make such a model"
REASONS: dict[str, str] = {
    "gemma4_assistant": f"gemma4_assistant: {_ASSISTANT}",
    "gemma4_unified_assistant": f"gemma4_unified_assistant: {_ASSISTANT}",
}
