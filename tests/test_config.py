"""config.py: layers, overrides, and what each mistake says."""

from dataclasses import replace

import pytest

import config
from config import Config, ConfigError, config_differences, leaves, load_config, save_config

REQUIRED = ["decoder=d", "encoder.path=e", "data.train=r.parquet", "output_dir=o"]


def load(*arguments: str) -> Config:
    return load_config([*REQUIRED, *arguments])


def error(*arguments: str) -> str:
    with pytest.raises(ConfigError) as raised:
        load(*arguments)
    return str(raised.value)


@pytest.mark.parametrize(
    "arguments",
    [["train.lora_lr=1e-3"], ["lora_lr=1e-3"], ["--lora_lr", "1e-3"], ["--lora_lr=1e-3"], ["--train.lora_lr", "0.001"]],
)
def test_spellings_of_an_override_mean_the_same(arguments):
    assert load(*arguments) == replace(load(), train=replace(load().train, lora_lr=0.001))


@pytest.mark.parametrize("text, value", [("False", False), ("false", False), ("True", True), ("true", True)])
def test_booleans_are_what_they_say(text, value):
    assert load("--bf16", text).train.bf16 is value
    assert load(f"bf16={text}").train.bf16 is value


def test_later_arguments_win():
    assert load("seed=1", "--seed", "2").train.seed == 2


def test_text_is_kept_to_the_letter():
    assert load("--system", "no").data.system == "no"
    assert load("system=007").data.system == "007"
    assert load("system=a=b: c").data.system == "a=b: c"
    assert load("system=你是一位图像理解助手。").data.system == "你是一位图像理解助手。"
    assert load("system=x", "system=null").data.system is None
    assert load("decoder=123").model.decoder == "123"


def test_lists_take_one_value_or_several():
    assert load().data.train == ["r.parquet"]
    assert load("data.train=[a,b]").data.train == ["a", "b"]
    assert load("report_to=tensorboard").train.report_to == ["tensorboard"]
    assert load("targets=[]").model.lora.targets == []


def test_unknown_key_suggests_the_nearest():
    assert "unknown key 'lora_rl' (did you mean train.lora_lr?)" in error("lora_rl=1")
    assert "did you mean train.gradient_checkpointing?" in error("--train.gradient_checkpoint", "true")
    assert error("zzzzzz=1").endswith("unknown key 'zzzzzz'")


def test_ambiguous_key_lists_the_candidates():
    assert "'kind' is ambiguous: model.encoder.kind, model.projector.kind" in error("kind=clip")
    assert load("encoder.kind=clip").model.encoder.kind == "clip"


@pytest.mark.parametrize(
    "argument, message",
    [
        ("lora.r=many", "model.lora.r expects int, got 'many'"),
        ("lora.r=1.5", "model.lora.r expects int, got 1.5"),
        ("lora_lr=high", "train.lora_lr expects float, got 'high'"),
        ("bf16=perhaps", "train.bf16 expects true or false, got 'perhaps'"),
        ("encoder.kind=resnet", "kind expects one of clip, siglip, vit, open_clip, timm or null, got 'resnet'"),
        ("seed=null", "train.seed expects int, got None"),
        ("save_total_limit=x", "train.save_total_limit expects int or null, got 'x'"),
        ("data.train={a: 1}", "data.train expects a list of str"),
        ("gradient_accumulation_steps=0", "train.gradient_accumulation_steps must be at least 1, got 0"),
        ("lora.r=-1", "model.lora.r is a rank, at least 1, got -1; model.tune=projector has no adapter"),
    ],
)
def test_wrong_type_names_key_and_expectation(argument, message):
    assert message in error(argument)


def test_malformed_arguments():
    assert "neither key=value nor --key value" in error("lora_lr")
    assert "--seed needs a value" in error("--seed")
    assert "--seed needs a value" in error("--seed", "--bf16", "true")
    assert "--config needs a value" in error("--config")
    assert "can't parse" in error("lora.r=[1")


def test_a_truth_needs_no_value():
    loaded = load("--bf16", "seed=3", "--gradient_checkpointing")
    assert loaded.train.bf16 and loaded.train.gradient_checkpointing and loaded.train.seed == 3


def test_names_of_other_scripts():
    arguments = ["--train_file", "a.json", "--validation_file", "b.csv", "--data_dir", "d", "--output_dir", "o"]
    arguments += ["--pretrained_text_model", "gpt2", "--pretrained_vision_model", "vit", "--learning_rate", "5e-5"]
    loaded = load_config(arguments)
    assert (loaded.data.train, loaded.data.validation, loaded.data.image_root) == (["a.json"], ["b.csv"], "d")
    assert (loaded.model.decoder, loaded.model.encoder.path, loaded.model.encoder.kind) == ("gpt2", "vit", None)
    assert loaded.train.lora_lr == loaded.train.decoder_lr == 5e-5 != loaded.train.projector_lr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune=decoder", "model.dtype=bfloat16"], "trains these weights: model.dtype must be float32, got bfloat16"),
        (["tune=all", "encoder.dtype=float16"], "model.encoder.dtype must be float32, got float16"),
        (["tune=decoder", "quantization=nf4"], "model.tune=decoder trains the decoder, which can't be quantized (nf4)"),
        (["tune=all", "feature_cache=f"], "model.tune=all trains the encoder, whose features then change with every"),
        (["--bf16", "--fp16"], "train.bf16 and train.fp16 exclude each other"),
    ],
)
def test_values_that_exclude_each_other(arguments, message):
    assert message in error(*arguments)


def test_required_keys_are_named():
    with pytest.raises(ConfigError, match="no value for model.decoder, model.encoder.path, data.train, train.output_d"):
        load_config([])


def test_yaml_extends_another_in_one_line(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.yaml").write_text("train: {seed: 1, lora_lr: 1e-3}\ndata: {train: one.parquet}\n")
    (tmp_path / "sub/b.yaml").write_text("base: ../a.yaml\ntrain:\n  seed: 2\n")
    (tmp_path / "sub/c.yaml").write_text("base: b.yaml\nmodel: {lora: {r: 4}}\n")
    loaded = load_config(["--config", str(tmp_path / "sub/c.yaml"), *REQUIRED[:2], "output_dir=o", "max_steps=5"])
    assert (loaded.train.seed, loaded.train.lora_lr, loaded.model.lora.r, loaded.train.max_steps) == (2, 1e-3, 4, 5)
    assert loaded.data.train == ["one.parquet"]


def test_mistakes_in_yaml_name_the_file(tmp_path):
    def yaml_error(text: str) -> str:
        (tmp_path / "x.yaml").write_text(text)
        return error("--config", str(tmp_path / "x.yaml"))

    assert "x.yaml: unknown key 'train.sed' (did you mean train.seed?)" in yaml_error("train: {sed: 1}")
    assert "x.yaml: unknown key 'lora' (did you mean" in yaml_error("lora: {r: 1}")
    assert "x.yaml: train.seed expects int, got 'a'" in yaml_error("train: {seed: a}")
    assert "x.yaml: train is a group of keys, not a value; got 3" in yaml_error("train: 3")
    assert "not a YAML mapping" in yaml_error("train: [")
    assert "expected a mapping" in yaml_error("- 1")
    assert "form a circle" in yaml_error("base: x.yaml")
    assert "y.yaml: no such configuration file" in yaml_error("base: y.yaml")


def test_saved_config_loads_to_the_same(tmp_path):
    original = load("lora_lr=1e-5", "system=a: b", "report_to=[wandb]", "save_total_limit=null")
    save_config(original, tmp_path / "config.yaml")
    assert config.read_config(tmp_path / "config.yaml") == original
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml"]


def test_differences_leave_out_what_does_not_touch_the_weights(tmp_path):
    save_config(load(), tmp_path / "config.yaml")
    assert config_differences(load("num_workers=3", "output_dir=p", "overwrite=true"), tmp_path / "config.yaml") == []
    assert config_differences(load("seed=3"), tmp_path / "config.yaml") == ["train.seed: 42 -> 3"]


def test_every_key_has_a_comment_and_help_prints_it(capsys):
    comments = config.comments()
    assert list(comments) == list(leaves())
    assert all(comments.values())
    with pytest.raises(SystemExit) as exit_:
        load_config(["--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert "model.lora.r = 128\n    rank" in printed
    assert "model.decoder = (required)" in printed


def test_free_and_bounded_keys_exist():
    assert config.FREE_KEYS <= set(leaves())
    assert set(config.AT_LEAST_ONE) <= set(leaves())


def test_shipped_configs_load(request):
    files = sorted((request.config.rootpath / "configs").glob("*.yaml"))
    assert files
    for file in files:
        assert config.read_config(file).train.output_dir == f"outputs/{file.stem}"


def test_a_fresh_projector_learns_faster_than_lora(request):
    files = set((request.config.rootpath / "configs").glob("*.yaml"))
    files = {file for file in files if config.read_config(file).model.tune == "lora"}
    files -= {request.config.rootpath / "configs/llava_qwen2.yaml"}  # goes on from a projector of a first stage
    assert len(files) >= 5
    for file in files:
        assert config.read_config(file).train.projector_lr > config.read_config(file).train.lora_lr, file


def test_experiments_differ_in_the_encoder_alone(request):
    folder = request.config.rootpath / "configs"
    siglip, clip = (config.read_config(folder / f"qwen7b_{name}.yaml") for name in ("siglip", "clip"))
    assert clip.model.encoder.path == "openai/clip-vit-large-patch14"
    assert replace(clip.model, encoder=siglip.model.encoder) == siglip.model
    assert replace(clip.train, output_dir=siglip.train.output_dir) == siglip.train
    assert clip.data == siglip.data
