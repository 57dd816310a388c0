"""Find a lens by its name: a folder, a file, or something on the hub."""

from __future__ import annotations

from pathlib import Path

from logitlab.errors import InputError
from logitlab.lenses.fitted import RECORD, FittedLens
from logitlab.lenses.published import CONFIG, PARAMETERS, is_tuned_lens, load_jacobian_lens, load_tuned_lens

PICKLES = (".pt", ".pth")
"""Endings of files that may be a Jacobian lens."""


def load_lens(place: str | Path, *, any_weights: bool = False, allow_pickle: bool = False) -> FittedLens:
    """Read a fitted lens.

    Args:
        place: a folder that logitlab or tuned-lens has written; a Jacobian lens' ``.pt`` file; or one of these on the
            hub, as ``owner/repository``, followed by the path in it if there is one
            (``neuronpedia/jacobian-lens/gpt2-small/.../lens.pt``), and ``spaces/`` before it if it is in a
            space (``spaces/AlignmentResearch/tuned-lens/lens/gpt2``).
        any_weights: use it also on a model of the same shape whose weights differ from those that it was
            fitted on (a fine-tuned one, or another dtype).
        allow_pickle: also read the pickles of the other tools, with PyTorch's weights-only loader.

    Raises:
        InputError: there is no lens, it is damaged, or it is a pickle and these are not allowed.

    Example:
        ``read(model, "The capital of France is", lens=load_lens("tuned"))``
    """
    lens = _load(_found(place), allow_pickle)
    return lens.for_any_weights() if any_weights else lens


def _load(place: Path, allow_pickle: bool) -> FittedLens:
    if place.is_file():
        if place.suffix not in PICKLES:
            raise InputError(f"{place} is no lens: give a folder, or a file that ends in {' or '.join(PICKLES)}")
        return load_jacobian_lens(place, allow_pickle=allow_pickle)
    if not (place / RECORD).is_file() and is_tuned_lens(place):
        return load_tuned_lens(place, allow_pickle=allow_pickle)
    if not (place / RECORD).is_file():
        files = sorted(p.name for p in place.glob("*.pt"))
        hint = f": give one of its files ({', '.join(files[:3])})" if files else ""
        raise InputError(f"there is no lens in {place}: neither {RECORD} nor {CONFIG} with {PARAMETERS} is in it{hint}")
    return FittedLens.load(place)


def _found(place: str | Path) -> Path:
    """A local path; that of what a hub id stands for if it must be."""
    local = Path(place).expanduser()
    if local.exists():
        return local
    words = [w for w in str(place).split("/") if w]
    kind = "space" if words[:1] == ["spaces"] else "model"
    if kind == "space":
        words = words[1:]
    if isinstance(place, Path) or len(words) < 2 or str(place).startswith((".", "/", "~")):
        raise InputError(f"there is no lens at {place}: no such file or folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    within = "/".join(words[2:])
    wanted = [within, f"{within}/*"] if within else [RECORD, "maps-*.safetensors", CONFIG, PARAMETERS]
    try:
        root = Path(snapshot_download("/".join(words[:2]), repo_type=kind, allow_patterns=wanted))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        why = " ".join(str(error).split())[:160]
        raise InputError(f"there is no lens at {place}: no such path, and the hub gives none ({why})") from error
    if not (root / within).exists():
        raise InputError(f"there is no {within} in {'/'.join(words[:2])} on the hub")
    return root / within
