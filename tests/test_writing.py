"""What is written appears whole or not at all, also when the writer is killed."""

import os
from pathlib import Path

import pytest

from tokjax.errors import UserError
from tokjax.writing import UNFINISHED, refuse_unfinished, whole_folder, write_whole

NAMES = ("weights", "config", "extra")


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def save(folder, **texts):
    with whole_folder(folder, NAMES) as staged:
        for name, text in texts.items():
            (staged / name).write_text(text)


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "deep" / "file"
    assert write_whole(path, lambda beside: beside.write_text("old")) == path

    def fail(beside):
        beside.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert contents(path.parent) == {"file": "old"}


def test_a_file_is_as_readable_as_any_other(tmp_path):
    def private(beside):
        beside.unlink()
        os.close(os.open(beside, os.O_CREAT | os.O_WRONLY, 0o600))

    (tmp_path / "any").touch()
    assert write_whole(tmp_path / "file", private).stat().st_mode == (tmp_path / "any").stat().st_mode


def test_a_folder_is_replaced_and_what_is_foreign_stays(tmp_path):
    folder = tmp_path / "a" / "b"
    save(folder, weights="1", config="1", extra="1")
    (folder / "notes").write_text("mine")
    save(folder, weights="2", config="2")
    assert contents(folder) == {"weights": "2", "config": "2", "notes": "mine"}


def test_whoever_fails_while_writing_changes_nothing(tmp_path):
    save(tmp_path / "m", weights="1", config="1")
    for folder in (tmp_path / "m", tmp_path / "new"):
        with pytest.raises(ZeroDivisionError), whole_folder(folder, NAMES) as staged:
            (staged / "weights").write_text("2")
            raise ZeroDivisionError
    assert contents(tmp_path / "m") == {"weights": "1", "config": "1"}
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="other was written too"):
        save(tmp_path / "m", weights="2", other="2")
    assert contents(tmp_path / "m") == {"weights": "1", "config": "1"}


@pytest.mark.parametrize("killed_at", range(3))
def test_a_folder_that_was_left_in_between_is_refused_until_it_is_saved_again(tmp_path, monkeypatch, killed_at):
    save(tmp_path, weights="1", config="1", extra="1")
    replace, moves = Path.replace, []

    def killed(self, target):
        if len(moves) == killed_at:
            raise KeyboardInterrupt
        moves.append(target)
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, weights="2", config="2", extra="2")
    assert "weights" not in contents(tmp_path)  # nobody takes the rest for a model
    with pytest.raises(UserError, match="its files do not belong together"):
        refuse_unfinished(tmp_path)
    save(tmp_path, weights="3", config="3")
    refuse_unfinished(tmp_path)
    assert contents(tmp_path) == {"weights": "3", "config": "3"}


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file; a folder is needed"):
        save(tmp_path / "file")


def test_the_mark_is_hidden():
    assert UNFINISHED.startswith(".")
