"""Speed of `MultiModalModel.generate` beside transformers' LLaVA, on equal weights, pictures and prompts.

    python -m benchmarks.generation                       # adds to benchmarks/results.md
    python -m benchmarks.generation --batches 1 --dtypes float32 --new-tokens 128
    python -m benchmarks.generation --small --output /tmp/results.md

Three systems hold the same CLIP encoder, projector and decoder: ours with a Qwen-1 decoder, ours with a decoder of
transformers (its weights as Qwen2), and `LlavaForConditionalGeneration` with that Qwen2. Each has a process of its own;
the parent lets them answer in turn, so that other load on the machine meets all alike, and takes medians.

Decoding is greedy and never ends early. *First token* is a generation of one token: picture, prompt, and what
`generate` prepares. *Tokens/s* are new tokens of the whole batch over the time of the whole generation, picture and
prompt included. In float32 the three write the same tokens, or the command exits with 1. In bfloat16 they round at
different places (see `benchmarks.train_step`), and random weights make many tokens almost equally likely: the share of
equal tokens is told.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, Qwen2ForCausalLM
from transformers.utils import logging

from benchmarks import train_step
from benchmarks.measure import RESULTS, Conversation, add_shapes, append_results, markdown_table, now, report
from model import MultiModalModel
from model.decoder import load_decoder
from model.export import qwen2_config, qwen2_state
from model.projector import build_projector
from qwen import MultimodalQWenLMHeadModel
from visual import build_encoder

SYSTEMS = {"qwen": "Kanjian, Qwen-1", "qwen2": "Kanjian, Qwen2", "llava": "LLaVA, Qwen2"}
PEER = "llava"
SMALL = {
    "hidden": 64, "layers": 2, "vocabulary": 1000, "image_tokens": 16, "prompt_tokens": 6, "new_tokens": 8,
    "encoder_width": 32, "encoder_layers": 2, "repeats": 1,
}  # fmt: skip


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny shapes, for tests")
    add_shapes(parser)
    parser.add_argument("--image-tokens", type=int, default=196, help="a square number")
    parser.add_argument("--prompt-tokens", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5, help="measured generations, after one that is not")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file that the result is added to")
    parser.add_argument("--worker", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    if "--small" in (sys.argv if argv is None else argv):
        parser.set_defaults(**SMALL)
    args = parser.parse_args(argv)
    args.rank = 4  # of the adapter that write_weights makes and nobody loads here
    return args


def write_weights(args: argparse.Namespace, folder: Path) -> None:
    """Writes encoder, projector and decoder for all systems."""
    train_step.write_weights(args, folder)
    decoder = MultimodalQWenLMHeadModel.from_pretrained(folder / "decoder")
    qwen2 = Qwen2ForCausalLM(qwen2_config(decoder.config, torch.float32))
    qwen2.load_state_dict(qwen2_state(decoder.state_dict()))
    qwen2.save_pretrained(folder / "qwen2")


def load(args: argparse.Namespace, system: str, dtype: torch.dtype) -> nn.Module:
    """A system with all weights in `dtype`, in eval mode."""
    folder = args.folder
    if system == PEER:
        return LlavaForConditionalGeneration.from_pretrained(folder / "llava", dtype=dtype).to(args.device).eval()
    encoder = build_encoder("clip", str(folder / "encoder"))
    projector = build_projector("mlp", encoder.width, args.hidden, init_std=None)
    projector.load_state_dict(load_file(folder / "kanjian" / "projector.safetensors"))
    decoder = load_decoder(folder / ("decoder" if system == "qwen" else "qwen2"), dtype)
    model = MultiModalModel(encoder, projector, decoder, placeholder_id=args.vocabulary - 1)
    return model.to(args.device, dtype).eval()


def prompt(args: argparse.Namespace, batch: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Per row: half of the prompt, the image tokens, the other half; and the pictures."""
    shapes = argparse.Namespace(**{**vars(args), "batch": batch, "answer_tokens": 1})
    inputs = train_step.batch_of_step(shapes, 0)
    return {
        "input_ids": inputs["input_ids"][:, :-1].to(args.device),
        "attention_mask": inputs["attention_mask"][:, :-1].to(args.device),
        "pixel_values": inputs["pixel_values"].to(args.device, dtype),
    }


@torch.no_grad()
def generate(model: nn.Module, inputs: dict[str, Tensor], count: int) -> tuple[float, list[list[int]]]:
    """Seconds for `count` new tokens of each row, and these."""
    start = now()
    ids = model.generate(**inputs, max_new_tokens=count, do_sample=False)
    seconds = now() - start
    return seconds, ids[:, -count:].tolist()


def work(args: argparse.Namespace) -> None:
    """Serves one system: reads batch sizes from stdin, answers each with a line of JSON."""
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    dtype = getattr(torch, args.dtypes[0])
    model = load(args, args.worker, dtype)
    print(json.dumps({"parameters": sum(parameter.numel() for parameter in model.parameters())}), flush=True)
    for line in sys.stdin:
        inputs = prompt(args, int(line), dtype)
        first, _ = generate(model, inputs, 1)
        seconds, tokens = generate(model, inputs, args.new_tokens)
        print(json.dumps({"first": first, "seconds": seconds, "tokens": tokens}), flush=True)


def compare(args: argparse.Namespace, argv: list[str], dtype: str) -> list[dict]:
    """For each size of a batch and each system: medians, and the share of its tokens that are LLaVA's."""
    command = ["benchmarks.generation", *argv, "--folder", str(args.folder), "--dtypes", dtype, "--worker"]
    workers = {system: Conversation(*command, system) for system in SYSTEMS}
    results = []
    try:
        parameters = {system: worker.answer()["parameters"] for system, worker in workers.items()}
        if len(set(parameters.values())) != 1:
            raise RuntimeError(f"the systems have different numbers of parameters: {parameters}")
        for batch in args.batches:
            rounds = [
                {system: worker.ask(batch) for system, worker in workers.items()} for _ in range(1 + args.repeats)
            ][1:]
            for system in SYSTEMS:
                pairs = zip(rounds[0][system]["tokens"], rounds[0][PEER]["tokens"], strict=True)
                equal = [ours == theirs for rows in pairs for ours, theirs in zip(*rows, strict=True)]
                results.append({
                    "dtype": dtype, "batch": batch, "system": system,
                    "first": statistics.median(answers[system]["first"] for answers in rounds),
                    "seconds": statistics.median(answers[system]["seconds"] for answers in rounds),
                    "equal": statistics.mean(equal),
                })  # fmt: skip
    finally:
        for worker in workers.values():
            worker.end()
    return results


def table(args: argparse.Namespace, results: list[dict]) -> str:
    peers = {(result["dtype"], result["batch"]): result["seconds"] for result in results if result["system"] == PEER}
    rows = [
        (
            SYSTEMS[result["system"]],
            result["dtype"],
            result["batch"],
            f"{result['first']:.3f}",
            f"{args.new_tokens * result['batch'] / result['seconds']:.1f}",
            f"{peers[result['dtype'], result['batch']] / result['seconds']:.2f}",
            f"{100 * result['equal']:.1f} %",
        )
        for result in results
    ]
    header = ("system", "dtype", "batch", "first token (s)", "new tokens/s", "of LLaVA's", "tokens equal to LLaVA's")
    return markdown_table(header, rows)


def main(argv: list[str]) -> int:
    args = arguments(argv)
    if args.worker:
        work(args)
        return 0
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = Path(temporary)
        write_weights(args, args.folder)
        results = [result for dtype in args.dtypes for result in compare(args, argv, dtype)]
    print("\n".join(json.dumps(result) for result in results))
    shapes = (
        f"Hidden {args.hidden}, {args.layers} layers, vocabulary {args.vocabulary:,}; {args.image_tokens} image and "
        f"{args.prompt_tokens} prompt tokens, then {args.new_tokens} new ones; medians of {args.repeats}."
    )
    text = report("Generation", "benchmarks.generation", argv, args.device, shapes, table(args, results))
    print(f"\n{text}")
    append_results(text, args.output)
    return int(any(result["equal"] < 1 for result in results if result["dtype"] == "float32"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
