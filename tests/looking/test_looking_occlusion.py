"""Occlusion against hiding one patch at a time, and maps that must peak where a model is known to look."""

import numpy as np
import pytest
import torch
from seeing import BLUE, PATCH, RED, SIDE, make_model, noise, picture, prompt_of, telling_answer

from looking import explain
from looking.answer import score
from looking.explain import LEAST_LIMIT
from looking.geometry import Box, planes
from looking.occlusion import FILLS, ablation, occlusion
from visual.media import Views

ANSWER = [11, 12, 13]


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path)


def log_p(model, prompt, answer, features) -> float:
    """log p(answer), token by token."""
    total = 0.0
    for length, token in enumerate(answer):
        ids = torch.tensor([prompt + answer[:length]])
        with torch.no_grad():
            total += float(model(ids, features=features).logits[0, -1].log_softmax(-1)[token])
    return total


def naive(model, prompt, answer, pixels, counts, colour) -> torch.Tensor:
    """[V, 4, 4] fall of log p with one patch of one view at a time in `colour` [3]."""
    whole = log_p(model, prompt, answer, model.encode_images(pixels, counts))
    found = torch.zeros(len(pixels), 4, 4)
    for view in range(len(pixels)):
        for row in range(4):
            for column in range(4):
                changed = pixels.clone()
                rows, columns = slice(row * PATCH, (row + 1) * PATCH), slice(column * PATCH, (column + 1) * PATCH)
                changed[view, :, rows, columns] = colour(pixels[view], rows, columns)[:, None, None]
                found[view, row, column] = whole - log_p(model, prompt, answer, model.encode_images(changed, counts))
    return found


def around(view, rows, columns) -> torch.Tensor:
    """Mean colour of the pixels less than half a patch around a patch."""
    pixels = [
        view[:, y, x]
        for y in range(max(0, rows.start - 4), min(SIDE, rows.stop + 4))
        for x in range(max(0, columns.start - 4), min(SIDE, columns.stop + 4))
        if not (rows.start <= y < rows.stop and columns.start <= x < columns.stop)
    ]
    return torch.stack(pixels).mean(0)


def fifty_per_cent(view, rows, columns) -> torch.Tensor:
    """127.5 of 255, after the processor's mean [0.4, 0.5, 0.3] and CLIP's standard deviation."""
    return (0.5 - torch.tensor([0.4, 0.5, 0.3])) / torch.tensor([0.26862954, 0.26130258, 0.27577711])


COLOURS = {"mean": lambda view, *_: view.mean((1, 2)), "surround": around, "grey": fifty_per_cent}


@pytest.mark.parametrize("fill", COLOURS)
def test_is_what_hiding_one_patch_at_a_time_gives(model, fill):
    pixels = noise(2)
    told = []
    maps = explain(
        model, prompt_of(16, 16), [Views(pixels[:1], [16]), Views(pixels[1:], [16])], ANSWER,
        fill=fill, batch_size=5, progress=lambda *step: told.append(step),
    )  # fmt: skip
    expected = naive(model, prompt_of(16, 16), ANSWER, pixels, [16, 16], COLOURS[fill])
    for one, own in zip(maps, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(one.values), own, atol=2e-5, rtol=1e-3)
    assert expected.abs().max() > 0.01
    assert told[-1] == (32, 32) and [done for done, _ in told] == [5, 10, 15, 16, 21, 26, 31, 32]


def test_one_token_of_the_answer(model):
    pixels = noise(1)
    prompt = prompt_of(16)
    (found,) = explain(model, prompt, [Views(pixels, [16])], ANSWER, token=1, fill="mean")
    (expected,) = naive(model, prompt + ANSWER[:1], ANSWER[1:2], pixels, [16], COLOURS["mean"])
    torch.testing.assert_close(torch.from_numpy(found.values), expected, atol=2e-5, rtol=1e-3)
    assert expected.abs().max() > 0.01


def test_overlapping_windows_are_averaged(model):
    """Of windows two patches wide, one apart, four hide each patch; at the edges they reach over."""
    pixels = noise(1)
    prompt, flat = prompt_of(16), pixels[0].mean((1, 2))[:, None, None]
    (found,) = explain(model, prompt, [Views(pixels, [16])], ANSWER, window=2, stride=1, fill="mean")
    whole = log_p(model, prompt, ANSWER, model.encode_images(pixels))
    falls = {}
    for top in range(-1, 4):
        for left in range(-1, 4):
            changed = pixels[0].clone()
            changed[:, max(0, top) * PATCH : (top + 2) * PATCH, max(0, left) * PATCH : (left + 2) * PATCH] = flat
            falls[top, left] = whole - log_p(model, prompt, ANSWER, model.encode_images(changed[None]))
    expected = [
        [np.mean([falls[row - i, column - j] for i in (0, 1) for j in (0, 1)]) for column in range(4)]
        for row in range(4)
    ]
    assert found.values == pytest.approx(np.array(expected), abs=2e-5, rel=1e-3) and np.ptp(expected) > 0.05
    (single,) = explain(model, prompt, [Views(pixels, [16])], ANSWER, window=1, fill="mean")
    (both,) = explain(model, prompt, [Views(pixels, [16])], ANSWER, window=[1, 2], stride=1, fill="mean")
    assert both.values == pytest.approx((single.values + found.values) / 2, abs=1e-6)


def test_steps_of_half_a_patch_give_a_finer_map(model):
    pixels = noise(1)
    (found,) = explain(model, prompt_of(16), [Views(pixels, [16])], ANSWER, window=0.5, stride=0.5, fill="mean")
    changed = pixels.clone()
    changed[0, :, 12:16, 4:8] = pixels[0].mean((1, 2))[:, None, None]
    fall = [log_p(model, prompt_of(16), ANSWER, model.encode_images(one)) for one in (pixels, changed)]
    assert found.values.shape == (8, 8) and found.values[3, 1] == pytest.approx(fall[0] - fall[1], abs=2e-5)
    assert abs(fall[0] - fall[1]) > 1e-3


def test_which_patches_change_the_answer(model):
    pixels = model.media.preprocess([picture((SIDE, SIDE), (8, 16, 16, 24))])
    both = torch.stack([model.encode_images(pixels), model.encode_images(torch.zeros_like(pixels))])
    for last in range(90):  # a question to which the red patch is the answer
        prompt = [*prompt_of(16), last]
        own, other = score(model, prompt, [0], both).top.tolist()
        if own != other:
            break
    (found,) = explain(model, prompt, [Views(pixels, [16])], own, fill="surround")
    changed = np.zeros((4, 4), dtype=bool)
    for row in range(4):
        for column in range(4):
            hidden = pixels.clone()
            rows, columns = slice(row * PATCH, (row + 1) * PATCH), slice(column * PATCH, (column + 1) * PATCH)
            hidden[0, :, rows, columns] = around(pixels[0], rows, columns)[:, None, None]
            changed[row, column] = score(model, prompt, [0], model.encode_images(hidden)[None]).top[0].tolist() != own
    assert found.changed.tolist() == changed.tolist() and changed[2, 1] and changed.sum() < 9


SIZES = [
    ((32, 32), (8, 16, 16, 24), False), ((128, 64), (80, 16, 96, 32), False), ((60, 200), (0, 100, 15, 115), False),
    ((120, 40), (90, 10, 120, 20), True),
]  # fmt: skip


@pytest.mark.parametrize(
    ("size", "box", "squash", "fill"), [(*SIZES[1], fill) for fill in FILLS] + [(*size, "mean") for size in SIZES]
)
def test_peaks_where_the_model_looks_in_the_original_picture(tmp_path, size, box, squash, fill):
    """Only what is red says anything to this model; blue elsewhere is as much as nothing."""
    model = make_model(tmp_path, squash=squash)
    shown = picture(size, box)
    views = model.media.load_image(shown)
    prompt = prompt_of(16)
    blank = model.encode_images(model.media.load_image(picture(size, box, BLUE)).pixel_values)
    answer = telling_answer(model, prompt, model.encode_images(views.pixel_values), blank)
    (found,) = explain(model, prompt, [views], answer, fill=fill)
    peak = found.peak_box(size)
    middle = (peak.left + peak.right) / 2, (peak.top + peak.bottom) / 2
    assert box[0] < middle[0] < box[2] and box[1] < middle[1] < box[3]
    assert found.share > (0.5 if fill == "blur" else 0.8)
    drawn = np.asarray(found.draw(shown)).astype(int)
    warm = drawn[..., 0] - drawn[..., 2]
    y, x = np.unravel_index(warm.argmax(), warm.shape)
    assert drawn.shape == (size[1], size[0], 3) and box[0] - 8 <= x < box[2] + 8 and box[1] - 8 <= y < box[3] + 8


def test_a_place_is_hidden_in_all_tiles_and_in_the_overview(tmp_path):
    """With tiles the red spot is seen twice: hiding it in one of the views would leave the other."""
    model = make_model(tmp_path, squash=True, max_tiles=2)
    size, box = (64, 32), (32, 16, 48, 32)  # four patches of the second tile, and two of the overview
    views, blank = (model.media.load_image(picture(size, box, colour)) for colour in (RED, BLUE))
    prompt = prompt_of(48)
    shown, other = (model.encode_images(one.pixel_values) for one in (views, blank))
    answer = telling_answer(model, prompt, shown, other)
    (found,) = explain(model, prompt, [views], answer, sizes=[size], window=2, stride=2, fill="surround")
    gone = log_p(model, prompt, answer, shown) - log_p(model, prompt, answer, other)
    only_tile = log_p(model, prompt, answer, shown)
    only_tile -= log_p(model, prompt, answer, torch.cat([shown[:16], other[16:]]))
    assert found.values.shape == (4, 8) and found.peak == (2, 4)
    assert found.values[2:, 4:6] == pytest.approx(np.full((2, 2), gone), rel=0.01) and abs(gone - only_tile) > 0.03
    assert found.place(size) == pytest.approx(Box(0, 0, 64, 32), abs=0.1)


def test_frames_of_a_clip_have_maps_of_their_own(model):
    frames = [picture((SIDE, SIDE), (8 * i, 8, 8 * i + 8, 16), RED if i == 2 else BLUE) for i in range(3)]
    views = Views(model.media.preprocess(frames), [16] * 3)
    prompt = prompt_of(48)
    shown = model.encode_images(views.pixel_values)
    blank = model.encode_images(model.media.preprocess([picture((SIDE, SIDE), (0, 0, 1, 1), BLUE)] * 3))
    maps = explain(model, prompt, [views], telling_answer(model, prompt, shown, blank), fill="surround")
    assert [one.frame for one in maps] == [0, 1, 2]
    assert maps[2].peak == (1, 2) and maps[2].limit == maps[0].limit == max(np.abs(maps[2].values).max(), LEAST_LIMIT)
    assert max(np.abs(one.values).max() for one in maps[:2]) < 1e-4 < maps[2].values.max()


@pytest.mark.parametrize("media", [{}, {"frame_pooling": 2}])
def test_ablation_zeroes_one_vector_at_a_time(tmp_path, media):
    model = make_model(tmp_path, **media)
    count = 4 if media else 16
    features = torch.randn(2 * count, 32, generator=torch.Generator().manual_seed(4))
    prompt = prompt_of(2 * count)
    found = ablation(model, prompt, ANSWER, features, [count, count], batch_size=3)
    whole = log_p(model, prompt, ANSWER, features)
    for vector in range(0, 2 * count, 3):
        zeroed = features.clone()
        zeroed[vector] = 0
        side = 2 if media else 4
        row, column = vector % count // side, vector % side
        fall = found[vector // count][row * 4 // side, column * 4 // side]
        assert float(fall) == pytest.approx(whole - log_p(model, prompt, ANSWER, zeroed), abs=2e-5)


def test_settings_out_of_range(model):
    views = Views(noise(1), [16])
    for options, message in [
        ({"fill": "black"}, "fill is one of mean, surround, grey, blur"),
        ({"stride": 0.3}, "stride is a whole number of patches or 1/2"),
        ({"stride": 2, "window": 1}, "some would never be hidden"),
        ({"token": 3}, "token 3 was asked for, but the answer has 3, numbered from 0"),
        ({"method": "gradient"}, "method is one of occlusion, features, attention, rollout"),
        ({"sizes": []}, "0 sizes are given for 1 pictures"),
    ]:
        with pytest.raises(ValueError, match=message):
            explain(model, prompt_of(16), [views], ANSWER, **options)
    with pytest.raises(ValueError, match="the answer is empty"):
        explain(model, prompt_of(16), [views], [])
    with pytest.raises(ValueError, match="shows no picture"):
        explain(model, prompt_of(), [], ANSWER)


def test_encoders_whose_features_fill_no_grid_can_be_hidden_from(model):
    """A class token among the features changes nothing about pixels."""
    views = Views(noise(1), [16])
    (expected,) = explain(model, prompt_of(16), [views], ANSWER)
    model.encoder.grid = None
    (found,) = explain(model, prompt_of(16), [views], ANSWER)
    assert np.array_equal(found.values, expected.values)


def test_many_patches_are_hidden_by_larger_windows(model):
    """At most 8 x 8 windows, so that a CPU takes seconds."""
    plane = planes(model.media, (SIDE, SIDE), (27, 27), 1, None)
    told = []
    (found,) = occlusion(
        model, prompt_of(16), ANSWER, noise(1), [16], plane,
        progress=lambda *step: told.append(step),
    )  # fmt: skip
    assert told[-1] == (49, 49) and found.fall.shape == (27, 27)
