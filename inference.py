"""Answers questions about pictures and clips, once or in a conversation.

    python inference.py --checkpoint_path outputs/run --image cat.jpg --text "What is this?"
    python inference.py --checkpoint_path outputs/run --image a.jpg b.jpg --text "What differs?" --num_beams 4
    python inference.py --checkpoint_path outputs/run --video clip.mp4 --text "What happens?" --do_sample
    echo "What is this?" | python inference.py --checkpoint_path outputs/run --image cat.jpg
    python inference.py --checkpoint_path outputs/run               conversation: /help lists its commands

An adapter of the first system (a folder with other_params.bin) does not say where its frozen weights lie:

    python inference.py --checkpoint_path step-36000 --decoder /models/Qwen-7B-Chat --encoder /models/siglip --text ...

The answer appears word by word, except with --num_beams above 1, where it is known only at its end. Ctrl-C stops it.
"""

import argparse
import sys
from pathlib import Path

from chat.loading import add_model_arguments, load_model
from chat.plain import one_line
from chat.sampling import add_sampling_arguments, generation_of
from chat.session import Session
from chat.terminal import ERRORS, answer_once, converse


def question_of(arguments: argparse.Namespace) -> str | None:
    """What is asked: --text, or what comes through a pipe; None for a conversation in a terminal.

    Raises:
        ValueError: the pipe gives no text.
    """
    if arguments.text is None and sys.stdin is not None and sys.stdin.isatty():
        return None
    text = arguments.text
    if text is None:
        try:
            text = sys.stdin.buffer.read().decode() if sys.stdin else ""
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input is no UTF-8 text: {error}") from error
    if not text.strip():
        raise ValueError("nothing is asked: give --text, a text through a pipe, or a terminal for a conversation")
    return text.strip()


def main() -> int:
    """Returns the exit status: 0, or 130 if Ctrl-C stopped the answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("question")
    group.add_argument("--image", nargs="+", default=[], metavar="PATH", help="pictures, placed before the text")
    group.add_argument(
        "--video", nargs="+", default=[], metavar="PATH", help="clips, placed before the text, after the pictures"
    )
    group.add_argument("--text", help="the question; without it, and without a pipe, a conversation begins")
    group.add_argument("--no-preview", action="store_true", help="don't draw pictures in the terminal")
    group.add_argument("--stats", action="store_true", help="tokens, seconds and tokens/s after each answer")
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    arguments = parser.parse_args()
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a character that a terminal does not have must not end anything
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else "replace")
    generation, question = generation_of(arguments), question_of(arguments)
    for path in (*arguments.image, *arguments.video):  # told before the model is loaded, which may take minutes
        if not Path(path).exists():
            raise FileNotFoundError(f"no file {path}")
    model, system = load_model(arguments)
    session = Session(model, system, **generation)
    for path in arguments.image:
        session.add_image(path)
    for path in arguments.video:
        session.add_video(path)
    if question is not None:
        return answer_once(session, question, arguments.stats)
    converse(session, not arguments.no_preview, arguments.stats)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ERRORS as error:  # files and settings of the user, and memory: the message says what to mend
        sys.exit(f"inference.py: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit(130)
