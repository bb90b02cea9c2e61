"""Files and folders that appear under their name whole, or not at all.

Everything is written beside the target and put in its place by one system call. Where a folder exists,
Linux (``renameat2``) and macOS (``renamex_np``) exchange two names in one step, so that the target is at
every moment the old folder or the new one. On other systems, and file systems that refuse the exchange, a
folder takes two renames: a process killed between them leaves no folder, and :func:`mend`, which every
reader and writer calls first, puts the old one back.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import logging
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)

ATTEMPTS = 1000  # at a name that other processes keep putting and taking
STALE_AFTER = 60.0  # seconds; younger work folders may not be locked yet


def atomic_write(path: Path, text: str) -> None:
    """Write one text file: the whole of it or nothing."""
    with renamed(path) as fresh:
        fresh.write_text(text)


def check_target(folder: str | Path) -> Path:
    """The absolute path of a folder that :func:`save_quantized` may write or replace.

    Raises:
        ValueError: It exists and is neither empty nor a model folder, or is the working directory.
    """
    folder = Path(folder).resolve()
    mend(folder)
    if Path.cwd().is_relative_to(folder):
        raise ValueError(f"folder {folder} is the working directory, which cannot be replaced; name another")
    try:
        contents = {path.name for path in folder.iterdir()}
    except FileNotFoundError:  # another process may take it away at any moment
        contents = set()
    except NotADirectoryError:
        contents = {"a file"}
    if contents and "config.json" not in contents:
        raise ValueError(f"folder {folder} exists and is not a model folder; it is left alone")
    return folder


@contextmanager
def renamed(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder, renamed to path if all goes well."""
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield fresh
        _sync(fresh)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder beside the target, swapped in if all goes well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder)
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    fresh, old = beside / "new", beside / "old"
    with _locked(beside):
        try:
            fresh.mkdir()
            yield fresh
            for path in (*fresh.rglob("*"), fresh):
                _sync(path)
            _put(fresh, folder, old)
        finally:
            mend(folder)
            shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def unreplaced(folder: Path) -> Iterator[None]:
    """Refuse what was read if the folder was replaced meanwhile: it may be half of the old and half of the new.

    Raises:
        ValueError: It was replaced, or is no folder.
    """
    mend(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    before = folder.stat().st_ino
    try:
        yield
    finally:
        if not folder.exists() or folder.stat().st_ino != before:
            raise ValueError(f"{folder} was replaced while it was read; read it again")


def mend(folder: Path) -> None:
    """Put back a folder whose replacement was killed between two renames, where no exchange exists."""
    if folder.exists():
        return
    for beside in _work_folders(folder):
        if (beside / "old").is_dir():
            try:
                os.rename(beside / "old", folder)
            except OSError:  # another process was faster, or this one may only read
                return
            logger.warning("%s was being replaced when the process died; the old one is back", folder)
            return


def _put(fresh: Path, folder: Path, old: Path) -> None:
    """Move fresh to folder; what was there goes to fresh or old."""
    for _ in range(ATTEMPTS):  # another process may put or take the folder between any two steps
        try:
            os.rename(fresh, folder)  # where nothing, or an empty folder, is
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        try:
            if _exchange(fresh, folder):
                return
            os.rename(folder, old)
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            shutil.rmtree(old)  # an earlier round's
    raise OSError(errno.EBUSY, "other processes keep replacing the folder", str(folder))


def _exchange(one: Path, other: Path) -> bool:
    """Let two existing paths change places in one step; False where that does not exist."""
    names = os.fsencode(one), os.fsencode(other)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            failed = libc.renamex_np(*names, 2)  # RENAME_SWAP
        else:
            failed = libc.renameat2(-100, names[0], -100, names[1], 2)  # AT_FDCWD, RENAME_EXCHANGE
    except (AttributeError, OSError, TypeError):
        return False
    if not failed:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _work_folders(folder: Path) -> list[Path]:
    pattern = f"{glob.escape(str(folder.parent))}/.{glob.escape(folder.name)}.*"
    return [Path(found) for found in sorted(glob.glob(pattern))]


def _remove_stale(folder: Path) -> None:
    """Remove what killed saves left beside the target; a living one holds a lock on its folder."""
    for beside in _work_folders(folder):
        with suppress(FileNotFoundError, NotADirectoryError):  # its process may remove it at any moment
            contents = {path.name for path in beside.iterdir()}
            if not contents <= {"new", "old"} or time.time() - beside.stat().st_mtime < STALE_AFTER:
                continue
            with _locked(beside) as mine:
                if mine:
                    shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock, which dies with the process; False if another process has it."""
    try:
        import fcntl
    except ImportError:  # Windows: nothing is locked, and nothing is taken for stale
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def _sync(path: Path) -> None:
    """Have the disk hold it, so that a name never outlives its content when the power fails."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system without it
            raise
    finally:
        os.close(handle)
