"""A headless Chromium that looks at the dashboard of a real service, and hears of everything that goes wrong in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Request, ViewportSize, expect, sync_playwright

from tests.conftest import REPOSITORY
from tests.services import require_binary

IMAGES = REPOSITORY / "docs" / "images"
REDRAW = os.environ.get("GRADSTORE_REDRAW_IMAGES") == "1"
"""Whether the pictures of docs/dashboard.md are taken anew."""
SIZE: ViewportSize = {"width": 1280, "height": 880}
PATIENCE = 20_000  # milliseconds that something may take to appear, on a machine that does other things as well


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser; skips with a reason where there is none."""
    program = require_binary("chromium")
    with sync_playwright() as playwright:
        arguments = ["--disable-gpu", "--font-render-hinting=none"]
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


class Visit:
    """A tab on a service's dashboard, and what it complained of."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.complaints: list[str] = []
        self.elsewhere: list[str] = []
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: self.complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", self._asked)

    def open(self, place: str, *, title: str) -> None:
        """Go to a place of the dashboard (`jobs?kind=gradients`), and wait for its heading."""
        self.page.goto(f"{self.url}/dashboard/#/{place}")
        self.heading(title)

    def heading(self, title: str) -> None:
        """Wait until the page with this heading is there, with nothing on its way."""
        self.page.get_by_role("heading", level=1, name=title, exact=True).wait_for()
        expect(self.page.locator(".loading")).to_have_count(0)

    def picture(self, name: str) -> None:
        """Take the picture of this page for the documentation, where pictures are wanted."""
        if REDRAW:
            IMAGES.mkdir(exist_ok=True)
            self.page.screenshot(path=IMAGES / f"{name}.png")

    def faults(self, *, only: str | None = None) -> list[str]:
        """What axe-core finds wrong with this page, by the rules of WCAG 2.2 AA or by one of them."""
        rules = [only] if only else ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
        found: Any = Axe().run(self.page, options={"runOnly": rules})
        return [
            f"{violation['id']}: {node['target']} {node['failureSummary']}"
            for violation in found.response["violations"]
            for node in violation["nodes"]
        ]

    def forgive(self, text: str) -> None:
        """Forget the complaints, which must all be of `text`: the browser writes one of every answer that is none."""
        assert all(text in complaint for complaint in self.complaints), self.complaints
        self.complaints.clear()

    def _asked(self, request: Request) -> None:
        if request.url.startswith("blob:"):
            return
        if urlsplit(request.url)[:2] != urlsplit(self.url)[:2]:
            self.elsewhere.append(request.url)


@contextmanager
def visiting(browser: Browser, url: str, **settings: Any) -> Iterator[Visit]:
    """A tab in a profile of its own; in the end nothing may have been complained of, and nobody else asked."""
    context = browser.new_context(viewport=SIZE, reduced_motion="reduce", **settings)
    try:
        visit = Visit(context.new_page(), url)
        yield visit
        assert not visit.complaints
        assert not visit.elsewhere
    finally:
        context.close()
