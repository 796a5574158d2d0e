from model.model import GREEDY, MultiModalModel

__all__ = ["GREEDY", "MultiModalModel"]
