"""The vision-language model: an encoder, a projector, and a decoder whose forward takes features."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Self

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from model.checkpoint import load_trained, read_spec, resolve_paths, save_trained
from model.decoder import Head, Quantization, add_rows, load_decoder, quantization_of
from model.legacy import is_legacy, legacy_spec
from model.lora import language_model, wrap_with_lora
from model.loss import supervised_cross_entropy
from model.media_inputs import MediaInput, expand_prompts
from model.packing import check_packed, packed_arguments
from model.projector import Projector, build_projector
from model.tokenizer import ChatTokenizer, load_tokenizer
from qwen import QWenTokenizer
from visual import build_encoder
from visual.grid import pool, pooled_grid
from visual.media import Media

# In place of the decoder's own settings of the same names, such as Qwen-7B-Chat's sampling with top_p 0.8.
GREEDY = {
    "do_sample": False, "num_beams": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0,
}  # fmt: skip


class MultiModalModel(nn.Module):
    """Pictures and clips become features of the decoder's width, which stand where the placeholder tokens stand.

    A view is what goes through the encoder: an image, a tile of one, or a frame of a clip (`visual.media`). What is
    trained is the projector and the LoRA layers of the decoder, both float32; encoder and decoder weights are frozen
    unless `tune` says otherwise. Works with `transformers.Trainer`, whose introspection reads the class attributes
    below.

    Args:
        encoder: module of `visual/`: `pixel_values [N, 3, H, W] -> [N, n, D]`.
        projector: module of `model/projector.py`: `[N, n, D] -> [N, n, H]`.
        decoder: of `model.decoder.load_decoder`, plain or with LoRA layers (`model.lora.add_lora`).
        placeholder_id: token that one feature vector replaces.
        tokenizer: gives `generate` its stop tokens and is saved with the checkpoint.
        system: text of the system turn that the model is trained with; saved with the checkpoint, for prompts.
        media: how images and clips become views; by default an image is one view.
        added_rows: rows that the decoder's embeddings have beyond those of its files (`model.decoder.add_rows`).

    Attributes:
        holds: "decoder" and "encoder" where its weights are not those of its files, but were trained; a checkpoint
            then holds them.
    """

    accepts_loss_kwargs = True  # Trainer passes num_items_in_batch and does not divide the loss again
    loss_type = "ForCausalLM"  # Trainer counts labels[:, 1:]: the first position predicts nothing
    supports_gradient_checkpointing = True
    main_input_name = "input_ids"

    def __init__(
        self,
        encoder: nn.Module,
        projector: Projector,
        decoder: nn.Module,
        placeholder_id: int,
        tokenizer: QWenTokenizer | ChatTokenizer | None = None,
        system: str | None = None,
        media: Media | None = None,
        added_rows: int = 0,
    ):
        super().__init__()
        _check_widths(encoder, projector, language_model(decoder))
        self.encoder = encoder.requires_grad_(False)
        self.projector = projector
        self.decoder = decoder
        self.placeholder_id = placeholder_id
        self.tokenizer = tokenizer
        self.system = system
        self.media = media or Media(encoder, pixel_shuffle=projector.spec["pixel_shuffle"])
        self.added_rows = added_rows
        self.holds: set[str] = set()
        self.language_model.config.placeholder_id = placeholder_id
        _freeze_base(decoder)

    @property
    def language_model(self) -> PreTrainedModel:
        """The decoder without peft's wrapper; its LoRA layers act nonetheless."""
        return language_model(self.decoder)

    @property
    def device(self) -> torch.device:
        return self.language_model.get_input_embeddings().weight.device

    @property
    def num_positions(self) -> int | None:
        """The longest text of a decoder with learned position vectors, such as GPT-2; None where nothing limits it."""
        words = len(self.language_model.get_input_embeddings().weight)
        tables = [m for m in self.language_model.base_model.modules() if isinstance(m, nn.Embedding)]
        has_positions = any(len(table.weight) != words for table in tables)
        return self.language_model.config.max_position_embeddings if has_positions else None

    def tune(self, decoder: bool, encoder: bool) -> None:
        """Makes the whole decoder, or the encoder, trainable; their weights must be float32."""
        for name, module, wanted in (("decoder", self.decoder, decoder), ("encoder", self.encoder, encoder)):
            if wanted:
                module.unfreeze() if name == "encoder" else module.requires_grad_(True)
                self.holds.add(name)

    def encode_images(self, pixel_values: Tensor, view_features: Tensor | Sequence[int] | None = None) -> Tensor:
        """Features `[M, H]` of views `[N, 3, H, W]`, one view after the other, in the decoder's dtype.

        `view_features` `[N]` says how many each view has: an image `media.num_features`, a frame of a clip
        `media.frame_features`; by default all are images. Gradients reach the projector, and the encoder if it is
        trained.

        Raises:
            ValueError: an entry of `view_features` is neither of the two.
        """
        return self.project(self.encoder(pixel_values), view_features)

    def project(self, vision: Tensor, view_features: Tensor | Sequence[int] | None = None) -> Tensor:
        """Features `[M, H]` of what the encoder made of views, `[N, n, D]`; otherwise as `encode_images`."""
        whole = self.media.num_features
        counts = [whole] * len(vision) if view_features is None else [int(count) for count in view_features]
        if len(counts) != len(vision):
            raise ValueError(f"view_features has {len(counts)} entries for {len(vision)} views")
        if all(count == whole for count in counts):
            return self._project(vision).flatten(0, 1)
        if unknown := set(counts) - {whole, self.media.frame_features}:
            raise ValueError(
                f"view_features holds {sorted(unknown)}, but an image has {whole} features and a frame of a clip "
                f"{self.media.frame_features}"
            )
        is_frame = torch.tensor([count != whole for count in counts], device=vision.device)
        grid, pooling = self.encoder.grid, self.media.spec["frame_pooling"]
        frames = iter(self._project(pool(vision[is_frame], grid, pooling), pooled_grid(grid, pooling)))
        images = iter(self._project(vision[~is_frame]))
        return torch.cat([next(frames if count != whole else images) for count in counts])

    def _project(self, vision: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """`[N, n, D]` -> `[N, n, H]`, or n / r^2 with pixel shuffle, in the decoder's dtype."""
        features = self.projector(vision, grid or self.encoder.grid)
        return features.to(self.language_model.get_input_embeddings().weight.dtype)

    def _features(
        self,
        pixel_values: Tensor | None,
        features: Tensor | None,
        view_features: Tensor | Sequence[int] | None = None,
        vision: Tensor | None = None,
    ) -> Tensor | None:
        if sum(given is not None for given in (pixel_values, vision, features)) > 1:
            raise ValueError("give one of pixel_values, vision and features, not several")
        if pixel_values is not None:
            return self.encode_images(pixel_values, view_features)
        if vision is not None:
            if self.encoder.trainable:
                raise ValueError("the encoder is trained: give pixel_values; vision would stay what it was before")
            return self.project(vision, view_features)
        if features is None and self.training:
            # A batch without pictures: no feature at all, yet all that is trained takes part in the graph and gets zero
            # gradients, which distributed training and a loss that depends on nothing else both need.
            if self.encoder.trainable:
                return self.encode_images(torch.zeros(0, 3, *self.encoder.image_size, device=self.device))
            vision = torch.zeros(0, self.encoder.num_features, self.encoder.width, device=self.device)
            return self._project(vision).flatten(0, 1)
        return features

    def _feature_counts(self, view_counts, view_features) -> list[int] | None:
        """Features per row, by which errors about placeholders name the row."""
        if view_counts is None:
            return None
        counts = [int(count) for count in view_counts]
        if view_features is None:
            return [count * self.media.num_features for count in counts]
        each = iter([int(count) for count in view_features])
        return [sum(islice(each, count)) for count in counts]

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        view_counts: Tensor | Sequence[int] | None = None,
        view_features: Tensor | Sequence[int] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        position_ids: Tensor | None = None,
        vision: Tensor | None = None,
        sample_lengths: Sequence[int] | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits of a batch, or with labels its loss.

        Args:
            input_ids: `[B, T]`, each view expanded to as many placeholders as it has features.
            pixel_values: `[N, 3, H, W]`, views in the order of their placeholders (row by row); None without any.
            features: `[M, H]` of `encode_images`, instead of `pixel_values`.
            attention_mask: `[B, T]`, 0 at padding.
            labels: `[B, T]` in the coordinates of `input_ids` (the shift happens inside), -100 where unsupervised.
            view_counts: views per row `[B]`; an error about placeholders can then name the row at fault.
            view_features: features per view `[N]`, see `encode_images`.
            num_items_in_batch: supervised tokens of the global batch, the divisor of the loss; own count by default.
            position_ids: `[B, T]`.
            vision: `[N, n, D]`, what the encoder made of the views, instead of `pixel_values`; it does not run then.
            sample_lengths: of a packed row, B = 1: tokens of each sample in it (`model.packing`). There is then no
                `attention_mask`, and `view_counts` are those of the samples.
            kwargs: further arguments of the decoder, such as `past_key_values` or `logits_to_keep`.

        Returns:
            `loss` (float32 scalar) and no logits when labels are given; else `logits [B, T, V]`.

        Raises:
            ValueError: the number of placeholders is not that of the features, `vision` is given to a model whose
                encoder is trained, or `sample_lengths` don't add up to T, or stand beside a mask or positions.
        """
        feature_counts = self._feature_counts(view_counts, view_features)
        if sample_lengths is not None:
            if not (attention_mask is position_ids is None):
                raise ValueError("sample_lengths say where samples stand: leave out attention_mask and position_ids")
            check_packed(input_ids, sample_lengths, feature_counts, self.placeholder_id)
            kwargs |= packed_arguments(self.language_model, list(sample_lengths), input_ids.device)
            kwargs["use_cache"] = False  # transformers tells packed samples apart only without a cache
            position_ids = kwargs.pop("position_ids")
            feature_counts = None if feature_counts is None else [sum(feature_counts)]
        inputs = dict(
            features=self._features(pixel_values, features, view_features, vision),
            feature_counts=feature_counts,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **kwargs,
        )
        if labels is None:
            return self.language_model(input_ids, **inputs)
        inputs["use_cache"] = False
        hidden = self.language_model.base_model(input_ids, **inputs).last_hidden_state  # [B, T, H]
        loss = supervised_cross_entropy(hidden, Head(self.language_model), labels, num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | Sequence[Sequence[int]],
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        features: Tensor | None = None,
        view_counts: Tensor | Sequence[int] | None = None,
        view_features: Tensor | Sequence[int] | None = None,
        image: MediaInput = None,
        video: MediaInput = None,
        **kwargs,
    ) -> Tensor:
        """Continues prompts; returns the new ids alone, `[B, <= max_new_tokens]`, rows padded on the right.

        Args:
            input_ids: `[B, T]` padded on the left, or a list of id lists, which is padded here. Prompts may hold
                several turns and several pictures, or none.
            attention_mask: `[B, T]`, 0 at padding; all ones by default.
            pixel_values: `[N, 3, H, W]`, views in the order of their placeholders (row by row).
            features: `[M, H]` of `encode_images`, instead of `pixel_values`.
            view_counts: views per row `[B]`; an error about placeholders can then name the row at fault.
            view_features: features per view `[N]`, see `encode_images`.
            image, video: instead of all these, pictures and clips themselves, see `model.media_inputs`. Prompts then
                have one placeholder for each, or none.
            kwargs: arguments of transformers' `generate`: `max_new_tokens`, `num_beams`, `do_sample`, `streamer`...
                Generation stops at the tokens that end an answer unless `eos_token_id` says otherwise, and where a
                decoder with position vectors has no more of them.

        Raises:
            ValueError: no prompt, rows padded on the right, one longer than the decoder has positions, or the number
                of placeholders is not that of the features.
        """
        defaults = self._stop_tokens()
        if image is not None or video is not None:
            if pixel_values is not None or features is not None:
                raise ValueError("give image and video, or pixel_values, or features, not several of them")
            input_ids, views = expand_prompts(self, input_ids, attention_mask, image, video)
            attention_mask, pixel_values = None, views.pixel_values.to(self.device)
            view_features = views.features
        if not isinstance(input_ids, Tensor):
            input_ids, attention_mask = _pad_left(input_ids, defaults.get("pad_token_id", 0), self.device)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if not attention_mask[:, -1].all():
            raise ValueError("prompts must be padded on the left: a row ends in padding")
        if (positions := self.num_positions) is not None:
            longest = int(attention_mask.sum(-1).max())
            if longest >= positions:
                raise ValueError(
                    f"a prompt has {longest} tokens, but the decoder has vectors for {positions} positions"
                )
            if "max_new_tokens" in kwargs:
                kwargs["max_new_tokens"] = min(kwargs["max_new_tokens"], positions - longest)
        sequences = self.language_model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            features=self._features(pixel_values, features, view_features),
            feature_counts=self._feature_counts(view_counts, view_features),
            **{**defaults, **kwargs},
        )
        if not isinstance(sequences, Tensor):  # return_dict_in_generate
            sequences.sequences = sequences.sequences[:, input_ids.shape[1] :]
            return sequences
        return sequences[:, input_ids.shape[1] :]

    def _stop_tokens(self) -> dict:
        """`eos_token_id` and `pad_token_id` of the tokenizer; without one the decoder's generation config decides."""
        if self.tokenizer is None:
            return {}
        return {
            "eos_token_id": self.tokenizer.stop_ids,
            "pad_token_id": self.tokenizer.pad_token_id,
        }

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, **kwargs) -> None:
        """Recomputes the decoder's layers in the backward pass (arguments as in transformers' `PreTrainedModel`)."""
        self.language_model.activation_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)

    def activation_checkpointing_disable(self) -> None:
        self.language_model.activation_checkpointing_disable()

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs) -> None:
        """Older name of `activation_checkpointing_enable`, still called by other libraries."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def merge(self) -> Self:
        """Adds the LoRA matrices into the decoder's weights and removes the adapter; logits stay as they are.

        The sum is made in float32 and rounded once to the dtype of the decoder. The decoder then no longer equals the
        weights on disk, so the model can be saved only after the decoder was:
        `model.language_model.save_pretrained(folder)`, and `load_decoder(folder)`; `export.py` does both.

        Raises:
            ValueError: the decoder is quantized, and the sum would be rounded to 4 or 8 bits; or LoRA changes one of
                two layers that share their matrix.
        """
        if not isinstance(self.decoder, PeftModel):
            return self
        decoder = self.language_model
        if decoder.config.tie_word_embeddings and any(
            isinstance(layer, LoraLayer) for layer in (decoder.get_input_embeddings(), decoder.get_output_embeddings())
        ):
            raise ValueError(
                "LoRA on the embedding or the head can't be merged: they are one matrix (tie_word_embeddings)"
            )
        if (quantization := quantization_of(self.language_model)) != "none":
            raise ValueError(f'LoRA is not merged into {quantization} weights; load the model with quantization="none"')
        for layer in self.decoder.modules():
            if isinstance(layer, LoraLayer):
                base = layer.get_base_layer()
                dtype = next(base.parameters()).dtype  # experts are several parameters of one module
                base.float()
                layer.merge()
                base.to(dtype)
        self.decoder = self.decoder.unload()
        self.decoder.config._name_or_path = ""
        _freeze_base(self.decoder)
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Saves what is trained, see `model.checkpoint.save_trained`."""
        save_trained(self, folder)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        decoder: str | Path | None = None,
        encoder: str | Path | None = None,
        dtype: torch.dtype | str | None = None,
        quantization: Quantization | None = None,
        device: torch.device | str | None = None,
        num_features: int | None = None,
        placeholder_id: int | None = None,
        **kwargs,
    ) -> Self:
        """Rebuilds a model from a checkpoint folder and the frozen weights that it names; in eval mode.

        Args:
            folder: what `save_pretrained` wrote, or an adapter folder of the first system (`model/legacy.py`).
            decoder, encoder: where the frozen weights lie now, instead of the recorded paths.
            dtype: of the decoder; the recorded one by default.
            quantization: of the decoder, see `load_decoder`; the recorded one by default.
            device: where the model goes; its decoder directly. None is the CPU.
            num_features, placeholder_id: for adapters of the first system alone, see `legacy_spec`.
            kwargs: further arguments of the decoder's `from_pretrained`, such as `attn_implementation`.

        Raises:
            FileNotFoundError: the folder is no complete checkpoint, or the frozen weights are not where it says.
            ValueError: names or shapes of weights differ from the model's (one error lists all of them), a file is
                damaged, or the checkpoint has a format that this code does not know.
        """
        if is_legacy(folder):
            spec = legacy_spec(folder, decoder, encoder, num_features, placeholder_id)
        elif num_features is None and placeholder_id is None:
            spec = resolve_paths(read_spec(folder), folder, decoder=decoder, encoder=encoder)
        else:
            raise ValueError(f"{folder} records num_features and placeholder_id itself; leave them out")
        base = load_decoder(
            spec["decoder"]["path"],
            dtype or spec["decoder"]["dtype"],
            quantization=quantization or spec["decoder"]["quantization"],
            device=device,
            **kwargs,
        )
        tokenizer = None
        if spec["tokenizer"]:
            place = spec["decoder"]["path"] if is_legacy(folder) else folder
            tokenizer = load_tokenizer(place, base.config.model_type, spec["template"])
        rows = add_rows(base, spec["decoder"]["rows"])
        encoder = build_encoder(**spec["encoder"], load_weights="encoder" not in spec["holds"])
        model = cls(
            encoder=encoder,
            projector=build_projector(**spec["projector"]),
            decoder=wrap_with_lora(base, LoraConfig.from_pretrained(str(folder))) if spec["adapter"] else base,
            placeholder_id=spec["placeholder_id"],
            tokenizer=tokenizer,
            system=spec["system"],
            media=Media(encoder, **spec["media"], pixel_shuffle=spec["projector"]["pixel_shuffle"]),
            added_rows=rows,
        )
        load_trained(model, folder, spec)
        return model.to(device).eval()


def _check_widths(encoder: nn.Module, projector: Projector, decoder: nn.Module) -> None:
    """Raises ValueError where the projector does not lead from the encoder to the decoder."""
    found = (projector.spec["in_width"], projector.spec["out_width"])
    if found != (encoder.width, decoder.config.hidden_size):
        raise ValueError(
            f"the projector maps vectors of width {found[0]} to {found[1]}, but the encoder "
            f"({encoder.spec.get('path')}) yields {encoder.width} and the decoder ({decoder.config._name_or_path}) "
            f"takes {decoder.config.hidden_size}"
        )


def _freeze_base(decoder: nn.Module) -> None:
    for name, parameter in decoder.named_parameters():
        if ".lora_" not in name:
            parameter.requires_grad_(False)


def _pad_left(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask `[B, T]` of rows of unequal length, padded on the left."""
    if not rows or not all(map(len, rows)):
        raise ValueError("no prompt to continue: input_ids is an empty list, or has an empty row")
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad_id, device=device)
    mask = torch.zeros_like(ids)
    for row, values in enumerate(rows):
        ids[row, length - len(values) :] = torch.tensor(values, device=device)
        mask[row, length - len(values) :] = 1
    return ids, mask
