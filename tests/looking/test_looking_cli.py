"""`python -m looking`: its picture, its words, its JSON, and what it says of wrong arguments."""

import json
import sys

import numpy as np
import pytest
from PIL import Image
from seeing import RED, picture

from build import build_model
from looking import __main__ as script


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("looking") / "run"
    build_model(tiny.config(folder).model).save_pretrained(folder)
    picture((40, 20), (20, 0, 30, 10)).save(folder.parent / "a.png")
    picture((16, 16), (0, 0, 8, 8), RED).save(folder.parent / "b.png")
    return folder


@pytest.fixture
def run(checkpoint, monkeypatch, tmp_path, capsys):
    def looking(*arguments: str) -> tuple[str, dict]:
        """What is printed, and the JSON; two pictures are asked about unless `arguments` show others."""
        both = [f"{checkpoint.parent}/{name}.png" for name in "ab"]
        media = [] if "--image" in arguments else ["--image", *both]
        command = ["looking", "--checkpoint_path", str(checkpoint), *media, "--text", "What <image> is it?",
                   "--output", str(tmp_path / "map.png"), "--json", str(tmp_path / "map.json"), *arguments]  # fmt: skip
        monkeypatch.setattr(sys, "argv", command)
        script.main()
        return capsys.readouterr().out, json.loads((tmp_path / "map.json").read_text(encoding="utf-8"))

    return looking


@pytest.mark.parametrize("method", ["occlusion", "features", "attention", "rollout"])
def test_maps_of_two_pictures(run, tmp_path, method):
    said, found = run("--answer", "red", "--method", method)
    assert found["answer"] == "red" and found["method"] == method and len(found["log_p"]) == len(found["tokens"])
    first, second = found["maps"]
    assert first["file"].endswith("a.png") and first["size"] == [40, 20] and np.array(first["values"]).shape == (2, 2)
    assert first["place"] == pytest.approx([10, 0, 30, 20], abs=0.1) and second["place"] == [0, 0, 16, 16]
    row, column = first["peak"]
    assert first["values"][row][column] == np.max(first["values"])
    assert f"row {row + 1}, column {column + 1} of 2 x 2" in said.replace("\n", " ")
    assert ("the answer changes at" in said) == (method == "occlusion")
    with Image.open(tmp_path / "map.png") as image:
        assert image.height > image.width / 2


def test_own_answer_one_token_other_windows(run):
    said, found = run(
        "--max_new_tokens", "3", "--token", "0", "--window", "1", "2", "--stride", "0.5", "--fill", "mean"
    )  # fmt: skip
    assert found["token"] == 0 and len(found["tokens"]) <= 3 and "its token 0" in said
    assert np.array(found["maps"][0]["values"]).shape == (4, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "/nowhere.png"], "looking: no image file /nowhere.png"),
        (["--image", "B", "--token", "9", "--answer", "red"], "token 9 was asked for"),
        (["--image", "B", "--method", "rollout", "--fill", "mean"], "--fill is for --method occlusion"),
        (["--image", "B", "--output", "map.gif"], "a picture's name ends in one of .png, .pdf, .svg"),
        ([], "give --image or --video"),
    ],
)
def test_errors_are_one_line(checkpoint, monkeypatch, capsys, arguments, message):
    arguments = [f"{checkpoint.parent}/b.png" if one == "B" else one for one in arguments]
    output = [] if "--output" in arguments else ["--output", "map.png"]
    monkeypatch.setattr(
        sys, "argv", ["looking", "--checkpoint_path", str(checkpoint), "--text", "?", *arguments, *output]
    )
    with pytest.raises((SystemExit, OSError, ValueError)) as caught:
        script.main()
    said = capsys.readouterr().err + str(caught.value)
    assert message.removeprefix("looking: ") in said
