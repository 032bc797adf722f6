"""Inventories of other projects, of those names alone that our pages refer to.

Each text file in the folder begins with the project's address; then follow lines of a name, its kind, and its page.
They are turned into the files that intersphinx reads, so that the build needs no network and a page's links are the
same everywhere. A name that isn't there is an unresolved reference, and so an error: add its line.
"""

import zlib

HEAD = """# Sphinx inventory version 2
# Project: {}
# Version:
# The remainder of this file is compressed using zlib.
"""


def mapping(folder):
    found = {}
    for path in sorted(folder.glob("*.txt")):
        address, *lines = path.read_text(encoding="utf-8").splitlines()
        entries = [line.split() for line in lines if line.strip()]
        body = "".join(f"{name} {kind} 1 {page} -\n" for name, kind, page in entries)
        written = HEAD.format(path.stem).encode() + zlib.compress(body.encode())
        target = path.with_suffix(".inv")
        if not target.exists() or target.read_bytes() != written:
            target.write_bytes(written)
        found[path.stem] = (address, f"{folder.name}/{target.name}")
    return found
