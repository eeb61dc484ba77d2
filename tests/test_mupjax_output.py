"""Files that commands write: replaced whole, but links, pipes and devices are written through."""

import json
import os
import threading

import pytest

from mupjax.commands.output import check_file, write_json

RECORD = {"useful": True}


def test_a_file_is_replaced_and_no_draft_stays(tmp_path):
    path = tmp_path / "new" / "out.json"
    for record in ({"old": 1}, RECORD):
        check_file(path, "--json")
        write_json(path, record)
        assert json.loads(path.read_text()) == record
    assert [file.name for file in path.parent.iterdir()] == ["out.json"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_a_link(tmp_path, there):
    target, link = tmp_path / "real.json", tmp_path / "link.json"
    if there:
        target.write_text("old")
    link.symlink_to(target)
    check_file(link, "--json")
    write_json(link, RECORD)
    assert link.is_symlink()
    assert json.loads(target.read_text()) == RECORD


def test_what_is_read_is_not_written_over(tmp_path):
    table, link = tmp_path / "t.csv", tmp_path / "link.csv"
    table.write_text("width,lr,loss")
    link.symlink_to(table)
    for path in (table, link, tmp_path / "." / "t.csv"):
        with pytest.raises(FileExistsError, match="is the file that is read"):
            check_file(path, "--json", table)
    check_file(tmp_path / "o.json", "--json", table)
    check_file(table, "--json", tmp_path / "not there")


def test_a_pipe_stays_a_pipe(tmp_path):
    """As /dev/stdout does, and /dev/null, which a superuser could otherwise replace by a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    heard: list[str] = []
    reader = threading.Thread(target=lambda: heard.append(pipe.read_text()), daemon=True)
    reader.start()
    check_file(pipe, "--json")
    write_json(pipe, RECORD)
    assert pipe.is_fifo()
    reader.join(timeout=10)
    assert json.loads(heard[0]) == RECORD


def test_what_cannot_be_written_is_said(tmp_path):
    name = "a" * 300 + ".json"
    for refused in (lambda: check_file(tmp_path / name, "--json"),
                    lambda: write_json(tmp_path / name, RECORD)):  # fmt: skip
        with pytest.raises(OSError, match="cannot be written: File name too long"):
            refused()
