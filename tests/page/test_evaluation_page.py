"""The page of an evaluation: as a parser reads it, and as a headless browser shows it."""

import json
import re
import shutil
from pathlib import Path

import pytest

from page.evaluation import write_page
from page.figures import caution, crossing, in_unit, meaning, metric_rows
from page.gallery import digest, script_data
from page.questions import Album, filters_of, order
from page.text import natural, plain
from tests.page.evaluated import CONDITIONS, HOSTILE, Page, draw_media, question, questions, report_of

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return draw_media(tmp_path_factory.mktemp("evaluated"))


@pytest.fixture(scope="module")
def file(folder) -> Path:
    rows = questions()
    write_page(report_of(rows), rows, folder, folder / "report.html", f"Evaluation {HOSTILE}")
    return folder / "report.html"


@pytest.fixture(scope="module")
def page(file) -> Page:
    return Page(file)


def written(folder: Path, rows: list[dict], **limits) -> Page:
    write_page(report_of(rows), rows, folder, folder / "limited.html", "Limited", **limits)
    return Page(folder / "limited.html")


# What the file is


def test_the_page_stands_alone_and_runs_its_own_script_only(page):
    assert not {"iframe", "object", "embed", "link", "base", "img"} & set(page.tags)
    assert page.tags.count("script") == 2 and page.tags.count("style") == 1
    for tag, name, value in page.attributes:
        assert not name.startswith("on") and name != "style", (tag, name)
        if name in ("src", "href", "srcset", "action"):
            data = tag == "image" and re.fullmatch(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+", value)
            assert data or tag in ("a", "use") and value.startswith("#"), (tag, name, value)
    scripts, (style,) = page.raw["script"], page.raw["style"]
    assert ("script", "type", "application/json") in page.attributes
    assert f"script-src '{digest(scripts[1])}';" in page.policy
    assert f"style-src '{digest(style)}';" in page.policy
    assert "default-src 'none'" in page.policy and "unsafe" not in page.policy
    assert HOSTILE.split("\u2028")[0] in page.text and "{{ 7 * 7 }}" in page.text


def test_no_data_breaks_out_of_its_element(page):
    for letter in "<>&\u2028\u2029":
        assert letter not in page.raw["script"][0]
    (evil,) = [row for row in page.data["rows"] if row["id"].startswith("evil")]
    shown = plain(HOSTILE)
    assert "\\u2028\\u202e" in shown and evil["answers"][0]["text"] == shown and [shown, shown] in evil["meta"]
    assert [part for part in evil["turns"][0][1] if part != 1] == [shown, shown]
    assert "\u202e" not in page.source


def test_script_data_is_json():
    value = {"a": ["</script>", "<!--", "\u2028", "&amp;", "é红", 1.5, None]}
    assert json.loads(script_data(value)) == value
    with pytest.raises(ValueError):
        script_data(float("nan"))


def test_each_picture_is_embedded_once(page):
    pictures = re.findall(r"base64,([A-Za-z0-9+/=]{40,})", page.source)
    shown = sum(len(medium["pictures"]) for medium in page.data["media"])
    assert len(set(pictures)) == len(pictures) == shown
    kinds = [(medium["kind"], len(medium["pictures"])) for medium in page.data["media"]]
    assert sorted(kinds) == [("image", 0)] * 2 + [("image", 1)] * 8 + [("video", 8)]
    names = [value for tag, name, value in page.attributes if tag == "image" and name == "id"]
    gone = [picture for medium in page.data["media"] for picture in medium["pictures"] if picture["uri"] is None]
    assert len(names) == len(set(names)) == len(gone) > 0
    for tag, name, value in page.attributes:
        if tag == "use" and name == "href":
            assert value[1:] in names


def test_what_is_missing_is_named(page):
    (gone,) = [medium for medium in page.data["media"] if medium["path"] == "gone.png"]
    assert "gone.png" in gone["error"] and not gone["pictures"]


def test_figures_are_those_of_the_report(page):
    report = report_of(questions())
    assert f"{report['n']} questions about 10 pictures and 1 clip" in page.text
    assert "61 seconds" in page.text
    for cell in [report["score"], *report["groups"]["type"].values()]:
        for name in CONDITIONS:
            value, low, high = (f"{100 * cell[name][key]:.1f}" for key in ("value", "low", "high"))
            assert f"{value}{low}–{high}" in page.text
            label = f"{name} {value} % ({low} to {high})"
            assert any(name == "aria-label" and label in shown for _, name, shown in page.attributes), label
            width = f"{100 * cell[name]['value']:.2f}%"
            assert ("rect", "width", width) in page.attributes
    score = report["looking"]["looking_score"]
    assert score is None or f"Looking score {score['value']:.2f}" in page.text
    assert "colour x en" in page.text and "looking score" in page.text
    assert ("a", "href", "#g.type=colour") in page.attributes
    assert ("a", "href", "#g.type=colour&g.language=en") in page.attributes
    assert ("a", "href", "#is.real=right&is.blind=wrong") in page.attributes


def test_without_a_script_the_first_questions_can_be_read(page):
    assert len(page.cards) == 24 and "The first 24 of 60 questions" in page.text
    first = page.data["rows"][0]
    assert first["id"] in page.cards[0] and first["answers"][0]["text"] in page.cards[0]
    assert "✗ wrong" in page.cards[0] and "reference" in page.cards[0]


# What is shown and what isn't


def test_wrong_answers_come_first_and_groups_in_turn():
    rows = [question(number) for number in range(60)]
    wrong = {number for number in range(60) if number % 5 == 0}
    found = list(order(rows, lambda row: row["conditions"]["real"]["score"] < 0.5))
    assert sorted(found) == list(range(60)) and set(found[:12]) == wrong
    for start in range(0, 12, 3):
        assert len({rows[number]["meta"]["type"] for number in found[start : start + 3]}) == 3


def test_a_limit_is_told_with_what_it_leaves_out(folder):
    rows = [question(number) for number in range(60)]
    page = written(folder, rows, most_rows=20)
    assert len(page.data["rows"]) == 20 and page.data["total"] == 60
    assert "40 of the 60 questions are left out here, since the gallery holds at most 20 questions" in page.text
    assert "It has all 12 wrong answers" in page.text
    assert "8 of the 12 wrong answers" in written(folder, rows, most_rows=8).text
    assert "are left out" not in written(folder, rows).text


def test_the_limit_of_bytes_is_kept(folder):
    rows = [question(number) for number in range(60)]
    whole = written(folder, rows)
    page = written(folder, rows, most_bytes=20_000)
    texts = len(page.raw["script"][0]) - len(script_data({**page.data, "rows": [], "media": []}))
    pictures = sum(map(len, re.findall(r"data:image/[^\"]+", page.source)))
    assert 0 < len(page.data["rows"]) < 60 and texts < 20_000 and pictures < 20_000
    assert len(page.data["media"]) < len(whole.data["media"])
    used = {place for row in page.data["rows"] for place in row["media"] + sum((own for _, own in row["instead"]), [])}
    assert used == set(range(len(page.data["media"])))
    assert "at most 0.02 MB" in page.text


def test_only_files_below_the_root_are_embedded(folder, tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    shutil.copy(folder / "1.png", tmp_path / "1.png")
    for path in ("../1.png", str(tmp_path / "1.png")):
        shown = Album(inner).load(("image", path))
        assert not shown["pictures"] and "relative to the image root" in shown["error"]
    assert Album(tmp_path).load(("image", "1.png"))["pictures"]


def test_filters_are_keys_with_few_values():
    rows = [question(number) for number in range(60)]
    found = dict(filters_of(rows))
    assert list(found) == ["language", "objects", "type"]  # each name is another one, and all have one metric
    assert found["objects"] == [str(number) for number in range(11)]
    assert sorted(["10", "b", "9", "a", "²"], key=natural) == ["9", "10", "a", "b", "²"]


@pytest.mark.parametrize("names", [("real",), ("blind",), ("real", "shuffled"), ("real", "blind")])
def test_any_conditions_make_a_page(folder, names):
    rows = questions()
    for row in rows:
        row["conditions"] = {name: row["conditions"][name] for name in names}
    page = written(folder, rows)
    assert page.data["columns"] == list(names) and len(page.data["rows"]) == 60
    labels = [shown for _, key, shown in page.attributes if key == "aria-label"]
    for name in CONDITIONS:
        assert any(shown.startswith(f"{name} ") for shown in labels) == (name in names)
    assert ("crossing" in page.source.partition("</style>")[2]) == (set(names) == {"real", "blind"})


def test_captions_alone_make_a_page(folder):
    rows = [question(number, metric="caption") for number in range(5)]
    for row in rows:
        for answer in row["conditions"].values():
            answer["score"] = None
    figures = {"n": 5, **{name: {"value": 0.912, "low": 0.5, "high": 1.3} for name in CONDITIONS}}
    report = {"n": 5, "conditions": list(CONDITIONS), "settings": {}, "seconds": {}, "metrics": {"cider": figures},
              "score": {"n": 0}, "looking": None, "groups": {}}  # fmt: skip
    write_page(report, rows, folder, folder / "captions.html", "Captions")
    page = Page(folder / "captions.html")
    assert "No question has a score of its own" in page.text and "0.910.50–1.30" in page.text
    assert "✗" not in page.text and "Looking score" not in page.text and len(page.cards) == 5


def test_rows_must_be_those_of_the_report(folder):
    with pytest.raises(ValueError, match="60 questions and there are 59 rows"):
        write_page(report_of(questions()), questions()[:-1], folder, folder / "x.html", "x")
    assert not (folder / "x.html").exists()


# What is said


def figure(value: float, low: float, high: float) -> dict:
    return {"value": value, "low": low, "high": high}


def headline(gain: dict | None, ratio: dict | None) -> str:
    score = {"n": 100, "real": figure(0.8, 0.7, 0.9), "blind": figure(0.5, 0.4, 0.6)}
    looking = None if gain is None else {"gain": gain, "looking_score": ratio}
    return " ".join(meaning({"score": score, "looking": looking}))


def test_sentences_say_what_the_intervals_allow():
    text = headline(figure(0.3, 0.2, 0.4), figure(0.9, 0.8, 1.0))
    assert "80.0 % (95 % interval 70.0 to 90.0)" in text and "worth 30.0 points (20.0 to 40.0)" in text
    assert "90 % is lost" in text and "Looking score 0.90 (0.80 to 1.00)" in text
    text = headline(figure(0.02, -0.05, 0.09), None)
    assert "may well be none" in text and "no looking score" in text and "worth" not in text
    assert "misleads" in headline(figure(-0.1, -0.2, -0.05), None)
    assert "can't be told" in headline(None, None)
    assert "No question has a score" in " ".join(meaning({"score": {"n": 0}, "looking": None}))
    score = {"n": 100, "real": figure(0.8, 0.7, 0.9), "blind": figure(0.5, 0.4, 0.6)}
    looking = {"n": 60, "gain": figure(0.3, 0.2, 0.4), "looking_score": None}
    assert "of the 60 questions that show something" in " ".join(meaning({"score": score, "looking": looking}))


def test_few_questions_are_pointed_out():
    cell = {"n": 12, "real": figure(0.5, 0.3, 0.7)}
    text = caution("24 questions", {"type": {"a": cell, "b": {**cell, "n": 100}}})
    assert "24 questions" in text and "2 groups" in text and "1 group has fewer than 30" in text
    assert "fewer" not in caution("2", {"type": {"b": {**cell, "n": 100}}})


def test_crossing_counts_every_question_once():
    rows = [question(number) for number in range(60)]
    cells = {cell["right"]: cell["count"] for cell in crossing(rows, ("real", "blind"))["cells"]}
    real, blind = ([number % 5 != 0 for number in range(60)], [number % 4 == 0 for number in range(60)])
    both = [pair for pair in zip(real, blind, strict=True)]
    assert cells == {pair: both.count(pair) for pair in ((True, False), (True, True), (False, True), (False, False))}
    assert crossing([], ("real", "blind")) is None


def test_units_of_metrics():
    assert in_unit("exact", 0.987) == "98.7" and in_unit("perplexity", 1.0325) == "1.03"
    assert in_unit("cider_zh", 0.91) == "0.91" and in_unit("perplexity", 12345.0) == "12,345"
    assert in_unit("exact", None) == in_unit("perplexity", float("inf")) == "–"


def test_parts_of_a_metric_have_rows_of_their_own(folder):
    rows = [question(number, metric="yes_no", answer="yes", references=["yes"]) for number in range(6)]
    for row in rows:
        row["conditions"]["real"] |= {"answer": "Yes, it is.", "score": 1.0}
    page = written(folder, rows)
    assert "yes_no: f1" in page.text and "yes_no: precision" in page.text
    (f1,) = [own for name, own, _ in metric_rows(report_of(rows)["metrics"], CONDITIONS) if name == "yes_no: f1"]
    assert f1["n"] == 6 and f1["real"] == {"value": 1.0, "low": None}


# In a browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (requirements-dev.txt)")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"needs one of {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


class View:
    """A page in a browser, and all that it complains of or asks for."""

    def __init__(self, browser, file: Path, state: str = "", **context):
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
        self.page = self.context.new_page()
        self.trouble, self.requests = [], []
        self.page.on("console", lambda message: self.trouble.append(message.text))
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("dialog", lambda dialog: self.trouble.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(f"{file.as_uri()}{state}")

    def ids(self) -> list[str]:
        return self.page.locator(".card h3").all_inner_texts()

    def status(self) -> str:
        return self.page.locator("#status").inner_text()

    def choose(self, name: str, value: str) -> None:
        self.page.locator(f"select[name='{name}']").select_option(value)

    def wait(self, text: str) -> None:
        self.page.wait_for_function("text => document.getElementById('status').textContent.includes(text)", arg=text)


@pytest.fixture
def view(browser, file):
    opened = []

    def show(state: str = "", of: Path = file, **context) -> View:
        opened.append(View(browser, of, state, **context))
        return opened[-1]

    yield show
    for one in opened:
        assert not one.trouble
        asked = {url.partition("#")[0] for url in one.requests if not url.startswith("data:")}
        assert asked == {one.page.url.partition("#")[0]}
        assert one.page.evaluate("window.broken") is None
        one.context.close()


def test_the_script_shows_what_the_markup_shows(view):
    plain_text = view(java_script_enabled=False).page.locator("#cards")
    shown = view().page.locator("#cards")
    for text in (plain_text.all_inner_texts(), shown.all_inner_texts()):
        assert len(text) == 1
    words = [re.sub(r"\s+", " ", text[0]) for text in (plain_text.all_inner_texts(), shown.all_inner_texts())]
    assert words[0] == words[1] and "evil </script><img" in words[0]


def test_filters(view):
    rows, shown = questions(), view()
    assert shown.status() == "1–24 of 60 questions, page 1 of 3."
    wrong = [row for row in rows if row["conditions"]["real"]["score"] < 0.5]
    shown.choose("is.real", "wrong")
    shown.wait(f"{len(wrong)} questions (out of 60)")
    assert set(shown.ids()) == {plain(row["id"]) for row in wrong}
    both = [row for row in wrong if row["meta"]["type"] == "colour"]
    shown.choose("g.type", "colour")
    shown.wait(f" {len(both)} questions (out of 60)")
    assert f"colour ({len(both)})" in shown.page.locator("select[name='g.type']").inner_text()
    shown.page.get_by_role("button", name="Clear filters").click()
    shown.wait("60 questions")
    helped = [row for row in rows if row["conditions"]["real"]["score"] > row["conditions"]["blind"]["score"]]
    button = shown.page.get_by_role("button", name="picture helped")
    assert button.inner_text() == f"picture helped ({len(helped)})"
    button.click()
    shown.wait(f"{len(helped)} questions (out of 60)")
    assert button.get_attribute("aria-pressed") == "true"
    shown.page.get_by_role("link", name="wrong with the picture and blind").click()
    neither = [row for row in wrong if row["conditions"]["blind"]["score"] < 0.5]
    shown.wait(f"{len(neither)} questions (out of 60)")


def test_search(view):
    shown = view()
    shown.page.keyboard.press("/")
    shown.page.keyboard.type("QUESTION 17: Colour?")
    for text, name in (("", "q017"), ("</script><img", "evil </script><img"), ("什么在动", "clip")):
        if text:
            shown.page.locator("#search").fill(text)
        shown.page.wait_for_function(
            "name => document.querySelector('.card h3').textContent.startsWith(name)", arg=name
        )
        assert shown.status() == "1–1 of 1 question (out of 60), page 1 of 1."
    assert shown.page.locator(".card img").count() == 8
    shown.page.locator("#search").fill("no such thing")
    shown.wait("0 questions (out of 60)")
    assert "No question fits" in shown.page.locator("#cards").inner_text()


def test_pages_and_orders(view):
    shown = view("#sort=file")
    expected = [plain(row["id"]) for row in questions()]
    assert shown.ids() == expected[:24]
    shown.page.get_by_role("button", name="Next").last.click()
    shown.wait("page 2 of 3")
    assert shown.ids() == expected[24:48]
    shown.page.keyboard.press("ArrowRight")
    shown.wait("49–60 of 60 questions, page 3 of 3")
    assert shown.ids() == expected[48:] and shown.page.get_by_role("button", name="Next").first.is_disabled()
    shown.page.go_back()
    shown.wait("page 2 of 3")
    shown.page.locator("#order").select_option("score")
    shown.wait("page 1 of 3")
    rows = {plain(row["id"]): row for row in questions()}
    scores = [rows[name]["conditions"]["real"]["score"] for name in shown.ids()]
    assert scores == sorted(scores) and scores[0] == 0
    shown.page.locator("#size").select_option("96")
    shown.wait("1–60 of 60 questions, page 1 of 1")


def test_jumps_within_the_page_keep_the_filters(view):
    shown = view("#g.type=colour&sort=file")
    shown.page.get_by_role("link", name="Settings").click()
    shown.page.get_by_role("link", name="Gallery").click()
    shown.choose("is.real", "wrong")
    expected = [row for row in questions()
                if row["meta"]["type"] == "colour" and row["conditions"]["real"]["score"] < 0.5]  # fmt: skip
    shown.wait(f" {len(expected)} questions (out of 60)")
    assert shown.ids() == [plain(row["id"]) for row in expected]


def test_the_address_holds_the_state(view):
    first = view("#is.real=wrong&g.type=colour&q=question&sort=file")
    second = view(f"#{first.page.url.partition('#')[2]}")
    assert first.ids() == second.ids() and 0 < len(first.ids()) < 10
    assert second.page.locator("#search").input_value() == "question"
    assert second.page.locator("select[name='g.type']").input_value() == "colour"
    assert view("#row=5").ids() == ["q005"]
    assert len(view("#is.real=nonsense&sort=__proto__&page=-3&size=7&g.none=1").ids()) == 24


def test_shown_instead_and_choices(view):
    shown = view("#q=outdoors")
    assert shown.ids() == ["choices"]
    card = shown.page.locator(".card")
    assert card.locator(".choices").inner_text().split() == (
        "log-probability per token real blind shuffled ✓ indoors -0.10 -3.00 -1.00 outdoors -2.00 -0.25 -0.50".split()
    )
    assert card.locator(".best").all_inner_texts() == ["-0.10", "-0.25", "-0.50"]
    assert card.locator("img").count() == 1
    card.locator("summary").click()
    shown.page.wait_for_selector(".card details img")
    assert card.locator("details img").evaluate("image => image.complete && image.naturalWidth") == 24
    votes = view("#q=navy").page.locator(".card")
    assert "blue ×7 · navy ×3" in votes.inner_text() and "✓ right, 0.9" in votes.inner_text()


def test_all_pictures_of_all_pages_load(view):
    shown = view("#size=96")
    loaded = shown.page.locator("#cards img").evaluate_all(
        "images => Promise.all(images.map(image => image.decode().then(() => image.naturalWidth > 0)))"
    )
    assert len(loaded) > 60 and all(loaded)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_wider_than_the_screen(view, scheme):
    shown = view(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= 360
    sizes = shown.page.locator("button:visible, select:visible, input:visible").evaluate_all(
        "controls => controls.map(control => control.getBoundingClientRect().height)"
    )
    assert min(sizes) >= 34
    style = "getComputedStyle(document.body)"
    ground, text = (
        sum(map(int, re.findall(r"\d+", shown.page.evaluate(f"{style}.{name}"))))
        for name in ("backgroundColor", "color")
    )
    assert (ground < text) == (scheme == "dark")


def test_thousands_of_questions_stay_fluid(view, folder):
    rows = [question(number) for number in range(5000)]
    report = report_of([question(number) for number in range(60)])
    write_page({**report, "n": len(rows)}, rows, folder, folder / "many.html", "Many")
    shown = view(of=folder / "many.html")
    assert shown.status() == "1–24 of 5,000 questions, page 1 of 209."
    spent = shown.page.evaluate("""async () => {
        const times = [];
        for (const hash of ["is.real=wrong", "q=question+49", "g.type=colour&is.blind=right", "sort=more", "page=2"]) {
            const start = performance.now();
            const drawn = new Promise((done) => addEventListener("hashchange", () => setTimeout(done), {once: true}));
            location.hash = hash;
            await drawn;
            times.push(performance.now() - start);
        }
        return times;
    }""")
    assert max(spent) < 1000, spent  # a tenth of it on an idle machine
