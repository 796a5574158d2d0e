"""What the page's buttons do, without a browser: settings, files, tabs, examples, errors, maps."""

import html
import math
import socket
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="needs requirements-app.txt")

import app
from chat import examples, web
from chat.sampling import SETTINGS
from chat.session import Session
from chat.tabs import Tabs
from chat.texts import RANGES, TEXTS, Problem, preferred
from chat.uploads import Limits, add_files
from dataset.record import read_records, write_records
from looking import METHODS
from model import GREEDY, MultiModalModel
from train import train

# As on the page: most tokens, beams, repetition penalty, draw, temperature, top-p, top-k, seed.
SHORT = (6, 1, 1, False, 1, 1, 50, "")
ME = SimpleNamespace(session_hash="me")


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory) -> MultiModalModel:
    folder = tmp_path_factory.mktemp("web") / "run"
    train(tiny.config(folder, "max_steps=4", "save_steps=4"))
    return MultiModalModel.from_pretrained(folder)


@pytest.fixture
def limits(monkeypatch) -> Limits:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    return Limits(files=2, megapixels=1, seconds=2)


@pytest.fixture
def told(monkeypatch) -> list[str]:
    """What the page would show as a message."""
    messages = []
    for kind in ("Warning", "Info"):
        monkeypatch.setattr(web.gr, kind, lambda text, **_: messages.append(text))
    return messages


@pytest.fixture
def handlers(model, limits) -> web.Handlers:
    return web.Handlers(model, "Be brief.", limits)


@pytest.fixture
def red(tiny) -> str:
    return str(tiny.folder / "images/red.png")


def ask(handlers, text: str, *files: str, settings: tuple = SHORT, who=ME, language: str = "en") -> list[tuple]:
    return list(handlers.ask(who, {"text": text, "files": list(files)}, language, "Be brief.", *settings))


def test_the_answer_is_the_sessions(handlers, model, red, told):
    _, first, *_, last = ask(handlers, " What colour? ", red)
    session = Session(model, "Be brief.", max_new_tokens=6)
    session.add_image(red)
    answer = html.escape(session.ask("What colour?") or "[no words]", quote=False)
    asked = {"role": "user", "content": [{"path": red}, "What colour?"]}
    assert first[0] == [asked]
    assert last[0] == [asked, {"role": "assistant", "content": [answer]}] and told == []
    conversation, *_ = list(handlers.regenerate(ME, "en", "", *SHORT))[-1]
    assert len(conversation) == 2 and handlers.tabs.get("me").session.system is None
    conversation, box, *_ = handlers.undo(ME, "en")
    assert conversation == [] and box == {"text": "What colour?", "files": [red]}


def test_all_outputs_are_given_each_time(handlers, red, told):
    page = web.Page(handlers.model, None, "x", handlers.limits, [{"text": "?", "files": [red]}])
    ask_event = next(f for f in page.app.fns.values() if f.fn == page.handlers.ask)
    width = len(ask_event.outputs)
    runs = [*ask(handlers, "One?"), *ask(handlers, ""), *handlers.regenerate(ME, "en", "", *SHORT),
            handlers.undo(ME, "en"), handlers.clear(ME, "en")]  # fmt: skip
    assert {len(values) for values in runs} == {width}
    assert {len(values) for values in handlers.look(ME, "occlusion", "en")} == {width + 1}
    assert len(ask_event.inputs) == 3 + len(SETTINGS) and list(page.settings) == list(SETTINGS)


@pytest.mark.parametrize("change, message", [
    ({"max_new_tokens": 0}, "Longest answer, in tokens: a whole number from 1 on, not 0."),
    ({"num_beams": 1.5}, "Beams: a whole number"),
    ({"do_sample": True, "temperature": 0}, "Temperature: a number from 0.01 to 100"),
    ({"do_sample": True, "top_p": 1.2}, "Top-p: a number above 0, at most 1"),
    ({"do_sample": True, "seed": "x"}, "Seed (empty: another answer each time): a whole number"),
    ({"repetition_penalty": float("nan")}, "Repetition penalty: a number from 0.01 to 100"),
])  # fmt: skip
def test_settings_out_of_range_are_explained(handlers, told, change, message):
    settings = tuple(change.get(name, value) for name, value in zip(SETTINGS, SHORT, strict=True))
    values = ask(handlers, "One?", settings=settings)
    assert values[-1][0] == [] and values[-1][1] == {"text": "One?", "files": []}
    assert len(told) == 1 and message in told[0]


def test_settings_become_arguments():
    assert web.generation_of(SHORT) == {**GREEDY, "max_new_tokens": 6}
    drawn = web.generation_of((6, 2, 1.1, True, 0.7, 0.9, 0, "12"))
    assert drawn == {"max_new_tokens": 6, "num_beams": 2, "repetition_penalty": 1.1, "do_sample": True,
                     "temperature": 0.7, "top_p": 0.9, "top_k": 0, "seed": 12}  # fmt: skip


def test_every_combination_of_extremes_answers(handlers, told):
    """Whatever the sliders allow goes together."""
    for settings in ((3, 8, 2, True, 0.05, 0.05, 1, ""), (3, 8, 0.8, False, 1, 1, 50, ""), (1, 1, 1, True, 2, 1, 0, 5)):
        ask(handlers, "One?", settings=settings)
    assert told == [] and len(handlers.tabs.get("me").session.exchanges) == 3


def test_what_the_model_raises_is_shown_and_leaves_the_history(handlers, red, told, monkeypatch, capsys):
    ask(handlers, "One?", red)

    def fail(*_, **__):
        raise MemoryError("no memory <left>\nmore")

    with monkeypatch.context() as patch:
        patch.setattr(handlers.model, "generate", fail)
        conversation, box, *_ = ask(handlers, "Two?", red)[-1]
    assert len(conversation) == 2 and box == {"text": "Two?", "files": [red]}
    assert told == ["That did not work: no memory &lt;left&gt; more"]
    assert "MemoryError" in capsys.readouterr().err
    assert len(ask(handlers, "Three?")[-1][0]) == 4


def test_files_are_limited(model, limits, red, tmp_path, write_clip):
    session = Session(model)
    with pytest.raises(Problem, match="3 files with one question; at most 2"):
        add_files(session, [red] * 3, limits)
    Image.new("RGB", (2000, 1000)).save(tmp_path / "large.png")  # Pillow alone would only warn
    Image.new("RGB", (2000, 2000)).save(tmp_path / "larger.png")
    for name in ("large.png", "larger.png"):
        with pytest.raises(Problem, match=f"^{name} has more than 1 million pixels"):
            add_files(session, [red, str(tmp_path / name)], limits)
    write_clip(tmp_path / "long.mp4", 4)
    with pytest.raises(Problem, match="long.mp4 is longer than 2 seconds"):
        add_files(session, [str(tmp_path / "long.mp4")], limits)
    write_clip(tmp_path / "clip.mp4", 1)
    add_files(session, [red, str(tmp_path / "clip.mp4")], limits)
    assert [(one.kind, one.name) for one in session.waiting] == [("image", "red.png"), ("video", "clip.mp4")]


def test_files_that_cannot_be_read_are_named_in_both_languages(model, limits, red, tmp_path):
    Image.effect_noise((200, 200), 50).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:2000])
    Image.new("RGB", (4, 4)).save(tmp_path / "eps.png", format="EPS")  # a program, which Ghostscript would run
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.mp4").write_text("no clip")
    session = Session(model)
    for name, key in (("cut.jpg", "bad_image"), ("eps.png", "no_image"), ("empty.jpg", "empty_file"),
                      ("text.mp4", "bad_clip"), ("gone.png", "no_file")):  # fmt: skip
        with pytest.raises(Problem) as found:
            add_files(session, [red, str(tmp_path / name)], limits)
        assert found.value.key == key and found.value.text("zh").startswith(f"{name} ")
        assert session.waiting == []


def test_long_texts_do_not_reach_the_model(handlers, told, monkeypatch):
    monkeypatch.setattr(handlers.model, "generate", lambda *_, **__: pytest.fail("the model was asked"))
    handlers.limits = Limits(prompt_tokens=100, characters=500)
    for text, system, language in (("a" * 501, "", "en"), ("One?", "a" * 501, "zh")):
        with monkeypatch.context() as patch:  # not even the tokenizer
            patch.setattr("chat.session.encode_prompt", lambda *_: pytest.fail("the text was tokenised"))
            message = {"text": text, "files": []}
            assert list(handlers.ask(ME, message, language, system, *SHORT))[-1][1] == message
    handlers.tabs.get("me").session.max_prompt_tokens = 100
    assert web.Handlers(handlers.model, None, handlers.limits).tabs.get("me").session.max_prompt_tokens == 100
    assert ask(handlers, "One " * 120)[-1][1]["text"] == "One " * 120
    assert told[0] == "A text has 501 characters; at most 500 are taken." and "501 个字符" in told[1]
    assert "tokens with its pictures; at most 100 are taken" in told[2] and len(told) == 3


@pytest.mark.parametrize("after", (1, 2))
def test_a_stop_before_the_first_token_is_kept(handlers, red, told, monkeypatch, after):
    """While files are loaded, of which there are more, or when they are."""
    loaded = []

    def load(session, file, name) -> None:
        loaded.append(name)
        if len(loaded) == after:
            handlers.stop(ME)

    monkeypatch.setattr(Session, "add_image", load)
    monkeypatch.setattr(handlers.model, "generate", lambda *_, **__: pytest.fail("the model was asked"))
    values = ask(handlers, "One?", red, red)
    stop = values[0][2]
    assert stop["interactive"] and len(loaded) == after and told == ["[stopped]"]
    assert values[-1][:2] == ([], {"text": "One?", "files": [red, red]})


def test_stopped_before_the_first_word_the_question_stands_in_the_box(handlers, told):
    answers = handlers.ask(ME, {"text": "One?", "files": []}, "en", "", *SHORT)
    next(answers), next(answers)
    handlers.stop(ME)
    assert list(answers)[-1][:2] == ([], {"text": "One?", "files": []}) and told == []


@pytest.fixture
def write_clip():
    """Writes a clip of so many seconds."""
    import av

    def write(file, seconds: int) -> None:
        with av.open(str(file), "w") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width = stream.height = 32
            for shade in range(10 * seconds):
                frame = av.VideoFrame.from_image(Image.new("RGB", (32, 32), (shade * 5 % 255, 0, 0)))
                container.mux(stream.encode(frame))
            container.mux(stream.encode())

    return write


def test_maps_of_pictures_and_clips(handlers, red, tmp_path, write_clip, told):
    write_clip(tmp_path / "clip.mp4", 1)
    ask(handlers, "Which?", red, str(tmp_path / "clip.mp4"))
    for method in web.METHODS:
        *_, (*_, maps, note) = handlers.look(ME, method, "en")
        names = [caption for _, caption in maps["value"]]
        assert names[0] == "red.png" and names[1] == "clip.mp4, frame 1"
        assert len(names) == 1 + handlers.model.media.spec["frames"]
        assert maps["value"][0][0].size == (480, 480)
        assert note.startswith(TEXTS["en"]["shares" if method in ("attention", "rollout") else "signed"])
    assert told == [] and web.METHODS == tuple(METHODS)


@pytest.mark.parametrize("values, changed, note", [
    ([[0.0, -3.0], [math.log(4), 0.1]], None, "With the strongest place hidden, 25.0% of the answer's probability"),
    ([[0.0, -3.0]], False, "100.0% of the answer's probability is left. No single place changes the answer."),
    ([[0.0, 0.001]], True, "99.9% of the answer's probability is left. Hiding some place changes the answer."),
])  # fmt: skip
def test_notes_tell_what_colours_do_not(values, changed, note):
    flag = None if changed is None else np.array([[changed]])
    maps = [SimpleNamespace(values=np.array([row]), changed=flag, signed=True) for row in values]
    assert note in web._strength(maps, TEXTS["en"])
    maps = [SimpleNamespace(values=np.array([[0.01, 0.125]]), signed=False)]
    assert "最多之处占全部注意力的 12.5%" in web._strength(maps, TEXTS["zh"])


def test_text_that_is_none_is_mended(handlers, told):
    """Half a surrogate pair could not even be sent to the page."""
    conversation, *_ = ask(handlers, "a\ud800\x1b")[-1]
    assert conversation[0]["content"] == ["a?"] and told == []


def test_an_example_leaves_what_was_typed(handlers, red, tiny):
    blue = str(tiny.folder / "images/blue.png")
    offered = [{"text": "Red?", "files": [red]}, {"text": "", "files": [blue]}]
    page = web.Page(handlers.model, None, "x", handlers.limits, offered)
    (choose,) = (one.fn for one in page.app.fns.values() if getattr(one.fn, "__name__", "") == "choose")
    first = choose(0, {"text": "", "files": []})
    assert first["text"] == "Red?" and [file.endswith("red.png") for file in first["files"]] == [True]
    second = choose(1, first)
    assert second["text"] == "" and [file.endswith("blue.png") for file in second["files"]] == [True]
    kept = choose(0, {"text": "Mine?", "files": ["mine.png", *second["files"]]})
    assert kept == {"text": "Mine?", "files": ["mine.png", *first["files"]]}


def test_maps_hold_one_picture_of_full_size_at_a_time(handlers, tmp_path, told, monkeypatch):
    files = [str(tmp_path / f"{number}.png") for number in range(2)]
    for file in files:
        Image.new("RGB", (600, 500)).save(file)
    full, load, most = [], web.load_image, []

    def loads(source):
        picture = load(source).copy()
        full.append(weakref.ref(picture))
        most.append(sum(one() is not None for one in full))
        return picture

    monkeypatch.setattr(web, "load_image", loads)
    monkeypatch.setattr(web, "MAP_SIDE", (48, 100))
    ask(handlers, "Which?", *files)
    (*_, maps, _) = list(handlers.look(ME, "attention", "en"))[-1]
    assert [picture.size for picture, _ in maps["value"]] == [(100, 83)] * 2
    assert most == [1, 1] and told == []


def test_maps_need_a_picture_and_can_be_stopped(handlers, red, told):
    handlers.tabs.get("me")
    list(handlers.look(ME, "occlusion", "zh"))
    ask(handlers, "Which?")
    list(handlers.look(ME, "occlusion", "en"))
    handlers.clear(ME, "en")
    ask(handlers, "Which?", red)
    for _ in handlers.look(ME, "occlusion", "en"):
        handlers.stop(ME)
    assert told == ["还没有提问。", "The conversation shows no picture to look at.", "[stopped]"]


def test_a_busy_conversation_is_not_changed(handlers, told):
    ask(handlers, "One?")
    tab = handlers.tabs.get("me")
    with tab.alone():
        with pytest.raises(web.gr.Error, match="The last answer is not finished"):
            handlers.clear(ME, "en")
        ask(handlers, "Two?")
    assert told == [TEXTS["en"]["answering"]] and len(tab.session.exchanges) == 1


def test_leaving_ends_the_answer(handlers):
    answers = handlers.ask(ME, {"text": "One?", "files": []}, "en", "", *(200, *SHORT[1:]))
    next(answers)
    handlers.leave(ME)
    assert len(list(answers)) < 100 and not handlers.tabs.peek("me").busy
    handlers.tabs.get("you")
    assert len(handlers.tabs) == 1 and handlers.tabs.get("me").after_forgotten


def test_tabs_are_bounded(model):
    tabs = Tabs(lambda: Session(model), most=2, idle=3600)
    first, second = tabs.get("1"), tabs.get("2")
    tabs.get("1")
    third = tabs.get("3")
    assert len(tabs) == 2 and tabs.get("1") is first and tabs.get("3") is third
    with first.alone():  # is not forgotten in the middle of an answer
        again = tabs.get("2")
        assert again is not second and again.after_forgotten and tabs.get("1") is first
    idle = Tabs(lambda: Session(model), idle=0)
    idle.get("1")
    idle.get("2")
    assert len(idle) == 1


def test_who_was_forgotten_is_told(handlers, told):
    handlers.tabs._most = 1
    you = SimpleNamespace(session_hash="you")
    ask(handlers, "One?")
    ask(handlers, "One?", who=you)
    assert len(ask(handlers, "Two?", language="zh")[-1][0]) == 2
    assert told == [TEXTS["zh"]["forgotten"]]


def test_only_questions_make_room_for_themselves(handlers, told):
    """Else anybody could have all conversations forgotten."""
    handlers.tabs._most = 1
    ask(handlers, "One?")
    for number in range(2):
        you = SimpleNamespace(session_hash=str(number))
        handlers.stop(you)
        assert handlers.clear(you, "en")[0] == []
        with pytest.raises(web.gr.Error, match="The server no longer has the earlier conversation"):
            handlers.undo(you, "en")
        ask(handlers, " ", who=you)
        ask(handlers, "One?", who=you, settings=(0, *SHORT[1:]))
        for values in (*handlers.regenerate(you, "en", "", *SHORT), *handlers.look(you, "attention", "en")):
            assert not any(button["interactive"] for button in values[2:7])
    assert len(handlers.tabs.find("me").session.exchanges) == 1 and handlers.tabs.find("0") is None
    assert told.count(TEXTS["en"]["forgotten"]) == 4


def test_ranges_are_translated(handlers, told):
    assert {setting.range for setting in SETTINGS.values()} == RANGES["zh"].keys()
    ask(handlers, "One?", settings=(1.5, *SHORT[1:]), language="zh")
    assert told == ["回答最多的 token 数：应为不小于 1 的整数，而不是 1.5。"]


def test_texts_are_complete():
    assert TEXTS["en"].keys() == TEXTS["zh"].keys()
    for key, text in TEXTS["en"].items():
        fields = [part.split("}")[0] for part in text.split("{")[1:]]
        assert fields == [part.split("}")[0] for part in TEXTS["zh"][key].split("{")[1:]], key
    assert [preferred(wanted) for wanted in ("zh-TW,zh;q=0.9,en;q=0.8", "fr, EN;q=0.5", "de", "")] == [
        "zh", "en", "en", "en"
    ]  # fmt: skip


def test_examples(tiny, tmp_path):
    found = examples.of_path(tiny.folder / "train.parquet", tiny.folder / "images")
    assert len(found) == 4 and found[0] == {"text": "What colour is it?", "files": [f"{tiny.folder}/images/red.png"]}
    assert [one["text"] for one in examples.of_path(tiny.folder / "images", most=3)] == [""] * 3
    with pytest.raises(ValueError, match="nothing in it shows a picture"):
        examples.of_path(tiny.folder / "train.parquet", tmp_path)
    records = list(read_records(tiny.folder / "train.parquet"))
    chinese = [{**one, "id": f"{one['id']}zh", "meta": {"language": "zh"}} for one in records]
    write_records(records + chinese, tmp_path / "both.parquet")
    both = examples.of_records(read_records(tmp_path / "both.parquet"), tiny.folder / "images")
    assert len({one["files"][0] for one in both}) == len(both) == 4
    assert examples.of_run(tmp_path) == []


def test_command_line_errors_are_one_line(monkeypatch, tiny):
    def message(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["app.py", "--checkpoint_path", "nowhere", *map(str, arguments)])
        with pytest.raises((OSError, ValueError)) as error:
            app.main()
        return str(error.value)

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} of 127.0.0.1 can't be used" in message("--port", port)
    monkeypatch.setattr(app, "end_on_signals", lambda: None)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # so that it has its old value after the test
    assert "nowhere" in message("--port", port, "--device", "cpu")
    assert "--port is a whole number from 1 to 65535, not 99999" in message("--port", 99999)
    for host in ("::1", "nonsense.invalid", "a" * 70):
        assert "--host is an IPv4 address of this machine or its name" in message("--host", host)
    assert "--queue is a whole number from 1 on" in message("--queue", 0)
    assert "max_megapixels is a number above 0" in message("--max_megapixels", -1)
