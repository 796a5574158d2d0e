import queue
import threading
from types import SimpleNamespace

import pytest
import torch
from transformers import TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from tests.model.toy import pictures, prompt

NEW = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


def _rows(model) -> list[list[int]]:
    """A history of two turns with two pictures, one picture, none."""
    return [
        prompt(model, [3], 1, [7, 8], [20, 21], [9], 1, [10, 11]),
        prompt(model, [4, 4], 1, [12, 13, 14]),
        prompt(model, [5, 17, 200, 41]),
    ]


def _alone(model, row: int, **kwargs) -> list[int]:
    images = pictures(3)[[slice(0, 2), slice(2, 3), slice(3, 3)][row]]
    ids = torch.tensor([_rows(model)[row]])
    return model.generate(ids, pixel_values=images if len(images) else None, **{**NEW, **kwargs})[0].tolist()


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_equals_its_rows_alone(make_model, beams):
    model = make_model()
    new = model.generate(_rows(model), pixel_values=pictures(3), view_counts=[2, 1, 0], num_beams=beams, **NEW)
    assert new.shape == (3, 8)
    assert new.tolist() == [_alone(model, row, num_beams=beams) for row in range(3)]


def test_greedy_equals_argmax_of_uncached_forwards(make_model):
    model = make_model()
    ids = _rows(model)[0]
    for _ in range(8):
        logits = model(torch.tensor([ids]), pixel_values=pictures(2)).logits
        ids = [*ids, int(logits[0, -1].argmax())]
    assert _alone(model, 0) == ids[-8:]


def test_lists_are_padded_as_tensors_would_be(make_model):
    model = make_model()
    rows = _rows(model)
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    images = pictures(3)
    by_tensor = model.generate(ids, mask, images, **NEW)
    assert torch.equal(model.generate(rows, pixel_values=images, **NEW), by_tensor)
    with pytest.raises(ValueError, match="padded on the left"):
        model.generate(ids.flip(1), mask.flip(1), images, **NEW)
    with pytest.raises(ValueError, match="no prompt"):
        model.generate([], **NEW)
    with pytest.raises(ValueError, match="row 1 has .* placeholders for 0 feature"):
        model.generate(rows, pixel_values=images, view_counts=[2, 0, 1], **NEW)


def test_sampling_follows_the_seed(make_model):
    model = make_model()
    sampled = {**NEW, "do_sample": True, "temperature": 1.5, "num_return_sequences": 4}
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(model.generate([_rows(model)[0]], pixel_values=pictures(2), **sampled))
    assert runs[0].shape == (4, 8)
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert len({tuple(row) for row in runs[0].tolist()}) > 1


def test_answers_depend_on_the_picture(make_model):
    model = make_model()
    row = [_rows(model)[1]]
    first, second = (model.generate(row, pixel_values=pictures(1, seed), **NEW) for seed in (0, 1))
    assert not torch.equal(first, second)


def test_stops_at_the_tokenizers_end_tokens(make_model):
    model = make_model()
    whole = _alone(model, 1)
    ending, other = whole[2], next(token for token in range(300) if token not in whole)
    stops = {"do_sample": False, "max_new_tokens": 8, "pixel_values": pictures(3)[2:]}
    for im_end, eod in ((ending, other), (other, ending)):
        model.tokenizer = SimpleNamespace(stop_ids=[im_end, eod], pad_token_id=eod)
        assert model.generate([_rows(model)[1]], **stops)[0].tolist() == whole[: whole.index(ending) + 1]
    assert model.generate([_rows(model)[1]], **stops, eos_token_id=other)[0].tolist() == whole


class _Collect(BaseStreamer):
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_streamers_see_the_prompt_and_every_new_token(make_model):
    model = make_model()
    streamer = _Collect()
    row = _rows(model)[1]
    new = model.generate([row], pixel_values=pictures(3)[2:], streamer=streamer, **NEW)
    assert streamer.pieces == [row, *([token] for token in new[0].tolist())]
    assert streamer.ended


def test_text_streams_while_generating(make_model):
    model = make_model()
    tokenizer = SimpleNamespace(decode=lambda ids, **_: "".join(f"<{token}>\n" for token in ids))
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    arguments = dict(pixel_values=pictures(3)[2:], streamer=streamer, **NEW)
    thread = threading.Thread(target=model.generate, args=([_rows(model)[1]],), kwargs=arguments)
    thread.start()
    try:
        text = "".join(streamer)
    except queue.Empty:
        pytest.fail("generation put nothing into the streamer")
    thread.join()
    assert text == tokenizer.decode(_alone(model, 1))
