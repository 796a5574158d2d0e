"""What a run tells of itself while it works."""

import time


class Speed:
    """Time and amount of work since the last report; validation and checkpoints are not counted."""

    def __init__(self):
        self.waiting = self.computing = 0.0  # seconds
        self.samples, self.tokens = 0, 0  # of this process; of all processes
        self._ready = time.perf_counter()

    def batch(self, seconds: float, samples: int, tokens) -> None:
        """A batch has come after `seconds` of waiting."""
        self.waiting += seconds
        self.samples += samples
        self.tokens += tokens
        self._ready = time.perf_counter()

    def step_done(self) -> None:
        self.computing += time.perf_counter() - self._ready

    def report(self, world_size: int) -> dict[str, float]:
        """Figures since the last call."""
        seconds = max(self.waiting + self.computing, 1e-9)
        figures = {
            "samples_per_second": self.samples * world_size / seconds,
            "supervised_tokens_per_second": float(self.tokens) / seconds,
            "seconds_waiting_for_data": self.waiting,
            "seconds_computing": self.computing,
        }
        self.__init__()
        return {name: round(value, 3) for name, value in figures.items()}
