"""chat/lines.py: paths as people type, complete and drop them; texts of several lines; history and plain text."""

import builtins
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat.lines import Lines, history_file, last_word, paths_in
from chat.plain import one_line, plain

NAMES = [
    "a.png", "a b.png", "it's.png", 'say "hi".png', "$HOME (1).png", "图 片.png", "ba&ck\\slash;.png", "~x.png",
    "#1.png",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in [*NAMES, ".hidden", "esc\x1b[2J.png"]:
        (tmp_path / name).write_text("")
    (tmp_path / "a folder").mkdir()
    (tmp_path / "a folder" / "c.png").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def lines() -> Lines:
    return Lines(["/image", "/save", "/set"], ["/image", "/save"])


def test_commands_are_completed(lines):
    assert lines.completions("/s") == ["/save ", "/set "] and lines.completions("/i") == ["/image "]
    assert lines.completions("") == lines.completions("What") == lines.completions("/set a") == []


@pytest.mark.parametrize("quote", ["", "'", '"'])
@pytest.mark.parametrize("place", ["", "./", "~/", "absolute"])
def test_completed_paths_are_read_as_the_files_they_name(lines, folder, quote, place):
    if place == "~/" and quote:
        pytest.skip("a shell does not expand what is quoted")
    place = f"{folder}/" if place == "absolute" else place
    found = lines.completions(f"/image first.png {quote}{place}")
    (folder_match,) = [match for match in found if match.endswith("/")]
    assert [os.path.relpath(path) for path in paths_in(folder_match + quote)] == ["a folder"]
    files = [match for match in found if match != folder_match]
    assert all(match.endswith(f"{quote} ") for match in files)
    assert sorted(os.path.relpath(path) for match in files for path in paths_in(match)) == sorted(NAMES)


@pytest.mark.parametrize("quote", ["", "'", '"'])
def test_a_completion_goes_on_from_what_is_typed(lines, folder, quote):
    """At every point within it, a completed path leads to its file."""
    files = [match for match in lines.completions(f"/image {quote}") if not match.endswith("/")]
    for whole in files:
        for end in range(1, len(whole) - 1):
            typed = whole[:end]
            matches = lines.completions(f"/image {typed}")
            assert all(match.startswith(typed) for match in matches)
            read = [paths_in(match) for match in matches if not match.endswith("/")]
            assert paths_in(whole) in read or typed.endswith("\\"), typed  # after a backslash what it escapes is open


def test_completion_offers_no_hidden_files_and_folders_go_on(lines, folder):
    assert lines.completions("/save .h") == [".hidden "]
    assert lines.completions("/image a\\ f") == ["a\\ folder/"]
    assert lines.completions("/image a\\ folder/") == ["a\\ folder/c.png "]
    assert lines.completions("/image nowhere/") == lines.completions("/image \0/") == []


@pytest.mark.parametrize(
    ("line", "word"), [("/image", "/image"), ("/image a", "a"), ("/image a\\ b", "a\\ b"), ("/image 'a b", "'a b"),
                       ('/image x "a \\" b', '"a \\" b'), ("/image 'it'\\''s' one", "one"), ("/image ", "")]
)  # fmt: skip
def test_words_begin_where_a_shell_sees_them(line, word):
    assert line[last_word(line)[0] :] == word


def test_dropped_paths(folder):
    here = str(folder)
    assert paths_in("a b.png") == ["a b.png"] and paths_in(" it's.png ") == ["it's.png"]
    assert paths_in("'a b.png' a.png") == ["a b.png", "a.png"]
    assert paths_in(f"{here}/a\\ b.png ") == [f"{here}/a b.png"]
    assert paths_in(f"file://{here}/a%20b.png") == [f"{here}/a b.png"]
    assert paths_in("~/a.png") == paths_in("~/'a.png'") == [f"{here}/a.png"]
    assert paths_in("~/a b.png") == [f"{here}/a b.png"]
    assert paths_in("what ever") == ["what", "ever"]
    for text, message in (("", "name a file"), ("''x 'y", "No closing quotation"), ("x\\", "No escaped character")):
        with pytest.raises(ValueError, match=message):
            paths_in(text)


def typed(monkeypatch, *given: str) -> list[str]:
    """Has `input` return these, then end; returns the prompts that it gets."""
    rest, prompts = list(given), []

    def answer(prompt: str) -> str:
        prompts.append(prompt)
        if not rest:
            raise EOFError
        return rest.pop(0)

    monkeypatch.setattr(builtins, "input", answer)
    return prompts


def test_texts_of_several_lines(lines, monkeypatch):
    prompts = typed(monkeypatch, "one", '"""', "two", "", " three", '"""', '"""four"""', '"""five', 'six"""', '"""open')
    assert [lines.read("> ") for _ in range(4)] == ["one", "two\n\n three", "four", "five\nsix"]
    assert prompts == ["> ", "> ", "... ", "... ", "... ", "... ", "> ", "> ", "... "]
    with pytest.raises(EOFError):
        lines.read("> ")


def test_bytes_that_are_no_text(lines, monkeypatch):
    typed(monkeypatch, b"caf\xe9".decode("utf-8", "surrogateescape"))
    assert lines.read("> ") == "caf\ufffd"


def test_history_is_kept_for_its_owner_alone(tmp_path, monkeypatch):
    readline = pytest.importorskip("readline")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    file = history_file()
    assert file == tmp_path / "kanjian" / "history"
    readline.clear_history()
    first = Lines([], [], file)
    readline.add_history("What is this?")
    first.close()
    assert file.stat().st_mode & 0o777 == 0o600
    readline.clear_history()
    Lines([], [], file)
    assert readline.get_history_item(1) == "What is this?"
    readline.clear_history()
    Lines([], [], tmp_path / "kanjian" / "history" / "below a file").close()  # such a home ends nothing


@given(st.text(st.characters(codec=None)))
def test_plain_text_has_no_controls(text):
    found = plain(text)
    assert not any(ord(letter) < 32 and letter not in "\n\t" or 127 <= ord(letter) < 160 for letter in found)
    assert [letter for letter in found if letter.isprintable()] == [
        "?" if "\ud800" <= letter <= "\udfff" else letter
        for letter in text if letter.isprintable() or "\ud800" <= letter <= "\udfff"
    ]  # fmt: skip
    assert "\n" not in one_line(text)


def test_plain_text_keeps_what_people_write():
    assert plain("a\tb\nc 图 👩‍👩‍👧 é") == "a\tb\nc 图 👩‍👩‍👧 é"
    assert plain("\x1b]0;title\x07\x1b[2J\x9b31mred\r\x08") == "]0;title[2J31mred"
    assert one_line("two\n lines\x1b") == "two lines"
