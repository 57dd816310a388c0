"""Make a small configuration of any type, by rules on what its fields are called and how their values relate.

The default configuration is read field by field. A rule turns a size into a small one of the same kind: every
width becomes `WIDTH`, every number of heads `HEADS`, every head dimension `WIDTH / HEADS`, so that sizes
which have to agree between the parts of a composite model agree without being told. Fields that the class
derives from others are left to it. Lists with one entry per layer are cut so that each kind of layer stays.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

from transformers import PreTrainedConfig, ResNetConfig, SiglipVisionConfig

from .overrides import OVERRIDES

VOCABULARY = 320
SPECIAL = 300  # token ids from here on are special ones; plain text may use 10 .. SPECIAL - 1
WIDTH = 32
HEADS = 4
HEAD_DIM = WIDTH // HEADS
FFN = 48
LAYERS = 3
POSITIONS = 64
EXPERTS = 4
LABELS = 7
IMAGE = 32
PATCH = 8
QUERIES = 6


def shrink(config: PreTrainedConfig, extra: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """A small configuration of the same class; ``extra`` replaces fields (dotted keys reach into parts)."""
    return _Shrinker(config, extra or {}).run()


# ---------------------------------------------------------------------------------------------------------
# Rules for integers: the first whose pattern matches the name decides; None means "leave it alone".

Rule = Callable[[int, "_Shrinker"], "int | float | None"]


def _at_most(limit: int) -> Rule:
    return lambda value, _: min(value, limit)


def _exactly(size: int) -> Rule:
    return lambda value, _: size if value > 0 else value


def _keep(value: int, _: _Shrinker) -> int:
    return value


def _width(value: int, shrinker: _Shrinker) -> int:
    """A width: a multiple or a fraction of the model's own stays one."""
    return shrinker.scaled(value)


def _kv_heads(value: int, shrinker: _Shrinker) -> int:
    heads = shrinker.heads_before
    return value if value <= 1 else HEADS if heads is not None and value == heads else HEADS // 2


def _head_dim(value: int, shrinker: _Shrinker) -> int:
    return shrinker.head_dim if value > 0 else value


def _plain_heads(value: int, shrinker: _Shrinker) -> int:
    """Heads of attention, or of a state-space layer if its expansion says that this is one."""
    return shrinker.inner // HEAD_DIM if "expand" in shrinker.values else HEADS


def _ssm_heads(value: int, shrinker: _Shrinker) -> int:
    return shrinker.inner // HEAD_DIM


def _inner(value: int, shrinker: _Shrinker) -> int:
    return shrinker.inner if value > 0 else value


def _period(value: int, _: _Shrinker) -> int:
    return min(value, 2)


def _last_layer(value: int, shrinker: _Shrinker) -> int:
    return value if value < shrinker.layers else shrinker.layers - 1


def _token(value: int, shrinker: _Shrinker) -> int:
    return shrinker.token(value)


def _window(value: int, shrinker: _Shrinker) -> int:
    """Two cells, which are counted in pixels where cells are merged."""
    merged = shrinker.values.get("spatial_merge_size")
    return min(value, 2 * PATCH * merged if isinstance(merged, int) else 2)


def _vocabulary(value: int, _: _Shrinker) -> int:
    return min(value, VOCABULARY)


# Widths of another part, of which this one takes or makes states.
_OTHER_WIDTH = r"^(cross|encoder|decoder|out|text)_hidden_size$|^(post_conv_out_channels|adapter_out_dim)$"

_INTEGERS: list[tuple[str, Rule]] = [
    # pictures, queries and sounds
    (r"^(num_queries|two_stage_num_proposals)$", _at_most(QUERIES)),
    (r"^(num_query_tokens|num_latents|latent_query_num)$", _at_most(QUERIES)),
    (r"^group_detr$", _at_most(2)),
    (r"^num_windows$|^num_groups$|^num_frames$|^num_filters$", _at_most(4)),
    (r"^window_size$", _window),
    (r"^mm_tokens_per_image$", _at_most(4)),
    (rf"{_OTHER_WIDTH}|^hidden_size_global$", _exactly(WIDTH)),
    (r"^base_channels$", _exactly(WIDTH)),
    (r"^num_embeddings$", _at_most(VOCABULARY)),
    (r"^index_kpool$", _at_most(2)),
    (r"^canvas_length$", _at_most(8)),
    (r"^acoustic_tokenizer_chunk_size$", _keep),
    # per-layer structure
    (r"(^|_)(first_k_dense_replace|num_dense_layers|num_kv_shared_layers|num_nextn_predict_layers)$", _at_most(1)),
    (r"(^|_)(max_window_layers)$", _at_most(1)),
    (r"layer_(start|end)_index$", _last_layer),
    (r"(_period|_interval|_every_n_layers|_pattern|sparse_step|layer_group_size|interleave_moe_layer_step)$", _period),
    (r"layer_offset$", _at_most(1)),
    # experts
    (r"(shared|zero)_(experts?|expert_num)$|expert_num$|num_shared", _at_most(2)),
    (r"(num_experts|n_routed_experts|num_local_experts|n_experts)$", _at_most(EXPERTS)),
    (r"(experts_per_tok(en)?|top_k|topk|top_k_experts|moe_k|num_selected_experts)$", _at_most(2)),
    (r"^(n_group|num_expert_group)$", _at_most(2)),
    (r"^topk_group$", _at_most(1)),
    (r"^expert_capacity$", _exactly(16)),
    # tokens
    (r"(token_id|token_index|token_idx|tok_id|pad_id)$|^(bos|eos|pad|unk|mask|sep|cls)_(index|idx|id)$", _token),
    (r"type_vocab_size$", _keep),
    (r"vocab_size(_per_layer_input)?$|^n_vocab$|^n_tokens$", _vocabulary),
    (r"_group_vocab$|^num_hash_buckets$", _vocabulary),
    # state-space layers
    (r"^num_heads$", _plain_heads),
    (r"^(mamba_n_heads|mamba_num_heads|n_mamba_heads)$", _ssm_heads),
    (r"^(mamba_d_head|mamba_head_dim|mamba_headdim)$", _exactly(HEAD_DIM)),
    (r"^mamba_d_ssm$", _inner),
    (r"(d_state|state_size)$", _exactly(8)),
    (r"(dt_rank|time_step_rank)$", _exactly(4)),
    (r"(n_groups|ngroups)$", _at_most(2)),
    (r"(d_conv|conv_kernel|conv_kernel_size|kernel_size|conv_kernel_dim|conv_L_cache|conv1d_width)$", _keep),
    (r"(^|_)chunk_size$", lambda value, _: min(value, 16)),
    # attention
    (r"(kv_heads|key_value_heads)$", _kv_heads),
    (r"(^|_)(num_key_heads)$", _exactly(HEADS // 2)),
    (r"(^|_)(n_heads?|num_heads|attention_heads|attention_head_num|value_heads|encoder_heads)$", _exactly(HEADS)),
    (r"(head_dim|d_head|dim_head|d_kv|kv_channels|attention_head_size|head_size)$", _head_dim),
    (r"^rotary_dim$", _exactly(HEAD_DIM // 2)),
    (r"lora_rank$|_rank$|lowrank$", _exactly(16)),
    (r"^(query_pre_attn_scalar)$", _exactly(HEAD_DIM)),
    (r"(index_topk|index_topk_blocks)$", _at_most(4)),
    (
        r"(sliding_window(_size)?|window_len|attention_chunk_size|local_attention|attention_window(_size)?)$",
        _at_most(4),
    ),
    # positions
    (
        r"(max_position_embeddings|n_positions|max_seq_len|max_sequence_length|context_length|n_ctx)$",
        _exactly(POSITIONS),
    ),
    (r"max_(source|target)_positions$", _exactly(POSITIONS)),
    (r"2d_position_embeddings$", _exactly(POSITIONS)),
    # layers
    (r"^(num_hidden_layers|n_layers?|num_layers)$", lambda value, shrinker: shrinker.layers),
    (r"^(encoder|decoder)_layers$", _exactly(LAYERS)),
    (r"(_layers|_num_layers|^depth)$", lambda value, _: min(value, LAYERS)),
    # images
    (r"image_size$", lambda value, shrinker: min(value, shrinker.image)),
    (r"patch_size$", _at_most(PATCH)),
    # multipliers of the final scores, kept away from 1 so that a dropped one shows
    (r"^dim_model_base$", _exactly(16)),
    (r"_per_block$", _at_most(LAYERS)),
    (r"^hidden_size_per_layer_input$", _exactly(WIDTH // 2)),
    # widths
    (
        r"(intermediate_size(_mlp)?|ffn_dim|ffn_hidden_size|d_ff|dff|dim_ff|d_inner|n_inner|feed_forward_size)$",
        _exactly(FFN),
    ),
    (r"(hidden_size|d_model|n_embd|embed_dim|emb_dim|embedding_size|embedding_dim|hidden_dim)$|^dim$", _width),
    (r"^d_latents$", _width),
    (r"(_size|_dim|_dims|_width|_channels|_features)$", _width),
]
_COMPILED = [(re.compile(pattern), rule) for pattern, rule in _INTEGERS]

# Factors and caps of the final scores: not at a value that changes nothing, so that a dropped one shows.
_SCALES: dict[str, float] = {
    "final_logit_softcapping": 2.0,
    "logits_soft_cap": 2.0,
    "output_logit_soft_cap": 2.0,
    "logit_scale": 0.25,
    "logits_scaling": 8.0,
    "lm_head_multiplier": 0.25,
    "logits_mup_width_multiplier": 4.0,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.22,
}

_LAYER_COUNT = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
_WIDTHS = ("hidden_size", "d_model", "n_embd", "emb_dim", "embed_dim", "dim", "embedding_dim")
_HEAD_COUNT = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads")
_INDEX_LIST = re.compile(r"(_ids|_idxs|_indices|_indexes|only_layers|moe_layers)$")
_STAGES = re.compile(r"depths|hidden_sizes|embed_dims|stage|block_configs|channels|unit_dims")
_CHANNELS = re.compile(r"(?<!image)(?<!kernel)(?<!patch)_(size|sizes|width|channels|dims?)$")
# Networks of convolutions that are made wider and deeper by a factor: the factor is small, the numbers stay.
_COEFFICIENTS: dict[str, Callable[[Any, _Shrinker], Any]] = {
    "width_coefficient": lambda value, _: 0.25,
    "depth_coefficient": lambda value, _: 0.5,
    "hidden_dim": lambda value, shrinker: int(value * 0.25 / shrinker.values["width_coefficient"]),
    "in_channels": lambda value, _: value,
    "out_channels": lambda value, _: value,
    "num_block_repeats": lambda value, _: value,
}
# What a model needs although its configuration may say nothing: set where the class does not work it out either.
_NEEDED: dict[str, int] = {
    "head_dim": HEAD_DIM,
    "num_key_value_heads": HEADS // 2,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
}
_DROPPED = ("quantization_config", "per_layer_config")


class _Shrinker:
    """One configuration on its way to a small one."""

    def __init__(self, config: PreTrainedConfig, extra: Mapping[str, Any]) -> None:
        self.config = config
        self.values = _values(config)
        self.usual = _usual(type(config))
        self.defaults: dict[str, Any] = {
            field.name: field.default for field in dataclasses.fields(cast(Any, type(config)))
        }
        overrides = OVERRIDES.get(type(config).__name__, {}) | OVERRIDES.get(config.model_type, {}) | dict(extra)
        self.own = {key: value for key, value in overrides.items() if "." not in key}
        self.below: dict[str, dict[str, Any]] = {}
        for key, value in overrides.items():
            if "." in key:
                part, rest = key.split(".", 1)
                self.below.setdefault(part, {})[rest] = value
        self.width_before = self._first(_WIDTHS)
        self.heads_before = self._first(_HEAD_COUNT)
        self.layers_before = self._first(_LAYER_COUNT)
        self.head_dim = self._choose_head_dim()
        self.inner = WIDTH * int(self._first(("expand", "mamba_expand")) or 2)
        self.convolutional = self._is_convolutional()
        self.image = self._choose_image()
        spec = config.__dict__.get("_heterogeneity_spec")
        self.layer_overrides: dict[int, dict[str, Any]] = {} if spec is None else dict(spec.per_layer_overrides)
        self.picked = self._pick_layers()
        self.layers = len(self.picked)
        self.tokens: dict[int, int] = {}

    def run(self) -> PreTrainedConfig:
        """The small configuration."""
        changed: dict[str, Any] = {}
        derived: dict[str, Any] = {}
        for name, value in self.values.items():
            if name in _DROPPED:
                continue
            small = self._small(name, value)
            if small is value or _same(small, value):
                if not _same(value, self.defaults.get(name)) and self._stated(name, value):
                    changed[name] = value
            elif self._left(name, small):
                derived[name] = small
            else:
                changed[name] = small
        # What the class works out by itself is left to it, unless it comes out at the full size again.
        if self.layer_overrides:
            changed["per_layer_config"] = self._small_layer_overrides()
        if self.head_dim != HEAD_DIM and "head_dim" not in self.values:  # checkpoints give it all the same
            changed["head_dim"] = self.head_dim
        changed |= self.own
        try:
            result = self._make(changed)
        except Exception:  # what it works out does not go with the small sizes
            return self._make(changed | {name: small for name, small in derived.items() if name not in self.own})
        again = {
            name: small
            for name, small in derived.items()
            if name not in self.own and not self._reached(result, name, small)
        }
        values = _values(result)
        again |= {
            name: self._small_integer(name, size)
            for name, size in _NEEDED.items()
            if name in values and values[name] is None and name not in self.own
        }
        if again:
            result = self._make(changed | again)
        return result

    def _make(self, changed: dict[str, Any]) -> PreTrainedConfig:
        """A configuration of the class, with parts copied so that two attempts share none."""
        given = {name: value for name, value in changed.items() if name not in ("_out_features", "_out_indices")}
        cls = cast(Any, type(self.config))  # it takes more than its fields
        return cls(**self._taps(), **given, num_labels=LABELS)

    def _taps(self) -> dict[str, Any]:
        """Of a backbone, the stages whose states it gives out: as many as before, the last ones if layers were cut."""
        names: list[str] | None = getattr(self.config, "_out_features", None)
        if "out_features" in self.own:
            return {}
        stages = [int(name[5:]) for name in names or () if re.fullmatch(r"stage\d+", name)]
        if not names or len(stages) != len(names):
            return {}
        if self.layers_before is not None and stages[-1] > self.layers:
            stages = list(range(1, self.layers + 1))[-len(stages) :]
        return {"out_features": [f"stage{stage}" for stage in stages]}

    def _left(self, name: str, small: Any) -> bool:
        """Whether the class is first left to work a field out."""
        if self.defaults.get(name) is not None or name in _SCALES or isinstance(small, PreTrainedConfig):
            return False
        if name in self.usual and not _same(self.values[name], self.usual[name]):
            return False
        return not (self.layer_overrides and isinstance(small, list | tuple))  # single layers' sizes go with it

    def _stated(self, name: str, value: Any) -> bool:
        """Whether a value was given, rather than worked out by the class: those with a list are worked out."""
        if name in self.usual and _same(value, self.usual[name]):
            return False
        return not (self.defaults.get(name) is None and isinstance(value, list | tuple | dict))

    def _reached(self, result: PreTrainedConfig, name: str, small: Any) -> bool:
        """Whether the class itself derived a small enough value for a field."""
        now, before = _values(result).get(name), self.values[name]
        if isinstance(small, list | tuple):
            return isinstance(now, list | tuple) and len(now) == len(small) and _kinds(now) == _kinds(small)
        if isinstance(small, PreTrainedConfig):
            return False
        if name == "head_dim":  # a rotation may need more than a share of the width
            return _same(now, small)
        return not _same(now, before)

    # -- single fields ------------------------------------------------------------------------------------

    def _small(self, name: str, value: Any) -> Any:
        if isinstance(value, PreTrainedConfig):
            return shrink(_without_timm(value), self.below.get(name))
        if "width_coefficient" in self.values and name in _COEFFICIENTS:
            return _COEFFICIENTS[name](value, self)
        if (
            self.convolutional
            and not re.search(_OTHER_WIDTH, name)
            and (isinstance(value, list | tuple) or _CHANNELS.search(name))
        ):
            return _narrow(value, depth=name.endswith("depths"))
        if name in _SCALES and (value is None or isinstance(value, int | float)):
            return _SCALES[name]
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, int):
            return self._small_integer(name, value)
        if isinstance(value, list | tuple):
            items = cast("Sequence[Any]", value)
            return type(value)(self._small_list(name, items))
        if isinstance(value, dict):
            return self._small_dict(cast("dict[str, Any]", value))
        return value

    def _small_integer(self, name: str, value: int) -> Any:
        for pattern, rule in _COMPILED:
            if pattern.search(name):
                small = rule(value, self)
                return value if small is None else small
        return WIDTH if value == self.width_before and value > WIDTH else value

    def _small_list(self, name: str, value: Sequence[Any]) -> list[Any]:
        if _INDEX_LIST.search(name) and _integers(value) and _increasing(value):
            return [new for new, old in enumerate(self.picked) if old in value]
        if self._per_layer(value) and name.endswith("_source_layers"):
            # each entry is a layer whose states are taken: its new number, or the layer itself if it is gone
            return [
                self.picked.index(value[old]) if value[old] in self.picked else new
                for new, old in enumerate(self.picked)
            ]
        if self._per_layer(value):
            return [self._small_entry(name, value[index]) for index in self.picked]
        if name == "image_grid_pinpoints":  # high and wide of images in several crops
            return [[self.image, self.image], [self.image, 2 * self.image]]
        if not value or not _integers(value):
            return list(value)
        if re.search(r"(image|train)_size$", name):
            return [min(entry, self.image) for entry in value]
        if name.endswith("in_channels"):  # of the backbone whose states it takes
            return _narrow(list(value))
        if re.search(r"token_ids?$", name):
            return [self.token(entry) for entry in value]
        if re.search(r"(depths|num_layers|layer_depths)$", name):
            return [min(entry, 2) if index == 1 else 1 for index, entry in enumerate(value)]
        if re.search(r"(hidden_sizes|embed_dims|out_channels|dims|widths|stage_channels)$", name):
            return [WIDTH // 2 * 2**index for index in range(len(value))]
        if re.search(r"(heads)$", name):
            return [min(entry, 2**index) for index, entry in enumerate(value)]
        return list(value)

    def _small_entry(self, name: str, value: Any) -> Any:
        """One entry of a list with an entry per layer."""
        if isinstance(value, int) and not isinstance(value, bool):
            singular = re.sub(r"_per_layer$", "", name)
            return self._small_integer(singular, value)
        return value

    def _small_layer_overrides(self) -> dict[int, dict[str, Any]]:
        """Where single layers have other sizes than the rest: still other ones, twice or half as large."""
        small: dict[int, dict[str, Any]] = {}
        for new, old in enumerate(self.picked):
            for name, value in self.layer_overrides.get(old, {}).items():
                size, before = self._small(name, value), self.values.get(name)
                if type(value) is int and type(before) is int and size == self._small(name, before):
                    size = size * 2 if value > before else max(1, size // 2)
                small.setdefault(new, {})[name] = size
        return small

    def _small_dict(self, value: dict[str, Any]) -> dict[str, Any]:
        """Rotary parameters, which may be nested by the kind of layer: lists as long as half a head's rotation."""
        small: dict[str, Any] = {}
        for key, entry in value.items():
            if isinstance(entry, dict):
                small[key] = self._small_dict(cast("dict[str, Any]", entry))
            elif isinstance(entry, list) and key in ("short_factor", "long_factor", "mrope_section"):
                half = int(self.head_dim * float(value.get("partial_rotary_factor", 1.0))) // 2
                items = cast("list[Any]", entry)
                small[key] = _sections(half) if key == "mrope_section" else items[:half]
            elif isinstance(entry, int) and key == "original_max_position_embeddings":
                small[key] = min(entry, POSITIONS // 2)
            else:
                small[key] = entry
        return small

    # -- quantities that several fields share ---------------------------------------------------------------

    def scaled(self, value: int) -> int:
        """A width in proportion to the model's own, and never wider than twice it unless it is a multiple."""
        if value <= WIDTH // 2:
            return value
        before = self.width_before
        if before is None or value == before:
            return WIDTH
        if value % before == 0:
            return WIDTH * (value // before)
        return WIDTH if value > before else WIDTH // 2

    def token(self, value: int) -> int:
        """A token id inside the small vocabulary; different ids stay different."""
        if value < 10:
            return value
        return self.tokens.setdefault(value, SPECIAL + len(self.tokens) % (VOCABULARY - SPECIAL))

    def _is_convolutional(self) -> bool:
        """Whether this is a network of convolutions in stages, whose channels are related by its code alone."""
        if self._first(_HEAD_COUNT) is not None or "vocab_size" in self.values or "num_heads" in self.values:
            return False
        lists = [name for name, value in self.values.items() if isinstance(value, list | tuple) and value]
        return any(_STAGES.search(name) for name in lists) and not any("heads" in name for name in self.values)

    def _choose_image(self) -> int:
        """The side of an image that still has two cells after the last stage, two cells being a window."""
        depths, window = self.values.get("depths"), self.values.get("window_size")
        patch = self.values.get("patch_size", 4)
        if isinstance(depths, list | tuple) and isinstance(window, int) and isinstance(patch, int):
            return patch * 2 ** len(cast("Sequence[Any]", depths))
        return max(IMAGE, 2 * int(self.values.get("output_stride") or 0))

    def _first(self, names: Sequence[str]) -> int | None:
        """The first of some fields that holds a positive integer."""
        for name in names:
            value = self.values.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        return None

    def _choose_head_dim(self) -> int:
        """A head dimension of which the rotated part is even (and, with sections, has room for three of them)."""
        least = HEAD_DIM
        for parameters in _dicts(self.values.get("rope_parameters")):
            fraction = float(parameters.get("partial_rotary_factor", 1.0) or 1.0)
            needed = 8 if "mrope_section" in parameters else 2
            while int(least * fraction) < needed or int(least * fraction) % 2:
                least *= 2
        return least

    def _per_layer(self, value: Sequence[Any]) -> bool:
        return self.layers_before is not None and len(value) == self.layers_before and len(value) > 1

    def _pick_layers(self) -> list[int]:
        """Which layers of the full model stay: the first of each kind that a list names, and the last."""
        count = self.layers_before
        if count is None:
            return list(range(LAYERS))
        wanted: set[int] = set()
        overrides = [repr(self.layer_overrides.get(index)) for index in range(count)] if self.layer_overrides else None
        for name, value in [*self.values.items(), ("", overrides)]:
            if isinstance(value, list | tuple) and self._per_layer(cast("Sequence[Any]", value)):
                entries = cast("Sequence[Any]", value)
                if _INDEX_LIST.search(name) and _integers(entries):
                    continue
                seen: list[Any] = []
                for index, entry in enumerate(entries):
                    if entry not in seen:
                        seen.append(entry)
                        if len(seen) <= 4:
                            wanted.add(index)
        if wanted:
            wanted.add(count - 1)
        for index in range(count):
            if len(wanted) >= min(LAYERS, count):
                break
            wanted.add(index)
        return sorted(wanted)


def _values(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a configuration; one that is stored under another name is found there."""
    stored: dict[str, str] = getattr(config, "attribute_map", {})
    fields = [field.name for field in dataclasses.fields(cast(Any, type(config))) if field.init]
    found: dict[str, Any] = {}
    for name in fields:
        place = name if name in config.__dict__ else stored.get(name, name)
        if place in config.__dict__ and (place == name or place not in fields):
            found[name] = config.__dict__[place]
    return found


def _usual(cls: type[PreTrainedConfig]) -> dict[str, Any]:
    """The fields of a configuration to which nothing was given; none if it cannot be made so."""
    try:
        return _values(cls())
    except Exception:  # whatever a class raises about its own defaults
        return {}


def _without_timm(config: PreTrainedConfig) -> PreTrainedConfig:
    """A backbone or an image encoder of the library itself in the place of one that needs the package timm."""
    if config.model_type == "timm_backbone":
        taps: Sequence[int] = getattr(config, "out_indices", (4,))
        return cast(Any, ResNetConfig)(out_features=[f"stage{index}" for index in taps])
    if config.model_type == "timm_wrapper":
        return SiglipVisionConfig()
    return config


def _narrow(value: Any, *, depth: bool = False) -> Any:
    """Channels of a convolutional network, an eighth of them: equal numbers stay equal, multiples of 8 as well."""
    if isinstance(value, list | tuple):
        items = cast("Sequence[Any]", value)
        if depth:
            return type(value)(min(entry, 2) if index == 1 else 1 for index, entry in enumerate(items))
        return type(value)(_narrow(entry) for entry in items)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 16:
        return value
    return 8 * math.ceil(value / 64)


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, PreTrainedConfig) or isinstance(right, PreTrainedConfig):
        return left is right
    try:
        return type(left) is type(right) and bool(left == right)
    except (TypeError, ValueError, RuntimeError):
        return False


def _kinds(values: Any) -> set[str]:
    return {repr(value) for value in values}


def _integers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in values)


def _increasing(values: Sequence[Any]) -> bool:
    return all(left < right for left, right in pairwise(values))


def _dicts(value: Any) -> list[dict[str, Any]]:
    """A dictionary and those inside it."""
    if not isinstance(value, dict):
        return []
    mapping = cast("dict[str, Any]", value)
    return [mapping, *(inner for entry in mapping.values() for inner in _dicts(entry))]


def _sections(half: int) -> list[int]:
    """Three parts of a rotation's frequencies, the first the largest."""
    rest = max(1, math.floor(half / 4))
    return [half - 2 * rest, rest, rest]
