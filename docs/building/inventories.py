"""Inventories of other projects, of those names alone that our pages refer to.

Each text file in the folder begins with the project's address; then follow lines of a name, its kind, and its page.
They are turned into the files that intersphinx reads, so that the build needs no network and a page's links are the
same everywhere. A name that isn't there is an unresolved reference, and so an error: add its line.
"""

import pathlib
import tempfile
import zlib


def mapping(folder):
    made = pathlib.Path(tempfile.gettempdir()) / f"inventories-of-{abs(hash(str(folder.resolve()))) % 10**8}"
    found = {}
    made.mkdir(exist_ok=True)
    for path in sorted(folder.glob("*.txt")):
        address, *lines = path.read_text(encoding="utf-8").split("\n")
        entries = [line.split() for line in lines if line.strip()]
        body = "".join(f"{name} {kind} 1 {page} -\n" for name, kind, page in entries)
        head = f"# Sphinx inventory version 2\n# Project: {path.stem}\n# Version: \n# The remainder of this file is compressed using zlib.\n"
        target = made / f"{path.stem}.inv"
        target.write_bytes(head.encode() + zlib.compress(body.encode()))
        found[path.stem] = (address.strip(), str(target))
    return found
