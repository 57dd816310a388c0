"""Models with quantised weights: loaded, saved, wrapped; what is dequantised equals what the model computes."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import logitlab as ll
from logitlab.models import load as loading
from logitlab.models.weights import dense, stored
from tests import zoo

TEXT = "The capital of France is"


def torchao() -> Any:
    """torchao's configurations; the test is skipped without it."""
    reason = "quantised weights need torchao: pip install 'torchao==0.18.0' (0.18.0 goes with torch 2.13)"
    return pytest.importorskip("torchao.quantization", reason=reason)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose widths are multiples of 32."""
    return zoo.save(tmp_path_factory.mktemp("model") / "tiny", intermediate_size=64)


def configured(kind: str) -> Any:
    """What a user would pass as ``quantize``."""
    if kind != "dynamic":
        return kind
    from transformers import TorchAoConfig

    return TorchAoConfig(torchao().Int8DynamicActivationInt8WeightConfig(version=2))


def own_logprobs(model: ll.Model) -> torch.Tensor:
    """Log-probabilities [tokens, V] by a plain call of the model."""
    ids = torch.tensor([model.tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        return torch.log_softmax(model.module(input_ids=ids).logits[0].double(), -1)


def assert_last_site_is(own: torch.Tensor, model: ll.Model, atol: float) -> None:
    """Compare what is read at the last site with log-probabilities [tokens, V]."""
    reading = ll.read(model, TEXT, target=5)
    np.testing.assert_allclose(reading.arrays["target_logprob"][0, -1, :, 0], own[:, 5], atol=atol, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "most"), [("int8", 0.3), ("dynamic", 0.3), ("int4", 3.0)])
def test_load_quantised(folder: Path, kind: str, most: float, dtype: str) -> None:
    torchao()
    plain, model = ll.load(folder, dtype=dtype), ll.load(folder, dtype=dtype, quantize=configured(kind))
    module: Any = model.module
    inside = [type(m.weight) for m in module.modules() if isinstance(m, torch.nn.Linear)]
    assert inside.count(torch.nn.Parameter) == 1  # the head
    assert type(module.lm_head.weight) is torch.nn.Parameter
    assert model.dtype == plain.dtype == getattr(torch, dtype)
    record = model.verification
    assert record.tail.error == 0.0
    assert record.fast_form.holds
    # the last site is what the quantised model says itself
    own = own_logprobs(model)
    assert_last_site_is(own, model, 2 * (record.fast_form.tolerance or 0.0))
    # and differs from the plain model's by what the quantisation changes, which is something
    change = float((own - own_logprobs(plain)).abs().max())
    assert 1e-4 < change < most
    assert model.fingerprint != plain.fingerprint


@pytest.mark.parametrize("kind", ["int8", "dynamic", "int4"])
def test_a_saved_quantised_folder_loads(folder: Path, tmp_path: Path, kind: str) -> None:
    torchao()
    model = ll.load(folder, quantize=configured(kind))
    module: Any = model.module
    module.save_pretrained(tmp_path)
    zoo.tokenizer().save_pretrained(tmp_path)
    again = ll.load(tmp_path)
    assert torch.equal(own_logprobs(again), own_logprobs(model))
    assert again.verification.fast_form.holds
    assert again.fingerprint == model.fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_head_is_read_dequantised(kind: str, tied: bool, dtype: torch.dtype) -> None:
    ao = torchao()
    module = zoo.build("llama", tie_word_embeddings=tied, intermediate_size=64).to(dtype)
    config = {
        "int8": ao.Int8WeightOnlyConfig(version=2),
        "int4": ao.IntxWeightOnlyConfig(weight_dtype=getattr(torch, "int4"), granularity=ao.PerGroup(32)),  # noqa: B009
    }[kind]
    kept = module.model.embed_tokens.weight.detach().clone()
    ao.quantize_(module, config)
    assert torch.equal(module.model.embed_tokens.weight, kept)  # tied or not, only the head is quantised
    model = ll.wrap(module, zoo.tokenizer())
    head = model.tail.head
    assert head is not None
    assert type(head.weight) is torch.Tensor
    assert type(module.lm_head.weight) is not torch.nn.Parameter
    levels = 2 ** int(kind[3:])
    original = zoo.build("llama", tie_word_embeddings=tied, intermediate_size=64).lm_head.weight.detach()
    step = original.abs().amax(1, keepdim=True) * 2 / (levels - 1)  # of a row; a group's is no larger
    error = (head.weight.float() - original).abs()
    assert bool((error <= 1.1 * step + 0.01 * original.abs()).all())
    assert float(error.max()) > 0
    assert_last_site_is(own_logprobs(model), model, 2 * (model.verification.fast_form.tolerance or 0.0))


def test_a_head_that_rounds_its_input_has_no_fast_form() -> None:
    """Dynamic quantisation of activations is no linear map: the model itself decodes."""
    ao = torchao()
    module = zoo.build("llama")
    ao.quantize_(module, ao.Int8DynamicActivationInt8WeightConfig(version=2))
    model = ll.wrap(module, zoo.tokenizer())
    check = model.verification.fast_form
    assert not check.holds
    assert check.error is not None
    assert check.tolerance is not None
    assert check.error > 100 * check.tolerance
    assert_last_site_is(own_logprobs(model), model, 1e-5)


def test_parts_of_quantised_blocks(folder: Path) -> None:
    torchao()
    record = ll.load(folder, quantize="int8").verification
    assert set(record.offered) == {"resid_pre", "resid_post", "attn_out", "mlp_out", "head_out", "neuron"}
    assert all(check.holds for check in record.decompositions)


def test_int4_needs_multiples_of_32(checkpoint: Path) -> None:
    torchao()
    with pytest.raises(ll.ModelError, match=r"cannot be loaded quantised .* multiples of 32, int8 takes any"):
        ll.load(checkpoint, quantize="int4")
    assert ll.load(checkpoint, quantize="int8").verification.tail.holds


def test_a_model_without_linear_modules(tmp_path: Path) -> None:
    torchao()
    zoo.save(tmp_path, "gpt2")
    with pytest.raises(ll.ModelError, match=r"quantize changed no weight of GPT2LMHeadModel: it has no nn.Linear"):
        ll.load(tmp_path, quantize="int8")


def test_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from logitlab import cli

    torchao()
    assert cli.main(["verify", str(folder), "--quantize", "int8"]) == 0
    assert f"fingerprint    {ll.load(folder, quantize='int8').fingerprint[:16]}" in capsys.readouterr().out


# -- without torchao ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int3", 8, True])
def test_unknown_kinds(checkpoint: Path, kind: Any) -> None:
    message = f"unknown quantisation {kind!r}: use int8, int4, or a configuration of transformers"
    with pytest.raises(ll.InputError, match=re.escape(message)):
        ll.load(checkpoint, quantize=kind)


def test_torchao_is_missing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(loading, "import_module", missing)
    with pytest.raises(ll.InputError, match=r"quantize='int8' needs torchao \(No module .*: pip install torchao"):
        ll.load(checkpoint, quantize="int8")


class Scaled(torch.Tensor):
    """A quantised weight as packages make them: small integers and a scale, with just enough operations."""

    q: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def of(weight: torch.Tensor) -> Scaled:
        scale = weight.detach().abs().amax(1, keepdim=True) / 127
        made: Any = torch.Tensor._make_wrapper_subclass(Scaled, weight.shape, dtype=weight.dtype)  # pyright: ignore[reportAttributeAccessIssue]
        made.q, made.scale = torch.round(weight.detach() / scale).to(torch.int8), scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["q", "scale"], None

    def dequantize(self) -> torch.Tensor:
        return self.q.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            made: Any = torch.Tensor._make_wrapper_subclass(cls, args[0].shape, dtype=args[0].dtype)  # pyright: ignore[reportAttributeAccessIssue]
            made.q, made.scale = args[0].q, args[0].scale
            return made
        if func in (torch.ops.aten.t.default, torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            plain = [a.dequantize() if isinstance(a, cls) else a for a in args]
            return func(*plain, **(kwargs or {}))
        raise NotImplementedError(f"{cls.__name__}: {func}")


def test_any_tensor_that_can_be_dequantised(llama: ll.Model) -> None:
    module: Any = copy.deepcopy(llama.module)
    for linear in [m for m in module.modules() if isinstance(m, torch.nn.Linear)]:
        linear.weight = torch.nn.Parameter(Scaled.of(linear.weight), requires_grad=False)
    weight = module.lm_head.weight
    assert torch.equal(dense(module.lm_head), weight.q.float() * weight.scale)  # pyright: ignore[reportArgumentType]
    assert [t.dtype for t in stored(module.lm_head, "weight")] == [torch.int8, torch.float32]
    model = ll.wrap(module, zoo.tokenizer())
    assert model.verification.fast_form.holds
    assert_last_site_is(own_logprobs(model), model, 1e-5)
    before = model.fingerprint
    weight.q[0, 0] += 1
    assert model.fingerprint != before


# -- GGUF --------------------------------------------------------------------------------------


def test_a_gguf_file_of_8_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model has the values that the file stands for, by gguf's own dequantisation."""
    gguf = pytest.importorskip("gguf", reason="GGUF files need gguf and accelerate")
    from tests import tiny_gguf

    monkeypatch.setenv("LOGITLAB_CACHE", str(tmp_path / "cache"))
    kind, add = gguf.GGMLQuantizationType.Q8_0, gguf.GGUFWriter.add_tensor
    rounded: dict[str, Any] = {}

    def quantised(writer: Any, name: str, values: Any) -> None:
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            packed = gguf.quants.quantize(values, kind)
            rounded[name] = gguf.quants.dequantize(packed, kind)
            add(writer, name, packed, raw_dtype=kind)
        else:
            add(writer, name, values)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", quantised)
    source = tiny_gguf.write(tmp_path / "tiny.gguf")
    model = ll.load(tmp_path / "tiny.gguf")
    mine, own = model.module.state_dict(), source.state_dict()
    for name, ours in {"token_embd.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight"}.items():
        np.testing.assert_array_equal(mine[ours], rounded[name])
        assert 0 < float((mine[ours] - own[ours]).abs().max()) <= float(own[ours].abs().max()) / 127
    assert model.verification.fast_form.holds
    assert_last_site_is(own_logprobs(model), model, 1e-5)


# -- the default model -------------------------------------------------------------------------


@pytest.mark.slow
def test_the_default_model_in_8_bits(default_model: ll.Model) -> None:
    torchao()
    model = ll.load("default", quantize="int8")
    text = TEXT
    plain, rounded = (ll.read(m, text, target=" Paris") for m in (default_model, model))
    assert [*rounded.at(position=-1).rows()][-1]["top"][0] == " Paris"
    p, q = (r.arrays["top_id"][0, :, :, 0] for r in (plain, rounded))
    a, b = (r.arrays["target_logprob"][0, :, :, 0] for r in (plain, rounded))
    same, last = float((p == q).mean()), float((p[-1] == q[-1]).mean())
    print(f"\nint8 against float32: top-1 equal in {same:.1%} of cells, {last:.1%} at the last layer")
    print(f"log p(' Paris') differs by at most {np.abs(a - b).max():.3f}, at the last cell by {abs(a - b)[-1, -1]:.4f}")
    print("\n".join(model.verification.lines()[:2]))
    assert same > 0.9
    assert abs(a - b)[-1, -1] < 0.1
