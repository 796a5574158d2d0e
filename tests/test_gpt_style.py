"""GPT-2 and a ViT over text, images and clips, by the plain commands of transformers' example scripts."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, ViTConfig, ViTForImageClassification, ViTImageProcessor

from model import MultiModalModel
from tests.model.families import make_decoder

ROWS = [
    {"image": "red.png", "instruction": "What colour is it?", "answer": "red"},
    {"video": "clip.mp4", "instruction": "What happens?", "answer": "nothing"},
    {"image": "red.png", "video": "clip.mp4", "instruction": "Are they alike?", "answer": "yes"},
    {"instruction": "Name a colour.", "answer": "blue"},
    {"text": "Red is a colour."},
    {"text": "The sky.", "instruction": "What colour is it?", "answer": "blue"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import av

    folder = tmp_path_factory.mktemp("gpt_style")
    make_decoder("gpt2", folder / "gpt2")
    torch.manual_seed(0)
    vit = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    ViTForImageClassification(vit).save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
    Image.new("RGB", (20, 20), (220, 30, 30)).save(folder / "red.png")
    with av.open(str(folder / "clip.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 32
        for value in range(0, 200, 40):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), value, np.uint8), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    (folder / "train.json").write_text(json.dumps(ROWS))
    with open(folder / "val.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "image", "video", "instruction", "answer"])
        writer.writeheader()
        writer.writerows(ROWS)
    return folder


@pytest.fixture(scope="module")
def trained(folder, tiny):
    result = tiny.run(
        "train.py", "--train_file", folder / "train.json", "--validation_file", folder / "val.csv",
        "--data_dir", folder, "--output_dir", folder / "run", "--pretrained_text_model", folder / "gpt2",
        "--pretrained_vision_model", folder / "vit", "--per_device_train_batch_size", "8",
        "--per_device_eval_batch_size", "8", "--gradient_accumulation_steps", "4", "--learning_rate", "5e-5",
        "--num_train_epochs", "3", "--fp16",
    )  # fmt: skip
    return folder / "run", result.stdout + result.stderr


def test_training_says_what_fp16_becomes_and_leaves_a_model(trained):
    run, output = trained
    assert "float16 needs a GPU, and there is none here; this run computes in float32" in output
    assert {"kanjian.json", "adapter_model.safetensors", "tokenizer.json"} <= {file.name for file in run.iterdir()}
    log = json.loads((run / "trainer_state.json").read_text())
    assert log["global_step"] == 3  # 6 rows are one step of 8 * 4
    assert all(entry["lora_lr"] <= 5e-5 for entry in log["log_history"] if "lora_lr" in entry)


def test_inference_by_command(trained, folder, tiny):
    result = tiny.run(
        "inference.py", "--checkpoint_path", trained[0], "--text", "What happens?", "--image", folder / "red.png",
        "--video", folder / "clip.mp4", "--max_new_tokens", "5", "--temperature", "0.7", "--do_sample",
    )  # fmt: skip
    assert result.returncode == 0 and "Traceback" not in result.stderr


def test_generate_with_the_tokenizer_of_the_folder(trained, folder):
    model = MultiModalModel.from_pretrained(trained[0])
    tokenizer = AutoTokenizer.from_pretrained(trained[0])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    image, clip = folder / "red.png", folder / "clip.mp4"

    plain = tokenizer("What colour?", return_tensors="pt")
    given = model.generate(**plain, image=image, **options)
    assert given.shape == (1, 4)
    marked = tokenizer("<image>What colour?", return_tensors="pt")
    assert model.generate(**marked, image=Image.open(image), **options).tolist() == given.tolist()
    pixels = model.encoder.preprocess([image])
    assert model.generate(**plain, image=pixels, **options).tolist() == given.tolist()
    by_hand = [[model.placeholder_id] * model.media.num_features + plain.input_ids[0].tolist()]
    assert model.generate(by_hand, pixel_values=pixels, **options).tolist() == given.tolist()

    pair = tokenizer(["<image> and <image>?", "So?"], return_tensors="pt", padding=True, padding_side="left")
    several = model.generate(**pair, image=[[image, image], None], video=[None, clip], **options)
    alone = model.generate(**tokenizer("So?", return_tensors="pt"), video=clip, **options)
    assert several[1].tolist() == alone[0].tolist()
    with pytest.raises(ValueError, match="prompt 0 has 1 placeholders .* for 2 images and videos"):
        model.generate(**marked, image=[image, image], **options)
    with pytest.raises(ValueError, match="image has 1 entries for 2 prompts"):
        model.generate(**pair, image=[image], **options)


def test_generation_ends_with_the_positions(trained):
    model = MultiModalModel.from_pretrained(trained[0])
    ids = model.generate([[5] * 120], max_new_tokens=50, eos_token_id=None)
    assert ids.shape == (1, 8)
    with pytest.raises(ValueError, match="a prompt has 130 tokens, but the decoder has vectors for 128 positions"):
        model.generate([[5] * 130], max_new_tokens=50)


def test_samples_longer_than_the_positions_are_refused_or_cut(folder, tiny):
    arguments = [
        "--train_file", folder / "train.json", "--data_dir", folder, "--output_dir", folder / "long",
        "--pretrained_text_model", folder / "gpt2", "--pretrained_vision_model", folder / "vit",
    ]  # fmt: skip
    result = tiny.run("train.py", *arguments, "--max_length", "500", check=False)
    assert result.returncode == 1 and "the decoder has vectors for 128 positions" in result.stderr
