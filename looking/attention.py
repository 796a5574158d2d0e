"""What the decoder's attention gives to each feature vector of the pictures when it predicts a token of the answer.

Attention is no explanation: it says from where a layer takes values, neither what is in them nor whether the answer
depends on them (Jain & Wallace 2019, https://arxiv.org/abs/1902.10186). In deeper layers a position no longer stands
for its own token alone. Rollout (Abnar & Zuidema 2020, https://arxiv.org/abs/2005.00928) follows the attention through
the layers back to the input, as far as a linear mixture can.
"""

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from looking.answer import answer_tokens
from model import MultiModalModel


def with_weights(decoder: PreTrainedModel) -> PreTrainedModel:
    """A decoder of the same parameters that returns attention weights: its attention is written out ("eager").

    It is another object, so that whoever uses the decoder meanwhile, in another thread, gets what it always gave.

    Raises:
        ValueError: its attention can't be written out.
    """
    shared = {id(tensor): tensor for tensor in (*decoder.parameters(), *decoder.buffers())}
    eager = deepcopy(decoder, shared)
    try:
        eager.set_attn_implementation("eager")
    except (ValueError, NotImplementedError) as error:
        raise ValueError(_no_weights(decoder, str(error))) from error
    if eager.config._attn_implementation != "eager":  # of which transformers only warns
        raise ValueError(_no_weights(decoder, "its attention can't be changed after loading"))
    return eager


@torch.no_grad()
def answer_attention(
    model: MultiModalModel, prompt: list[int], answer: list[int], features: Tensor, token: int | None = None
) -> Tensor:
    """Attention `[L, heads, M]` of each layer from an answer's token to the features, float32.

    It is that of the position that predicts the token, the one before it; with `token` None the mean over all tokens.

    Args:
        prompt: ids, expanded to one placeholder per feature.
        answer: ids that follow.
        features: [M, H], one for each placeholder.

    Raises:
        ValueError: the decoder can't return weights, or the answer has no such token.
    """
    rows = [len(prompt) - 1 + index for index in answer_tokens(answer, token)]
    places = _places(model, prompt)
    layers = _layers(model, prompt, answer, features, lambda weights: weights[:, :, rows])
    return torch.stack([layer[:, :, places].float().mean(1) for layer in layers])


@torch.no_grad()
def rollout(
    model: MultiModalModel,
    prompt: list[int],
    answer: list[int],
    features: Tensor,
    token: int | None = None,
    residual: float = 0.5,
) -> Tensor:
    """Shares `[M]` of the features in what the last layer holds where it predicts an answer's token, float32.

    A layer passes on `residual * I + (1 - residual) * A`, where A is the mean of its heads, with rows that add up to 1;
    the product over all layers is read off at that position. Otherwise as `answer_attention`.
    """
    rows = [len(prompt) - 1 + index for index in answer_tokens(answer, token)]
    layers = _layers(model, prompt, answer, features, lambda weights: weights.float().mean(1, keepdim=True))
    shares = torch.eye(layers[0].shape[-1], device=layers[0].device)[rows]  # [tokens, T]
    for layer in reversed(layers):  # from the last one down: rows of a product need no more than rows
        mixture = (1 - residual) * layer[0] / layer[0].sum(-1, keepdim=True)
        mixture.diagonal().add_(residual)
        shares = shares @ mixture
    return shares[:, _places(model, prompt)].mean(0)


def _layers(
    model: MultiModalModel, prompt: list[int], answer: list[int], features: Tensor, kept: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """What is `kept` of each layer's weights `[1, heads, T, T]`, without the first dimension."""
    decoder = with_weights(model.language_model)
    ids = torch.tensor([[*prompt, *answer]], device=model.device)

    def keep(module: nn.Module, _, output):
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        # What an inner module has reduced already goes through the outer ones as it is.
        if isinstance(weights, Tensor) and weights.ndim == 4 and weights.shape[2] == ids.shape[1]:
            return output[0], kept(weights), *output[2:]
        return None

    # All weights of all layers would take gigabytes. The hooks come before the one by which transformers collects what
    # modules of this kind return, and belong to this copy of the decoder alone.
    for module in decoder.modules():
        if "attention" in type(module).__name__.lower():
            module.register_forward_hook(keep, prepend=True)
    output = decoder(ids, features=features, output_attentions=True, use_cache=False, logits_to_keep=1)
    layers = list(output.attentions or [])
    wanted = decoder.config.num_hidden_layers
    having = sum(layer is not None for layer in layers)
    if having != wanted or len(layers) != wanted:
        raise ValueError(_no_weights(decoder, f"{having} of its {wanted} layers have attention weights"))
    return [layer[0] for layer in layers]


def _places(model: MultiModalModel, prompt: list[int]) -> list[int]:
    """Positions of the features."""
    places = [index for index, token in enumerate(prompt) if token == model.placeholder_id]
    if not places:
        raise ValueError("the prompt shows no picture, so nothing can be looked at")
    return places


def _no_weights(decoder: PreTrainedModel, reason: str) -> str:
    name = type(decoder).__name__
    return f"{name} gives no attention weights ({reason}); take the method occlusion, which needs none"
