"""dataset/json_files.py: what `json.loads` makes of a whole text, whatever the size of the pieces that are read."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset import json_files
from dataset.json_files import encoding_problem, first_bracket, json_elements, json_items, json_lines, json_lists

ELEMENTS = [
    0, -1.5, 12e-7, 12345678901234567890, True, False, None, "", "猫 \n\t\"\\ 😀 \u2028", "\\u", [], {},
    [[]], {"": [{}]}, {"a": [1, "]", {"b": "}"}], "c": None}, "a" * 100, 1e300, -0.0, "\x00\x1f",
]  # fmt: skip


@pytest.fixture(params=[1, 2, 3, 5, 7, 16, 33, 1 << 20])
def chunk(request, monkeypatch) -> int:
    monkeypatch.setattr(json_files, "CHUNK", request.param)
    return request.param


@pytest.mark.parametrize("style", [{}, {"indent": 3}, {"ensure_ascii": False}, {"separators": (",", ":")}])
def test_elements_equal_those_of_the_library(tmp_path, chunk, style):
    text = json.dumps(ELEMENTS, **style)
    for start, end in (("", ""), ("\ufeff \n", "\r\n "), ("\n" * 40, "\t" * 40)):
        (tmp_path / "a.json").write_text(start + text + end)
        assert list(json_elements(tmp_path / "a.json")) == ELEMENTS
        (tmp_path / "a.json").write_text(f'{start}{{"k": {text}, "long\\u732b": 1{end}}}')
        assert list(json_items(tmp_path / "a.json")) == [("k", ELEMENTS), ("long猫", 1)]


@pytest.mark.parametrize("number", ["1", "1.5", "1e5", "1E-5", "-1.25e+10", "123456789", "-0", "NaN", "-Infinity"])
def test_numbers_at_the_end_of_a_piece(tmp_path, chunk, number):
    (tmp_path / "a.json").write_text(f"[{number},{number} ]")
    (first, second), (expected, _) = json_elements(tmp_path / "a.json"), json.loads(f"[{number},{number}]")
    assert first == second == expected or math.isnan(first) and math.isnan(expected)


MALFORMED = [
    "[1, 2", '["abc', '["a" "b"]', "[1,]", '[{"a" 1}]', '[{"a": 1,}]', "[{'a': 1}]", "[tru]", "[nul", "[-]",
    '["\\x"]', '["\\u12"]', '["a\nb"]', "[1]]", "[1] x", "[01]", "[.5]", "[1 2]", "hello", "[\n\n  {\n 1: 2}]", "[",
    '[{"a": [1, 2}]',
]  # fmt: skip


@pytest.mark.parametrize("text", MALFORMED)
def test_malformed_json_names_the_place_that_the_library_names(tmp_path, chunk, text):
    text = '\n [\n{"fine": "猫"},' + text[1:] if text.startswith("[") else text
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="a.json") as caught:
        list(json_elements(tmp_path / "a.json"))
    line, column = expected.value.lineno, expected.value.colno
    message = str(caught.value)
    # At a comma after which nothing follows the library names the one or the other, as versions differ.
    assert any(f"a.json, line {line}, column {c}: not valid JSON" in message for c in (column, column + 1)), message


def test_a_fault_in_the_middle_is_found_there(tmp_path, monkeypatch):
    """Not after the rest of the file was read."""
    monkeypatch.setattr(json_files, "CHUNK", 1000)
    (tmp_path / "a.json").write_text("[" + "[1], " * 500 + "{oops}" + ", [1]" * 100_000 + "]")
    read = []
    original = json_files.JsonBuffer._read
    monkeypatch.setattr(json_files.JsonBuffer, "_read", lambda self, size: read.append(size) or original(self, size))
    with pytest.raises(ValueError, match="line 1, column 2503: not valid JSON"):
        list(json_elements(tmp_path / "a.json"))
    assert sum(read) < 10_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty; expected a JSON list"),
        (" \n", "the file is empty"),
        ('{"a": 1}\n{"a": 2}', "expected a JSON list, got an object; JSON lines end in .jsonl"),
        ('"text"', "expected a JSON list, got a text"),
        ("null", "expected a JSON list, got a single value"),
        ("[" * 100_000, "line 1, column 2: not valid JSON: nested too deeply"),
        ("[" + "9" * 5000 + "]", "line 1, column 2: not valid JSON: Exceeds the limit"),
    ],
)
def test_files_without_a_list(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=f"a.json[:,] {message}"):
        list(json_elements(tmp_path / "a.json"))


def test_a_key_that_stands_twice_is_a_fault_of_its_value_alone(tmp_path, chunk):
    (tmp_path / "a.json").write_text('[{"a": 1},\n  {"b": {"猫": 1, "猫": 2}}, {"a": 3}]')
    first, fault, last = json_elements(tmp_path / "a.json")
    assert (first, last) == ({"a": 1}, {"a": 3})
    assert str(fault).endswith("a.json, line 2, column 3: the key '猫' stands twice in one object; remove one of them")
    (tmp_path / "b.json").write_text('{"a": 1, "a": 2, "b": {"c": 1, "c": 1}}')
    first, second, (key, fault) = json_items(tmp_path / "b.json")
    assert (first, second, key) == (("a", 1), ("a", 2), "b") and "column 23: the key 'c' stands twice" in str(fault)


def test_lists_of_an_object(tmp_path, chunk):
    content = {"info": {"x": [1]}, "a": [1, [2]], "skipped": [[3]] * 20, "b": [{"c": 4}], "z": "a"}
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert list(json_lists(tmp_path / "a.json", ["b", "a"])) == [("a", 1), ("a", [2]), ("b", {"c": 4})]
    with pytest.raises(ValueError, match="expected a list under 'z'$"):
        list(json_lists(tmp_path / "a.json", ["z"]))
    with pytest.raises(ValueError, match="expected a list under 'y'; its keys are 'info, a, skipped, b, z'"):
        list(json_lists(tmp_path / "a.json", ["y"]))
    (tmp_path / "b.json").write_text('{"a": [], "a": [1]}')
    with pytest.raises(ValueError, match="the key 'a' stands twice"):
        list(json_lists(tmp_path / "b.json", ["a"]))


def test_first_bracket(tmp_path, chunk):
    for text in (" \n{}", "[", "7"):
        (tmp_path / "a.json").write_text(text)
        assert first_bracket(tmp_path / "a.json") == text.strip()[0]


def test_lines(tmp_path):
    content = b'\xef\xbb\xbf{"a": 1}\r\n\n  \n"\xe7\x8c\xab"\n\xff\n{"b": }\n[1] 2\n' + b"[" * 100_000 + b"\nnull"
    (tmp_path / "a.jsonl").write_bytes(content)
    first, cat, *bad, last = json_lines(tmp_path / "a.jsonl")
    assert (first, cat, last) == ({"a": 1}, "猫", None)
    assert [str(fault).partition("a.jsonl")[2] for fault in bad] == [
        ", line 5: not UTF-8 at byte 23 of the file; save it in that encoding",
        ", line 6, column 7: not valid JSON: Expecting value",
        ", line 7, column 5: not valid JSON: Extra data",
        ", line 8: not valid JSON: nested too deeply",
    ]


@pytest.mark.parametrize("before", [b"", b"a\n" * 3, "猫\n".encode() * 5, b"x" * 7])
@pytest.mark.parametrize("bad", [b"\xff", b"\xe7\x8c", b"\xe7\x8c\n", b"\xed\xa0\x80"])
def test_bytes_that_are_not_utf8(tmp_path, chunk, before, bad):
    content = before + bad + (b"" if bad == b"\xe7\x8c" else b"\nb")
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UnicodeDecodeError) as expected:
        content.decode()
    line = before.count(b"\n") + 1
    message = f"line {line}: not UTF-8 at byte {expected.value.start} of the file"
    assert message in encoding_problem(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(b'["' + content + b'"]')
    with pytest.raises(ValueError, match=f"a.json, line {line}: not UTF-8 at byte {expected.value.start + 2}"):
        list(json_elements(tmp_path / "a.json"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.lists(JSON, max_size=6), st.integers(1, 60), st.sampled_from([None, 1]), st.booleans())
def test_any_list_in_pieces_of_any_size(tmp_path_factory, rows, size, indent, ascii):
    file = tmp_path_factory.getbasetemp() / "any.json"
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii)
    file.write_bytes(text.encode(errors="replace"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "CHUNK", size)
        assert list(json_elements(file)) == json.loads(file.read_bytes())


@pytest.mark.parametrize("depth", [99, 100, 101, 500])
def test_depth(tmp_path, chunk, depth):
    """Values that Python can read, but not pass on, are faults of their own; brackets in texts do not count."""
    text = "[" * depth + '"' + "[{" * 200 + '"' + "]" * depth
    (tmp_path / "a.json").write_text(f'[1,\n {text}, {{"a": 1}}]')
    (tmp_path / "a.jsonl").write_text(f'1\n{text}\n{{"a": 1}}')
    for rows, place in (
        (json_elements(tmp_path / "a.json"), "a.json, line 2, column 2: "),
        (json_lines(tmp_path / "a.jsonl"), "a.jsonl, line 2: "),
    ):
        first, deep, last = rows
        assert (first, last) == (1, {"a": 1})
        if depth <= 100:
            assert deep == json.loads(text)
        else:
            assert f"{place}nested deeper than 100 levels" in str(deep)
