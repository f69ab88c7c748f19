"""Screenshots of the built site, wide and narrow, light and dark, and what a reader must never meet.

Taken with the Chromium that ``CHROMIUM`` names, one on the path, or playwright's own (``playwright install chromium``).
"""

import os
import shutil
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
SITE, SHOTS = ROOT / "site", ROOT / "results/screens"
WIDTHS = {390: 844, 1440: 900}
SCHEMES = ("light", "dark")
TALLEST = 3000  # pixels of a page that a picture shows
FAULTS = """() => {
  const width = document.documentElement.clientWidth, found = [];
  const clips = (e) => { for (let p = e.parentElement; p && p !== document.body; p = p.parentElement)
    if (getComputedStyle(p).overflowX !== 'visible') return true; return false; };
  if (document.documentElement.scrollWidth > width) {
    found.push('wider than ' + width);
    for (const e of document.querySelectorAll('main *'))
      if (e.getBoundingClientRect().right > width + 1 && !clips(e) && found.length < 4)
        found.push(e.tagName + '.' + e.className + ': ' + e.textContent.slice(0, 60));
  }
  for (const e of document.querySelectorAll('article h1, article h2, article h3, footer'))
    if (!e.closest('details') && !e.getClientRects().length) found.push('not shown: ' + e.textContent.slice(0, 60));
  for (const e of document.images) if (!e.naturalWidth) found.push('no picture at ' + e.src);
  if (!document.querySelector('footer')) found.push('no footer: the page ends too early');
  return found;
}"""


class Quiet(SimpleHTTPRequestHandler):
    """A server of files that writes no log."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def top_pages() -> list[str]:
    """Addresses of all pages but design notes, which are text alone; those named on the command line, if any are."""
    found = [path.parent.relative_to(SITE).as_posix() for path in sorted(SITE.rglob("index.html"))]
    chosen = [page for page in found if not page.startswith("design/")]
    return [page for page in chosen if not sys.argv[1:] or page in sys.argv[1:]]


def main() -> int:
    """Take all pictures; the number of pages on which something is wrong, as a status."""
    if not (SITE / "index.html").exists():
        print("site/ holds no site: build it first, nox -s docs")
        return 2
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    SHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_chromium(), args=["--no-sandbox", "--disable-gpu"])
        found = list(_faults(browser, f"http://127.0.0.1:{server.server_port}"))
        browser.close()
    print("\n".join(found) or f"nothing wrong on {len(top_pages())} pages; pictures in {SHOTS.relative_to(ROOT)}")
    return min(1, len(found))


def _faults(browser: Browser, origin: str) -> Iterator[str]:
    for width, height in WIDTHS.items():
        for scheme in SCHEMES:
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
            page, heard = context.new_page(), []
            page.on("console", lambda message, heard=heard: heard.append(f"console: {message.text}"))
            page.on("pageerror", lambda error, heard=heard: heard.append(f"error: {error}"))
            page.on("request", lambda one, heard=heard: heard.extend(_elsewhere(one.url, origin)))
            for address in top_pages():
                heard.clear()
                name = "home" if address == "." else address.replace("/", "-")
                _look(page, f"{origin}/{address}/", width, SHOTS / f"{name}-{width}-{scheme}.png")
                yield from (f"{name} at {width}, {scheme}: {text}" for text in [*heard, *page.evaluate(FAULTS)])
            context.close()


def _look(page: Page, url: str, width: int, shot: Path) -> None:
    """One picture of a page in a window as high as the page, up to a bound."""
    page.set_viewport_size({"width": width, "height": WIDTHS[width]})
    page.goto(url, wait_until="networkidle")
    height = page.evaluate("() => document.documentElement.scrollHeight")
    page.set_viewport_size({"width": width, "height": min(height, TALLEST)})
    page.screenshot(path=shot, timeout=180_000)


def _elsewhere(url: str, origin: str) -> list[str]:
    return [] if url.startswith((origin, "data:", "blob:")) else [f"request to {url}"]


def _chromium() -> str | None:
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    return os.environ.get("CHROMIUM") or next(filter(None, found), None)


if __name__ == "__main__":
    sys.exit(main())
