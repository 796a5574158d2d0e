"""The state of an optimizer as one process alone would have it, from and into optimizers that lie divided.

The form is that of `torch.optim.Optimizer.state_dict()` with the groups of `model.optim.parameter_groups`, whether the
run was on one process, data-parallel, under FSDP2 or under DeepSpeed's ZeRO. So each of them reads what another wrote.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from model.sharded import is_first_process, map_tensors, whole

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, shaped like their parameter


def whole_state(optimizer: torch.optim.Optimizer) -> dict:
    """State of an optimizer of torch, its parameters perhaps `DTensor`s. All processes come here together.

    What was divided is on the CPU, and complete in process 0 alone.
    """
    return map_tensors(optimizer.state_dict(), _gathered)


def _gathered(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    gathered = whole(tensor)
    return gathered.cpu() if is_first_process() else torch.empty(0)


def restore(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Loads what `whole_state` gave into an optimizer of torch.

    Raises:
        ValueError: it has other groups or parameters.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        index: {name: _divided(value, parameters[index]) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})


def _divided(value: Tensor, parameter: Tensor) -> Tensor:
    """A state tensor divided as its parameter is."""
    if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
        # Every process has read the same file: nothing needs to be sent.
        value = value.to(parameter.device)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value


def whole_zero_state(engine, groups: list[dict]) -> dict:
    """State of the AdamW inside of a DeepSpeed engine (ZeRO-2 or -3). All processes come here together.

    Args:
        groups: of `parameter_groups`, by whose order parameters are numbered.

    Returns:
        The state, complete in process 0 alone.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    step = next(iter(engine.optimizer.optimizer.state.values()))["step"]
    _link(engine.optimizer)
    state, numbered, index = {}, [], 0
    for group, options in zip(groups, engine.optimizer.optimizer.param_groups, strict=True):
        numbered.append({**{key: value for key, value in options.items() if key != "params"}, "params": []})
        for parameter in group["params"]:
            moments = {}
            for name in MOMENTS:
                gathered = safe_get_full_optimizer_state(parameter, name)
                moments[name] = gathered.cpu() if is_first_process() else None
            state[index] = {"step": step.detach().cpu().clone(), **moments}
            numbered[-1]["params"].append(index)
            index += 1
    return {"state": state, "param_groups": numbered}


def restore_zero(engine, groups: list[dict], state: dict) -> None:
    """Loads what `whole_zero_state` or `whole_state` gave into a fresh DeepSpeed engine.

    Raises:
        ValueError: it has other groups or parameters.
    """
    zero = engine.optimizer
    sizes = [len(group["params"]) for group in groups]
    if sizes != [len(group["params"]) for group in state["param_groups"]]:
        raise ValueError(f"the optimizer's state has groups of other sizes than those of the model, {sizes}")
    for options, saved in zip(zero.optimizer.param_groups, state["param_groups"], strict=True):
        options.update({key: value for key, value in saved.items() if key != "params"})
    if not state["state"]:
        return
    step = next(iter(state["state"].values()))["step"]
    flats = zero.fp32_partitioned_groups_flat if _is_stage_3(zero) else zero.single_partition_of_fp32_groups
    for flat in flats:  # which torch's AdamW would otherwise make at its first step
        moments = {name: torch.zeros_like(flat) for name in MOMENTS}
        zero.optimizer.state[flat] = {"step": step.clone().to(flat.device), **moments}
    _link(zero)
    parameters = [parameter for group in groups for parameter in group["params"]]
    for index, parameter in enumerate(parameters):
        for name in MOMENTS:
            _set_zero_state(parameter, state["state"][index][name], name)


def _is_stage_3(zero) -> bool:
    return hasattr(zero, "fp32_partitioned_groups_flat")


def _link(zero) -> None:
    """Tells ZeRO-2's parameters where their moments lie. It does so itself within the first step, but when only those
    of the first group exist."""
    if not _is_stage_3(zero):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _set_zero_state(parameter: nn.Parameter, value: Tensor, name: str) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if not hasattr(parameter, "ds_id"):
        safe_set_full_optimizer_state(parameter, value.to(parameter.device), name)
        return
    size = parameter.ds_tensor.numel()  # of a process's part; the last one is filled up with zeros
    rank = torch.distributed.get_rank(parameter.ds_process_group)
    flat = value.flatten()[rank * size : (rank + 1) * size]
    safe_set_local_optimizer_state(parameter, F.pad(flat, (0, size - len(flat))).to(parameter.ds_tensor.device), name)
