"""Asks a server that speaks the OpenAI protocol about pictures; the answer appears as it comes.

    transformers serve outputs/scenes_llava --host 127.0.0.1 --port 8000
    python examples/ask_server.py --image data/scenes/images/test/00003.png --text "How many objects?"
"""

import argparse
import base64
import mimetypes
import sys
from pathlib import Path

from openai import OpenAI, OpenAIError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="outputs/scenes_llava", help="as the server was started with")
    parser.add_argument("--image", nargs="*", type=Path, default=[])
    parser.add_argument("--text", required=True)
    parser.add_argument("--max_tokens", type=int, default=64)
    arguments = parser.parse_args()
    content = [{"type": "image_url", "image_url": {"url": data_uri(file)}} for file in arguments.image]
    content.append({"type": "text", "text": arguments.text})
    client = OpenAI(base_url=arguments.url, api_key="none")  # neither server asks for a key by itself
    answer = client.chat.completions.create(
        model=arguments.model,
        messages=[{"role": "user", "content": content}],
        max_tokens=arguments.max_tokens,
        stream=True,
    )
    for chunk in answer:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


def data_uri(file: Path) -> str:
    kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


if __name__ == "__main__":
    try:
        main()
    except (OSError, OpenAIError) as error:  # a file, or a server that is not there or refuses
        sys.exit(f"ask_server.py: {error}")
