"""inference.py: answers from checkpoints of every kind, to arguments and pipes; what ends it is said in one line."""

import io
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict

import inference
from chat.plain import plain
from chat.session import Session
from model import MultiModalModel
from model.decoder import quantization_of
from train import train


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inference") / "run"
    train(tiny.config(folder, "max_steps=4", "save_steps=4", "system=Be brief."))
    return folder


@pytest.fixture(scope="module")
def model(checkpoint) -> MultiModalModel:
    return MultiModalModel.from_pretrained(checkpoint)


@pytest.fixture
def session(model) -> Session:
    return Session(model, "Be brief.", max_new_tokens=6)


def main(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["inference.py", *map(str, arguments)])
    return inference.main()


def piped(monkeypatch, content: bytes, terminal: bool = False) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: terminal)


def test_script_prints_the_answer_alone(checkpoint, session, tiny, monkeypatch, capsys):
    """The system text comes from the checkpoint's configuration; a checkpoint-N serves as well as the run's folder."""
    session.add_image(tiny.folder / "images/blue.png")
    expected = plain(session.ask("Which?"))
    for folder in (checkpoint, checkpoint / "checkpoint-4"):
        status = main(monkeypatch, "--checkpoint_path", folder, "--image", tiny.folder / "images/blue.png",
                      "--text", "Which?", "--max_new_tokens", 6, "--device", "cpu")  # fmt: skip
        assert status == 0 and capsys.readouterr().out == expected + "\n"


def test_a_pipe_asks_once(checkpoint, session, tiny, monkeypatch, capsys):
    """All of it is one question, whatever it looks like."""
    expected = plain(session.ask("/image nowhere.png\n有几个?"))
    piped(monkeypatch, "/image nowhere.png\n有几个?\n".encode())
    assert main(monkeypatch, "--checkpoint_path", checkpoint, "--max_new_tokens", 6) == 0
    assert capsys.readouterr().out == expected + "\n"
    for content, message in ((b" \n", "nothing is asked: give --text"), (b"caf\xe9", "standard input is no UTF-8")):
        piped(monkeypatch, content)
        with pytest.raises(ValueError, match=message):
            main(monkeypatch, "--checkpoint_path", "nowhere")


def test_a_terminal_without_a_question_begins_a_conversation(checkpoint, tiny, monkeypatch):
    begun = []
    monkeypatch.setattr(inference, "converse", lambda *arguments: begun.append(arguments))
    piped(monkeypatch, b"", terminal=True)
    image = tiny.folder / "images/red.png"
    status = main(monkeypatch, "--checkpoint_path", checkpoint, "--image", image, "--no-preview", "--stats")
    ((session, preview, stats),) = begun
    assert status == 0 and [shown.name for shown in session.waiting] == [str(image)]
    assert (preview, stats) == (False, True)


def test_beams_and_sampling(checkpoint, tiny, monkeypatch, capsys):
    arguments = ["--checkpoint_path", checkpoint, "--text", "Which?", "--max_new_tokens", 5, "--device", "cpu",
                 "--image", tiny.folder / "images/blue.png", tiny.folder / "images/red.png"]  # fmt: skip
    main(monkeypatch, *arguments, "--num_beams", 3)
    assert capsys.readouterr().out.endswith("\n")
    answers = []
    for seed in (0, 1, 2, 3, 0):
        main(monkeypatch, *arguments, "--do_sample", "--temperature", 2.0, "--top_p", 0.95, "--seed", seed)
        answers.append(capsys.readouterr().out)
    assert len(set(answers)) > 1 and answers[0] == answers[4]
    with pytest.raises(ValueError, match="--temperature acts only where tokens are drawn"):
        main(monkeypatch, "--checkpoint_path", "nowhere", "--text", "Which?", "--temperature", 2.0)


def test_missing_picture_is_named(checkpoint, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere.png"):
        main(monkeypatch, "--checkpoint_path", checkpoint, "--text", "?", "--image", "nowhere.png")


def test_a_folder_that_is_no_checkpoint_ends_the_script_with_one_line(tmp_path, monkeypatch):
    folder = tmp_path / "no\x1b[2J run"
    folder.mkdir()
    monkeypatch.setattr(sys, "argv", ["inference.py", "--checkpoint_path", str(folder), "--text", "?"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(inference.__file__, run_name="__main__")
    assert end.value.code == f"inference.py: {tmp_path}/no[2J run is no complete checkpoint: it has no kanjian.json"


def test_an_adapter_of_the_first_system_answers(checkpoint, model, tiny, tmp_path, monkeypatch, capsys):
    torch.save(get_peft_model_state_dict(model.decoder), tmp_path / "adapter_model.bin")
    torch.save({name[7:]: tensor for name, tensor in model.projector.state_dict().items()},
               tmp_path / "other_params.bin")  # fmt: skip
    shutil.copy(checkpoint / "adapter_config.json", tmp_path)
    arguments = ["--image", tiny.folder / "images/red.png", "--text", "Which?", "--max_new_tokens", 6]
    bases = ["--decoder", tiny.folder / "decoder", "--encoder", tiny.folder / "encoder"]
    main(monkeypatch, "--checkpoint_path", tmp_path, *bases, *arguments)
    answer = capsys.readouterr().out
    main(monkeypatch, "--checkpoint_path", checkpoint, "--system", "你是一位图像理解助手。", *arguments)
    assert answer == capsys.readouterr().out
    with pytest.raises(ValueError, match="does not say where its frozen weights lie"):
        main(monkeypatch, "--checkpoint_path", tmp_path, *arguments)
    with pytest.raises(ValueError, match="records num_features and placeholder_id itself"):
        main(monkeypatch, "--checkpoint_path", checkpoint, "--num_features", 4, *arguments)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_decoder_answers(checkpoint, tiny, monkeypatch, capsys, quantization):
    main(monkeypatch, "--checkpoint_path", checkpoint, "--quantization", quantization, "--text", "Which?",
         "--image", tiny.folder / "images/red.png", "--max_new_tokens", 6, "--device", "cpu")  # fmt: skip
    model = MultiModalModel.from_pretrained(checkpoint, quantization=quantization)
    session = Session(model, "Be brief.", max_new_tokens=6)
    session.add_image(tiny.folder / "images/red.png")
    assert capsys.readouterr().out == plain(session.ask("Which?")) + "\n"
    assert quantization_of(model.language_model) == quantization
