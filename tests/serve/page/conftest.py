"""A headless Chromium for the tests of the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from .driving import CHROMIUM, opened
from .fake_server import Fake, serving


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="the page's tests drive a browser: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def fake() -> Iterator[Fake]:
    with serving(Fake()) as running:
        yield running


@pytest.fixture
def page(browser: Any, fake: Fake) -> Iterator[Any]:
    """The page, opened; at the end of a test nothing may have gone wrong in it that the test did not expect."""
    yield from opened(browser, fake)
