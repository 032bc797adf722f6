"""Files that are whole at every moment: written under a temporary name in the same folder, then renamed."""

from __future__ import annotations

import contextlib
import os
import pathlib
import platform
import re
import secrets
import stat
import time
import zlib
from collections.abc import Iterator
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # on Windows, where no other process can remove a file that is open
    fcntl = None

_HOST = f"{zlib.crc32(platform.node().encode()):08x}"
_TEMPORARY = re.compile(r"\.fisherop-([0-9a-f]{8})-[0-9a-f]{16}\.tmp")
_OLD = 24 * 3600.0  # seconds without a change, after which nobody can still be writing


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `path` when the block ends without an exception.

    Until then `path` holds what it held before, whatever happens. Each writer has a temporary file of its own, so that
    any number of threads and processes may write to one path; the last one counts. A symbolic link stays one, and its
    target is replaced. An existing file's permissions stay; a new file gets those that the umask gives. What killed
    processes left in the folder is removed.

    Raises
    ------
    ValueError
        `path` is something else than a file.
    OSError
        The file can't be written.
    """
    target = pathlib.Path(os.path.realpath(path))
    mode = _mode(target)
    _remove_leftovers(target.parent)
    file = _create(target.parent)
    temporary = pathlib.Path(file.name)
    try:
        with file:
            if mode is not None:
                os.chmod(temporary, mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is not None:
                os.replace(temporary, target)  # while it is locked
        if fcntl is None:
            os.replace(temporary, target)  # Windows renames no open file
    finally:
        temporary.unlink(missing_ok=True)


def _mode(target: pathlib.Path) -> int | None:
    """The permissions of a file, None where there is none."""
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
        raise ValueError(f"path must name a file or nothing yet, but {os.fspath(target)!r} is {kind}")
    return stat.S_IMODE(mode)


def _create(folder: pathlib.Path) -> BinaryIO:
    """A new file that this writer alone holds the lock of, as long as it is open."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    while True:
        name = folder / f".fisherop-{_HOST}-{secrets.token_hex(8)}.tmp"
        file = open(name, "w+b", opener=lambda path, _: os.open(path, flags, 0o666))  # noqa: SIM115
        try:
            if fcntl is None:
                return file
            with contextlib.suppress(OSError):  # a file system without locks, where leftovers are known by their age
                fcntl.flock(file, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(name)):
                return file
        except FileNotFoundError:  # another writer took it for a leftover before it was locked
            pass
        except BaseException:
            name.unlink(missing_ok=True)
            file.close()
            raise
        file.close()


def _remove_leftovers(folder: pathlib.Path) -> None:
    """Remove temporary files that nobody writes to any more: the lock of its writer ends with the process.

    Other machines may not see the lock, and their names are other ones: what these left is removed after a day.
    """
    try:
        names = os.listdir(folder)
    except PermissionError:  # a folder that one may write to but not list keeps what is in it
        return
    for name, match in ((name, _TEMPORARY.fullmatch(name)) for name in names):
        if match is None:
            continue
        path = folder / name
        # it may be gone by now, be locked, or belong to another user
        with contextlib.suppress(FileNotFoundError, BlockingIOError, PermissionError, IsADirectoryError):
            is_old = time.time() - path.stat().st_mtime > _OLD
            if is_old or (match[1] == _HOST and fcntl is not None):
                _remove_unlocked(path, is_old)


def _remove_unlocked(path: pathlib.Path, is_old: bool) -> None:
    if fcntl is None:
        path.unlink()
        return
    with open(path, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # a file system without locks
            if not is_old:
                return
        path.unlink()
