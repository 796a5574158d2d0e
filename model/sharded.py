"""Weights that lie divided among processes (FSDP2, DeepSpeed ZeRO-3), put together as those of one process.

Under FSDP2 a parameter is a `DTensor`; under ZeRO-3 it is empty between its uses and has a `ds_id`. Whatever asks for
the whole of one is a collective operation: all processes come here, for the same tensors in the same order.
"""

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor that one process alone would have, without a gradient history; itself where it isn't divided."""
    if isinstance(tensor, DTensor):
        return tensor.detach().full_tensor()
    if hasattr(tensor, "ds_id"):
        import deepspeed  # parameters of its kind exist only where it is installed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.detach()


def whole_state(module: nn.Module, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """`module.state_dict()` of the names that are wanted, whole and on the CPU; empty but in process 0.

    Tensors are put together one at a time, so that a device never holds all of them. Names that share a tensor share
    it here, too.
    """
    state, seen = {}, {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not wanted(name):
            continue
        if id(tensor) not in seen:
            gathered = whole(tensor)
            # What nobody keeps is dropped before the next one comes.
            seen[id(tensor)] = gathered.cpu().contiguous() if is_first_process() else None
        if seen[id(tensor)] is not None:
            state[name] = seen[id(tensor)]
    return state


def is_first_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def map_tensors(value, function: Callable[[Tensor], Tensor]):
    """Nested dicts and lists with `function` applied to each tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(inner, function) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(inner, function) for inner in value)
    return value


def num_bytes(value) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    sizes: list[int] = []
    map_tensors(value, lambda tensor: sizes.append(tensor.nbytes) or tensor)
    return sum(sizes)
