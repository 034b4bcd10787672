"""Takes the pictures of the page for the docs: `python docs/pictures/page.py --url http://127.0.0.1:8000`.

Needs Chromium and `pip install playwright`. Without `--url` the fake server of the tests answers, which is enough to look at the layout.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
QUESTION = "What is 47 + 38?"
GREEDY = '{"temperature": "0"}'  # the same picture from the same model
ANSWERED = "#send:not([hidden])"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running `sparseling serve`")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the pictures (default: docs/pictures)")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--scheme", choices=["light", "dark"], default="light")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        url = options.url or stack.enter_context(fake_server())
        browser = stack.enter_context(chromium())
        for name, (size, scale, shoot) in PICTURES.items():
            viewport = {"width": size[0], "height": size[1]}
            context = browser.new_context(viewport=viewport, device_scale_factor=scale, color_scheme=options.scheme)
            context.add_init_script(f"localStorage.setItem('sparseling.settings', '{GREEDY}')")
            page = context.new_page()
            page.goto(url)
            page.wait_for_selector("#model-name:not(:empty)")
            shoot(page, options.question)
            page.wait_for_timeout(400)
            path = options.out / f"page-{name}.png"
            page.screenshot(path=path)
            print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
            context.close()


@contextlib.contextmanager
def fake_server() -> Iterator[str]:
    sys.path.insert(0, str(REPOSITORY))
    from tests.serve.page.fake_server import Fake, Shape, serving

    with serving(Fake(Shape(layers=tuple(range(1, 9)), experts=64, per_token=4, groups=8, kept_groups=4), delay_s=0.005)) as fake:
        yield fake.url


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium") or shutil.which("google-chrome"), args=["--no-sandbox"])
        yield browser
        browser.close()


def ask(page: Any, question: str) -> None:
    page.fill("#question", question)
    page.press("#question", "Enter")
    page.wait_for_selector(ANSWERED, timeout=120_000)
    page.evaluate("document.activeElement.blur()")


def think(page: Any) -> None:
    if page.get_attribute("#thinking", "aria-checked") != "true":
        page.click("#thinking")


def token(page: Any, question: str) -> None:
    """An answer with thinking, and the experts of one token of its reasoning."""
    think(page)
    ask(page, question)
    tokens = page.locator(".reasoning-tokens .token:not(.silent)")
    tokens.nth(min(tokens.count() - 1, 12)).click()


def heat_map(page: Any, question: str) -> None:
    """The whole answer; the tokens of the busiest expert of the first layer are marked."""
    think(page)
    ask(page, question)
    page.get_by_role("button", name="Experts").click()
    page.click("#map-view details summary")
    counts = page.locator("#map-view tbody tr").first.locator("td").evaluate_all("cells => cells.map(cell => Number(cell.textContent))")
    page.click("#map-view details summary")
    box = page.locator("#map-view .plot canvas").bounding_box()
    page.mouse.click(box["x"] + (counts.index(max(counts)) + 0.5) * box["width"] / len(counts), box["y"] + 6)


def side_by_side(page: Any, question: str) -> None:
    page.click("#side-by-side")
    ask(page, question)
    page.wait_for_selector(".comparison tbody tr")
    page.wait_for_timeout(700)


# Name: width and height, pixels a point, what is done.
PICTURES: dict[str, tuple[tuple[int, int], int, Callable[[Any, str], None]]] = {
    "token": ((1280, 720), 1, token),
    "heatmap": ((1280, 720), 1, heat_map),
    "side-by-side": ((1280, 1220), 1, side_by_side),
    "phone": ((390, 780), 2, token),
}

if __name__ == "__main__":
    main()
