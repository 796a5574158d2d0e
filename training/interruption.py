"""How a run ends before its time: by a signal after the step in hand; and whatever ends it, its curves are drawn."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from run_folder import CURVES_FILE
from training.trainer import VLMTrainer

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stopping_on_signals(trainer: VLMTrainer) -> Iterator[None]:
    """SIGTERM, which schedulers send before they kill, or Ctrl-C ends a run after the step in hand, with a checkpoint.

    A second Ctrl-C is a `KeyboardInterrupt`.
    """
    main_process = os.getpid()

    def stop(number: int, frame) -> None:
        if os.getpid() != main_process:  # a data loader's process, which has this from its parent
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if number == trainer.stop_signal == signal.SIGINT:
            raise KeyboardInterrupt
        trainer.stop_signal = number
        if trainer.is_world_process_zero():
            again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
            # Not print: the signal may have come in the middle of one.
            os.write(2, f"\nstopping after the step in hand, with a checkpoint{again}\n".encode())

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def drawing_curves(trainer: VLMTrainer) -> Iterator[None]:
    """Leaves `loss_curves.png` in the output folder, also where an error ends the run; not if it is to end at once."""
    try:
        yield
    finally:
        trainer.console.close()
        at_once = isinstance(sys.exc_info()[1], KeyboardInterrupt)
        if trainer.is_world_process_zero() and not at_once:
            draw_curves(trainer)


def draw_curves(trainer: VLMTrainer) -> None:
    """Draws what has been logged. It can fail without harm: the log is there, and `training.curves` draws it later."""
    history = trainer.state.log_history
    if not any("loss" in entry for entry in history):
        return
    try:
        from training.curves import draw  # a second that no run needs at its start

        draw({"": history}, Path(trainer.args.output_dir, CURVES_FILE))
    except Exception as error:  # whatever it is, it must not hide what ended the run, nor end one that is finished
        print(f"no curves were drawn: {error!r}", file=sys.stderr)
