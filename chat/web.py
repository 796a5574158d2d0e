"""The conversation in a browser: what stands on the page, and what its buttons do.

The questions of all tabs wait in one queue, as there is one model. What a request runs into is shown in its tab as one
line and never ends the server.
"""

import html
import json
import math
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from PIL import Image

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
import gradio as gr
from starlette.middleware import Middleware

from chat.guard import Guard
from chat.plain import one_line, plain
from chat.sampling import MAX_NEW_TOKENS, SETTINGS
from chat.session import Exchange, PromptTooLong, Session, Shown
from chat.tabs import Tab, Tabs
from chat.texts import LANGUAGES, RANGES, TEXTS, Problem, preferred
from chat.uploads import Limits, add_files, check_length
from model import GREEDY, MultiModalModel
from visual.image import image_size, load_image
from visual.video import load_frames

if TYPE_CHECKING:
    from looking import Map

DAY = 24 * 60 * 60
MAP_SIDE = (480, 1024)  # least and most pixels along the longer side of a picture under its map
METHODS = ("occlusion", "features", "attention", "rollout")
FONTS = ["system-ui", "Noto Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "sans-serif"]
MONO_FONTS = ["ui-monospace", "Consolas", "monospace"]
AT_ONCE = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}  # of events that ask no model
# What readers of the screen go by; Gradio sets it once, or not at all.
SPOKEN = """(language) => {
    document.documentElement.lang = language
    document.querySelector("#box textarea").ariaLabel = LABELS[language]
}""".replace("LABELS", json.dumps({language: texts["box"] for language, texts in TEXTS.items()}))
# Pictures of the conversation and the examples have no text of their own: their name.
NAMED = """() => {
    const name = () => document.querySelectorAll('#chat img[alt=""], #examples img[alt=""]').forEach(
        (image) => { image.alt = decodeURIComponent(image.src.split("/").pop()) })
    new MutationObserver(name).observe(document.body, {childList: true, subtree: true})
    name()
}"""
# The box loses the focus when it is locked.
FOCUSED = """() => {
    if (document.activeElement === document.body) document.querySelector("#box textarea").focus()
}"""
# The buttons beside a picture in the conversation would share it with a server elsewhere.
CSS = """
#head {align-items: center}
#chat .message img {width: 12rem; max-width: 100%; max-height: 20rem; object-fit: contain}
#chat .message video {width: 16rem; max-width: 100%}
#chat .message span.md {white-space: pre-wrap}
#chat .message-row:has(.component-wrap) + .message-buttons {display: none}
#map .grid-wrap {padding-top: 2rem}
#map .thumbnail-lg {aspect-ratio: auto; border: none}
#map .thumbnail-lg img {max-height: 40vh; object-fit: contain}
#examples img {height: 5rem; width: auto}
#examples .container {align-items: center}
"""


class Handlers:
    """What the events of the page do. A tab is known by `request.session_hash`.

    Those that change the conversation give, in this order, new values of the conversation, the box, its four buttons,
    the button of the maps, and the maps.
    """

    def __init__(self, model: MultiModalModel, system: str | None, limits: Limits):
        self.model, self.limits = model, limits
        self.tabs = Tabs(lambda: Session(model, system, limits.prompt_tokens))

    def take(self, message: dict) -> tuple:
        """What stands in the box, which is locked until it is answered; then new values of the box and all buttons."""
        return message, gr.update(value=None, interactive=False), *_buttons(busy=False)

    def give_back(self, request: gr.Request, message: dict) -> tuple:
        """New values of the box and all buttons where `ask` could not even begin, as the queue is full."""
        exchanges, busy = self._state(request)
        return gr.update(value=message, interactive=True), *_buttons(busy, bool(exchanges))

    def ask(self, request: gr.Request, message: dict, language: str, system: str, *settings) -> Iterator[tuple]:
        """Answers what stood in the box, which gets it back if that fails."""
        message = {**message, "text": plain(message["text"] or "")}
        question = message["text"].strip()

        def find() -> Tab:
            if not question:
                raise Problem("no_question")
            check_length(question, self.limits)
            return self.tabs.get(request.session_hash)

        def begin(tab: Tab) -> tuple[list[Exchange], str, list[Shown], Iterator[str]]:
            session = tab.session
            add_files(session, message["files"] or [], self.limits, lambda: tab.stopping)
            return session.exchanges, question, session.waiting, session.stream(question)

        yield from self._answer(request, find, begin, language, system, settings, message)

    def regenerate(self, request: gr.Request, language: str, system: str, *settings) -> Iterator[tuple]:
        """Answers the last question again."""

        def begin(tab: Tab) -> tuple[list[Exchange], str, list[Shown], Iterator[str]]:
            if not tab.session.exchanges:
                raise Problem("nothing_asked")
            *before, last = tab.session.exchanges
            return before, last.question, last.shown, tab.session.regenerate()

        yield from self._answer(request, lambda: self._known(request), begin, language, system, settings)

    def _answer(
        self,
        request: gr.Request,
        find: Callable[[], Tab],
        begin: Callable[[Tab], tuple[list[Exchange], str, list[Shown], Iterator[str]]],
        language: str,
        system: str,
        settings: tuple,
        message: dict | None = None,
    ) -> Iterator[tuple]:
        texts, box = TEXTS[language], gr.skip()
        given_back = box if message is None else message
        try:
            generation, system = generation_of(settings, language), plain(system).strip()
            check_length(system, self.limits)
            tab = find()
            if tab.after_forgotten:
                gr.Info(texts["forgotten"])
                tab.after_forgotten = False
            with tab.alone() as session:
                session.generation, session.system = generation, system or None
                yield *_nothing(2), *_buttons(busy=True), gr.skip()  # files take their time, and Stop ends that, too
                before, question, shown, answers = begin(tab)
                with closing(answers):
                    if tab.stopping:  # later ones reach what `begin` has returned
                        raise Problem("stopped")
                    turns = [*_conversation(before, texts), _asked(question, shown)]
                    yield turns, *_nothing(6), _no_map(texts)
                    for answer in answers:
                        yield [*turns, _said(answer)], *_nothing(7)
                if len(session.exchanges) == len(before):  # stopped before the first word
                    box = given_back
        except Exception as error:  # whatever it is, the server and the other tabs go on
            gr.Warning(_told(error, language), duration=None)
            box = given_back
        exchanges, busy = self._state(request)
        yield _conversation(exchanges, texts), box, *_buttons(busy, bool(exchanges)), gr.skip()

    def _known(self, request: gr.Request) -> Tab:
        """The tab of a request that goes on with what was asked. It makes none, for which others would have to go."""
        tab = self.tabs.find(request.session_hash)
        if tab is None:
            raise Problem("forgotten")
        return tab

    def _state(self, request: gr.Request) -> tuple[list[Exchange], bool]:
        """What was said in a tab, and whether it is busy."""
        tab = self.tabs.peek(request.session_hash)
        return ([], False) if tab is None else (tab.session.exchanges, tab.busy)

    def stop(self, request: gr.Request) -> None:
        if tab := self.tabs.peek(request.session_hash):
            tab.stop()

    def undo(self, request: gr.Request, language: str) -> tuple:
        """Takes the last question back into the box."""
        box = gr.skip()
        with self._alone(request, language) as session:
            if last := session.undo():
                box = {"text": last.question, "files": [str(shown.source) for shown in last.shown]}
            exchanges = session.exchanges
        texts = TEXTS[language]
        return _conversation(exchanges, texts), box, *_buttons(False, bool(exchanges)), _no_map(texts)

    def clear(self, request: gr.Request, language: str) -> tuple:
        if self.tabs.peek(request.session_hash):
            with self._alone(request, language) as session:
                session.clear()
        return [], None, *_buttons(False, False), _no_map(TEXTS[language])

    @contextmanager
    def _alone(self, request: gr.Request, language: str) -> Iterator[Session]:
        try:
            with self._known(request).alone() as session:
                yield session
        except Problem as problem:
            raise gr.Error(problem.text(language), print_exception=False) from problem

    def look(
        self, request: gr.Request, method: str, language: str, progress: gr.Progress = gr.Progress()  # noqa: B008
    ) -> Iterator[tuple]:
        """Maps of the last answer; yields `Page.changed` and the note under the maps."""
        texts = TEXTS[language]
        maps, note = gr.skip(), gr.skip()
        try:
            tab = self._known(request)
            with tab.alone() as session:
                if not session.exchanges:
                    raise Problem("nothing_asked")
                if not session.shown:
                    raise Problem("no_picture")
                yield *_nothing(2), *_buttons(busy=True), _no_map(texts), gr.skip()

                def tell(done: int, total: int) -> None:
                    if tab.stopping:
                        raise Problem("stopped")
                    progress((done, total), desc=texts["looking"])

                drawn, note = maps_of(session, method, texts, tell)
                answer = one_line(session.exchanges[-1].answer)
                label = texts["map_of"].format(answer=answer if len(answer) <= 40 else f"{answer[:39]}…")
                columns = 1 if len(drawn) == 1 else 2 if len(drawn) <= 4 else 4
                maps = gr.update(value=drawn, label=label, columns=columns)
        except Exception as error:  # as above
            gr.Warning(_told(error, language), duration=None)
        exchanges, busy = self._state(request)
        yield *_nothing(2), *_buttons(busy, bool(exchanges)), maps, note

    def leave(self, request: gr.Request) -> None:
        self.tabs.leave(request.session_hash)


def generation_of(values: tuple, language: str = "en") -> dict[str, Any]:
    """Arguments of `Session` from the settings on the page, which stand in the order of `SETTINGS`.

    Raises:
        Problem: a value out of range.
    """
    given = dict(zip(SETTINGS, values, strict=True))
    chosen = {**GREEDY, "max_new_tokens": MAX_NEW_TOKENS}
    for name, value in given.items():
        setting = SETTINGS[name]
        if value in (None, "") or (setting.draws and not given["do_sample"]):
            continue
        try:
            chosen[name] = setting.kind(value)
            fits = chosen[name] == float(value) and setting.allows(chosen[name])
        except (TypeError, ValueError, OverflowError):
            fits = False
        if not fits:
            range_ = RANGES.get(language, {}).get(setting.range, setting.range)
            raise Problem("out_of_range", name=TEXTS[language][name], range=range_, value=value)
    return chosen


def maps_of(
    session: Session, method: str, texts: dict[str, str], progress: Callable[[int, int], None]
) -> tuple[list[tuple[Image.Image, str]], str]:
    """Pictures and frames of a conversation, each under the map of the last answer, with captions; a note on them all.
    """
    from looking import explain  # when asked for: it brings matplotlib along
    from looking.answer import words

    model, last, shown = session.model, session.exchanges[-1], session.shown
    sizes = [image_size(one.source) if one.kind == "image" else None for one in shown]
    maps = explain(
        model, last.prompt, [one.views for one in shown], words(model, last.ids), method,
        sizes=sizes, features=session.features, progress=progress,
    )  # fmt: skip
    drawn = []
    for number, one in enumerate(shown):
        pictures = _scaled_pictures(one, model)
        for found in maps:
            if found.picture == number:
                caption = one.name
                if found.frame is not None:
                    caption = texts["frame"].format(name=caption, frame=found.frame + 1)
                drawn.append((found.draw(pictures[found.frame or 0]), caption))
    return drawn, _strength(maps, texts)


def _strength(maps: "list[Map]", texts: dict[str, str]) -> str:
    """What the colours mean, and how much there is behind them, which they don't tell."""
    largest = max(float(found.values.max()) for found in maps)
    if not maps[0].signed:
        return f"{texts['shares']} {texts['largest_share'].format(share=largest)}"
    note = f"{texts['signed']} {texts['left'].format(left=math.exp(-max(largest, 0.0)))}"
    if all(found.changed is not None for found in maps):
        changed = any(found.changed.any() for found in maps)
        note += f" {texts['changes' if changed else 'stays']}"
    return note


def _scaled_pictures(shown: Shown, model: MultiModalModel) -> list[Image.Image]:
    """A picture, or the frames of a clip that the model saw. Of those in full size only one is in memory at a time."""
    if shown.kind == "image":
        return [_scaled(load_image(shown.source))]
    return [_scaled(frame) for frame in load_frames(shown.source, **model.media.sampling)]


def _scaled(picture: Image.Image) -> Image.Image:
    least, most = MAP_SIDE
    longer = max(picture.size)
    scale = min(max(longer, least), most) / longer
    size = [max(1, round(side * scale)) for side in picture.size]
    return picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _told(error: Exception, language: str) -> str:
    """One line about an error, as HTML. What nobody expected is also written to the terminal."""
    if isinstance(error, PromptTooLong):
        error = Problem("long_prompt", tokens=error.tokens, most=error.most)
    if isinstance(error, Problem):
        text = error.text(language)
    elif isinstance(error, OSError | ValueError):
        text = one_line(error)
    else:
        traceback.print_exception(error)
        text = TEXTS[language]["failed"].format(error=one_line(error) or type(error).__name__)
    return html.escape(text if len(text) <= 300 else f"{text[:299]}…")


def _asked(question: str, shown: list[Shown]) -> dict:
    return {"role": "user", "content": [*({"path": str(one.source)} for one in shown), _literal(question)]}


def _said(*parts: str) -> dict:
    return {"role": "assistant", "content": [_literal(part) for part in parts]}


def _literal(text: str) -> str:
    """What the conversation shows as it stands: even without Markdown it takes `<image>` for HTML."""
    return html.escape(text, quote=False)


def _conversation(exchanges: list[Exchange], texts: dict[str, str]) -> list[dict]:
    turns = []
    for one in exchanges:
        answer = _said(one.answer or texts["no_answer"], *([texts["stopped"]] if one.stopped else []))
        turns += [_asked(one.question, one.shown), answer]
    return turns


def _no_map(texts: dict[str, str]) -> dict:
    return gr.update(value=None, label=texts["map"])


def _nothing(count: int) -> list:
    return [gr.skip()] * count


def _buttons(busy: bool, said: bool = False) -> list:
    """Stop; regenerate, undo, clear and look, which need an answer."""
    return [gr.update(interactive=on) for on in (busy, *[said and not busy] * 4)]


class Page:
    """The page; `Page.app` is what Gradio launches.

    Args:
        name: of what is loaded, for the head of the page.
        examples: `{"text": str, "files": [path, ...]}`.
    """

    def __init__(
        self, model: MultiModalModel, system: str | None, name: str, limits: Limits, examples: list[dict] | None = None
    ):
        Image.MAX_IMAGE_PIXELS = int(limits.megapixels * 1e6)  # of this process: `visual` asks for it
        self.handlers = Handlers(model, system, limits)
        self._texts: list[tuple[gr.blocks.Block, dict[str, str]]] = []  # property -> key of TEXTS
        self.app = gr.Blocks(
            title=f"Kanjian · {name}", analytics_enabled=False, delete_cache=(DAY // 24, DAY), fill_width=True
        )
        with self.app:
            with gr.Row(elem_id="head"):
                gr.Markdown(f"### Kanjian · {html.escape(name)}")
                self.language = gr.Radio(
                    [(shown, key) for key, shown in LANGUAGES.items()], value="en", show_label=False, container=False,
                    label="Language · 语言", elem_id="language", scale=0, min_width=220,
                )  # fmt: skip
            with gr.Row():
                with gr.Column(scale=3, min_width=320):
                    self._make_chat()
                with gr.Column(scale=2, min_width=320):
                    self._make_look()
                    self._make_settings(system)
            if examples:
                self._make_examples(examples)
            self._connect()

    def launch(self, host: str, port: int, queue: int, share: bool = False) -> str:
        """Serves the page in threads of its own; returns its address, or with `share` the public one.

        Args:
            queue: how many questions of all tabs wait at most; one more is told that the server is busy.

        Raises:
            OSError: the port can't be used.
        """
        # Question and system prompt, each character as \uXXXX at most, and the rest.
        guard = Middleware(Guard, most=2 * 6 * self.handlers.limits.characters + 1_000_000)
        # `api_open` would let requests skip the queue.
        _, local, public = self.app.queue(max_size=queue, api_open=False).launch(
            server_name=host, server_port=port, share=share, prevent_thread_lock=True, quiet=True, show_error=True,
            max_file_size=int(self.handlers.limits.upload_mb * 1e6), allowed_paths=[], run_history=False,
            app_kwargs={"middleware": [guard]}, footer_links=[], ssr_mode=False, enable_monitoring=False,
            state_session_capacity=1000, css=CSS,
            # By default fonts come from elsewhere. Grey, since colours are those of the pictures and maps.
            theme=gr.themes.Default(primary_hue="neutral", font=FONTS, font_mono=MONO_FONTS),
        )  # fmt: skip
        return public if share else local

    def _worded(self, component: gr.blocks.Block, **keys: str) -> Any:
        """A component some of whose properties are texts of the chosen language."""
        for name, key in keys.items():
            setattr(component, name, TEXTS["en"][key])
        self._texts.append((component, keys))
        return component

    def _make_chat(self) -> None:
        self.chat = self._worded(
            gr.Chatbot(
                elem_id="chat", height="62vh", buttons=[], render_markdown=False, layout="bubble",
                group_consecutive_messages=False,
            ),
            label="chat", placeholder="hello",
        )  # fmt: skip
        self.box = self._worded(
            gr.MultimodalTextbox(
                elem_id="box", file_types=["image", "video"], file_count="multiple", sources=["upload"], max_lines=8,
                max_plain_text_length=self.handlers.limits.characters, show_label=False, autofocus=True,
            ),
            label="box", placeholder="ask",
        )  # fmt: skip
        with gr.Row():
            self.buttons = [
                self._worded(
                    gr.Button(size="sm", interactive=False, min_width=100, elem_id=name,
                              variant="stop" if name == "stop" else "secondary"),
                    value=name,
                )
                for name in ("stop", "regenerate", "undo", "clear")
            ]  # fmt: skip

    def _make_examples(self, examples: list[dict]) -> None:
        self._worded(gr.Markdown(), value="examples")
        offered = gr.Dataset(
            components=[self.box], samples=[[example] for example in examples], type="index", layout="gallery",
            samples_per_page=len(examples), show_label=False, elem_id="examples",
        )  # fmt: skip
        # Gradio has copied the files to where it may serve them from.
        values = [
            {"text": sample["text"], "files": [file["path"] for file in sample["files"]]}
            for (sample,) in offered.samples
        ]
        shown = {file for value in values for file in value["files"]}
        texts = {"", *(value["text"] for value in values)}

        def choose(number: int, box: dict) -> dict:
            """The example, but what the user has typed or attached stays."""
            typed, own = box["text"] or "", [file for file in box["files"] or [] if file not in shown]
            example = values[number]
            return {"text": example["text"] if typed in texts else typed, "files": [*own, *example["files"]]}

        offered.click(choose, [offered, self.box], self.box, **AT_ONCE)

    def _make_look(self) -> None:
        self.maps = self._worded(
            gr.Gallery(elem_id="map", height="48vh", columns=1, object_fit="contain", interactive=False,
                       buttons=["download", "fullscreen"]),
            label="map",
        )  # fmt: skip
        with gr.Row(equal_height=True):
            self.method = self._worded(
                gr.Dropdown(
                    _methods("en"), value=METHODS[0], elem_id="method", show_label=False, container=False, scale=5,
                    min_width=200,
                ),
                label="method",
            )  # fmt: skip
            self.look = self._worded(
                gr.Button(variant="primary", interactive=False, elem_id="look", scale=4, min_width=160), value="look"
            )
        self.note = self._worded(gr.Markdown(), value="look_hint")

    def _make_settings(self, system: str | None) -> None:
        with self._worded(gr.Accordion(open=False, elem_id="settings"), label="settings"):
            self.system = self._worded(
                gr.Textbox(system or "", lines=2, elem_id="system"), label="system", info="system_hint"
            )
            made = {
                "max_new_tokens": partial(gr.Slider, 1, 4096, MAX_NEW_TOKENS, step=1),
                "num_beams": partial(gr.Slider, 1, 8, 1, step=1),
                "repetition_penalty": partial(gr.Slider, 0.8, 2, 1, step=0.01),
                "do_sample": gr.Checkbox,
                "temperature": partial(gr.Slider, 0.05, 2, 1, step=0.05),
                "top_p": partial(gr.Slider, 0.05, 1, 1, step=0.05),
                "top_k": partial(gr.Slider, 0, 200, GREEDY["top_k"], step=1),
                "seed": partial(gr.Textbox, max_lines=1),  # a number could not be empty
            }
            hints = {"num_beams": {"info": "num_beams_hint"}}
            self.settings = {
                name: self._worded(
                    made[name](elem_id=name, interactive=not setting.draws), label=name, **hints.get(name, {})
                )
                for name, setting in SETTINGS.items()
            }
            self.drawing = [self.settings[name] for name, setting in SETTINGS.items() if setting.draws]

    def _connect(self) -> None:
        do, changed = self.handlers, [self.chat, self.box, *self.buttons, self.look, self.maps]
        settings = [self.language, self.system, *self.settings.values()]
        stop, regenerate, undo, clear = self.buttons
        # One at a time: two answers or maps at once would share the memory and the time of the device.
        model = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
        asked, shut = gr.State({"text": "", "files": []}), [self.box, *self.buttons, self.look]
        taken = self.box.submit(do.take, self.box, [asked, *shut], **AT_ONCE)
        answered = taken.then(do.ask, [asked, *settings], changed, show_progress_on=self.chat, **model)
        answered.failure(do.give_back, asked, shut, **AT_ONCE)
        opened = answered.then(lambda: gr.update(interactive=True), None, self.box, **AT_ONCE)
        opened.then(None, js=FOCUSED, **AT_ONCE)
        regenerate.click(do.regenerate, settings, changed, show_progress_on=self.chat, **model)
        self.look.click(
            do.look, [self.method, self.language], [*changed, self.note], show_progress_on=self.maps, **model
        )
        stop.click(do.stop, None, None, **AT_ONCE)
        undo.click(do.undo, self.language, changed, **AT_ONCE)
        gr.on([clear.click, self.chat.clear], do.clear, self.language, changed, **AT_ONCE)
        self.settings["do_sample"].change(
            lambda on: [gr.update(interactive=on)] * len(self.drawing),
            self.settings["do_sample"], self.drawing, **AT_ONCE,
        )  # fmt: skip
        worded = [component for component, _ in self._texts]
        spoken = {"fn": None, "inputs": self.language, "js": SPOKEN, **AT_ONCE}
        self.language.input(self._reworded, self.language, worded, **AT_ONCE).then(**spoken)
        self.app.load(self._greet, None, [self.language, *worded], **AT_ONCE).then(**spoken)
        self.app.load(None, js=NAMED, **AT_ONCE)
        self.app.unload(do.leave)

    def _reworded(self, language: str) -> list:
        texts = TEXTS[language]
        updates = [{name: texts[key] for name, key in keys.items()} for _, keys in self._texts]
        methods = [component for component, _ in self._texts].index(self.method)
        updates[methods]["choices"] = _methods(language)
        return [gr.update(**values) for values in updates]

    def _greet(self, request: gr.Request) -> list:
        language = preferred(request.headers.get("accept-language", ""))
        return [language, *self._reworded(language)]


def _methods(language: str) -> list[tuple[str, str]]:
    return [(TEXTS[language][method], method) for method in METHODS]
