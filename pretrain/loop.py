"""The loop that both stages of pretraining share: Muon for matrices, AdamW for the rest, linear decay."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from tqdm import tqdm

METRICS_FILE = "metrics.json"  # written last: a folder that has it is complete


@dataclass
class LoopConfig:
    steps: int = 600  # optimizer steps
    muon_lr: float = 0.02  # peak learning rate of matrices inside the layers (Muon)
    adam_lr: float = 3e-3  # peak learning rate of embeddings, heads, norms and biases (AdamW)
    warmup_steps: int = 50  # steps of linear warm-up; then linear decay to a twentieth of the peak
    weight_decay: float = 0.01  # decoupled, of both optimizers
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    bf16: bool = True  # bfloat16 autocast; pays on a CPU with AVX512-BF16 or AMX and on a GPU
    seed: int = 0  # of weights and data


def optimizers(module: nn.Module, config: LoopConfig) -> list[Optimizer]:
    """Muon (K. Jordan et al., 2024) on the matrices of the layers, AdamW on all else.

    Muon steps each matrix by its orthogonalized momentum. Embeddings, output heads and vectors are not maps between
    hidden states, for which that is meant.
    """
    outside = {
        id(parameter)
        for name, part in module.named_modules()
        for parameter in part.parameters(recurse=False)
        if isinstance(part, nn.Embedding) or "head" in name
    }
    matrices = [p for p in module.parameters() if p.ndim == 2 and id(p) not in outside]
    rest = [p for p in module.parameters() if p.ndim != 2 or id(p) in outside]
    return [
        Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay),
        AdamW(rest, lr=config.adam_lr, betas=(0.9, 0.98), weight_decay=config.weight_decay),
    ]


def optimise(
    module: nn.Module, loss_of_step: Callable[[int], Tensor], config: LoopConfig, title: str, log_every: int = 20
) -> list[dict]:
    """Trains `module` on `loss_of_step(step)`; returns the history: step, seconds and mean loss of each interval.

    Raises:
        FloatingPointError: a loss that is not finite.
    """
    torch.manual_seed(config.seed)
    both = optimizers(module, config)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(config)) for optimizer in both]
    parameters = [p for p in module.parameters() if p.requires_grad]
    history, losses, start = [], [], time.perf_counter()
    module.train()
    with tqdm(range(config.steps), desc=title, unit=" steps", mininterval=2.0) as bar:
        for step in bar:
            with torch.autocast(parameters[0].device.type, torch.bfloat16, enabled=config.bf16):
                loss = loss_of_step(step)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            for optimizer, schedule in zip(both, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"{title}: loss {losses[-1]} in step {step + 1}; lower muon_lr and adam_lr")
            if (step + 1) % log_every == 0 or step + 1 == config.steps:
                mean = sum(losses) / len(losses)
                history.append({"step": step + 1, "seconds": time.perf_counter() - start, "loss": mean})
                bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
                losses = []
    return history


def _schedule(config: LoopConfig) -> Callable[[int], float]:
    def factor(step: int) -> float:
        return min(1.0, (step + 1) / max(config.warmup_steps, 1), max(0.05, 1 - step / config.steps))

    return factor


def is_done(output: str, config: LoopConfig) -> bool:
    """Whether `output` holds what this configuration makes.

    Raises:
        ValueError: it holds something else.
    """
    folder = Path(output)
    if not folder.exists():
        return False
    try:
        saved = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))["config"]
    except FileNotFoundError:
        raise ValueError(f"{folder} exists but has no {METRICS_FILE}: choose another output, or remove it") from None
    changed = [f"{key}: {saved.get(key)!r} -> {value!r}" for key, value in asdict(config).items()
               if saved.get(key) != value]
    if changed:
        what = "\n  ".join(changed)
        raise ValueError(f"{folder} was made with other settings:\n  {what}\nChoose another output, or remove it")
    print(f"{folder} is there already, made with these settings")
    return True


def save_folder(output: str, config: LoopConfig, metrics: dict, write: Callable[[Path], None]) -> None:
    """`write` fills a folder beside `output`, which is renamed when it is complete."""
    folder = Path(output)
    staged = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    write(staged)
    text = json.dumps({**metrics, "config": asdict(config)}, indent=2, ensure_ascii=False)
    (staged / METRICS_FILE).write_text(text + "\n", encoding="utf-8")
    os.replace(staged, folder)


def compare(title: str, reached: dict[str, float], expected: dict[str, float]) -> None:
    """Prints each figure (a share) beside the least that a healthy run reaches."""
    print(title)
    for name, least in expected.items():
        remark = "" if reached[name] >= least else "  <- below: later stages will suffer"
        print(f"  {name:12}{100 * reached[name]:6.1f} %  (expected at least {100 * least:.0f} %){remark}", flush=True)
