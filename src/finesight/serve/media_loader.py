"""Load the images of a request that are uploaded files or web URLs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from finesight.errors import UserError
from finesight.serve.api_errors import ApiError, from_user_error
from finesight.serve.file_store import FileStore
from finesight.serve.image_fetcher import ImageFetcher
from finesight.serve.message_conversion import get_image_name
from finesight.serve.request_preprocessor import ImageRequest


@dataclass(frozen=True, slots=True)
class MediaLoader:
    """Loads the images of one request into its private folder.

    Attributes:
        folder: Private folder of the request, deleted at its end.
        owner: Owner name of the API key.
        fetcher: Fetches images from the web.
        store: Uploaded files.
    """

    folder: Path
    owner: str
    fetcher: ImageFetcher
    store: FileStore

    async def fetch_image(self, image: ImageRequest) -> None:
        """Load an image into the folder: link an uploaded file, or fetch a URL.

        Images of data URLs are already there. A worker process checks the content of the file
        later.

        Raises:
            ApiError: The URL is a path or has another scheme, the file does not exist, the image is
                too large, or its content type is not an image.
        """
        path = self.folder / get_image_name(image.image_number)
        try:
            if image.file_id is not None:
                self.store.link(self.owner, image.file_id, path)
            elif image.url is not None:
                with open(path, "xb") as file:
                    await self.fetcher.fetch(image.url, file)
        except UserError as error:
            raise from_user_error(error, image.param, hidden_path=f"{self.folder}/") from error
        except ApiError as error:
            error.param = image.param
            raise
