# SPDX-License-Identifier: Apache-2.0
"""Nothing is removed but what a mark says that this tool made."""

import json

import pytest

from megatron_cream import ownership
from megatron_cream.errors import UserError


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "x.parts"
    made.mkdir()
    return made


def test_marked_folder_is_removed_whole(folder):
    ownership.mark(folder, "import")
    (folder / "inside").mkdir()
    (folder / "inside" / "file").write_text("work")
    assert ownership.marked_kind(folder) == "import"
    ownership.remove(folder, "import")
    assert not folder.exists()
    ownership.remove(folder, "import")


@pytest.mark.parametrize(
    "mark", [None, "", "[]", "{}", '{"made_by": "me", "kind": "import"}', '{"made_by": 1}', "\xff{"]
)
def test_folder_without_the_mark_is_kept(folder, mark):
    (folder / "mine.txt").write_text("mine")
    if mark is not None:
        (folder / ownership.MARK_NAME).write_text(mark)
    for call in (
        lambda: ownership.validate_usable(folder, "import", "--output x"),
        lambda: ownership.remove(folder, "import"),
    ):
        with pytest.raises(UserError, match="holds mine.txt and was not made by this tool"):
            call()
    assert (folder / "mine.txt").read_text() == "mine"


def test_folder_of_another_kind_of_job_is_kept(folder):
    ownership.mark(folder, "preprocess")
    (folder / "work").write_text("work")
    with pytest.raises(UserError, match=r"another kind \(preprocess, this one merge\)"):
        ownership.remove(folder, "merge")
    assert (folder / "work").exists()


@pytest.mark.parametrize("content", [None, "", json.dumps({"made_by": "megatron_cream"})])
def test_folder_that_holds_nothing_is_usable(folder, content):
    """What a process leaves that is killed between making a folder and marking it."""
    if content is not None:
        (folder / ownership.MARK_NAME).write_text(content)
    ownership.validate_usable(folder, "merge", "--output x")


def test_link_and_file_are_refused_though_marked(folder, tmp_path):
    ownership.mark(folder, "merge")
    (folder / "work").write_text("work")
    link = tmp_path / "link.parts"
    link.symlink_to(folder)
    assert ownership.marked_kind(link) is None
    for path in (link, folder / "work"):
        with pytest.raises(UserError, match="is a (link|file), needs a name"):
            ownership.remove(path, "merge")
    dangling = tmp_path / "dangling.parts"
    dangling.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a link"):
        ownership.validate_usable(dangling, "merge", "--output x")
    assert (folder / "work").exists()


def test_input_inside_is_refused_through_links_too(folder, tmp_path):
    (folder / "in.txt").write_text("text")
    link = tmp_path / "link"
    link.symlink_to(folder)
    for path in (folder, folder / "in.txt", link / "in.txt", link):
        with pytest.raises(UserError, match="where unfinished work is kept"):
            ownership.validate_outside(path, folder, "--output x")
    ownership.validate_outside(tmp_path / "x.parts2", folder, "--output x")
