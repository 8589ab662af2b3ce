"""Generate docs/images/web.png: PYTHONPATH=tests:pretraining python tools/chat_screenshot.py"""

import io
import tempfile
from pathlib import Path

from browser import launch_chromium
from PIL import Image
from service_fixture import run_service, write_shape_image
from web_server_fixture import ChatPageDriver, run_web_page

TARGET = Path(__file__).parents[1] / "docs" / "images" / "web.png"
NUM_COLORS = 96
"""Palette size, to keep the file small."""


def main() -> None:
    """Ask two questions about shapes and save a screenshot."""
    with (
        tempfile.TemporaryDirectory() as made,
        run_service("finesight-tiny") as service,
        run_web_page(service) as page,
        launch_chromium() as browser,
    ):
        visit = ChatPageDriver(browser, page.address, 900)
        browser.visit(page.address, 900, 1300)
        visit.wait_for_script("return !!document.querySelector('#welcome:not([hidden])');")
        image_path, question = write_shape_image(Path(made), 10)
        visit.ask(question, [image_path])
        visit.ask("Where is the gray star?")
        # Where a machine has no Chinese letters, the button would show boxes of its own.
        browser.run("document.querySelector('#language').style.visibility = 'hidden';")
        browser.settle()
        seen = Image.open(io.BytesIO(browser.driver.get_screenshot_as_png())).convert("RGB")
        seen.quantize(NUM_COLORS).save(TARGET, optimize=True)


if __name__ == "__main__":
    main()
