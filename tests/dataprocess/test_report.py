from dataprocess.report import EXAMPLES, Tally, table


def test_counts_and_first_examples():
    tally = Tally(read=10, kept=2)
    for number in range(7):
        tally.drop("image missing", f"record {number}")
    tally.drop("empty answer", "record x")
    assert tally.as_dict() == {
        "read": 10,
        "kept": 2,
        "dropped": {
            "empty answer": {"count": 1, "examples": ["record x"]},
            "image missing": {"count": 7, "examples": [f"record {number}" for number in range(EXAMPLES)]},
        },
    }


def test_table():
    clean, mixed = Tally(read=100, kept=100), Tally(read=3, kept=1)
    mixed.drop("image missing", "x")
    mixed.drop("empty answer", "y")
    assert table({"clean": clean, "mixed_source": mixed}).splitlines() == [
        "source        read  kept  empty answer  image missing",
        "clean          100   100             0              0",
        "mixed_source     3     1             1              1",
        "total          103   101             1              1",
    ]
