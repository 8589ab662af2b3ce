"""Images of a request that its body does not hold: uploaded before, or fetched from the web."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from finesight.errors import UserError
from finesight.serve.conversation import image_name
from finesight.serve.errors import Refused, refused
from finesight.serve.fetch import Fetcher
from finesight.serve.preparation import ImageRequest
from finesight.serve.store import Store


@dataclass(frozen=True, slots=True)
class Media:
    """Puts the images of one client's request into `folder`, which lives as long as it."""

    folder: Path
    owner: str
    fetcher: Fetcher
    store: Store

    async def open_media(self, image: ImageRequest) -> None:
        """Link or fetch an image, unless its data URL was written to the folder already.

        Raises Refused for a path, another protocol, a file that is not there, and what is too
        large or no image by its content type. What the file holds is read by a worker.
        """
        path = self.folder / image_name(image.number)
        try:
            if image.file_id is not None:
                self.store.link(self.owner, image.file_id, path)
            elif image.url is not None:
                with open(path, "xb") as file:
                    await self.fetcher.take(image.url, file)
        except UserError as error:
            raise refused(error, image.param, hidden=f"{self.folder}/") from error
        except Refused as error:
            error.param = image.param
            raise
