"""Examines the built-in run on scenes it has never seen and writes what a reader wants to know of it.

    python report.py --run outputs/scenes --scenes data/scenes

leaves in the run's folder

    report.json    accuracy with real, blind and shuffled images, by type, language, number of objects; seconds a stage
    report.md      the same as tables, each figure beside its target
    losses.png     the loss of every stage
    sheet.png      test pictures with questions, right answers and the model's
    test/, compositional/    of each test set `report.html`, a page with all questions and answers, and its figures
"""

import argparse
import json
import random
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import font_manager, pyplot
from PIL import Image

from dataset.files import write_text
from dataset.record import read_records
from evaluation.answering import evaluate
from evaluation.metrics import normalise
from model import MultiModalModel
from run_folder import RunError
from training.curves import draw_loss, read_history, save_figure

TARGETS = {"colour": 0.95, "shape": 0.95, "existence": 0.95, "count": 0.95, "position": 0.95, "digit": 0.85}
COMPOSITIONAL_TARGET = 0.80
CHINESE_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "PingFang SC",
                 "Microsoft YaHei", "SimHei", "Source Han Sans SC")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("outputs/scenes"), help="folder of the trained model")
    parser.add_argument("--scenes", type=Path, default=Path("data/scenes"), help="folder of the drawn scenes")
    parser.add_argument("--limit", type=int, help="only this many questions of each split")
    arguments = parser.parse_args()
    model = MultiModalModel.from_pretrained(arguments.run, attn_implementation="eager")
    results = {}
    for split in ("test", "compositional"):
        file = arguments.scenes / f"{split}.parquet"
        records = list(read_records(file))
        if arguments.limit:
            records = random.Random(0).sample(records, min(arguments.limit, len(records)))
        results[split] = evaluate(
            model, records, arguments.scenes / "images", batch_size=128, max_new_tokens=4, output=arguments.run / split,
            overwrite=True, described={"checkpoint_path": str(arguments.run), "data": str(file)},
        )  # fmt: skip
    report = {**results["test"], "compositional": results["compositional"]}
    evaluation = sum(result["seconds"]["total"] for result in results.values())
    report["seconds"] = {**stage_seconds(arguments.run), "evaluation": evaluation}
    text = tables(report)
    print(text)
    write_text(text + "\n", arguments.run / "report.md")
    plot_losses(arguments.run)
    draw_sheet(arguments.run, arguments.scenes / "images")
    # Last of all: train.sh takes a run that has it for finished.
    write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", arguments.run / "report.json")
    print(f"\nWritten to {arguments.run}: report.json, report.md, losses.png, sheet.png")
    print(f"Every question, picture and answer: {arguments.run}/test/report.html")


def stage_seconds(run: Path) -> dict[str, float]:
    """Wall-clock seconds of the stages, as train.sh noted them: `name seconds` lines in `stages.txt`."""
    file = run / "stages.txt"
    if not file.exists():
        return {}
    lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {name: float(seconds) for name, seconds in lines}


def tables(report: dict) -> str:
    """Accuracy as Markdown: by type beside its target, by language and by number of objects."""
    lines = ["| | real | blind | shuffled | most frequent answer | questions | target |",
             "|---|---:|---:|---:|---:|---:|---:|"]

    def row(name: str, figures: dict, target: float | None = None) -> None:
        shares = [*(figures[key]["value"] for key in ("real", "blind", "shuffled")), figures["majority"]]
        cells = [name, *(f"{100 * share:.1f} %" for share in shares), str(figures["n"])]
        if target is None:
            cells.append("")
        else:
            cells.append(f"{100 * target:.0f} %" + ("" if figures["real"]["value"] >= target else " **missed**"))
        lines.append("| " + " | ".join(cells) + " |")

    groups = report["groups"]
    for kind, target in TARGETS.items():
        if kind in groups["type"]:
            row(kind, groups["type"][kind], target)
    row("**all**", report["score"])
    titles = {"language": "", "num_objects": " objects", "type x language": "", "type x num_objects": ""}
    for name, title in titles.items():
        for key, figures in groups[name].items():
            row(key.replace(" x ", "/") + title, figures)
    row("unseen pairs of colour and shape", report["compositional"]["score"], COMPOSITIONAL_TARGET)
    lost = {name: 100 * report["looking"][name]["value"] for name in ("gain", "gain_over_shuffled")}
    lines += [
        "",
        f"The model looks: without its image it loses {lost['gain']:.1f} points, with another image "
        f"{lost['gain_over_shuffled']:.1f}.",
    ]
    if (looking := report["looking"]["looking_score"]) is not None:
        lines[-1] += f" Looking score: {looking['value']:.3f}."
    stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in report["seconds"].items())
    lines.append(f"Seconds: {stages}.")
    return "\n".join(lines)


def plot_losses(run: Path) -> None:
    """Loss of tower, decoder and the whole model over their steps."""
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    stages = (("tower", "CLIP tower (contrastive)"), ("decoder", "Qwen-1 decoder (text)"))
    for axis, (name, title) in zip(axes[:2], stages, strict=True):
        history = json.loads((run / name / "metrics.json").read_text(encoding="utf-8"))["history"]
        axis.plot([point["step"] for point in history], [point["loss"] for point in history])
        axis.set(title=title, xlabel="step", ylabel="loss", yscale="log")
    draw_loss(axes[2], read_history(run))
    axes[2].set(title="Projector + LoRA", xlabel="step", ylabel="loss", yscale="log")
    axes[2].legend()
    for axis in axes:
        axis.grid(alpha=0.3)
    save_figure(figure, run / "losses.png")


def draw_sheet(run: Path, images: Path, columns: int = 6, rows: int = 2) -> None:
    """Test pictures with three questions each, taken at random; wrong answers in red."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    chinese = next((font for font in CHINESE_FONTS if font in installed), None)
    answers: dict[str, list[dict]] = {}
    for line in (run / "test" / "rows.jsonl").read_text(encoding="utf-8").splitlines():
        answer = json.loads(line)
        if answer["meta"]["language"] == "en" or chinese:
            answers.setdefault(answer["images"][0], []).append(answer)
    rng = random.Random(0)
    fonts = {"font.family": [chinese, "DejaVu Sans"] if chinese else ["DejaVu Sans"]}
    with pyplot.rc_context(fonts):
        figure, axes = pyplot.subplots(
            2 * rows, columns, figsize=(2.5 * columns, 4.2 * rows), layout="constrained", height_ratios=[1, 0.62] * rows
        )
        for axis in axes.flat:
            axis.set_axis_off()
        chosen = rng.sample(sorted(answers), min(rows * columns, len(answers)))
        for place, image in enumerate(chosen):
            row, column = divmod(place, columns)
            picture, text = axes[2 * row, column], axes[2 * row + 1, column]
            picture.imshow(Image.open(images / image))
            for number, answer in enumerate(rng.sample(answers[image], min(3, len(answers[image])))):
                said = answer["conditions"]["real"]["answer"]
                right = normalise(said) == normalise(answer["answer"])
                said += "" if right else f"  (right: {answer['answer']})"
                question = answer["turns"][0]["content"].removeprefix("<image>\n")
                text.text(0, 1 - number / 3, question, va="top", fontsize=10, color="0.25")
                colour = "tab:green" if right else "tab:red"
                text.text(0, 0.86 - number / 3, said, va="top", fontsize=10, weight="bold", color=colour)
        save_figure(figure, run / "sheet.png")


if __name__ == "__main__":
    torch.manual_seed(0)
    try:
        main()
    except (OSError, ValueError, RunError) as error:  # files of the user, or a folder in use: the message says what
        sys.exit(f"report.py: {error}")
