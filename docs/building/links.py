"""Each link and picture within a built site must lead somewhere: ``python docs/building/links.py build/docs``.

Sphinx checks what pages refer to; this looks at what was written, anchors included. Links to other sites are counted,
not followed, so that the build needs no network.
"""

import html.parser
import pathlib
import sys
import urllib.parse


class Page(html.parser.HTMLParser):
    """What a page links to, and the names in it that can be linked to."""

    def __init__(self, path):
        super().__init__()
        self.links, self.names = [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.names.add(value)
            elif value and (tag, name) in {("a", "href"), ("img", "src"), ("link", "href"), ("script", "src")}:
                self.links.append(value)


def check(folder):
    """Lines of what leads nowhere, and how many pages, links within, and links to other sites there are."""
    pages = {path.resolve(): Page(path) for path in sorted(folder.rglob("*.html")) if "_static" not in path.parts}
    broken, within, outside = [], 0, 0
    for path, page in pages.items():
        for link in page.links:
            url = urllib.parse.urlsplit(link)
            if url.scheme or url.netloc:
                outside += url.scheme in ("http", "https")
                continue
            within += 1
            target = (path.parent / urllib.parse.unquote(url.path)).resolve() if url.path else path
            target = target / "index.html" if target.is_dir() else target
            anchor = urllib.parse.unquote(url.fragment)
            if not target.exists():
                broken.append(f"{path.relative_to(folder.resolve())}: {link}: there is no such file")
            elif anchor and target in pages and anchor not in pages[target].names:
                broken.append(f"{path.relative_to(folder.resolve())}: {link}: that page has no such anchor")
    return broken, len(pages), within, outside


if __name__ == "__main__":
    broken, n_pages, n_within, n_outside = check(pathlib.Path(sys.argv[1]))
    print(*broken, sep="\n", end="\n" * bool(broken))
    print(f"{n_pages} pages, {n_within} links within, of which {len(broken)} are broken")
    print(f"{n_outside} links to other sites, which were not followed")
    sys.exit(bool(broken))
