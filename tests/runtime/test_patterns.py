"""Patterns of files."""

from gpt2.runtime.patterns import files_matching, no_file


def test_file_that_appears_later_is_found(tmp_path):
    """As in a notebook, where a user adds a missing file after an error."""
    pattern = str(tmp_path / "*.txt")
    assert no_file(pattern).startswith("no file matches")
    (tmp_path / "a.txt").touch()
    assert no_file(pattern) is None
    assert list(files_matching(pattern)) == [str(tmp_path / "a.txt")]
