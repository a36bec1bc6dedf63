"""Draws docs/report.jpg and docs/worst.jpg: two parts of the page that `make demo` writes.

    python docs/make_screenshots.py runs/quickstart/report.html

Needs the extra `browser` and an installed Chromium.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright


FOLDER = Path(__file__).parent
# Page pixels, which the pictures show at three quarters of their size.
WIDTH, SCALE = 1200, 0.75
# Heights: the metrics and curves at the top of the page, and the first of its worst images.
TOP, WORST = 1160, 570


def main(report: Path) -> None:
    """Takes both pictures of a report."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": WIDTH, "height": TOP}, device_scale_factor=SCALE)
        tab.goto(report.resolve().as_uri())
        tab.wait_for_function("document.querySelectorAll('.picture image').length > 0")
        tab.screenshot(path=FOLDER / "report.jpg", quality=80)
        heading = tab.get_by_role("heading", name="Worst images").bounding_box()
        assert heading is not None
        clip = {"x": 0, "y": heading["y"] - 20, "width": WIDTH, "height": WORST}
        tab.screenshot(path=FOLDER / "worst.jpg", quality=80, full_page=True, clip=clip)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
