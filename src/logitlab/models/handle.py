"""The handle: a model, its stack, its tail, and what was proved about them."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from logitlab.errors import InputError, ModelError, VerificationError
from logitlab.models.decompose import BlockParts, decompose
from logitlab.models.encoder import Encoder
from logitlab.models.inputs import Encoded
from logitlab.models.interfere import suspended
from logitlab.models.output import Output, Space, configs_of, output_of, space_of
from logitlab.models.sites import INDEXED_KINDS, Site, SiteSpec, normalise_request, select_layers
from logitlab.models.stack import Found, Stack, find_stacks
from logitlab.models.tail import Tail
from logitlab.models.template import Template, device_of, forward_parameters
from logitlab.models.verify import (
    Check,
    Judgement,
    UnrelatedStackError,
    Verification,
    offers,
    verify_decompositions,
    verify_tail,
)
from logitlab.models.vocabulary import ColumnLabels, Vocabulary
from logitlab.models.weights import stored


@dataclass(frozen=True)
class Continuation:
    """Whether a model goes on from its cache as it would have gone on without a break.

    Attributes:
        state: of what it was found out: weights, hooks and the like, as one number.
        tokens: up to how many tokens it was proved; 0 if it does not.
    """

    state: int
    tokens: int


class Model:
    """A verified model. Made by `logitlab.load` and `logitlab.wrap`.

    Attributes:
        module: the torch module, untouched, in evaluation mode.
        tokenizer: its tokenizer, or None.
        name: what it is called in readings.
        stacks: every layer stack that a forward pass on tokens runs through.
        stack: the one that is read.
        tail: what decodes a hidden state of that stack.
        verification: what was proved, in values.
        processor: what prepares its pictures or sounds, or None.
        vocabulary: labels for token ids.
        columns: labels for the columns of its output: token ids, or classes.
        continuation: what was found out about going on from its cache; None while nobody has needed it.
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any,
        name: str,
        template: Template,
        stacks: Sequence[Stack],
        stack: Stack,
        tail: Tail,
        tail_check: Check,
        fast_form: Check,
        processor: Any = None,
    ) -> None:
        self.module = module
        self.tokenizer = tokenizer
        self.processor = processor
        self.name = name
        self.template = template
        self.stacks = tuple(stacks)
        self.stack = stack
        self.tail = tail
        self.verification = Verification(tail_check, fast_form, _describe(tail), lambda: self._taken_apart[1])
        self.vocabulary = Vocabulary(tokenizer, tail.vocab_size)
        self.columns = column_labels(module, tail.space, self.vocabulary)
        self.continuation: Continuation | None = None

    def __repr__(self) -> str:
        return (
            f"Model({self.name}: {self.stack.name}, {self.n_layers} layers of width {self.width}, "
            f"vocabulary {self.vocab_size}; {self.verification.text})"
        )

    @contextmanager
    def exclusive(self) -> Generator[None]:
        """Hold the module for one piece of work: one thread at a time, in evaluation mode.

        The lock belongs to the module, so two handles on one module share it. What was in training
        mode is again afterwards.
        """
        with _lock_of(self.module):
            training = [m for m in self.module.modules() if m.training]
            for m in training:
                m.training = False
            try:
                yield
            finally:
                for m in training:
                    m.training = True

    @cached_property
    def _taken_apart(self) -> tuple[tuple[BlockParts, ...], Judgement]:
        with self.exclusive(), suspended():
            try:
                parts = decompose(self.module, self.stack, self.template)
            except NotImplementedError as error:  # a quantised weight can do little beside its own forward pass
                why = f"its weights cannot be taken apart ({' '.join(str(error).split())[:80]})"
                kinds = ("attn_out", "cross_attn_out", "mlp_out", "head_out", "neuron")
                parts = [BlockParts(reasons=dict.fromkeys(kinds, why)) for _ in self.stack.blocks]
        judgement = verify_decompositions(parts, self.dtype)
        return tuple(parts), judgement

    @property
    def parts(self) -> tuple[BlockParts, ...]:
        """What each block adds to the residual stream, as far as it was proved."""
        return self._taken_apart[0]

    @property
    def space(self) -> Space:
        """The space that hidden states are decoded into."""
        return self.tail.space

    @property
    def n_layers(self) -> int:
        """Number of blocks in the stack."""
        return len(self.stack)

    @property
    def width(self) -> int:
        """Size of a hidden state."""
        return self.stack.width

    @property
    def vocab_size(self) -> int:
        """Number of columns of the logits."""
        return self.tail.vocab_size

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the model's parameters."""
        return _dtype(self.module)

    @property
    def device(self) -> torch.device:
        """Where inputs are put."""
        return device_of(self.module)

    @property
    def encoder_decoder(self) -> bool:
        """Whether inputs go to an encoder and the read sequence is the decoder's."""
        return self.template.encoder_decoder

    @cached_property
    def context_length(self) -> int | None:
        """Longest sequence that the model's configuration allows, or None if it names none."""
        config: Any = getattr(self.module, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        for name in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"):
            value = getattr(text, name, None)
            if isinstance(value, int) and value > 0:
                return value - self._reserved_positions(value)
        return None

    def _reserved_positions(self, size: int) -> int:
        """Rows of a position embedding that no token gets (RoBERTa counts from its padding index on)."""
        for m in self.module.modules():
            if not isinstance(m, nn.Embedding) or m.padding_idx is None or size == self.input_vocab_size:
                continue
            if m.num_embeddings == size:
                return int(m.padding_idx) + 1
        return 0

    @property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 over the configuration and a fixed sample of every parameter.

        For each parameter its name, shape, dtype and up to 64 evenly spaced values are hashed, so a
        fingerprint takes milliseconds, follows the weights when they change, and works for models in
        memory; a change of a few values between the sampled ones is not seen.
        """
        digest = hashlib.sha256()
        config: Any = getattr(self.module, "config", None)
        if hasattr(config, "to_dict"):
            kept = {k: v for k, v in config.to_dict().items() if not k.startswith("_") and k != "transformers_version"}
            digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
        tied: Any = getattr(self.module, "all_tied_weights_keys", None) or {}
        for name, parameter in self.module.named_parameters():
            if name in tied and parameter.device.type == "meta":
                continue  # off-loaded, it is no longer the same object as the one that it is tied to
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            owner, _, own_name = name.rpartition(".")
            for part in stored(self.module.get_submodule(owner), own_name):
                if not part.numel():
                    continue
                flat = part.reshape(-1)
                sample = flat[:: max(1, flat.numel() // 64)][:64].contiguous().cpu()
                digest.update(sample.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @property
    def about(self) -> dict[str, Any]:
        """What is kept of the model in files that belong to it (lenses, vectors, studies): plain values."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "stack": self.stack.name,
            "width": self.width,
            "layers": self.n_layers,
            "architecture": type(self.module).__name__,
        }

    def stacks_described(self) -> list[str]:
        """The layer stacks in words, the one that is read marked."""
        return [
            f"{s.name} ({len(s)} blocks of width {s.width}{', read' if s is self.stack else ''})" for s in self.stacks
        ]

    # -- sites ---------------------------------------------------------------------------------

    @property
    def last_site(self) -> Site:
        """The output of the last block: the state that the model itself decodes."""
        return Site(self.n_layers - 1, "resid_post")

    def select_sites(self, sites: str | Site | Iterable[str | Site] | None = None) -> list[Site]:
        """The sites that a request names, in order of depth; see `logitlab.models.sites`.

        A kind without an index (``3.head_out``) names all its components.

        Raises:
            InputError: a layer is out of range, a kind is unknown or not offered by this model, or a
                component index is too large.
        """
        chosen: set[Site] = set()
        if sites in (None, "resid") and not self.stack.enters_alike:
            sites = "resid_post"  # there is no state of this width before the first block
        for spec in normalise_request(sites):
            layers = select_layers(spec, self.n_layers)
            able = [layer for layer in layers if self.offers(layer, spec.kind)]
            if not able or (isinstance(spec.layers, int) and len(able) < len(layers)):
                why = self._reason(layers[0], spec.kind)
                raise InputError(f"site kind {spec.kind!r} is not offered at layer {layers[0]} of {self.name}: {why}")
            for layer in able:
                if spec.kind not in INDEXED_KINDS:
                    chosen.add(Site(layer, spec.kind))
                    continue
                block = self.parts[layer]
                projection = block.heads if spec.kind == "head_out" else block.neurons
                assert projection is not None
                if spec.index is not None and spec.index >= projection.parts:
                    raise InputError(
                        f"{layer}.{spec.kind}.{spec.index} does not exist: layer {layer} has {projection.parts} "
                        f"(0 to {projection.parts - 1})"
                    )
                indices = range(projection.parts) if spec.index is None else [spec.index]
                chosen.update(Site(layer, spec.kind, i) for i in indices)
        return sorted(chosen, key=lambda site: site.order)

    def offers(self, layer: int, kind: str) -> bool:
        """Whether a layer has a kind of site.

        Args:
            layer: number of the layer, from 0.
            kind: one of `logitlab.models.sites.KINDS`.

        Example:
            ``model.offers(0, "head_out")``
        """
        if kind == "resid_post":
            return True
        if kind == "resid_pre":
            return layer > 0 or self.stack.enters_alike
        return offers(self.parts[layer], kind)

    def _reason(self, layer: int, kind: str) -> str:
        if kind == "resid_pre":
            return "the first block takes a state of another shape"
        return self.parts[layer].reasons.get(kind, "not found")

    def value_vectors(self, layer: int, neurons: Sequence[int] | None = None) -> torch.Tensor:
        """What MLP neurons write to the residual stream, per unit of activation.

        Args:
            layer: number of the layer; negative ones count from the end.
            neurons: which neurons; None for all.

        Returns:
            [neurons, width] float32.

        Raises:
            InputError: the layer is out of range, or its MLP has no single output matrix.
        """
        (layer,) = select_layers(SiteSpec(layer, "neuron", None), self.n_layers)
        block = self.parts[layer]
        if block.neurons is None:
            raise InputError(f"layer {layer} of {self.name} has no value vectors: {block.reasons.get('neuron')}")
        bad = next((i for i in neurons or () if not 0 <= i < block.neurons.parts), None)
        if bad is not None:
            most = block.neurons.parts - 1
            raise InputError(f"neuron {bad} does not exist: layer {layer} has {most + 1} (0 to {most})")
        matrix = block.neurons.matrix()
        return matrix if neurons is None else matrix[list(neurons)]

    # -- inputs --------------------------------------------------------------------------------

    def encode(self, inputs: Any, *, decoder: Any = None, concepts: Sequence[Any] | None = None) -> list[Encoded]:
        """Inputs in any accepted form, ready for the model.

        Texts, chats, token ids and encoded tensors are those of `logitlab.models.inputs.encode`; pictures
        and sounds those of `logitlab.models.media.media_of`, alone or in a list.

        Args:
            inputs: what to read.
            decoder: what the decoder of an encoder-decoder model has already written.
            concepts: texts that pictures are compared with (pictures, where a text tower is read).
        """
        return Encoder(self).encode(inputs, decoder, concepts)

    @cached_property
    def input_vocab_size(self) -> int:
        """Number of token ids that go in: rows of the input embedding; 2**31 where ids are hashed."""
        try:
            embedding: Any = getattr(self.module, "get_input_embeddings", lambda: None)()
        except NotImplementedError:  # transformers asks the class to say which one it is
            embedding = None
        weight = getattr(embedding, "weight", None)
        if isinstance(weight, torch.Tensor):
            return int(weight.shape[0])
        config: Any = getattr(self.module, "config", None)
        sizes = [size for c in configs_of(config) if isinstance(size := getattr(c, "vocab_size", None), int)]
        if config is None:
            sizes = [m.num_embeddings for m in self.module.modules() if isinstance(m, nn.Embedding)]
        return max(sizes, default=2**31)

    @property
    def decoder_start(self) -> list[int]:
        """Token ids that a decoder starts with."""
        config: Any = getattr(self.module, "config", None)
        generation: Any = getattr(self.module, "generation_config", None)
        for source in (generation, config):
            for name in ("decoder_start_token_id", "bos_token_id"):
                value = getattr(source, name, None)
                if isinstance(value, int):
                    return [value]
        return []

    def check_free(self) -> None:
        """Raise `InputError` if this thread holds the model: another one could not get on then."""
        lock: Any = _lock_of(self.module)
        if lock._is_owned():
            raise InputError(
                f"{self.name} is at work in this very thread (in a callback, say): wait until that is done"
            )

    def takes(self, name: str) -> bool:
        """Whether the model's forward pass has a parameter of this name."""
        return name in forward_parameters(self.module)


_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def _lock_of(module: nn.Module) -> threading.RLock:
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(module, threading.RLock())


def wrap(
    module: nn.Module,
    tokenizer: Any = None,
    *,
    name: str | None = None,
    stack: str | None = None,
    example: Mapping[str, Any] | None = None,
) -> Model:
    """Find a model's layer stack and tail, and prove that the tail is right.

    Args:
        module: a Hugging Face model (or any module that takes ``input_ids`` and returns ``logits``);
            it is put into evaluation mode and otherwise left as it is.
        tokenizer: its tokenizer, processor, image processor or feature extractor, or None.
        name: what to call it; by default the name that its configuration carries.
        stack: which layer stack to read, by (part of) its path; by default the last large one before
            the answer.
        example: keyword arguments of a small forward pass, for a module whose inputs have names that
            transformers does not use; by default they are made from the signature.

    Returns:
        The verified handle.

    Raises:
        ModelError: no layer stack or no logits were found, or ``stack`` names none.
        VerificationError: the tail does not reproduce the model's own logits.

    Example:
        ``model = wrap(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))``
    """
    module.eval()
    with _lock_of(module):
        return _wrapped(module, tokenizer, name, stack, example)


def _wrapped(
    module: nn.Module, tokenizer: Any, name: str | None, stack: str | None, example: Mapping[str, Any] | None
) -> Model:
    processor = tokenizer if _prepares_media(tokenizer) else None
    if processor is not None:
        tokenizer = getattr(processor, "tokenizer", None)
    template = Template.of(module, example)
    found = find_stacks(module, template)
    if stack is not None:
        if example is None and not any(stack in s.name for s in found.stacks):
            found = _with_picture(module, found)
            template = found.template
        groups = [_named(stack, found.stacks)]
    else:
        ordered = _in_order(found)
        groups = [[s for s in ordered if not _is_minor(s, found)], [s for s in ordered if _is_minor(s, found)]]
    failures: list[VerificationError] = []
    whole: Model | None = None
    for group in groups:
        for chosen in group:
            tail = _tail(module, chosen, found)
            try:
                checked, fast = verify_tail(tail, _dtype(module))
            except UnrelatedStackError as failure:
                failures.append(failure)
                continue
            except VerificationError as failure:
                # Stacks before one that should be readable and is not would say nothing about its layers.
                if whole is None:
                    raise
                failures.append(failure)
                continue
            later = any(s.end > chosen.end and s.composed for s in found.stacks)
            if tail.by is None and tail.space.per == "position" and tail.space.name != "boxes" and later:
                tail.space = replace(tail.space, per="output")  # equal lengths by chance: another stack answers
            title = name or _name(module)
            model = Model(module, tokenizer, title, template, found.stacks, chosen, tail, checked, fast, processor)
            if tail.by is not None or tail.space.per == "input" or tail.space.name == "boxes":
                return model
            whole = whole or model  # a stack whose rows can be decoded comes before one whose whole states can
        if failures and whole is None:
            break  # that a minor chain could be decoded says nothing about the model's layers
    if whole is not None:
        return whole
    raise failures[0]


def _with_picture(module: nn.Module, found: Found) -> Found:
    """The pass over an example that has a picture in it, for towers that text alone does not reach."""
    from logitlab.models.example import example_inputs

    try:
        return find_stacks(module, Template.of(module, example_inputs(module, vision=True)))
    except ModelError:  # no such example can be made: what was found without it stands
        return found


def _is_minor(stack: Stack, found: Found) -> bool:
    """Whether a chain is too small to be the model's layers (an output head made of several, say)."""
    return not stack.composed or 500 * stack.n_parameters < sum(s.n_parameters for s in found.stacks)


def column_labels(module: nn.Module, space: Space, vocabulary: Vocabulary) -> Vocabulary:
    """What the columns of a space are called."""
    if space.name == "vocabulary":
        return vocabulary
    if space.name == "concepts":
        return ColumnLabels([f"concept {i}" for i in range(space.size)])
    names: Any = getattr(getattr(module, "config", None), "id2label", None) or {}
    labels = [str(names.get(i, names.get(str(i), f"class {i}"))) for i in range(space.size)]
    if space.name == "boxes" and space.size not in (len(names), len(names) + 1):
        return ColumnLabels([f"query {i}" for i in range(space.size)])  # open vocabulary: the texts are the columns
    if space.name == "boxes" and space.activation == "softmax":
        labels[-1] = "no object"  # the column that a softmax detector has beyond its labels
    return ColumnLabels(labels)


def _prepares_media(tokenizer: Any) -> bool:
    names = ("image_processor", "feature_extractor")
    return any(hasattr(tokenizer, n) for n in names) or (
        tokenizer is not None and not hasattr(tokenizer, "convert_ids_to_tokens")
    )


def _in_order(found: Found) -> list[Stack]:
    """Stacks in the order in which they are tried: the last one before the answer first.

    Of two towers that are compared with each other, the one of the picture comes first; a single
    block comes after a stack of several that ends later.
    """
    output = output_of(found.output, pixels=found.template.pixels)

    def key(stack: Stack) -> tuple[bool, bool, int]:
        pictures = output is None or not output.name.startswith("logits_per_") or _about_pictures(stack, output)
        single = len(stack) == 1 and any(len(s) > 1 and s.composed and s.end > stack.end for s in found.stacks)
        return (single, not pictures, -stack.end)

    return sorted(found.stacks, key=key)


def _about_pictures(stack: Stack, output: Output) -> bool:
    return stack.batch == output.logits.shape[0]


def _tail(module: nn.Module, stack: Stack, found: Found) -> Tail:
    output = output_of(found.output, pixels=found.template.pixels)
    assert output is not None
    texts = output.name.startswith("logits_per_") and not _about_pictures(stack, output)
    if texts:
        output = output_of(found.output, texts=True) or output
    tokens = found.template.tokens is not None
    tail = Tail(module, stack, found, space_of(output, module, stack.batch, stack.positions, tokens=tokens))
    tail.texts = texts
    return tail


def _named(name: str, stacks: Sequence[Stack]) -> list[Stack]:
    found = [s for s in stacks if s.name == name] or [s for s in stacks if name in s.name]
    if len(found) != 1:
        names = ", ".join(s.name for s in stacks)
        problem = "names no layer stack" if not found else "fits several layer stacks"
        raise ModelError(f"stack={name!r} {problem} of this model; it has {names}")
    return found


def _describe(tail: Tail) -> str | None:
    head = tail.head
    if head is None:
        return None
    words = [f"linear {head.weight.shape[1]} -> {head.vocab_size}"]
    if head.bias is not None:
        words.append("bias")
    if head.scale != 1.0:
        words.append(f"scale {head.scale:g}")
    if head.softcap is not None:
        words.append(f"soft-cap {head.softcap:g}")
    if head.offset is not None:
        words.append("offset")
    return ", ".join(words)


def _dtype(module: nn.Module) -> torch.dtype:
    """Coarsest floating dtype among the parameters; those of one byte only store numbers, and are left out."""
    dtypes = {p.dtype for p in module.parameters() if p.is_floating_point() and p.dtype.itemsize > 1}
    return max(dtypes, key=lambda d: torch.finfo(d).eps, default=torch.float32)


def _name(module: nn.Module) -> str:
    config: Any = getattr(module, "config", None)
    name = str(getattr(config, "_name_or_path", "") or "")
    return name.rstrip("/").rpartition("/")[2] or type(module).__name__
