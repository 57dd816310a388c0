"""Small random models of any type that transformers knows, made from the type's own default configuration.

Nothing is downloaded. `build` gives a model that runs in milliseconds and whose norms, biases, scales and caps are
away from the values at which they do nothing, so that leaving one out gives visibly wrong numbers.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from logitlab.errors import InputError
from logitlab.models.example import example_inputs

from .overrides import REASONS, START, TASK_FIELDS
from .shrink import shrink

__all__ = ["TASKS", "CannotBuild", "Task", "build", "calibrate", "configure", "perturb", "types"]


class CannotBuild(Exception):  # noqa: N818 - a verdict on a type, which a sweep counts
    """A type has no small model here; the message is the reason, on one line."""


@dataclass(frozen=True)
class Task:
    """One of the lists in which transformers says which class serves which model type for a task.

    ``mapping`` is the list's name in `transformers.models.auto.modeling_auto`.
    """

    name: str
    mapping: str


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("causal-lm", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
        Task("masked-lm", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
        Task("seq2seq-lm", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
        Task("sequence-classification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
        Task("token-classification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"),
        Task("image-classification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
        Task("image-text-to-text", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
        Task("zero-shot-image-classification", "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
        Task("object-detection", "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES"),
        Task("speech-to-text", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"),
        Task("ctc", "MODEL_FOR_CTC_MAPPING_NAMES"),
        Task("audio-classification", "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES"),
    )
}


def _classes(task: str) -> dict[str, str]:
    """The class name of every model type of a task."""
    if task not in TASKS:
        raise InputError(f"there is no task {task!r}: use one of {', '.join(TASKS)}")
    names = cast("dict[str, str | tuple[str, ...]]", getattr(modeling_auto, TASKS[task].mapping))
    return {key: value if isinstance(value, str) else value[0] for key, value in names.items()}


def types(task: str) -> list[str]:
    """All model types of a task, in the order of the library; InputError if there is no such task."""
    return list(_classes(task))


def configure(task: str, model_type: str) -> PreTrainedConfig:
    """The small configuration from which `build` makes a model; the same errors."""
    return _prepare(task, model_type)[1]


def build(task: str, model_type: str, seed: int = 0) -> torch.nn.Module:
    """A small random model of a type for a task: float32, in evaluation mode, the same for the same seed.

    Raises InputError for an unknown task, or a type that the task does not list, and CannotBuild where the model
    cannot be made, such as when it needs a package that is not installed.
    """
    cls, config = _prepare(task, model_type)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        try:
            model = cast(torch.nn.Module, cls._from_config(config, dtype=torch.float32))
        except Exception as error:
            raise CannotBuild(_line(model_type, error)) from error
        model = model.float().eval()
        perturb(model)
        calibrate(model)
    return model


def _prepare(task: str, model_type: str) -> tuple[Any, PreTrainedConfig]:
    """The class and the small configuration of a type."""
    classes = _classes(task)
    if model_type not in classes:
        raise InputError(f"the task {task!r} has no model type {model_type!r}: logitlab.zoo.types({task!r}) lists them")
    if model_type in REASONS:
        raise CannotBuild(REASONS[model_type])
    try:
        cls: Any = getattr(transformers, classes[model_type])
        config = CONFIG_MAPPING[model_type](**START.get(model_type, {}))
        config = _part_for(cls, config)
        extra = {
            key: value
            for key, value in TASK_FIELDS.get(task, {}).items()
            if key.split(".")[0] in type(config).__dataclass_fields__
        }
        return cls, shrink(config, extra)
    except Exception as error:
        raise CannotBuild(_line(model_type, error)) from error


def _part_for(cls: Any, config: PreTrainedConfig) -> PreTrainedConfig:
    """A composite configuration, or the part of it that the class is made from."""
    wanted = getattr(cls, "config_class", None)
    if wanted is None or isinstance(config, wanted):
        return config
    parts = (value for value in vars(config).values() if isinstance(value, wanted))
    return next(parts, config)


def _line(model_type: str, error: Exception) -> str:
    """An error as one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{model_type}: {type(error).__name__}: {text}"[:300]


def perturb(model: torch.nn.Module) -> None:
    """Move norms, biases and weights far from their initial values, in place, with the current random state.

    Matrices get a standard deviation at which the states of a narrow model stay of the order of one.
    """
    convolutions = {id(part.weight) for part in model.modules() if isinstance(part, torch.nn.Conv2d | torch.nn.Conv3d)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point() or parameter.numel() == 0 or "A_log" in name:
                continue
            if parameter.ndim <= 1:
                parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim else 0.1))
                continue
            inputs = parameter.shape[-1] if parameter.ndim == 2 else max(parameter.shape[-2:])
            target = 0.6 / inputs**0.5
            spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
            if id(parameter) in convolutions:  # most are followed by a rectifier, which halves the variance
                parameter.copy_(torch.randn_like(parameter) * 1.2 / parameter[0].numel() ** 0.5)
            elif spread < 1e-6:
                parameter.add_(torch.randn_like(parameter) * target)
            elif parameter.ndim == 2 or spread < target:
                parameter.mul_(target / spread)
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point() and name.endswith(("_bias", "running_mean")):
                buffer.add_(torch.randn_like(buffer) * 0.3)


def calibrate(model: torch.nn.Module) -> None:
    """Set the statistics of batch norms, in place, to those of an example, as training does.

    With their initial ones they change nothing, and through a deep network of convolutions the input is lost or grows
    without bound. Channels are scaled together, so that one value per channel is enough.
    """
    norms = [
        part for part in model.modules() if {"running_mean", "running_var"} <= {n for n, _ in part.named_buffers()}
    ]
    norms = [part for part in norms if not list(part.children())]
    if not norms:
        return

    def measure(norm: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        size = float(inputs[0].square().mean().clamp_min(1e-6))
        norm.running_var.copy_((torch.rand_like(norm.running_var) + 0.5) * size)
        norm.running_mean.copy_(torch.randn_like(norm.running_mean) * 0.3 * size**0.5)

    hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
    try:
        with torch.no_grad():
            model(**example_inputs(model))
    except Exception:  # noqa: S110 - whoever runs it will see what it is
        pass
    finally:
        for hook in hooks:
            hook.remove()
