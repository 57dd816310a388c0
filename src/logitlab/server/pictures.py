"""Pictures that come with a request: decoded from its own bytes, and refused before they can take much memory."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from typing import Any

from logitlab.errors import InputError
from logitlab.server.settings import Limits

FORMATS = ("PNG", "JPEG", "WEBP")


def decoded(addresses: Sequence[str], limits: Limits) -> list[Any]:
    """Pictures of data addresses.

    Args:
        addresses: ``data:image/png;base64,...``, see `logitlab.server.requests.PICTURE`.
        limits: how many pictures, and pixels together.

    Returns:
        PIL images, RGB.

    Raises:
        InputError: they are too many or too large, or not what they say they are.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError("pictures need Pillow: pip install 'logitlab[vision]'") from error
    if len(addresses) > limits.images:
        raise InputError(f"there are {len(addresses)} pictures; this server takes {limits.images}")
    found: list[Any] = []
    pixels = 0
    most = f"the pictures have more than {limits.pixels:,} pixels together (picture {{n}}{{size}}): give smaller ones"
    for n, address in enumerate(addresses):
        try:
            raw = base64.b64decode(address.partition(",")[2], validate=True)
        except (binascii.Error, ValueError) as error:
            raise InputError(f"picture {n} is not base64: {error}") from error
        try:
            opened = Image.open(io.BytesIO(raw), formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise InputError(most.format(n=n, size="")) from error
        except Exception as error:  # a decoder can raise anything
            raise InputError(f"picture {n} is no PNG, JPEG or WebP picture that can be read") from error
        with opened:
            pixels += opened.width * opened.height  # known before anything is decoded
            if pixels > limits.pixels:
                raise InputError(most.format(n=n, size=f": {opened.width:,} x {opened.height:,}"))
            try:
                found.append(opened.convert("RGB"))
            except Exception as error:
                raise InputError(f"picture {n} is damaged: {' '.join(str(error).split())[:200]}") from error
    return found
