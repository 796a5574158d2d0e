from model.model import MultiModalModel

__all__ = ["MultiModalModel"]
