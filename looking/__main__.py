"""Where does a model look when it gives an answer? A picture with maps, their peaks in words, and their values.

    python -m looking --checkpoint_path outputs/scenes --image x.png --text "Where is the circle?" --output map.png
    python -m looking --checkpoint_path outputs/scenes --image a.png b.png --text "..." --answer "red" --method rollout

By default the model's own answer is explained, the whole of it; --answer gives another one, --token one token of it.

    occlusion    by how much log p(answer) falls where pixels are hidden: what the answer depends on
    features     the same, where a feature vector becomes zero: quicker, but each vector has seen the whole picture
    attention    what the attention gives to each feature vector, mean over layers and heads: no explanation
    rollout      attention followed through all layers

Colours: occlusion and features from violet (speaks against the answer) over white to orange (speaks for it), attention
and rollout from dark blue to yellow; the ends of the scale are the largest value of all maps.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

from chat.loading import add_model_arguments, load_model
from dataset.files import write_text
from dataset.template import encode_prompt
from looking.answer import score, words
from looking.draw import PICTURES, figure, save
from looking.explain import METHODS, SIGNED, Map, explain
from looking.occlusion import FILLS
from model import GREEDY, MultiModalModel
from visual import load_image
from visual.media import Views
from visual.video import load_frames

MOST_FRAMES = 8  # of all pictures and frames, drawn under each other


class Medium(NamedTuple):
    """A file with its views and the pictures in it: one, or the frames of a clip."""

    file: str
    views: Views
    pictures: list[Image.Image]
    size: tuple[int, int] | None


def main() -> None:
    arguments = parse_arguments()
    model, system = load_model(arguments)
    media = [load(model, kind, file) for kind in ("image", "video") for file in getattr(arguments, kind)]
    content = [part for kind in ("image", "video") for _ in getattr(arguments, kind)
               for part in ({"type": kind}, {"type": "text", "text": "\n"})]  # fmt: skip
    turns = [{"role": "user", "content": [*content, {"type": "text", "text": arguments.text}]}]
    counts = [count for one in media for count in one.views.features]
    prompt = encode_prompt(turns, model.tokenizer, [sum(one.views.features) for one in media], system)
    pixels = torch.cat([one.views.pixel_values for one in media]).to(model.device)
    with torch.no_grad():
        features = model.encode_images(pixels, counts)
    ids = answer_of(model, prompt, features, arguments.answer, arguments.max_new_tokens)
    with tqdm(desc=arguments.method, leave=False, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        maps = explain(
            model, prompt, [one.views for one in media], ids, arguments.method, arguments.token,
            sizes=[one.size for one in media], features=features, progress=show, **arguments.options,
        )  # fmt: skip
    tokens = [model.tokenizer.decode([token]) for token in ids]
    log_p = score(model, prompt, ids, features[None]).log_p[0]
    answer = model.tokenizer.decode(ids, skip_special_tokens=True)
    about = "the answer" if arguments.token is None else f"its token {arguments.token}, {tokens[arguments.token]!r}"
    print(f"{answer}\n\n{len(ids)} tokens {tokens}, p = {log_p.sum().exp():.3g}; {METHODS[arguments.method]}, {about}:")
    for map_ in maps:
        print("  " + described(map_, media[map_.picture]))
    title = f"{arguments.text}  {answer}"
    save(drawn(maps, media, arguments.method, title), arguments.output)
    print(arguments.output)
    if arguments.json:
        values = {
            "question": arguments.text, "answer": answer, "tokens": tokens, "log_p": log_p.tolist(),
            "token": arguments.token, "method": arguments.method, "maps": [as_json(m, media[m.picture]) for m in maps],
        }  # fmt: skip
        write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", arguments.json)
        print(arguments.json)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--image", nargs="+", default=[], metavar="PATH", help="pictures, placed before the text")
    parser.add_argument("--video", nargs="+", default=[], metavar="PATH", help="clips, placed after the pictures")
    parser.add_argument("--text", required=True, help="the question")
    parser.add_argument("--answer", help="the answer to explain; default: the model's own")
    parser.add_argument("--token", type=int, help="number of the answer's token to explain, from 0 on; default: all")
    parser.add_argument("--method", choices=METHODS, default="occlusion")
    group = parser.add_argument_group("occlusion")
    group.add_argument("--window", type=float, nargs="+", help="side of what is hidden, in patches of the encoder; "
                       "several: the mean of their maps (default: one, or an eighth of the picture)")  # fmt: skip
    group.add_argument("--stride", type=float, help="from window to window, in patches (default: one, or an eighth of "
                       "the picture, but not more than a window)")
    group.add_argument("--fill", choices=FILLS, help="what stands in place of hidden pixels (default: mean)")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="of the model's own answer")
    parser.add_argument("--output", type=Path, required=True, help=f"picture: {', '.join(PICTURES)}")
    parser.add_argument("--json", type=Path, help="file for the values of the maps")
    arguments = parser.parse_args()
    if not arguments.image and not arguments.video:
        parser.error("give --image or --video: without a picture there is nowhere to look")
    if arguments.output.suffix not in PICTURES:
        parser.error(f"--output {arguments.output}: a picture's name ends in one of {', '.join(PICTURES)}")
    given = {name: getattr(arguments, name) for name in ("window", "stride", "fill")}
    arguments.options = {name: value for name, value in given.items() if value is not None}
    if arguments.options and arguments.method != "occlusion":
        parser.error(f"--{next(iter(arguments.options))} is for --method occlusion")
    return arguments


def load(model: MultiModalModel, kind: str, file: str) -> Medium:
    """Raises FileNotFoundError, ValueError: the file is missing or can't be read; names it."""
    if kind == "image":
        picture = load_image(file)
        return Medium(file, model.media.load_image(picture), [picture], picture.size)
    frames = list(load_frames(file, **model.media.sampling))
    return Medium(file, model.media.load_video(file), frames, None)


def answer_of(
    model: MultiModalModel, prompt: list[int], features: torch.Tensor, answer: str | None, max_new_tokens: int
) -> list[int]:
    """Ids of the answer that is given, or else of the model's, without the token that ends it."""
    if answer is not None:
        return model.tokenizer.encode_plain(answer)
    ids = model.generate([prompt], features=features, max_new_tokens=max_new_tokens, **GREEDY)[0].tolist()
    return words(model, ids)


def described(found: Map, medium: Medium) -> str:
    """Where the largest value of a map is, in words."""
    rows, columns = found.values.shape
    box = found.peak_box(medium.pictures[found.frame or 0].size)
    name = medium.file if found.frame is None else f"{medium.file}, frame {found.frame + 1}"
    peak = f"largest {float(found.values.max()):.3g} in row {found.peak[0] + 1}, column {found.peak[1] + 1} of "
    where = f"{rows} x {columns} (x {box.left:.0f} to {box.right:.0f}, y {box.top:.0f} to {box.bottom:.0f})"
    share = f"{100 * found.share:.0f} % of all that is above zero"
    if not found.signed:
        share = f"{100 * found.share:.0f} % of the picture's {100 * float(found.values.sum()):.1f} % of all"
    changes = "" if found.changed is None else f"; the answer changes at {int(found.changed.sum())} of {rows * columns}"
    return f"{name}: {peak}{where}, {share}{changes}"


def drawn(maps: list[Map], media: list[Medium], method: str, title: str):
    """Pictures with their maps; of many the ones with the largest values."""
    largest = sorted(range(len(maps)), key=lambda i: -float(maps[i].values.max()))[:MOST_FRAMES]
    panels = []
    for found in (maps[i] for i in sorted(largest)):
        picture = media[found.picture].pictures[found.frame or 0]
        name = Path(media[found.picture].file).name + ("" if found.frame is None else f", frame {found.frame + 1}")
        panels.append((name, picture, found.draw(picture)))
    return figure(panels, method in SIGNED, maps[0].limit, METHODS[method], title)


def as_json(found: Map, medium: Medium) -> dict:
    """A map as JSON; `place` and pixels are (left, top, right, bottom) in pixels of the picture."""
    size = medium.pictures[found.frame or 0].size
    return {
        "file": medium.file, "frame": found.frame, "size": size, "place": found.place(size), "peak": found.peak,
        "peak_box": found.peak_box(size), "share": found.share, "values": found.values.tolist(),
        "changed": None if found.changed is None else found.changed.tolist(),
    }  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:  # files and settings of the user: the message says what to mend
        sys.exit(f"looking: {error}")
