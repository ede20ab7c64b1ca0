"""Files and folders that are written whole or not at all."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import os
from pathlib import Path
import secrets
import shutil

from tokjax.errors import UserError

UNFINISHED = ".unfinished_save"  # stands in a folder while files of a new state replace those of an old one


def write_whole(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Lets `write` fill a temporary file beside `path`, which then takes its place; missing folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        beside.touch()
        mode = beside.stat().st_mode  # safetensors makes its files readable by their owner alone
        write(beside)
        beside.chmod(mode)
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def whole_folder(folder: str | Path, names: Sequence[str]) -> Iterator[Path]:
    """Replaces the files of these names in a folder, all or none.

    The caller fills an empty folder, within `folder`. When that is done, every one of `names` is moved to its place, or
    removed from there if it was not written. Files of other names stay as they are. Whatever fails or is killed while
    the caller writes changes nothing; within the moves, which are renames alone, a file `UNFINISHED` stands in
    `folder`, so that `refuse_unfinished` tells, and the first of `names` is missing, so that no other reader takes it
    for whole.

    Args:
        folder: made if it does not exist.
        names: what the caller may write; the first is the one without which nothing can be read.

    Raises:
        UserError: `folder` is a file.
        ValueError: the caller wrote a file of another name.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; a folder is needed.")
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    staged, mark = folder / f".saving.{secrets.token_hex(4)}.tmp", folder / UNFINISHED
    staged.mkdir()
    try:
        yield staged
        written = {path.name for path in staged.iterdir()}
        if others := sorted(written - set(names)):
            raise ValueError(f"names={tuple(names)}: {', '.join(others)} was written too")
        mark.touch()
        (folder / names[0]).unlink(missing_ok=True)
        for name in reversed(names):
            if name in written:
                (staged / name).replace(folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        mark.unlink()
        made = False
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        if made:  # for nothing
            with contextlib.suppress(OSError):
                folder.rmdir()


def refuse_unfinished(folder: Path) -> None:
    """For readers of what `whole_folder` writes.

    Raises:
        UserError: writing ended while files were moved, so that some are of the new state and some of the old one.
    """
    if (folder / UNFINISHED).exists():
        raise UserError(f"{folder} was left by a save that did not end: its files do not belong together; save again.")
