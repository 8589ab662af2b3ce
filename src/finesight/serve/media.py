"""The one place that opens media from outside: bytes into a private file, its header checked.

What comes is a data URL, an uploaded file, or an address of a host that the server allows. From
there on a picture is opened as every other: `data.headers.picture_size`, `vision.picture`.
"""

from __future__ import annotations

import binascii
from dataclasses import dataclass
from pathlib import Path

from finesight.data.headers import picture_size
from finesight.errors import UserError
from finesight.serve.errors import Refused, refused
from finesight.serve.fetch import Fetcher
from finesight.serve.limits import Limits
from finesight.serve.pool import Pool
from finesight.serve.schema import FilePart, ImagePart
from finesight.serve.store import Store


@dataclass(frozen=True, slots=True)
class Media:
    """Opens the media of one client's request into `folder`, which lives as long as it."""

    folder: Path
    owner: str
    limits: Limits
    fetcher: Fetcher
    store: Store
    pool: Pool

    async def open_media(self, part: ImagePart | FilePart, number: int, param: str) -> str:
        """The name in `folder` of the `number`-th picture, its size known from its header.

        Raises Refused for a path, another protocol, a file that is not there, and what is too
        large, no picture or damaged.
        """
        path = self.folder / f"picture-{number}"
        url = part.image_url.url if isinstance(part, ImagePart) else ""
        try:
            if isinstance(part, FilePart):
                self.store.link(self.owner, part.file.file_id, path)
            elif url[:5].lower() == "data:":
                await self.pool.run(_decode, url, path, self.limits.picture_bytes)
            else:
                with open(path, "xb") as file:
                    await self.fetcher.take(url, file)
            await self.pool.run(picture_size, path, self.limits.picture_pixels)
        except UserError as error:
            raise refused(error, param, hidden=f"{self.folder}/") from error
        except Refused as error:
            error.param = param
            raise
        return path.name


def _decode(url: str, path: Path, most: int) -> None:
    """Write the bytes of a data URL in base64 (RFC 2397). Raises Refused for what is none."""
    comma = url.find(",", 0, 200)
    if comma < 0 or not url[:comma].lower().endswith(";base64"):
        raise Refused(400, f"a data URL that begins {url[:20]!r}: expected data:image/...;base64,")
    if (len(url) - comma) * 3 // 4 > most + 3:
        raise Refused(413, f"a picture of {(len(url) - comma) * 3 // 4} bytes: at most {most}")
    try:
        data = binascii.a2b_base64(url[comma + 1 :].encode("ascii"))
    except (binascii.Error, UnicodeEncodeError) as error:
        raise Refused(400, f"a data URL that is no base64: {type(error).__name__}") from error
    with open(path, "xb") as file:
        file.write(data)
