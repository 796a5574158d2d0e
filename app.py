"""Talks with a model in a browser: pictures and clips, many turns, and where it looked.

    python app.py --checkpoint_path outputs/scenes             then open http://127.0.0.1:7860

Only this machine reaches it unless --host says otherwise. Ctrl-C ends it. Needs `pip install -r requirements-app.txt`.
"""

import argparse
import os
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path

from chat import examples
from chat.loading import add_model_arguments, load_model
from chat.uploads import Limits


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    group = parser.add_argument_group("page")
    group.add_argument(
        "--examples",
        help="file of records, or folder of pictures and clips, to begin with; none: no examples (default: what the "
        "run was validated with, where it is there)",
    )
    group.add_argument("--image_root", help="folder that the media of --examples are relative to; default: its own")
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: all of this machine")
    group.add_argument("--port", type=int, default=7860)
    group.add_argument("--share", action="store_true", help="also at a public address, through a server of Gradio")
    group.add_argument("--queue", type=int, default=16, metavar="N", help="questions that wait at most (default: 16)")
    what = {
        "prompt_tokens": "tokens of a conversation, its pictures and clips included",
        "characters": "characters of a question, or of a system prompt",
        "files": "pictures and clips of a question",
        "megapixels": "millions of pixels of a picture or frame",
        "seconds": "length of a clip",
        "upload_mb": "megabytes of a file",
    }
    for name, default in vars(Limits()).items():
        note = f"{what[name]} (default: {default})"
        group.add_argument(f"--max_{name}", type=type(default), default=default, metavar="N", help=note)
    return parser.parse_args()


def check_port(host: str, port: int) -> None:
    """Raises ValueError if nothing can listen there."""
    if not 0 < port < 65536:
        raise ValueError(f"--port is a whole number from 1 to 65535, not {port}")
    try:
        found = socket.getaddrinfo(host, port, family=socket.AF_INET, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # the latter of names that no host can have
        raise ValueError(f"--host is an IPv4 address of this machine or its name, not {host!r} ({error})") from error
    family, kind, protocol, _, address = found[0]
    try:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server will
            probe.bind(address)
    except OSError as error:
        raise ValueError(f"port {port} of {host} can't be used ({error.strerror}): choose another --port") from error


def end_on_signals() -> None:
    """Has what else ends a program at once end it as Ctrl-C does, so that no uploads stay behind."""
    for name in ("SIGTERM", "SIGHUP"):  # the latter where the terminal or ssh goes
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda *_: sys.exit(0))


def offered(arguments: argparse.Namespace) -> list[dict]:
    """The examples that the command line asks for."""
    if arguments.examples == "none":
        return []
    if arguments.examples is None:
        return examples.of_run(arguments.checkpoint_path)
    return examples.of_path(arguments.examples, arguments.image_root)


def main() -> None:
    arguments = parse_arguments()
    limits = Limits(**{name: getattr(arguments, f"max_{name}") for name in vars(Limits())})
    if arguments.queue < 1:
        raise ValueError(f"--queue is a whole number from 1 on, not {arguments.queue}")
    check_port(arguments.host, arguments.port)
    begin_with = offered(arguments)
    end_on_signals()
    with tempfile.TemporaryDirectory(prefix="kanjian-app-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        try:
            from chat.web import Page
        except ImportError as error:
            raise ValueError(f"{error}: pip install -r requirements-app.txt") from error
        model, system = load_model(arguments)
        page = Page(model, system, Path(arguments.checkpoint_path).resolve().name, limits, begin_with)
        address = page.launch(arguments.host, arguments.port, arguments.queue, arguments.share)
        print(f"{arguments.checkpoint_path} on {model.device}: {address}   (Ctrl-C ends it)", flush=True)
        try:
            threading.Event().wait()
        finally:
            page.app.close(verbose=False)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:  # files and settings of the user: the message says what to mend
        sys.exit(f"app.py: {error}")
    except KeyboardInterrupt:
        print()
