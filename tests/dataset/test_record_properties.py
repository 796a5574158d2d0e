"""Records that nobody thought of: a record is valid or a RecordError says why, and what is valid survives a file."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataset.record import FIELDS, ROLES, RecordError, read_records, to_table, validate_record, write_records
from dataset.table import TABLE_KEYS, record_of_row

FAST = settings(
    derandomize=True, max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# Half surrogates and null characters among them, which JSON can carry.
SLY = ["", " ", "<image>", "<video>", "a/../b", "/a", "\0"]
TEXT = st.text(st.characters(), max_size=6) | st.sampled_from(SLY) | st.just("\ud800")
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
TURN = st.fixed_dictionaries({"role": st.sampled_from([*ROLES, "human"]) | ANYTHING, "content": TEXT | ANYTHING})
RECORD = st.fixed_dictionaries(
    {"id": TEXT, "source": TEXT, "messages": st.lists(TURN, max_size=3) | ANYTHING},
    optional={
        **{name: st.lists(TEXT, max_size=2) | ANYTHING for name in ("images", "videos", "audios")},
        "meta": st.dictionaries(TEXT, TEXT | st.integers(), max_size=2) | ANYTHING,
    },
)

WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
    lambda text: text.strip() and "<image>" not in text and "<video>" not in text
)
PATH = WORDS.filter(lambda path: ".." not in path and "\0" not in path and not path.startswith("/"))


@st.composite
def valid_record(draw, name: str) -> dict:
    """Media in any of the user's turns, with or without a system turn; or a plain text."""
    if draw(st.booleans()):
        contents, role = [draw(WORDS)], "text"
        messages = [{"role": "text", "content": contents[0]}]
    else:
        role = "user"
        messages = [{"role": "system", "content": draw(WORDS)}] if draw(st.booleans()) else []
        for _ in range(draw(st.integers(1, 3))):
            messages += [{"role": "user", "content": draw(WORDS)}, {"role": "assistant", "content": draw(WORDS)}]
    record = {"id": name, "source": draw(WORDS), "messages": messages, "audios": draw(st.lists(PATH, max_size=1))}
    for key, placeholder in (("images", "<image>"), ("videos", "<video>")):
        record[key] = draw(st.lists(PATH, max_size=2))
        for _ in record[key]:
            turn = draw(st.sampled_from([turn for turn in messages if turn["role"] == role]))
            turn["content"] += placeholder
    return {**record, "meta": draw(st.dictionaries(WORDS, WORDS | st.integers(), max_size=2))}


@st.composite
def spoiled_record(draw) -> dict:
    """A valid record, in which one value is another."""
    record = draw(valid_record("r"))
    key = draw(st.sampled_from(FIELDS))
    values = {"meta": st.dictionaries(TEXT, TEXT, min_size=1, max_size=2), "messages": st.lists(TURN, max_size=2)}
    return {**record, key: draw(values.get(key, st.lists(TEXT, min_size=1, max_size=2)) | TEXT | ANYTHING)}


@FAST
@given(st.one_of(RECORD, ANYTHING, spoiled_record(), spoiled_record()))
def test_anything_is_a_record_or_a_record_error(value):
    try:
        record = validate_record(value)
    except RecordError as error:
        assert error.reason
        str(error).encode()  # can be printed and written, whatever stands in the record
        return
    assert set(record) == set(FIELDS) and validate_record(record) == record
    to_table([record])


@FAST
@given(st.data())
def test_valid_records_survive_a_file(tmp_path, data):
    records = [data.draw(valid_record(f"r{number}")) for number in range(2)]
    assert [validate_record(record) for record in records] == records
    write_records(records, tmp_path / "r.parquet")
    assert list(read_records(tmp_path / "r.parquet")) == records


@FAST
@given(st.dictionaries(st.sampled_from(TABLE_KEYS) | TEXT, TEXT | ANYTHING, max_size=5))
def test_any_row_of_a_table_is_a_record_or_a_record_error(row):
    try:
        validate_record({**record_of_row(row, "r"), "id": "r", "source": "s"})
    except RecordError as error:
        str(error).encode()


@pytest.mark.parametrize("depth", [5, 500])
def test_a_deep_value_is_shown_in_short(depth):
    deep: list = []
    for _ in range(depth):
        deep = [deep]
    for change in ({"id": deep}, {"messages": deep}, {"meta": deep}, {"images": deep}):
        record = {"id": "x", "source": "s", "messages": [{"role": "text", "content": "T"}], **change}
        with pytest.raises(RecordError) as caught:
            validate_record(record)
        assert len(str(caught.value)) < 400
