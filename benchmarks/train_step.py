"""One training step of `MultiModalModel` against transformers' LLaVA + peft, on equal weights and data.

    python -m benchmarks.train_step                     # the shapes of README.md, 1 thread, float32 and bfloat16
    python -m benchmarks.train_step --small             # seconds instead of minutes
    python -m benchmarks.train_step --device cuda --dtypes bfloat16

Both systems hold a CLIP encoder, a two-layer projector and the same decoder: `LlavaForConditionalGeneration` has a
Qwen2 text model whose q, k, v are the thirds of our `c_attn` and whose gate and up are our `w2` and `w1`. LoRA stands
on the linear modules that exist one to one in both. Each system runs in its own process, from weights on disk; the
parent lets them step in turn, so that other load on the machine meets both alike. A step is forward, backward and
AdamW. In bfloat16 the frozen weights are stored so and autocast is on; trained weights are float32.

Peak memory is that of the whole process during the steps: resident memory on a CPU (VmHWM of Linux' /proc, reset before
the first step), allocated tensors on a GPU. Exits with 1 if the losses of a step differ by more than the tolerance.

In bfloat16 the systems round at different places, hence the wider tolerance: LLaVA rotates queries and keys in bfloat16
where Qwen-1 does so in float32; it projects a strided view of the encoder's output, for which PyTorch rounds before it
adds the bias; and it sums the gradients of q, k and v in bfloat16 where one product with `c_attn` does so inside.
`tests/model/test_train_step_benchmark.py` removes the first two and finds equal forward passes.
"""

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlavaConfig, LlavaForConditionalGeneration

from benchmarks.measure import Conversation, add_shapes, peak_memory, reset_peak
from model import MultiModalModel
from model.export import LINEAR_NAMES, qwen2_config, qwen2_state
from model.export_llava import PROJECTOR_NAMES
from model.lora import add_lora
from model.projector import build_projector
from qwen import MultimodalQWenLMHeadModel, QWenConfig
from visual import build_encoder

SYSTEMS = ("kanjian", "llava")
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-3}  # largest difference between the losses of a step
PATCH = 16  # pixels; LLaVA's image tokens are the patches without the class token


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny shapes, for tests")
    add_shapes(parser)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--image-tokens", type=int, default=196, help="a square number")
    parser.add_argument("--prompt-tokens", type=int, default=24)
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=5, help="measured steps")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them, compared but not timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--worker", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.small:
        args.hidden, args.layers, args.vocabulary, args.batch, args.image_tokens = 64, 2, 1000, 2, 16
        args.prompt_tokens, args.answer_tokens, args.encoder_width, args.encoder_layers, args.rank = 6, 8, 32, 2, 4
    return args


# Weights: ours, drawn at random, and the same under LLaVA's names.


def write_weights(args: argparse.Namespace, folder: Path, placeholder_id: int | None = None) -> None:
    """Writes `folder/kanjian` (a checkpoint with its decoder and encoder beside it) and `folder/llava`.

    Features stand where `placeholder_id` stood, by default the last of the vocabulary.
    """
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=args.encoder_width,
        intermediate_size=4 * args.encoder_width,
        num_hidden_layers=args.encoder_layers,
        num_attention_heads=args.encoder_width // 32,
        image_size=PATCH * int(args.image_tokens**0.5),
        patch_size=PATCH,
    )
    decoder_config = QWenConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64 or 1,
        kv_channels=64,
        intermediate_size=2 * 11 * args.hidden // 4,
    )
    CLIPVisionModel(vision).save_pretrained(folder / "encoder")
    MultimodalQWenLMHeadModel(decoder_config).save_pretrained(folder / "decoder")
    decoder = MultimodalQWenLMHeadModel.from_pretrained(folder / "decoder")
    encoder = build_encoder("clip", str(folder / "encoder"))
    size = {"in_width": encoder.width, "out_width": args.hidden, "num_features": encoder.num_features}
    projector = build_projector("mlp", **size, init_std=None)
    decoder = add_lora(decoder, r=args.rank, alpha=2 * args.rank, targets=list(LINEAR_NAMES))
    for name, parameter in decoder.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    placeholder_id = args.vocabulary - 1 if placeholder_id is None else placeholder_id
    model = MultiModalModel(encoder, projector, decoder, placeholder_id)
    model.save_pretrained(folder / "kanjian")
    write_llava(model, vision, folder)


def write_llava(model: MultiModalModel, vision: CLIPVisionConfig, folder: Path) -> None:
    text = qwen2_config(model.language_model.config, torch.float32)
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=model.placeholder_id, vision_feature_layer=-1
        )
    )
    state = {f"model.vision_tower.{name}": weight for name, weight in model.encoder.backbone.state_dict().items()}
    for ours, theirs in PROJECTOR_NAMES.items():
        for kind in ("weight", "bias"):
            state[f"model.multi_modal_projector.{theirs}.{kind}"] = model.projector.state_dict()[f"{ours}.{kind}"]
    decoder = qwen2_state(MultimodalQWenLMHeadModel.from_pretrained(folder / "decoder").state_dict())
    state |= {re.sub(r"^model\.", "model.language_model.", name): weight for name, weight in decoder.items()}
    llava.load_state_dict(state)
    llava.save_pretrained(folder / "llava")
    adapter = load_file(folder / "kanjian" / "adapter_model.safetensors")
    adapter = {llava_lora_name(name): weight for name, weight in adapter.items()}
    (folder / "llava_adapter").mkdir()
    save_file(adapter, folder / "llava_adapter" / "adapter_model.safetensors")
    lora = LoraConfig.from_pretrained(str(folder / "kanjian"))
    lora.target_modules = sorted(name.rpartition(".")[2] for name in LINEAR_NAMES.values())
    lora.save_pretrained(str(folder / "llava_adapter"))


def llava_lora_name(name: str) -> str:
    index, part, matrix = re.fullmatch(r"base_model\.model\.transformer\.h\.(\d+)\.(.+)\.(lora_.+)", name).groups()
    return f"base_model.model.model.language_model.layers.{index}.{LINEAR_NAMES[part]}.{matrix}"


# The two systems, each in its own process.


def load_kanjian(folder: Path, dtype: torch.dtype) -> nn.Module:
    model = MultiModalModel.from_pretrained(folder / "kanjian", dtype=dtype)
    model.encoder.to(dtype)
    return model.train()


def load_llava(folder: Path, dtype: torch.dtype) -> nn.Module:
    llava = LlavaForConditionalGeneration.from_pretrained(folder / "llava", dtype=dtype)
    projector = llava.model.multi_modal_projector
    model = PeftModel.from_pretrained(llava, folder / "llava_adapter", is_trainable=True)
    projector.float().requires_grad_(True)
    masters = load_file(folder / "kanjian" / "projector.safetensors")  # not rounded to the dtype of the frozen weights
    for ours, theirs in PROJECTOR_NAMES.items():
        getattr(projector, theirs).load_state_dict({kind: masters[f"{ours}.{kind}"] for kind in ("weight", "bias")})
    return model.train()


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict, dtype: torch.dtype) -> float:
    """Forward, backward and optimizer step; returns the loss, once the device has computed it."""
    device = batch["input_ids"].device.type
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def batch_of_step(args: argparse.Namespace, step: int) -> dict[str, Tensor | int]:
    """Random pictures and ids; per row: half of the prompt, the image tokens, the other half, the answer."""
    generator = torch.Generator().manual_seed(step)
    length = args.prompt_tokens + args.image_tokens + args.answer_tokens
    image = slice(args.prompt_tokens // 2, args.prompt_tokens // 2 + args.image_tokens)
    input_ids = torch.randint(0, args.vocabulary - 1, (args.batch, length), generator=generator)
    labels = input_ids.clone()
    labels[:, : -args.answer_tokens] = -100
    input_ids[:, image] = args.vocabulary - 1
    size = PATCH * int(args.image_tokens**0.5)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": labels,
        "pixel_values": torch.randn(args.batch, 3, size, size, generator=generator),
        "num_items_in_batch": args.batch * args.answer_tokens,
    }


def work(args: argparse.Namespace) -> None:
    """Serves one system: reads step numbers from stdin, answers each with a line of JSON."""
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtypes[0])
    model = (load_kanjian if args.worker == "kanjian" else load_llava)(args.folder, dtype).to(args.device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0)
    reset_peak(args.device)
    print(json.dumps({"trained": sum(parameter.numel() for parameter in trained)}), flush=True)
    for line in sys.stdin:
        batch = batch_of_step(args, int(line))
        batch = {key: value.to(args.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        start = time.perf_counter()
        loss = train_step(model, optimizer, batch, dtype)
        seconds = time.perf_counter() - start
        print(json.dumps({"loss": loss, "seconds": seconds, "peak": peak_memory(args.device)}), flush=True)


# The comparison.


def compare(args: argparse.Namespace, argv: list[str], folder: Path, dtype: str) -> dict:
    """Steps both systems in turn; returns medians, peaks and the largest difference of the losses."""
    command = ["benchmarks.train_step", *argv, "--folder", str(folder), "--dtypes", dtype, "--worker"]
    workers = {system: Conversation(*command, system) for system in SYSTEMS}
    try:
        trained = {system: worker.answer()["trained"] for system, worker in workers.items()}
        if len(set(trained.values())) != 1:
            raise RuntimeError(f"trainable parameters differ: {trained}")
        steps = [
            {system: worker.ask(number) for system, worker in workers.items()}
            for number in range(args.warmup + args.steps)
        ]
    finally:
        for worker in workers.values():
            worker.end()
    return {
        "dtype": dtype,
        "trained_parameters": trained["kanjian"],
        "losses": [[step[system]["loss"] for system in SYSTEMS] for step in steps],
        "loss_difference": max(abs(step["kanjian"]["loss"] - step["llava"]["loss"]) for step in steps),
        "seconds": {s: statistics.median(step[s]["seconds"] for step in steps[args.warmup :]) for s in SYSTEMS},
        "peak_mib": {s: steps[-1][s]["peak"] for s in SYSTEMS},
    }


def table(results: list[dict]) -> str:
    """Markdown; ratios above 1 mean that LLaVA + peft needs more."""
    lines = [
        "| dtype | step, Kanjian (s) | step, LLaVA + peft (s) | ratio | peak, Kanjian (MiB) | peak, LLaVA + peft (MiB) "
        "| ratio | largest loss difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        seconds, peak = ([result[key][system] for system in SYSTEMS] for key in ("seconds", "peak_mib"))
        lines.append(
            f"| {result['dtype']} | {seconds[0]:.3f} | {seconds[1]:.3f} | {seconds[1] / seconds[0]:.2f} "
            f"| {peak[0]:.0f} | {peak[1]:.0f} | {peak[1] / peak[0]:.2f} | {result['loss_difference']:.1e} |"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    args = arguments(argv)
    if args.worker:
        work(args)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_weights(args, folder)
        results = [compare(args, argv, folder, dtype) for dtype in args.dtypes]
    for result in results:
        print(json.dumps(result))
    print(table(results))
    return int(any(result["loss_difference"] > TOLERANCE[result["dtype"]] for result in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
