import os

import pytest

from vggenc import UsageError
from vggenc.inputs import ImageList, find_images


def test_folder_is_searched_deep_and_sorted(folder):
    found = find_images(folder)
    assert found.root == str(folder)
    assert found.paths == ["1.png", "2.png", "4.png", "5.png", "7.png", "8.png"] + [
        f"deep/{i}.png" for i in (0, 3, 6, 9)
    ]
    assert os.path.samefile(found.file(6), folder / "deep" / "0.png")


def test_other_files_are_passed_over_in_folders_but_not_when_named(folder):
    (folder / "notes.txt").write_text("x")
    (folder / "UPPER.JPG").write_text("x")
    assert find_images(folder).paths[6] == "UPPER.JPG"
    assert "notes.txt" not in find_images(folder).paths
    assert find_images(folder / "notes.txt").paths == ["notes.txt"]


def test_globs_lists_and_files_keep_the_order_given_and_name_each_file_once(folder, tmp_path):
    listing = tmp_path / "list.txt"
    listing.write_text(f"{folder}/8.png\r\n\n{folder}/missing.png\n{folder}/1.png\n")
    found = find_images([f"{folder}/**/*[03].png", f"@{listing}", folder / "8.png", folder / "deep"])
    assert found.root == str(folder)
    assert found.paths == [
        "deep/0.png",
        "deep/3.png",
        "8.png",
        "missing.png",
        "1.png",
        "deep/6.png",
        "deep/9.png",
    ]


def test_paths_in_a_list_are_relative_to_the_working_directory(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    (tmp_path / "list.txt").write_text("deep/3.png\n1.png")
    assert find_images(f"@{tmp_path}/list.txt") == ImageList(str(folder), ["deep/3.png", "1.png"])


def test_file_whose_name_looks_like_a_pattern_is_found(folder):
    (folder / "[1].png").write_bytes(b"")
    assert find_images(str(folder / "[1].png")).paths == ["[1].png"]


def test_links_are_followed_but_not_in_circles(folder):
    (folder / "deep" / "up").symlink_to(folder)
    (folder / "gone.png").symlink_to(folder / "nothing")
    paths = find_images(folder).paths
    assert len(paths) == 11
    assert "gone.png" in paths


@pytest.mark.parametrize("inputs", ["nowhere", "*.nothing", "@nolist.txt", []])
def test_inputs_that_name_nothing_are_usage_errors(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        find_images(inputs)


def test_folder_without_images_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no images in"):
        find_images(tmp_path)


def test_a_line_that_names_no_file_does_not_move_the_root(folder, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "list.txt").write_text(f"# chosen by hand\n{folder}/1.png\n{folder}/deep/0.png\n")
    found = find_images(f"@{tmp_path}/list.txt")
    assert found == ImageList(str(folder), ["../elsewhere/# chosen by hand", "1.png", "deep/0.png"])


def test_a_folder_gives_files_whose_whole_name_is_a_suffix(tmp_path):
    (tmp_path / ".png").write_bytes(b"")
    (tmp_path / "png").write_bytes(b"")
    assert find_images(tmp_path).paths == [".png"]


def test_only_line_feeds_end_a_name_in_a_list(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_bytes(b"a\rb.png\r\nc\x0cd.png\n")
    assert find_images("@list.txt").paths == ["a\rb.png", "c\x0cd.png"]


def test_a_list_may_come_from_a_pipe_but_not_from_a_device(tmp_path):
    read, write = os.pipe()
    os.write(write, f"{tmp_path}/a.png\n".encode())
    os.close(write)
    assert find_images(f"@/dev/fd/{read}").paths == ["a.png"]
    os.close(read)
    with pytest.raises(UsageError, match="the list /dev/zero is a device"):
        find_images("@/dev/zero")
