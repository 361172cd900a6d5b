"""Files that are written whole or not at all."""

import os
import secrets
from pathlib import Path


def check_writable(option: str, name: str) -> None:
    """A ValueError before the work, where a file could not be written after it."""
    path, what = Path(os.path.realpath(name)), f"{option} {name!r}"
    try:
        if not name or path.is_dir():
            raise ValueError(f"{what} names no file")
        if not path.parent.is_dir():
            raise ValueError(f"{what}: there is no directory {str(path.parent)!r}")
        special = path.exists() and not path.is_file()
        if not os.access(path if special else path.parent, os.W_OK):
            raise ValueError(f"{what} cannot be written")
    except OSError as error:
        raise ValueError(f"{what} cannot be written: {error.strerror}") from None


def write_whole(name: str, content: bytes) -> None:
    """Write a file whole or not at all; its mode stays, and a link goes on to its target.

    What is no regular file (a pipe) is written to. A ValueError says why a file cannot be written.
    """
    try:
        path = Path(os.path.realpath(name))
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        part = path.with_name(f".{secrets.token_hex(16)}.part")
        try:
            with part.open("xb") as file:  # "x" creates the file and follows no link
                if path.exists():
                    os.fchmod(file.fileno(), path.stat().st_mode & 0o7777)
                file.write(content)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{name!r} cannot be written: {error.strerror}") from None
