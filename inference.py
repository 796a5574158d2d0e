"""Answers questions about pictures and clips, once or in a conversation.

    python inference.py --checkpoint_path outputs/run --image cat.jpg --text "What is this?"
    python inference.py --checkpoint_path outputs/run --image a.jpg b.jpg --text "What differs?" --num_beams 4
    python inference.py --checkpoint_path outputs/run --video clip.mp4 --text "What happens?" --do_sample
    python inference.py --checkpoint_path outputs/run               conversation; /image /video /clear /quit, Ctrl-D

An adapter of the first system (a folder with other_params.bin) does not say where its frozen weights lie:

    python inference.py --checkpoint_path step-36000 --decoder /models/Qwen-7B-Chat --encoder /models/siglip --text ...

The answer appears token by token, except with --num_beams above 1, where it is known only at its end.
"""

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import TextStreamer

from dataset.template import encode_prompt
from model import MultiModalModel
from visual.media import Views

# In place of the decoder's own settings of the same names, such as Qwen-7B-Chat's sampling with top_p 0.8.
GREEDY = {"do_sample": False, "num_beams": 1, "temperature": 1.0, "top_p": 1.0}
CHAT_HELP = (
    "/image PATH [PATH ...] and /video PATH [PATH ...] add pictures and clips to the next question, /clear forgets "
    "everything, /quit or Ctrl-D ends"
)


class Chat:
    """A conversation with a model: turns so far, their pictures and clips, and those waiting for the next question.

    Args:
        system: text of the system turn, or None for none.
        generation: arguments of transformers' `generate`; by default the answer is greedy and ends after 512 tokens.
    """

    def __init__(self, model: MultiModalModel, system: str | None = None, **generation):
        self.model, self.system = model, system
        self.generation = {**GREEDY, "max_new_tokens": 512, **generation}
        self.clear()

    def clear(self) -> None:
        """Forgets turns, pictures and clips."""
        self.messages: list[dict[str, str]] = []
        self.features: list[torch.Tensor] = []  # of each picture and clip so far, [n, H]
        self.waiting: list[str] = []  # "image" or "video" of each that the next question will show, the last `features`

    def add_image(self, path: str | Path) -> None:
        """Shows a picture with the next question.

        Raises:
            FileNotFoundError, ValueError: the file is missing or can't be read as an image; names it.
        """
        self._add("image", self.model.media.load_image(path))

    def add_video(self, path: str | Path) -> None:
        """Shows a clip with the next question; raises what `add_image` raises."""
        self._add("video", self.model.media.load_video(path))

    def _add(self, kind: str, views: Views) -> None:
        with torch.no_grad():
            self.features.append(
                self.model.encode_images(views.pixel_values.to(self.model.device), views.features)  # [n, H]
            )
        self.waiting.append(kind)

    def ask(self, text: str, stream: bool = True) -> str:
        """The model's answer to `text`, written to standard output as it comes if `stream`.

        `text` is plain text: nothing in it is read as a placeholder or another control token.
        """
        content = [part for kind in self.waiting for part in ({"type": kind}, {"type": "text", "text": "\n"})]
        content.append({"type": "text", "text": text})
        messages = [*self.messages, {"role": "user", "content": content}]
        tokenizer = self.model.tokenizer
        prompt = encode_prompt(messages, tokenizer, [len(one) for one in self.features], self.system)
        streamer = None
        if stream and self.generation["num_beams"] == 1:
            streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        ids = self.model.generate(
            torch.tensor([prompt], device=self.model.device),
            features=torch.cat(self.features) if self.features else None,
            streamer=streamer,
            **self.generation,
        )[0]
        answer = tokenizer.decode(ids, skip_special_tokens=True)
        if stream and streamer is None:
            print(answer, flush=True)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        self.waiting = []
        return answer


def converse(chat: Chat) -> None:
    """Reads questions and commands from standard input until it ends."""
    print(CHAT_HELP)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        command, *rest = line.split(maxsplit=1)[:2] or [""]
        if command == "/quit":
            return
        if command == "/clear":
            chat.clear()
        elif command in ("/image", "/video"):
            add_files(chat.add_image if command == "/image" else chat.add_video, rest[0] if rest else "")
        elif command.startswith("/"):
            print(f"unknown command {command}; {CHAT_HELP}")
        elif line:
            chat.ask(line)


def add_files(add: Callable[[str], None], text: str) -> None:
    """Adds the files that a line names; says what is wrong with one instead of ending the conversation."""
    try:
        paths = shlex.split(text)
    except ValueError as error:
        print(f"{error}: {text}")
        return
    for path in paths:
        try:
            add(path)
        except (OSError, ValueError) as error:
            print(error)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that `load_model` reads."""
    parser.add_argument(
        "--checkpoint_path",
        required=True,
        help="folder that train.py wrote, a checkpoint-N in it, or a folder with other_params.bin",
    )
    parser.add_argument("--decoder", help="folder or hub id of the decoder; default: the recorded one")
    parser.add_argument("--encoder", help="folder or hub id of the encoder; default: the recorded one")
    parser.add_argument(
        "--num_features",
        type=int,
        help="with other_params.bin: feature vectors per picture in its training (SigLIP: 728 without the first "
        "patch, the default, or 729)",
    )
    parser.add_argument("--device", help="cuda, cpu, ...; default: cuda where there is one")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, help="of the decoder; default: the recorded one")
    parser.add_argument(
        "--quantization", choices=("none", "nf4", "int8"), help="of the decoder; default: the recorded one"
    )
    parser.add_argument("--system", help="text of the system turn; default: the one of the training")


def load_model(arguments: argparse.Namespace) -> tuple[MultiModalModel, str | None]:
    """Model in eval mode on its device, and the system text that belongs to it.

    Raises:
        OSError, ValueError: an argument or a file is at fault; the message names it.
    """
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    model = MultiModalModel.from_pretrained(
        arguments.checkpoint_path,
        decoder=arguments.decoder,
        encoder=arguments.encoder,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        device=device,
        num_features=arguments.num_features,
    )
    return model, model.system if arguments.system is None else arguments.system


def check_device(name: str) -> None:
    """Raises ValueError if nothing can be written to a device and read back."""
    try:
        torch.zeros(1, device=torch.device(name)).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # which of them depends on the kind of device
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(f"--device {name} can't be used, take cpu, or cuda where there is a GPU: {reason}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--image", nargs="+", default=[], help="pictures, placed before the text")
    parser.add_argument("--video", nargs="+", default=[], help="clips, placed before the text, after the pictures")
    parser.add_argument("--text", help="the question; without it a conversation begins")
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--num_beams", type=int, default=1)
    parser.add_argument("--do_sample", action=argparse.BooleanOptionalAction, default=False, help="draw tokens")
    parser.add_argument("--temperature", type=float, default=1.0, help="with --do_sample")
    parser.add_argument("--top_p", type=float, default=1.0, help="with --do_sample")
    arguments = parser.parse_args()
    model, system = load_model(arguments)
    names = ("max_new_tokens", "num_beams", "do_sample", "temperature", "top_p")
    chat = Chat(model, system, **{name: getattr(arguments, name) for name in names})
    for path in arguments.image:
        chat.add_image(path)
    for path in arguments.video:
        chat.add_video(path)
    if arguments.text is not None:
        chat.ask(arguments.text)
    else:
        converse(chat)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:  # files and settings of the user: the message says what to mend
        sys.exit(f"inference.py: {error}")
