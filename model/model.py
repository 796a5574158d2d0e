"""The vision-language model: a frozen encoder, a projector, and a decoder whose forward takes features."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from model.checkpoint import load_trained, read_spec, resolve_paths, save_trained
from model.decoder import Quantization, load_decoder, quantization_of
from model.legacy import is_legacy, legacy_spec
from model.lora import language_model, wrap_with_lora
from model.loss import supervised_cross_entropy
from model.projector import Projector, build_projector
from qwen import MultimodalQWenLMHeadModel, QWenTokenizer
from visual import build_encoder


class MultiModalModel(nn.Module):
    """Pictures become features of the decoder's width, which stand where the placeholder tokens stand.

    What is trained is the projector and the LoRA layers of the decoder, both float32; encoder and decoder weights are
    frozen. Works with `transformers.Trainer`, whose introspection reads the class attributes below.

    Args:
        encoder: module of `visual/`: `pixel_values [N, 3, H, W] -> [N, n, D]`.
        projector: module of `model/projector.py`: `[N, n, D] -> [N, n, H]`.
        decoder: `MultimodalQWenLMHeadModel`, plain or with LoRA layers (`model.lora.add_lora`).
        placeholder_id: token that one feature vector replaces.
        tokenizer: gives `generate` its stop tokens and is saved with the checkpoint.
        system: text of the system turn that the model is trained with; saved with the checkpoint, for prompts.
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
        tokenizer: QWenTokenizer | None = None,
        system: str | None = None,
    ):
        super().__init__()
        _check_widths(encoder, projector, language_model(decoder))
        self.encoder = encoder.requires_grad_(False)
        self.projector = projector
        self.decoder = decoder
        self.placeholder_id = placeholder_id
        self.tokenizer = tokenizer
        self.system = system
        self.language_model.config.placeholder_id = placeholder_id
        _freeze_base(decoder)

    @property
    def language_model(self) -> MultimodalQWenLMHeadModel:
        """The decoder without peft's wrapper; its LoRA layers act nonetheless."""
        return language_model(self.decoder)

    @property
    def device(self) -> torch.device:
        return self.language_model.get_input_embeddings().weight.device

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Features `[N * n, H]` of pictures `[N, 3, H, W]`, in the decoder's dtype; gradients reach the projector."""
        with torch.no_grad():
            vision = self.encoder(pixel_values)  # [N, n, D]
        return self._project(vision)

    def _project(self, vision: Tensor) -> Tensor:
        features = self.projector(vision).flatten(0, 1)  # [N, n, D] -> [N * n, H]
        return features.to(self.language_model.get_input_embeddings().weight.dtype)

    def _features(self, pixel_values: Tensor | None, features: Tensor | None) -> Tensor | None:
        if pixel_values is not None and features is not None:
            raise ValueError("give pixel_values or features, not both")
        if pixel_values is not None:
            return self.encode_images(pixel_values)
        if features is None and self.training:
            # A batch without pictures: no feature at all, yet the projector takes part in the graph and gets zero
            # gradients, which distributed training and a loss that depends on nothing else both need.
            return self._project(torch.zeros(0, self.encoder.num_features, self.encoder.width, device=self.device))
        return features

    def _feature_counts(self, image_counts: Tensor | Sequence[int] | None) -> list[int] | None:
        """Features per row, by which errors about placeholders name the row."""
        return None if image_counts is None else [int(count) * self.encoder.num_features for count in image_counts]

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        image_counts: Tensor | Sequence[int] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        position_ids: Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits of a batch, or with labels its loss.

        Args:
            input_ids: `[B, T]`, each picture expanded to as many placeholders as the encoder yields features.
            pixel_values: `[N, 3, H, W]`, pictures in the order of their placeholders (row by row); None without any.
            features: `[N * n, H]` of `encode_images`, instead of `pixel_values`.
            attention_mask: `[B, T]`, 0 at padding.
            labels: `[B, T]` in the coordinates of `input_ids` (the shift happens inside), -100 where unsupervised.
            image_counts: pictures per row `[B]`; an error about placeholders can then name the row at fault.
            num_items_in_batch: supervised tokens of the global batch, the divisor of the loss; own count by default.
            position_ids: `[B, T]`.
            kwargs: further arguments of the decoder, such as `past_key_values` or `logits_to_keep`.

        Returns:
            `loss` (float32 scalar) and no logits when labels are given; else `logits [B, T, V]`.

        Raises:
            ValueError: the number of placeholders is not that of the features.
        """
        inputs = dict(
            features=self._features(pixel_values, features),
            feature_counts=self._feature_counts(image_counts),
            attention_mask=attention_mask,
            position_ids=position_ids,
            **kwargs,
        )
        if labels is None:
            return self.language_model(input_ids, **inputs)
        inputs["use_cache"] = False
        hidden = self.language_model.transformer(input_ids, **inputs).last_hidden_state  # [B, T, H]
        loss = supervised_cross_entropy(hidden, self.language_model.lm_head, labels, num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | Sequence[Sequence[int]],
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        features: Tensor | None = None,
        image_counts: Tensor | Sequence[int] | None = None,
        **kwargs,
    ) -> Tensor:
        """Continues prompts; returns the new ids alone, `[B, <= max_new_tokens]`, rows padded on the right.

        Args:
            input_ids: `[B, T]` padded on the left, or a list of id lists, which is padded here. Prompts may hold
                several turns and several pictures, or none.
            attention_mask: `[B, T]`, 0 at padding; all ones by default.
            pixel_values: `[N, 3, H, W]`, pictures in the order of their placeholders (row by row).
            features: `[N * n, H]` of `encode_images`, instead of `pixel_values`.
            image_counts: pictures per row `[B]`; an error about placeholders can then name the row at fault.
            kwargs: arguments of transformers' `generate`: `max_new_tokens`, `num_beams`, `do_sample`, `streamer`...
                Generation stops at `<|im_end|>` and `<|endoftext|>` unless `eos_token_id` says otherwise.

        Raises:
            ValueError: no prompt, rows padded on the right, or the number of placeholders is not that of the features.
        """
        defaults = self._stop_tokens()
        if not isinstance(input_ids, Tensor):
            input_ids, attention_mask = _pad_left(input_ids, defaults.get("pad_token_id", 0), self.device)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if not attention_mask[:, -1].all():
            raise ValueError("prompts must be padded on the left: a row ends in padding")
        sequences = self.language_model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            features=self._features(pixel_values, features),
            feature_counts=self._feature_counts(image_counts),
            **{**defaults, **kwargs},
        )
        return sequences[:, input_ids.shape[1] :]

    def _stop_tokens(self) -> dict:
        """`eos_token_id` and `pad_token_id` of the tokenizer; without one the decoder's generation config decides."""
        if self.tokenizer is None:
            return {}
        return {
            "eos_token_id": [self.tokenizer.im_end_id, self.tokenizer.eod_id],
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
                dtype = base.weight.dtype
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
        tokenizer_folder = spec["decoder"]["path"] if is_legacy(folder) else folder
        model = cls(
            encoder=build_encoder(**spec["encoder"]),
            projector=build_projector(**spec["projector"]),
            decoder=wrap_with_lora(base, LoraConfig.from_pretrained(str(folder))) if spec["adapter"] else base,
            placeholder_id=spec["placeholder_id"],
            tokenizer=QWenTokenizer.from_pretrained(tokenizer_folder) if spec["tokenizer"] else None,
            system=spec["system"],
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
    if not rows:
        raise ValueError("no prompt to continue: input_ids is an empty list")
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad_id, device=device)
    mask = torch.zeros_like(ids)
    for row, values in enumerate(rows):
        ids[row, length - len(values) :] = torch.tensor(values, device=device)
        mask[row, length - len(values) :] = 1
    return ids, mask
