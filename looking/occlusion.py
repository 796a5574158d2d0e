"""How much less likely an answer becomes where a part of the picture is hidden from the model.

Occlusion sensitivity (Zeiler & Fergus 2014, https://arxiv.org/abs/1311.2901) hides pixels before the encoder sees them.
`ablation` replaces feature vectors behind the encoder by zeros, which is quicker; but each of them has seen the whole
picture, so that it says which vectors the decoder reads, and not which pixels matter.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from looking.answer import Scores, answer_tokens, score
from looking.geometry import Box, Plane
from looking.grid import feature_cells
from model import MultiModalModel

FILLS = ("mean", "surround", "grey", "blur")
MOST_PLACES = 8  # along a side of the picture, where the window is not given
Progress = Callable[[int, int], None]  # (variants done, variants in all)


class Occlusion(NamedTuple):
    """Of one plane.

    Attributes:
        fall: [h, w] log p(answer | picture) minus that with a place hidden, mean over the windows that hide it.
        changed: [h, w] whether most of the windows that hide a place change what the model says: its likeliest tokens
            in place of the answer's.
    """

    fall: Tensor
    changed: Tensor


def occlusion(
    model: MultiModalModel,
    prompt: list[int],
    answer: list[int],
    pixel_values: Tensor,
    view_features: Sequence[int],
    planes: Sequence[Plane],
    *,
    token: int | None = None,
    window: float | Sequence[float] | None = None,
    stride: float | None = None,
    fill: str = "mean",
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[Occlusion]:
    """Occlusion maps of all planes of a prompt.

    Args:
        prompt: ids, expanded to one placeholder per feature.
        answer: ids that follow.
        pixel_values: [V, 3, H, W] of all views of the prompt.
        view_features: features of each view.
        planes: whose views are indices into `pixel_values`; a window hides its place in all views that show it.
        token: the one whose probability is asked for; None: of the whole answer.
        window: side of what is hidden, in patches of the encoder; several: the mean of their maps.
        stride: from window to window, in patches: a whole number, or 1/2, 1/3, ... By default, `window` and `stride`
            are one patch, or so many that there are at most `MOST_PLACES` windows along a side; a stride is not wider
            than the window.
        fill: what stands in place of what is hidden: "mean", the mean colour of the view; "surround", that of the
            pixels around it, half a window wide, in which an even area stays what it was; "grey", 50 % grey; "blur",
            the view out of focus. By `benchmarks.where_it_looks` the first two are best, and "mean" is the better one
            where a window is smaller than what it is to hide.
        batch_size: variants of the prompt that go through the decoder at once.

    Raises:
        ValueError: a setting out of range, no picture, or the answer has no such token.
    """
    if fill not in FILLS:
        raise ValueError(f"fill is one of {', '.join(FILLS)}, not {fill!r}")
    if not planes:
        raise ValueError("the prompt shows no picture, so nothing can be hidden")
    tokens = answer_tokens(answer, token)
    pixel_values = pixel_values.to(model.device)
    layouts = [_Layout.of(plane, window, stride) for plane in planes]
    total, done = sum(len(layout.windows) for layout in layouts), 0
    with torch.no_grad():
        features = model.encode_images(pixel_values, view_features)
        views = list(features.split(list(view_features)))
        whole = score(model, prompt, answer, features[None])
        hidden = {view: _Hidden(pixel_values[view], fill, model) for plane in planes for view in plane.views}
        found = []
        for plane, layout in zip(planes, layouts, strict=True):
            falls, changes = [], []
            for start in range(0, len(layout.windows), batch_size):
                batch = layout.windows[start : start + batch_size]
                variants = _variants(model, plane, layout, batch, views, view_features, hidden)
                scores = score(model, prompt, answer, variants)
                falls.append(_fall(whole, scores, tokens))
                changes.append((scores.top != whole.top)[:, tokens].any(1).float())
                done += len(batch)
                if progress is not None:
                    progress(done, total)
            falls, changes = torch.cat(falls).cpu(), torch.cat(changes).cpu()
            found.append(Occlusion(layout.mean(falls), layout.mean(changes) > 0.5))
    return found


@torch.no_grad()
def ablation(
    model: MultiModalModel,
    prompt: list[int],
    answer: list[int],
    features: Tensor,
    view_features: Sequence[int],
    *,
    token: int | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[Tensor]:
    """Fall of log p(answer | picture) where a feature vector becomes zero: `[h, w]` patches of each view.

    Args:
        features: [M, H] of all views.

    Raises:
        ValueError: the encoder's features fill no grid, or the answer has no such token.
    """
    tokens = answer_tokens(answer, token)
    cells = [feature_cells(model, count) for count in view_features]
    whole, falls = score(model, prompt, answer, features[None]), []
    for start in range(0, len(features), batch_size):
        zeroed = torch.arange(start, min(start + batch_size, len(features)))
        variants = features.repeat(len(zeroed), 1, 1)
        variants[range(len(zeroed)), zeroed] = 0
        falls.append(_fall(whole, score(model, prompt, answer, variants), tokens))
        if progress is not None:
            progress(int(zeroed[-1]) + 1, len(features))
    split = torch.cat(falls).cpu().split(list(view_features))
    return [fall[where] for fall, where in zip(split, cells, strict=True)]


def _fall(whole: Scores, variants: Scores, tokens: list[int]) -> Tensor:
    return (whole.log_p - variants.log_p)[:, tokens].sum(1)


class _Layout(NamedTuple):
    """Where windows lie on a plane, which is divided into cells of a patch, or a fraction of one.

    Attributes:
        cells: (rows, columns).
        windows: (number of its size, top, left, bottom, right) of each in cells, cut off at the edges of the plane.
    """

    cells: tuple[int, int]
    windows: list[tuple[int, int, int, int, int]]
    sizes: int

    @classmethod
    def of(cls, plane: Plane, window: float | Sequence[float] | None, stride: float | None) -> "_Layout":
        windows = [] if window is None else [window] if isinstance(window, int | float) else list(window)
        if stride is None:
            stride = min([-(-max(plane.grid) // MOST_PLACES), *windows])
        windows = windows or [max(1, stride)]
        parts = 1 if stride >= 1 else round(1 / max(stride, 1e-3))  # cells along the side of a patch
        step, sides = stride * parts, [one * parts for one in windows]
        if not windows or any(abs(n - round(n)) > 1e-6 or round(n) < 1 for n in (step, *sides)) or max(windows) > 1e4:
            raise ValueError(
                f"stride is a whole number of patches or 1/2, 1/3, ..., window a multiple of one patch or of such a "
                f"fraction, not {stride} and {window}"
            )
        rows, columns = (side * parts for side in plane.grid)
        if min(sides) < step:
            raise ValueError(f"with a stride of {stride} patches and a window of {window}, some would never be hidden")
        places = [
            (number, max(0, top), max(0, left), min(rows, top + side), min(columns, left + side))
            for number, side in enumerate(map(round, sides))
            # Windows reach over the edges, so that every cell is hidden by as many of them.
            for top in _starts(rows, side, round(step))
            for left in _starts(columns, side, round(step))
        ]
        return cls((rows, columns), places, len(sides))

    def box(self, plane: Plane, window: tuple[int, int, int, int, int]) -> Box:
        """A window in pixels of the plane."""
        _, top, left, bottom, right = window
        x, y = plane.size[0] / self.cells[1], plane.size[1] / self.cells[0]
        return Box(left * x, top * y, right * x, bottom * y)

    def mean(self, values: Tensor) -> Tensor:
        """Values `[K]` of all windows -> `[rows, columns]`: means over the windows of a size, then over sizes."""
        sums, counts = torch.zeros(2, self.sizes, *self.cells, dtype=torch.float64)
        for value, (number, top, left, bottom, right) in zip(values.tolist(), self.windows, strict=True):
            sums[number, top:bottom, left:right] += value
            counts[number, top:bottom, left:right] += 1
        return (sums / counts).mean(0).float()


def _starts(cells: int, side: int, step: int) -> range:
    """First cells of windows along a side; with a step as large as the window they lie side by side from 0 on."""
    first = -((side - 1) // step) * step
    return range(first, cells, step)


class _Hidden:
    """A view `[3, H, W]` and what stands in place of hidden parts of it."""

    def __init__(self, view: Tensor, fill: str, model: MultiModalModel):
        self.view, self.fill = view, fill
        self.flat = None
        if fill == "mean":
            self.flat = view.mean((1, 2))
        elif fill == "grey":
            size = model.encoder.image_size
            black, white = (_plain(model, shade, size) for shade in (0, 255))
            self.flat = ((black + white) / 2).to(view)

    def without(self, box: Box) -> Tensor | None:
        """The view with `box`, in its pixels, hidden; None where the box is outside."""
        height, width = self.view.shape[1:]
        left, right = max(0, round(box.left)), min(width, round(box.right))
        top, bottom = max(0, round(box.top)), min(height, round(box.bottom))
        if left >= right or top >= bottom:
            return None
        part, changed = (slice(None), slice(top, bottom), slice(left, right)), self.view.clone()
        changed[part] = self._filling(top, bottom, left, right)
        return changed

    def _filling(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        if self.flat is not None:
            return self.flat[:, None, None]
        if self.fill == "blur":
            sigma = max(bottom - top, right - left) / 2
            size = 2 * min(round(2 * sigma), min(self.view.shape[1:]) - 1) + 1
            return gaussian_blur(self.view, [size, size], [sigma, sigma])[:, top:bottom, left:right]
        y, x = max(1, (bottom - top) // 2), max(1, (right - left) // 2)
        ring = torch.zeros(self.view.shape[1:], dtype=torch.bool, device=self.view.device)
        ring[max(0, top - y) : bottom + y, max(0, left - x) : right + x] = True
        ring[top:bottom, left:right] = False
        around = self.view[:, ring]
        # A window over the whole view has nothing around it.
        return (around if around.shape[1] else self.view.flatten(1)).mean(1)[:, None, None]


def _plain(model: MultiModalModel, shade: int, size: tuple[int, int]) -> Tensor:
    """What the encoder gets for a shade of grey: [3]."""
    return model.media.preprocess.exact([Image.new("RGB", size[::-1], (shade,) * 3)])[0, :, 0, 0]


def _variants(
    model: MultiModalModel,
    plane: Plane,
    layout: _Layout,
    windows: list[tuple[int, int, int, int, int]],
    views: list[Tensor],
    view_features: Sequence[int],
    hidden: dict[int, _Hidden],
) -> Tensor:
    """Features `[K, M, H]` of the prompt with each of K windows hidden; only views that show one are encoded anew."""
    changed: list[tuple[int, int, Tensor]] = []  # (variant, view, its pixels)
    for variant, window in enumerate(windows):
        box = layout.box(plane, window)
        for view, place in plane.views.items():
            height, width = hidden[view].view.shape[1:]
            x, y = width / place.size[0], height / place.size[1]
            own = Box((box.left - place.left) * x, (box.top - place.top) * y,
                      (box.right - place.left) * x, (box.bottom - place.top) * y)  # fmt: skip
            pixels = hidden[view].without(own)
            if pixels is not None:
                changed.append((variant, view, pixels))
    rows = [list(views) for _ in windows]
    if changed:
        counts = [view_features[view] for _, view, _ in changed]
        encoded = model.encode_images(torch.stack([pixels for *_, pixels in changed]), counts).split(counts)
        for (variant, view, _), own in zip(changed, encoded, strict=True):
            rows[variant][view] = own
    return torch.stack([torch.cat(row) for row in rows])
