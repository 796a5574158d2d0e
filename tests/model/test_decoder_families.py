"""The patch on every family of decoders: same powers, same checkpoints."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    GPTNeoXConfig,
    GraniteConfig,
    OPTConfig,
    StableLmConfig,
)

from build import build_model
from config import EncoderConfig, LoraConfig, ModelConfig, ProjectorConfig
from dataset.template import encode_prompt, encode_record
from model import MultiModalModel
from model.decoder import Head, load_decoder
from model.lora import add_lora
from tests.conftest import make_encoder
from tests.model.families import FAMILIES, SHAPE, TOKENS, byte_tokenizer, make_decoder

NEW = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module", params=FAMILIES)
def folders(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    make_encoder(folder / "encoder")
    return make_decoder(request.param, folder / "decoder"), folder / "encoder"


def settings(folders, **changes) -> ModelConfig:
    return ModelConfig(
        decoder=str(folders[0]),
        encoder=EncoderConfig(kind="clip", path=str(folders[1])),
        projector=ProjectorConfig(init_std=0.3),
        lora=LoraConfig(r=4, alpha=8, dropout=0.0),
        **changes,
    )


def batch(model, count: int = 3) -> dict:
    """Two images in a row of their own text, text alone, one image; padded on the right."""
    contents = ["<image>Is it <image>?", "Say a word.", "<image>\nred"][:count]
    images = [content.count("<image>") for content in contents]
    samples = [
        encode_record(
            {"id": "", "images": ["x"] * number, "videos": [], "messages": [
                {"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]},
            model.tokenizer, model.media.num_features,
        )
        for content, number in zip(contents, images, strict=True)
    ]  # fmt: skip
    length = max(len(sample["input_ids"]) for sample in samples)
    fill = {"input_ids": model.tokenizer.pad_token_id, "labels": -100}
    rows = {name: [s[name] + [value] * (length - len(s[name])) for s in samples] for name, value in fill.items()}
    mask = [[1] * len(s["input_ids"]) + [0] * (length - len(s["input_ids"])) for s in samples]
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.tensor(rows["input_ids"]),
        "labels": torch.tensor(rows["labels"]),
        "attention_mask": torch.tensor(mask),
        "view_counts": torch.tensor(images),
        "pixel_values": torch.randn(sum(images), 3, *model.encoder.image_size, generator=generator),
    }


def logits(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        found = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    return found[inputs["attention_mask"].bool()]


def test_injected_logits_and_loss_equal_those_of_embeddings(folders):
    model = build_model(settings(folders)).eval()
    inputs = batch(model)
    plain = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32).eval()
    plain.resize_token_embeddings(model.placeholder_id + 1, mean_resizing=False)
    plain.load_state_dict(load_rows(model, plain))
    with torch.no_grad():
        embeds = plain.get_input_embeddings()(inputs["input_ids"])
        features = model.encode_images(inputs["pixel_values"])
        embeds[inputs["input_ids"] == model.placeholder_id] = features
        expected = plain(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], labels=inputs["labels"])
        loss = model(**inputs).loss
    torch.testing.assert_close(logits(model, inputs), expected.logits[inputs["attention_mask"].bool()])
    torch.testing.assert_close(loss, expected.loss)


def load_rows(model, plain) -> dict:
    """Weights of the plain model, with the rows that ours has added."""
    state = plain.state_dict()
    for ours, theirs in (
        (model.language_model.get_input_embeddings(), plain.get_input_embeddings()),
        (model.language_model.get_output_embeddings(), plain.get_output_embeddings()),
    ):
        for name, parameter in theirs.named_parameters():
            for key, value in state.items():
                if value.data_ptr() == parameter.data_ptr():
                    state[key] = ours.get_parameter(name).detach()
    return state


def test_generation_with_and_without_cache_and_in_a_batch(folders):
    model = build_model(settings(folders)).eval()
    prompts = [
        encode_prompt([{"role": "user", "content": text}], model.tokenizer, model.media.num_features)
        for text in ("<image>Is it <image>, do you think?", "Say a word.", "<image>red")
    ]
    pixels = torch.randn(3, 3, *model.encoder.image_size, generator=torch.Generator().manual_seed(1))
    together = model.generate(prompts, pixel_values=pixels, view_counts=[2, 0, 1], **NEW)
    uncached = model.generate(prompts, pixel_values=pixels, use_cache=False, **NEW)
    assert together.tolist() == uncached.tolist()
    alone = [(prompts[0], pixels[:2]), (prompts[1], None), (prompts[2], pixels[2:])]
    for row, (prompt, own) in zip(together.tolist(), alone, strict=True):
        assert model.generate([prompt], pixel_values=own, **NEW)[0].tolist() == row


def test_a_left_padded_row_equals_the_row_alone(folders):
    model = build_model(settings(folders)).eval()
    inputs = batch(model, count=1)
    shifted = {
        "input_ids": torch.nn.functional.pad(inputs["input_ids"], (5, 0), value=model.tokenizer.pad_token_id),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (5, 0)),
        "pixel_values": inputs["pixel_values"],
    }
    torch.testing.assert_close(logits(model, shifted), logits(model, inputs), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tune", ["projector", "lora", "decoder", "all"])
def test_train_save_load_merge(folders, tmp_path, tune):
    model = build_model(settings(folders, tune=tune)).train()
    inputs = batch(model)
    before = logits(model.eval(), inputs)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model.train()(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = logits(model.eval(), inputs)
    assert not torch.allclose(before, after, atol=1e-3)

    model.save_pretrained(tmp_path / "run")
    loaded = MultiModalModel.from_pretrained(tmp_path / "run")
    torch.testing.assert_close(logits(loaded, inputs), after, rtol=0, atol=0)
    torch.testing.assert_close(logits(loaded.merge(), inputs), after, atol=1e-4, rtol=1e-4)
    # Training goes on from it, too: in a model built anew, as when a run is continued.
    again = build_model(settings(folders, tune=tune, checkpoint=str(tmp_path / "run"))).eval()
    torch.testing.assert_close(logits(again, inputs), after, rtol=0, atol=0)
    again.save_pretrained(tmp_path / "again")
    loaded = MultiModalModel.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(loaded, inputs), after, rtol=0, atol=0)


@pytest.mark.parametrize("first", ["decoder", "all"])
def test_lora_on_a_decoder_that_was_trained_as_a_whole(tmp_path, first):
    make_encoder(tmp_path / "encoder")
    folders = (make_decoder("llama", tmp_path / "decoder"), tmp_path / "encoder")
    model = build_model(settings(folders, tune=first))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "whole")
    inputs = batch(model.eval())
    expected = logits(model, inputs)

    start = {"tune": "lora", "checkpoint": str(tmp_path / "whole")}
    with pytest.raises(ValueError, match=f"start from it with model.decoder={tmp_path}/whole/trained_decoder"):
        build_model(settings(folders, **start))
    lora = build_model(settings((tmp_path / "whole" / "trained_decoder", folders[1]), **start)).eval()
    torch.testing.assert_close(logits(lora, inputs), expected, rtol=0, atol=0)
    for name, parameter in lora.decoder.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    lora.save_pretrained(tmp_path / "lora")
    assert (tmp_path / "lora" / "encoder.safetensors").exists() == (first == "all")
    assert not (tmp_path / "lora" / "trained_decoder").exists()
    loaded = MultiModalModel.from_pretrained(tmp_path / "lora")
    torch.testing.assert_close(logits(loaded, inputs), logits(lora, inputs), rtol=0, atol=0)
    with pytest.raises(ValueError, match="LoRA layers have no place in the model; merge them .export.py") as error:
        build_model(settings(folders, tune="decoder", checkpoint=str(tmp_path / "lora")))
    assert "lora_A" not in str(error.value)


def test_rows_are_added_only_where_none_is_spare(tmp_path):
    make_encoder(tmp_path / "encoder")
    for spare, added in ((0, 1), (1, 0), (5, 0)):
        folder = make_decoder("llama", tmp_path / f"decoder{spare}", spare_rows=spare)
        model = build_model(settings((folder, tmp_path / "encoder")))
        rows = model.language_model.get_input_embeddings().weight
        assert (model.placeholder_id, len(rows), model.added_rows) == (TOKENS, TOKENS + max(spare, 1), added)
        model.save_pretrained(tmp_path / "run")
        assert (tmp_path / "run" / "added_rows.safetensors").exists() == bool(added)


def test_tokens_behind_the_rows_get_rows_as_well(tmp_path):
    make_encoder(tmp_path / "encoder")
    folder = make_decoder("gpt2", tmp_path / "decoder", "<image>")
    tokenizer = byte_tokenizer("<image>")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    model = build_model(settings((folder, tmp_path / "encoder")))
    assert model.tokenizer.pad_token_id == TOKENS + 1 and model.added_rows == 1
    assert model(**batch(model)).loss > 0


def test_an_existing_placeholder_token_is_taken(tmp_path):
    make_encoder(tmp_path / "encoder")
    for token in ("<image>", "<|image_pad|>"):
        folder = make_decoder("llama", tmp_path / token.strip("<|>"), "<|im_start|>", "<|im_end|>", token)
        model = build_model(settings((folder, tmp_path / "encoder")))
        assert model.placeholder_id == TOKENS + 2 and model.added_rows == 0 and model.tokenizer.template == "chatml"


def test_lora_reaches_all_linear_layers_of_the_blocks_but_not_what_routes(tmp_path):
    expected = {
        "gpt2": {"c_attn", "c_proj", "c_fc"},
        "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
        "mixtral": {"q_proj", "k_proj", "v_proj", "o_proj"},
        "qwen2_moe": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    }
    for family, names in expected.items():
        decoder = add_lora(load_decoder(make_decoder(family, tmp_path / family), "float32"), r=2, alpha=4)
        adapters = [name.split(".lora_A")[0] for name, _ in decoder.named_parameters() if ".lora_A" in name]
        assert {name.rpartition(".")[2] for name in adapters} == names


def test_experts_are_reached_by_the_name_of_their_parameter(tmp_path):
    folder = make_decoder("mixtral", tmp_path / "decoder")
    decoder = add_lora(load_decoder(folder, "float32"), r=2, alpha=4, targets=["q_proj", "experts.down_proj"])
    trained = {name for name, parameter in decoder.named_parameters() if parameter.requires_grad}
    assert any("q_proj" in name for name in trained) and any("experts" in name for name in trained)
    with torch.no_grad():
        make_encoder(tmp_path / "encoder")
        settled = settings((folder, tmp_path / "encoder"))
        settled.lora.targets = ["q_proj", "experts.down_proj", "experts.gate_up_proj"]
        model = build_model(settled).eval()
        for name, parameter in model.decoder.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.1)
        inputs = batch(model)
        whole = logits(model, inputs)
        model.save_pretrained(tmp_path / "run")
        loaded = MultiModalModel.from_pretrained(tmp_path / "run")
        torch.testing.assert_close(logits(loaded, inputs), whole, rtol=0, atol=0)
        torch.testing.assert_close(logits(loaded.merge(), inputs), whole, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="knows no dropout"):
        add_lora(load_decoder(folder, "float32"), r=2, alpha=4, dropout=0.1, targets=["experts.down_proj"])
    with pytest.raises(ValueError, match="match no linear layer .* experts.down_proj"):
        add_lora(load_decoder(folder, "float32"), r=2, alpha=4, targets=["w1"])


@pytest.mark.parametrize("config", [
    CohereConfig(**SHAPE, logit_scale=0.3), GraniteConfig(**SHAPE, logits_scaling=3.0),
    GPTNeoXConfig(**{**SHAPE, "num_key_value_heads": 4}), StableLmConfig(**SHAPE),
], ids=lambda config: config.model_type)  # fmt: skip
def test_losses_of_decoders_that_scale_their_logits(config, tmp_path):
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.save_pretrained(tmp_path)
    decoder = load_decoder(tmp_path, "float32")
    ids = torch.randint(3, TOKENS, (2, 12))
    with torch.no_grad():
        hidden = decoder.base_model(ids).last_hidden_state
        torch.testing.assert_close(Head(decoder)(hidden), plain.eval()(ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("config", [
    OPTConfig(vocab_size=TOKENS, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=4,
              word_embed_proj_dim=32),
    BloomConfig(vocab_size=TOKENS, hidden_size=32, n_layer=1, n_head=4),
], ids=lambda config: config.model_type)  # fmt: skip
def test_a_decoder_that_features_cant_reach_is_refused(config, tmp_path):
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="hands no further arguments to the model behind it"):
        load_decoder(tmp_path, "float32")
