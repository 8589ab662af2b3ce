"""Make docs/pictures/web.png anew: PYTHONPATH=tests python tests/web/screenshot.py"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from browser import chromium
from page_visit import Visit
from PIL import Image
from served_page import served
from speaking import shapes, speaking

TARGET = Path(__file__).parents[2] / "docs" / "pictures" / "web.png"
COLOURS = 96
"""A palette, so that the file stays small."""


def main() -> None:
    """Ask two questions about shapes, and keep what is seen."""
    with (
        tempfile.TemporaryDirectory() as made,
        speaking("finesight-tiny") as service,
        served(service) as place,
        chromium() as browser,
    ):
        visit = Visit(browser, place.address, 900)
        browser.visit(place.address, 900, 900)
        visit.until("return !!document.querySelector('.welcome');")
        picture, question = shapes(Path(made), 10)
        visit.ask(question, [picture])
        visit.ask("Where is the gray star?")
        # Where a machine has no Chinese letters, the button would show boxes of its own.
        browser.run("document.querySelector('#language').style.visibility = 'hidden';")
        browser.settle()
        seen = Image.open(io.BytesIO(browser.driver.get_screenshot_as_png())).convert("RGB")
        seen.quantize(COLOURS).save(TARGET, optimize=True)


if __name__ == "__main__":
    main()
