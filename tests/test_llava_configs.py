"""configs/llava_*.yaml: what their comments promise can be written in one line."""

import pytest

from config import load_config

FLOATS = ("model.dtype=float32", "model.encoder.dtype=float32")


@pytest.mark.parametrize("tune,others", [("projector", ()), ("lora", ()), ("decoder", FLOATS[:1]), ("all", FLOATS)])
def test_modes_differ_by_tune(request, tune, others):
    file = request.config.rootpath / "configs" / "llava_qwen2.yaml"
    config = load_config(["--config", str(file), f"model.tune={tune}", *others])
    assert (config.model.tune, config.model.encoder.layer) == (tune, "penultimate")
    t = config.train
    assert (t.projector_lr, t.lora_lr, t.decoder_lr, t.encoder_lr) == (2e-5, 2e-4, 2e-5, 2e-6)


def test_stages_differ_in_what_learns(request):
    folder = request.config.rootpath / "configs"
    first, second = (load_config(["--config", str(folder / f"llava_qwen2{end}.yaml")]) for end in ("_stage1", ""))
    assert (first.model.tune, first.train.projector_lr) == ("projector", 1e-3)
    assert first.train.output_dir != second.train.output_dir
    first.model.tune, first.train = second.model.tune, second.train
    assert first == second
