"""A conversation with a model about pictures and clips, apart from any interface."""

import io
import json
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer, set_seed

from dataset.rows import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from dataset.template import encode_prompt
from model import GREEDY, MultiModalModel
from visual.image import File, load_image, name_of
from visual.media import Views
from visual.video import load_frames


@dataclass(frozen=True, eq=False)
class Shown:
    """A picture or a clip of a conversation.

    Attributes:
        kind: "image" or "video".
        name: what messages call it.
        source: the file, or the picture.
        views: what went through the encoder.
        features: [n, H], what stands in the prompt for it.
    """

    kind: str
    name: str
    source: File | Image.Image
    views: Views
    features: Tensor

    def pictures(self, frames: int = 8) -> list[Image.Image]:
        """The picture, or so many frames of the clip."""
        return [load_image(self.source)] if self.kind == "image" else list(load_frames(self.source, frames))


@dataclass(frozen=True)
class Exchange:
    """A question with the pictures and clips it shows, and its answer.

    Attributes:
        prompt: [T] ids of the whole conversation up to where the answer begins.
        ids: [A] ids of the answer as generated, with what ended it.
        stopped: whether the answer was broken off by the user.
    """

    question: str
    shown: list[Shown]
    answer: str
    prompt: list[int] = field(repr=False)
    ids: list[int] = field(repr=False)
    stopped: bool = False


class PromptTooLong(ValueError):
    """A conversation of more `tokens` than a session allows, which are `most`."""

    def __init__(self, tokens: int, most: int):
        super().__init__(
            f"the conversation has {tokens} tokens with its pictures, but at most {most} are taken: ask a shorter "
            "question, show fewer pictures, or begin anew"
        )
        self.tokens, self.most = tokens, most


class Session:
    """Questions and answers so far, their pictures and clips, and those that wait for the next question.

    What a user types is plain text: nothing in it is read as a placeholder or another control token.

    Args:
        system: text of the system turn, or None for none. It may be changed between questions, as may
        max_prompt_tokens: how long a conversation may be that is answered, pictures and clips included, beside the
            `max_position_embeddings` of the decoder's configuration, beyond which it says nothing of sense. Time and
            memory until the first word grow with it, by its square in the end.
        generation: arguments of transformers' `generate`, and `seed`, an integer that makes drawn answers repeatable;
            by default the answer is greedy and ends after 512 tokens.

    Attributes:
        exchanges: what was said.
        waiting: pictures and clips that the next question will show.
    """

    def __init__(
        self, model: MultiModalModel, system: str | None = None, max_prompt_tokens: int | None = None, **generation
    ):
        self.model, self.system = model, system
        positions = getattr(model.language_model.config, "max_position_embeddings", None)
        self.max_prompt_tokens = min((most for most in (max_prompt_tokens, positions) if most), default=None)
        self.generation = {**GREEDY, "max_new_tokens": 512, **generation}
        self.exchanges: list[Exchange] = []
        self.waiting: list[Shown] = []
        self._stopping, self._answering = _Stopping(), threading.Lock()

    @property
    def messages(self) -> list[dict]:
        """The turns so far, as `encode_prompt` takes them."""
        return _messages(self.exchanges)

    @property
    def shown(self) -> list[Shown]:
        """All pictures and clips that the last answer could see, in the order of the prompt."""
        return [shown for exchange in self.exchanges for shown in exchange.shown]

    @property
    def features(self) -> Tensor | None:
        """[M, H] of `shown`; None without any."""
        return _features(self.shown)

    def add_image(self, image: File | Image.Image, name: str | None = None) -> Shown:
        """Shows a picture with the next question.

        Raises:
            FileNotFoundError, ValueError: the file is missing or can't be read as an image; names it.
        """
        return self._add("image", image, name)

    def add_video(self, file: File, name: str | None = None) -> Shown:
        """Shows a clip with the next question; raises what `add_image` raises."""
        return self._add("video", file, name)

    def _add(self, kind: str, source: File | Image.Image, name: str | None) -> Shown:
        views = self.model.media.load(kind, source)
        with torch.no_grad():
            features = self.model.encode_images(views.pixel_values.to(self.model.device), views.features)
        if name is None:
            name = f"{source.width} x {source.height} pixels" if isinstance(source, Image.Image) else name_of(source)
        shown = Shown(kind, name, source, views, features)
        self.waiting.append(shown)
        return shown

    def stream(self, text: str) -> Iterator[str]:
        """The answer to `text` so far, again with each new piece of it; with beams once, at its end.

        The exchange joins the history when the answer ends. Closing the iterator, or `stop` at any time after this
        call, ends it early: what was said by then is the answer; if that is nothing, or something fails, all is as if
        nothing had been asked.

        Raises, when the iterator is read:
            RuntimeError: another answer of this session has not ended; or what the model raises, memory for example.
            PromptTooLong: the conversation is longer than `max_prompt_tokens`; the model has not begun.
            ValueError: the conversation is too long for the model, `generation` does not go together, or `text` is not
                valid text.
        """
        return self._answer(text, list(self.waiting), list(self.exchanges), self._may_be_stopped())

    def ask(self, text: str) -> str:
        """The answer to `text`; otherwise as `stream`."""
        return ["", *self.stream(text)][-1]

    def regenerate(self) -> Iterator[str]:
        """The last question answered again, as by `stream`; the old answer stays if that fails.

        Raises:
            ValueError: nothing was asked yet.
        """
        if not self.exchanges:
            raise ValueError("there is no answer yet that could be given again")
        last = self.exchanges[-1]
        return self._answer(last.question, last.shown, self.exchanges[:-1], self._may_be_stopped())

    def stop(self) -> None:
        """Ends the answer that is being generated or about to be, from another thread or a signal handler."""
        self._stopping.wanted = True

    def undo(self) -> Exchange | None:
        """Takes the last exchange back; returns it, or None where there is none."""
        return self.exchanges.pop() if self.exchanges else None

    def clear(self) -> None:
        """Forgets turns, pictures and clips."""
        self.exchanges, self.waiting = [], []

    def _may_be_stopped(self) -> "_Stopping":
        """What `stop` acts on from now on, unless it has an answer that is being generated."""
        stopping = _Stopping()
        if not self._answering.locked():
            self._stopping = stopping
        return stopping

    def _answer(
        self, question: str, shown: list[Shown], before: list[Exchange], stopping: "_Stopping"
    ) -> Iterator[str]:
        try:
            question.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair: bytes of a shell that are no UTF-8, or bad JSON
            raise ValueError(f"the question is no valid text: {error}") from error
        if not self._answering.acquire(blocking=False):
            raise RuntimeError("the last question is still being answered; stop that answer first")
        try:
            self._stopping = stopping
            messages = [*_messages(before), _question(question, shown)]
            media = [*(one for exchange in before for one in exchange.shown), *shown]
            tokenizer = self.model.tokenizer
            prompt = encode_prompt(messages, tokenizer, [len(one.features) for one in media], self.system)
            if self.max_prompt_tokens is not None and len(prompt) > self.max_prompt_tokens:
                raise PromptTooLong(len(prompt), self.max_prompt_tokens)
            run = _Generation(self.model, prompt, _features(media), self.generation, stopping)
            try:
                yield from run
            finally:  # reached too when the iterator is closed
                ids = run.finish()
                answer = tokenizer.decode(ids, skip_special_tokens=True)
                if answer or not run.stopped:
                    self.exchanges = [*before, Exchange(question, shown, answer, prompt, ids, run.stopped)]
                    self.waiting = [one for one in self.waiting if one not in shown]
        finally:
            self._answering.release()

    def save(self, file: str | Path) -> None:
        """Writes the conversation as a file with one record (`dataset.record`), which can be trained and evaluated on.

        Its pictures and clips go into a folder beside it, `talk_media` for `talk.json`; the folder of the file is their
        `image_root`. Exchanges without an answer are left out, and so is what still waits for a question. `<image>` and
        `<video>` inside of texts, which a record would take for placeholders, become `< image >` and `< video >`.

        Raises:
            FileExistsError: the file or the folder exists.
            ValueError: nothing was said yet, or the name does not end in `.json`.
        """
        file = Path(file)
        media = file.with_name(f"{file.stem}_media")
        if file.suffix != ".json":
            raise ValueError(f"{file}: a conversation is saved as JSON; give it a name that ends in .json")
        if existing := [path for path in (file, media) if path.exists()]:
            raise FileExistsError(f"{existing[0]} exists; choose another name")
        answered = [exchange for exchange in self.exchanges if exchange.answer.strip()]
        if not answered:
            raise ValueError("there is no answer yet, so nothing to save")
        file.parent.mkdir(parents=True, exist_ok=True)
        record = {"id": file.stem, "source": file.stem, "images": [], "videos": [], "messages": []}
        if self.system:
            record["messages"].append({"role": "system", "content": _plain(self.system)})
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.stem}") as folder:
            written = Path(folder, media.name)
            for exchange in answered:
                marks = ""
                for shown in exchange.shown:
                    paths = record[f"{shown.kind}s"]
                    name = _copy(shown, written, f"{shown.kind}_{len(paths) + 1}")
                    paths.append(f"{media.name}/{name}")
                    marks += f"<{shown.kind}>\n"
                record["messages"].append({"role": "user", "content": marks + _plain(exchange.question)})
                record["messages"].append({"role": "assistant", "content": _plain(exchange.answer)})
            temporary = Path(folder, file.name)
            temporary.write_text(json.dumps([record], ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            if written.exists():
                written.rename(media)
            temporary.rename(file)


class _Generation:
    """An answer that a thread generates: iterate over its text so far, then `finish`."""

    def __init__(self, model, prompt: list[int], features: Tensor | None, generation: dict, stopping: "_Stopping"):
        arguments = dict(generation)
        self._model, self._prompt, self._features, self._stopping = model, prompt, features, stopping
        self._seed = arguments.pop("seed", None)
        self._streams = arguments.get("num_beams", 1) == 1
        self._arguments = arguments
        # Its queue also tells the reader that the thread has ended, with or without an error.
        self._streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._ids: list[int] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def stopped(self) -> bool:
        return self._stopping.stopped

    def __iter__(self) -> Iterator[str]:
        self._thread.start()
        text = ""
        for piece in self._streamer:
            if piece:
                text += piece
                yield text
        self._thread.join()
        if self._error is not None:
            raise self._error
        whole = self._model.tokenizer.decode(self._ids, skip_special_tokens=True)
        if whole != text:  # with beams nothing came before; else an answer may end within a character
            yield whole

    def finish(self) -> list[int]:
        """Ids of the answer; ends the thread if it still runs.

        Raises:
            Exception: what the thread raised.
        """
        while self._thread.is_alive():
            self._stopping.wanted = True
            with suppress(KeyboardInterrupt):  # one after the first: the model must be free before the next question
                self._thread.join()
        if self._error is not None:
            raise self._error
        return self._ids

    def _run(self) -> None:
        try:
            if self._stopping.wanted:  # before it began: the first token may take long
                self._stopping.stopped = True
                return
            if self._seed is not None:
                set_seed(self._seed)
            ids = self._model.generate(
                torch.tensor([self._prompt], device=self._model.device),
                features=self._features,
                streamer=self._streamer if self._streams else None,
                stopping_criteria=StoppingCriteriaList([self._stopping]),
                **self._arguments,
            )
            self._ids = ids[0].tolist()
        except BaseException as error:  # raised again where the answer is read
            self._error = error
        finally:
            self._streamer.text_queue.put(self._streamer.stop_signal)


class _Stopping(StoppingCriteria):
    """Ends all rows once that is `wanted`; `stopped` says whether it did.

    A plain attribute, as a signal handler sets it: an event's lock may be held by what the signal interrupts.
    """

    def __init__(self) -> None:
        self.wanted = self.stopped = False

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        self.stopped = self.stopped or self.wanted
        return torch.full((len(input_ids),), self.stopped, device=input_ids.device, dtype=torch.bool)


def _question(text: str, shown: list[Shown]) -> dict:
    """A user turn: each picture and clip on a line of its own, then the text."""
    parts = [part for one in shown for part in ({"type": one.kind}, {"type": "text", "text": "\n"})]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def _messages(exchanges: list[Exchange]) -> list[dict]:
    turns = []
    for exchange in exchanges:
        turns += [_question(exchange.question, exchange.shown), {"role": "assistant", "content": exchange.answer}]
    return turns


def _features(shown: list[Shown]) -> Tensor | None:
    return torch.cat([one.features for one in shown]) if shown else None


def _plain(text: str) -> str:
    for placeholder in (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER):
        text = text.replace(placeholder, f"< {placeholder[1:-1]} >")
    return text


def _copy(shown: Shown, folder: Path, stem: str) -> str:
    """Copies a picture or a clip into a folder as it is; returns the name it has there."""
    folder.mkdir(exist_ok=True)
    if isinstance(shown.source, Image.Image):
        load_image(shown.source).save(folder / f"{stem}.png")  # upright and RGB, as the model was shown it
        return f"{stem}.png"
    suffix = Path(name_of(shown.source)).suffix or (".png" if shown.kind == "image" else ".mp4")
    if isinstance(shown.source, io.IOBase):
        shown.source.seek(0)
        with open(folder / f"{stem}{suffix}", "wb") as copy:
            shutil.copyfileobj(shown.source, copy)
    else:
        shutil.copyfile(shown.source, folder / f"{stem}{suffix}")
    return f"{stem}{suffix}"
