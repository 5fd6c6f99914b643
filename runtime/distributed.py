"""One training in several processes, started by torchrun on one machine or on many.

torchrun --nproc-per-node=2 train.py --model cnn

Without torchrun there is one process, and these functions do next to nothing.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from runtime.errors import UserError


class LostProcess(UserError):
    """Another process of this training is gone."""


def local_rank() -> int:
    """Return the number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def restarted() -> bool:
    """Say whether torchrun started this process again after another had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Join the other processes, if torchrun started any: over NCCL on GPUs, else over Gloo. Leave them at the end.

    Raises LostProcess when another one is gone.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, world, *_ = next(dist.rendezvous("env://"))
    # torchrun keeps one store through all its attempts; a worker could find the address of a dead one in it.
    attempt = f"{os.environ['TORCHELASTIC_RESTART_COUNT']} of {world}"
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore(attempt, store), rank=rank, world_size=world)
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise LostProcess(
            "another process of this training is gone; torchrun --max-restarts=3 starts all anew"
        ) from error
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Return the number of this process among all; the first is 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wrap(model: torch.nn.Module, images: torch.Tensor) -> torch.nn.Module:
    """Make the model average its gradients over all processes; images are any that it takes.

    DistributedDataParallel sorts gradients into other buckets after its first step, and sums are then rounded in
    another order. That first step is taken here, without effect, so that a resumed run equals an uninterrupted one. It
    must also know whether the loss leaves parameters unused.
    """
    if world() == 1:
        return model
    model.eval()  # without an effect on running statistics either
    model(images).sum().backward()
    unused = any(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    model.zero_grad()
    network = DistributedDataParallel(model, find_unused_parameters=unused)
    network(images).sum().backward()
    model.zero_grad()
    model.train()
    return network


def share_buffers(model: torch.nn.Module) -> None:
    """Give the model of every process the buffers of the first one's, such as batch norm's running statistics."""
    if world() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def add_up(*numbers: float) -> list[float]:
    """Sum each of these numbers over all processes."""
    device = torch.device("cuda") if world() > 1 and dist.get_backend() == "nccl" else None
    return sum_tensor(torch.tensor(numbers, dtype=torch.double, device=device)).tolist()


def sum_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all processes, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def from_first(function: Callable[[], Any]) -> Any:
    """Call a function in the first process only, and return its result in all. A UserError is raised in all."""
    if world() == 1:
        return function()
    answer: list[Any] = [None, None]
    if rank() == 0:
        try:
            answer[0] = function()
        except (UserError, OSError) as error:
            answer[1] = error
    dist.broadcast_object_list(answer)
    if answer[1]:
        raise answer[1]
    return answer[0]
