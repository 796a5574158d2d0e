"""The training loop."""

from .arguments import learning_rates, training_arguments
from .trainer import VLMTrainer

__all__ = ["VLMTrainer", "learning_rates", "training_arguments"]
