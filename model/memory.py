"""Peak memory of training and validation, from a step of each on fake tensors.

Shapes and lifetimes are real, nothing is computed. A step runs the model's own modules (projector, LoRA layers, decoder
blocks, loss) with autograd and autocast under torch's `FakeTensorMode`, while a dispatch mode adds up the storages that
exist. What no tensor of PyTorch shows is not seen: scratch space inside of kernels, the CUDA context, fragmentation of
the allocator.
"""

import weakref
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from model.decoder import Head
from model.encoding import VIEWS
from model.loss import summed_cross_entropy
from model.model import MultiModalModel

# With the values of a padding mask out of reach transformers would build the mask of a padded batch. Batches without
# padding run without a mask, and flash and flex attention then keep what sdpa keeps: output and log-sum-exp of a row.
UNPADDED = "unpadded_sdpa"
AttentionInterface.register(UNPADDED, sdpa_attention_forward)
AttentionMaskInterface.register(UNPADDED, lambda **kwargs: None)


@dataclass
class Peak:
    """Bytes at the worst moment of a phase of the step."""

    working: int  # beside weights and gradients: what the backward pass waits for, and temporaries
    gradients: int  # present at that moment

    @property
    def total(self) -> int:
        return self.working + self.gradients


@dataclass
class StepMemory:
    """What forward and backward pass of one micro-batch take beside weights and optimizer state, in bytes."""

    phases: dict[str, Peak]  # "encoder", "decoder", "loss", "backward"
    saved: int  # kept for the backward pass at the end of the decoder's forward pass
    hidden_dtype: torch.dtype  # of the decoder's output

    @property
    def phase(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=lambda name: self.phases[name].total)

    @property
    def peak(self) -> Peak:
        return self.phases[self.phase]


class StorageTracker(TorchDispatchMode):
    """Bytes of all storages that came out of an operation and still exist, and their maximum in each phase.

    Gradients are told from the rest by hooks on `parameters`.
    """

    def __init__(self, parameters: list[nn.Parameter]):
        super().__init__()
        self.bytes = 0
        self.gradients: dict[int, int] = {}  # id of a parameter -> bytes of its gradient
        self.phases: dict[str, Peak] = {}
        self._alive: dict[int, weakref.ref] = {}
        self._phase: str | None = None
        self._hooks = [p.register_post_accumulate_grad_hook(self._gradient_came) for p in parameters]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._track(value.untyped_storage())
        return result

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        for hook in self._hooks:
            hook.remove()

    def ignore(self, tensors) -> None:
        """Does not count these tensors (weights, say), whatever operation returns them or views of them."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._alive[storage._cdata] = weakref.ref(storage)

    def phase(self, name: str) -> None:
        self._phase = name
        self._note()

    def _track(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive[key] = weakref.ref(storage, lambda _: self._free(key, size))
        self.bytes += size
        self._note()

    def _free(self, key: int, size: int) -> None:
        del self._alive[key]
        self.bytes -= size

    def _note(self) -> None:
        gradients = sum(self.gradients.values())
        if self._phase and self.bytes > self.phases.get(self._phase, Peak(-1, 0)).total:
            self.phases[self._phase] = Peak(self.bytes - gradients, gradients)

    def _gradient_came(self, parameter: nn.Parameter) -> None:
        self.gradients[id(parameter)] = parameter.grad.nbytes


@contextmanager
def fake_weights(model: MultiModalModel, gpu: bool = True):
    """Within it `model`, built on the meta device, stands on the CPU with fake tensors.

    A fake GPU would need a real one for its backward pass. What differs there and matters is replaced instead (`gpu`):
    dropout keeps a mask of one byte per element, where a CPU keeps one in the dtype of its input.
    """
    fakes: dict[Tensor, Tensor] = {}  # tied weights stay tied
    with FakeTensorMode():
        for module in list(model.modules()):
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = fakes.setdefault(tensor, _fake(tensor))
            for name, child in module._modules.items():
                if gpu and type(child) is nn.Dropout:
                    module._modules[name] = _FusedDropout(child.p)
        yield


def _fake(tensor: Tensor) -> Tensor:
    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


class _FusedDropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return torch.native_dropout(x, self.p, self.training)[0] if self.p > 0 and self.training else x


def quantize_meta(model: MultiModalModel, quantization: str) -> None:
    """Puts stand-ins with the memory of bitsandbytes' linear modules into the decoder, the head left out.

    For models on the meta device. `quantization` is "nf4" (double quantization) or "int8".
    """
    decoder = model.language_model
    for parent_name, parent in list(decoder.named_modules()):
        for name, child in list(parent.named_children()):
            adapter = ".lora_" in f".{parent_name}." or name.startswith("lora_")
            if type(child) is nn.Linear and not adapter and child is not decoder.lm_head:
                setattr(parent, name, _Quantized(child, quantization))


class _Quantized(nn.Module):
    """Linear module whose frozen weight is dequantized whole for each product, as bitsandbytes does it.

    nf4 packs two weights into a byte and has one uint8 factor per 64 weights, whose own float32 factors stand for 256
    of them each (QLoRA, https://arxiv.org/abs/2305.14314); int8 has one float32 factor per row.
    """

    W_q = None  # peft lets modules that have this attribute dequantize themselves

    def __init__(self, linear: nn.Linear, quantization: str):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype, self.int8 = linear.weight.dtype, quantization == "int8"
        count = linear.weight.numel()
        sizes = {"weight": (count, torch.uint8), "factors": (self.out_features, torch.float32)}
        if not self.int8:
            blocks = -(-count // 64)
            sizes = {"weight": (-(-count // 2), torch.uint8), "factors": (blocks, torch.uint8)}
            sizes["outer_factors"] = (-(-blocks // 256), torch.float32)
        for name, (size, dtype) in sizes.items():
            tensor = torch.empty(size, dtype=dtype, device=linear.weight.device)
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.bias = linear.bias

    def dequantize(self) -> Tensor:
        """The whole weight, as DoRA asks for it."""
        return _dequantized(self, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        inputs = x if self.int8 else x.to(self.dtype)
        return _QuantizedProduct.apply(inputs, self.weight, self).to(x.dtype)


class _QuantizedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, module: _Quantized) -> Tensor:
        ctx.module, ctx.dtype = module, x.dtype
        shape = (*x.shape[:-1], module.out_features)
        if module.int8:  # products of int8 matrices are int32; the inputs stay with the graph
            ctx.inputs = x
            codes = x.to(torch.float16).to(torch.int8)
            return codes.new_empty(shape, dtype=torch.int32).to(x.dtype)
        return F.linear(x, _dequantized(module, x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return grad.to(ctx.dtype) @ _dequantized(ctx.module, ctx.dtype), None, None


def _dequantized(module: _Quantized, dtype: torch.dtype) -> Tensor:
    return torch.empty(module.out_features, module.in_features, dtype=dtype)


def step_memory(
    model: MultiModalModel, batch: int, length: int, *, bf16: bool, checkpointing: int, accumulation: int = 1
) -> StepMemory:
    """Memory of forward and backward pass on `batch` samples of `length` tokens, all supervised, one picture each.

    For models within `fake_weights`. `checkpointing` is k if every k-th block is recomputed, 0 if none is. From the
    second micro-batch of a step on all gradients exist from the start.
    """
    model.train()
    if checkpointing:
        # Fake tensors draw no random numbers, so there is no state to restore.
        options = {"use_reentrant": False, "preserve_rng_state": False}
        model.activation_checkpointing_enable(options, every_n_layers=checkpointing)
    else:
        model.activation_checkpointing_disable()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with StorageTracker(trained) as tracker:
        tracker.ignore([*model.parameters(), *model.buffers()])
        ahead = None
        if not model.encoder.trainable:
            tracker.phase("encoder")
            views = batch * most_views(model)
            ahead = _encoded_ahead(model, accumulation * views, max(VIEWS, views), bf16)
        for _ in range(min(accumulation, 2)):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                hidden = _decoder_output(model, batch, length, tracker.phase, ahead)
                saved = tracker.bytes - sum(tracker.gradients.values())
                tracker.phase("loss")
                loss = _loss(model, hidden)
            hidden_dtype = hidden.dtype
            del hidden
            tracker.phase("backward")
            loss.backward()
            del loss
    for parameter in trained:
        parameter.grad = None
    return StepMemory(tracker.phases, saved, hidden_dtype)


def loss_memory(
    model: MultiModalModel, batch: int, length: int, *, bf16: bool, dtype: torch.dtype, naive: bool
) -> int:
    """Bytes that the loss takes at its worst moment, given hidden states `[B, T, H]` in `dtype`; backward included.

    `naive`: logits `[B, T, V]`, a float32 copy and their gradients, as transformers' loss for causal language models.
    """
    hidden = torch.empty(batch, length, model.language_model.config.hidden_size, dtype=dtype, requires_grad=True)
    with StorageTracker([]) as tracker:
        tracker.ignore([*model.parameters(), *model.buffers(), hidden])
        tracker.phase("loss")
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = _naive_loss(model, hidden) if naive else _loss(model, hidden)
        loss.backward()
    return tracker.phases["loss"].total


@torch.no_grad()
def validation_memory(model: MultiModalModel, batch: int, length: int, *, bf16: bool, naive: bool) -> int:
    """Bytes that the loss of a batch takes in eval mode at its worst moment, beside weights and optimizer state.

    Samples as in `step_memory`; `naive` as in `loss_memory`. Gradients are None between the steps.
    """
    model.eval()
    with StorageTracker([]) as tracker, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        tracker.ignore([*model.parameters(), *model.buffers()])
        hidden = _decoder_output(model, batch, length, lambda _: tracker.phase("validation"))
        _naive_loss(model, hidden) if naive else _loss(model, hidden)
    return tracker.phases["validation"].total


def most_views(model: MultiModalModel) -> int:
    """Views of a picture with all the tiles that it may have."""
    return 1 + model.media.spec["max_tiles"]


@torch.no_grad()
def _encoded_ahead(model: MultiModalModel, views: int, size: int, bf16: bool) -> Tensor:
    """`model.encoding.encode_ahead`: what the encoder makes of all views of a step, `[N, n, D]`, `size` at a time."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return torch.cat([
            model.encoder(torch.empty(min(size, views - start), 3, *model.encoder.image_size))
            for start in range(0, views, size)
        ])  # fmt: skip


def _decoder_output(
    model: MultiModalModel, batch: int, length: int, phase: Callable[[str], None], ahead: Tensor | None = None
) -> Tensor:
    """`MultiModalModel.forward` up to the loss, `[B, T, H]`, past the checks that have to read token ids."""
    phase("encoder")
    views = batch * most_views(model)
    if ahead is None:
        features = model.encode_images(torch.empty(views, 3, *model.encoder.image_size))
    else:
        features = model.project(ahead[:views])
    input_ids = torch.zeros(batch, length, dtype=torch.long)
    phase("decoder")
    decoder = model.language_model.base_model
    embeds = decoder.get_input_embeddings()(input_ids)
    embeds = embeds.masked_scatter((input_ids == model.placeholder_id).unsqueeze(-1), features.to(embeds))
    mask = torch.ones_like(input_ids)
    return decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state


def _loss(model: MultiModalModel, hidden: Tensor) -> Tensor:
    batch, length, _ = hidden.shape
    supervised = batch * (length - most_views(model) * model.media.num_features)
    positions = torch.zeros(2, supervised, dtype=torch.long)  # what a mask of labels comes down to
    rows = hidden[:, :-1][positions[0], positions[1]]
    return summed_cross_entropy(rows, positions[0], Head(model.language_model)) / len(rows)


def _naive_loss(model: MultiModalModel, hidden: Tensor) -> Tensor:
    decoder = model.language_model
    labels = torch.zeros(hidden.shape[:2], dtype=torch.long)
    logits = Head(decoder)(hidden)
    return decoder.loss_function(logits, labels, decoder.config.vocab_size, num_items_in_batch=labels.numel())
