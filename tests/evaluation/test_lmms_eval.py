"""The model that lmms-eval drives. Without lmms-eval, stand-ins of the two classes that it takes from there serve."""

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from dataset.template import encode_prompt, encode_record
from evaluation import run_lmms_eval
from model import GREEDY, MultiModalModel
from train import train

TASK, SPLIT = "colours", "test"
DOCUMENTS = [
    {"pictures": ["red"], "question": "What colour is it?"},
    {"pictures": ["blue"], "question": "What colour is it? Say it. Say it again, please."},
    {"pictures": [], "question": "Name a colour."},
    {"pictures": ["green", "red"], "question": "Which colours?"},
    {"pictures": ["white", "blue"], "question": "Before <image> between <image> after?"},
]
# The same as records write it.
TURNS = [
    "<image>\nWhat colour is it?",
    "<image>\nWhat colour is it? Say it. Say it again, please.",
    "Name a colour.",
    "<image>\n<image>\nWhich colours?",
    "Before <image> between <image> after?",
]


@dataclass
class GenerationResult:
    text: Any


class Lmms:
    """What the plug-in uses of lmms-eval's base class."""

    def __init__(self):
        self.rank, self.task_dict, self.cached = 0, {}, []
        self.cache_hook = SimpleNamespace(add_partial=lambda *partial: self.cached.append(partial))


def module(name: str, **content) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(content, __path__=[])
    return made


@pytest.fixture(scope="module")
def plugin():
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("lmms_eval") is None:
            patch.setitem(sys.modules, "lmms_eval", module("lmms_eval"))
            patch.setitem(sys.modules, "lmms_eval.api", module("lmms_eval.api"))
            patch.setitem(sys.modules, "lmms_eval.api.model", module("lmms_eval.api.model", lmms=Lmms))
            instance = module("lmms_eval.api.instance", GenerationResult=GenerationResult)
            patch.setitem(sys.modules, "lmms_eval.api.instance", instance)
        yield importlib.import_module("evaluation.lmms_eval_model")
        sys.modules.pop("evaluation.lmms_eval_model")


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lmms_eval") / "run"
    train(tiny.config(folder, "max_steps=4", "save_steps=4"))
    return folder


@pytest.fixture(scope="module")
def model(checkpoint) -> MultiModalModel:
    return MultiModalModel.from_pretrained(checkpoint)


@pytest.fixture
def driven(plugin, checkpoint):
    """The plug-in with batches of two and the documents as its task."""
    made = plugin.Kanjian(str(checkpoint), batch_size="2", device="cpu", system="Be brief.")
    made.task_dict = {TASK: {SPLIT: DOCUMENTS}}
    return made


@pytest.fixture
def pictures(tiny):
    def show(document: dict) -> list[Image.Image]:
        return [Image.open(tiny.folder / "images" / f"{name}.png") for name in document["pictures"]]

    return show


def request(*before, number: int, shows) -> SimpleNamespace:
    return SimpleNamespace(args=(DOCUMENTS[number]["question"], *before, shows, number, TASK, SPLIT))


def views(model, shown: list[Image.Image]) -> torch.Tensor | None:
    return torch.cat([model.media.load_image(picture).pixel_values for picture in shown]) if shown else None


def answer_alone(model, number: int, shown: list[Image.Image], **options) -> str:
    prompt = encode_prompt([{"role": "user", "content": TURNS[number]}], model.tokenizer, 4, "Be brief.")
    ids = model.generate([prompt], pixel_values=views(model, shown), **{**GREEDY, **options})
    return model.tokenizer.decode(ids[0], skip_special_tokens=True)


def test_answers_in_batches_equal_those_of_single_prompts(driven, model, pictures):
    settings = {"max_new_tokens": 5, "temperature": 0, "do_sample": False, "until": ["\n\n"]}
    found = driven.generate_until([request(settings, number=n, shows=pictures) for n in range(len(DOCUMENTS))])
    alone = [answer_alone(model, n, pictures(document), max_new_tokens=5) for n, document in enumerate(DOCUMENTS)]
    assert found == [text.strip() for text in alone] and len(set(found)) > 1


def test_requests_keep_their_own_settings(driven, model, pictures):
    """Requests with other settings don't share a batch; an answer ends before the first of its `until`."""
    beams = {"max_new_tokens": 4, "num_beams": 3}
    long = answer_alone(model, 0, pictures(DOCUMENTS[0]), max_new_tokens=8)
    end = long[3]
    requests = [
        request({"max_new_tokens": 8, "until": [end, "never"]}, number=0, shows=pictures),
        request(beams, number=1, shows=pictures),
        request({"max_new_tokens": 2}, number=0, shows=pictures),
    ]
    found = driven.generate_until(requests)
    assert found[0] == long[: long.index(end)].strip()
    assert found[1] == answer_alone(model, 1, pictures(DOCUMENTS[1]), **beams).strip()
    assert found[2] == answer_alone(model, 0, pictures(DOCUMENTS[0]), max_new_tokens=2).strip()


def test_loss_of_continuations(driven, model, pictures):
    """The mean over the tokens of the answer and the end of its turn, as in training; a space before it is left out."""
    greedy = answer_alone(model, 1, pictures(DOCUMENTS[1]), max_new_tokens=3)
    texts = [(0, " red"), (0, " green"), (1, "red"), (2, "blue"), (1, greedy), (3, "red and green")]
    results = driven.loglikelihood([request(text, number=n, shows=pictures) for n, text in texts])
    for (number, text), result in zip(texts, results, strict=True):
        shown = pictures(DOCUMENTS[number])
        turns = [("user", TURNS[number]), ("assistant", text.strip())]
        record = {
            "id": "x", "images": ["x"] * len(shown), "videos": [],
            "messages": [{"role": role, "content": content} for role, content in turns],
        }  # fmt: skip
        encoded = encode_record(record, model.tokenizer, 4, "Be brief.")
        with torch.no_grad():
            batch = {name: torch.tensor([ids]) for name, ids in encoded.items()}
            loss = model(**batch, pixel_values=views(model, shown)).loss
        assert result.text[0] == pytest.approx(loss.item(), rel=1e-4)
        ids = [label for label in encoded["labels"] if label != -100]
        prompt = encode_prompt(record["messages"][:1], model.tokenizer, 4, "Be brief.")
        said = model.generate([prompt], pixel_values=views(model, shown), max_new_tokens=len(ids), **GREEDY)
        assert result.text[1] == (said[0].tolist() == ids)


def test_the_greedy_continuation_is_told(driven, pictures, monkeypatch):
    ids = driven.model.tokenizer.encode_plain("red")
    end = driven.model.tokenizer.stop_ids[0]
    whole = driven.model.generate

    def say_red(*arguments, **options):
        output = whole(*arguments, **options)
        rows = torch.tensor([[*ids, end, 0, 0]] * len(output.sequences))
        return SimpleNamespace(sequences=rows, past_key_values=None)

    monkeypatch.setattr(driven.model, "generate", say_red)
    results = driven.loglikelihood([request(text, number=0, shows=pictures) for text in ("red", "re", "green")])
    assert [result.text[1] for result in results] == [True, False, False]


def test_rounds_end_when_the_task_says_so(driven, model, pictures):
    asked = []

    def doc_to_text(document, previous_output, round_idx, previous_round_info):
        asked.append((list(previous_output), round_idx, previous_round_info))
        return [], f"And {previous_output[-1]!r}?", round_idx == 3, previous_output, round_idx

    arguments = ("What colour is it?", {"max_new_tokens": 2}, pictures, doc_to_text, 0, TASK, SPLIT)
    (answers,) = driven.generate_until_multi_round([SimpleNamespace(args=arguments)])
    assert answers[0] == answer_alone(model, 0, pictures(DOCUMENTS[0]), max_new_tokens=2).strip()
    assert len(answers) == 3 and asked[2] == (answers, 3, 2)
    assert [(len(said), number, carried) for said, number, carried in asked] == [(1, 1, None), (2, 2, 1), (3, 3, 2)]


def test_settings_of_a_task(plugin):
    options, until = plugin.generation_options({"until": "\n", "top_p": None, "image_aspect_ratio": "original"})
    assert options == {**GREEDY, "max_new_tokens": 1024} and until == ("\n",)
    drawn, _ = plugin.generation_options({"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 3})
    assert (drawn["do_sample"], drawn["temperature"], drawn["top_p"]) == (True, 0.7, 0.9)
    assert plugin.generation_options({"do_sample": True})[0]["do_sample"]
    for greedy in ({"temperature": 0, "do_sample": True, "top_p": 0.1}, {"temperature": 0.7, "do_sample": False}):
        assert plugin.generation_options(greedy)[0] == {**GREEDY, "max_new_tokens": 1024}
    with pytest.raises(ValueError, match=r"'max_new_token' is not supported \(did you mean 'max_new_tokens'\?\)"):
        plugin.generation_options({"max_new_token": 5})


def test_answers_are_cut_at_the_first_end(plugin):
    assert plugin.cut("red\nblue. white", (". ", "\n")) == "red"
    assert plugin.cut("red", ("\n",)) == "red" and plugin.cut("red", ()) == "red"


def test_what_a_task_shows(plugin, tmp_path):
    picture = Image.new("RGB", (4, 4))
    shown = ["a.PNG", picture, "clip.mp4", {"type": "video", "url": "b.webm"}, {"type": "image", "url": picture}]
    prompt = plugin.make_prompt("What?", shown)
    assert [kind for kind, _ in prompt.media] == ["image", "image", "video", "video", "image"]
    parts = prompt.question.turns[0]["content"]
    assert "".join(part.get("text", f"<{part['type']}>") for part in parts) == (
        "<image>\n<image>\n<video>\n<video>\n<image>\nWhat?"
    )
    smuggled = plugin.make_prompt("What is <image>?", []).question.turns[0]["content"]
    assert smuggled == [{"type": "text", "text": "What is <image>?"}]
    for sound in ({"array": [0.0], "sampling_rate": 16000}, {"type": "audio", "url": "a.wav"}, 7):
        with pytest.raises(ValueError, match="pictures .* and video files can be shown"):
            plugin.make_prompt("What?", [sound])


def test_arguments_of_the_model(plugin, checkpoint, tmp_path):
    with pytest.raises(ValueError, match="--batch_size must be a positive number, got 'auto'"):
        plugin.Kanjian(str(checkpoint), batch_size="auto", device="cpu")
    (tmp_path / "system.txt").write_text("Be kind.\n")
    assert plugin.Kanjian(str(checkpoint), device="cpu", system=str(tmp_path / "system.txt")).system == "Be kind."


def test_registration(monkeypatch):
    """The model is in the registry, and the package `evaluate` is found before the script of that name."""
    manifests = []
    registry = SimpleNamespace(register_manifest=lambda manifest, overwrite: manifests.append(manifest))
    models = module("lmms_eval.models", MODEL_REGISTRY_V2=registry)
    monkeypatch.setitem(sys.modules, "lmms_eval", module("lmms_eval", models=models))
    monkeypatch.setitem(sys.modules, "lmms_eval.models", models)
    versioned = module("lmms_eval.models.registry_v2", ModelManifest=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "lmms_eval.models.registry_v2", versioned)
    monkeypatch.setattr(sys, "path", ["", str(run_lmms_eval.PROJECT), *sys.path])
    monkeypatch.chdir(run_lmms_eval.PROJECT)
    run_lmms_eval.register()
    assert manifests[0].model_id == "kanjian"
    assert manifests[0].simple_class_path == "evaluation.lmms_eval_model.Kanjian"
    assert "" not in sys.path and sys.path.index(str(run_lmms_eval.PROJECT)) == len(sys.path) - 1


def test_without_lmms_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ValueError, match="lmms-eval can't be imported .* see requirements-lmms-eval.txt"):
        run_lmms_eval.register()
