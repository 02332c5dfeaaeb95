"""The processes of one training: who am I, on which device, and what do the others say."""

import os
import socket
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from kdbench.errors import UserError
from kdbench.settings import Hardware


@dataclass(frozen=True)
class Processes:
    """One process among those of a training.

    Attributes:
        rank: number of this process, from 0; number 0 alone writes files.
        world: how many there are.
        device: where this one computes.
    """

    rank: int
    world: int
    device: torch.device

    def sum(self, values: Tensor) -> list[float]:
        """Element-wise sum over all processes, in double precision; waits for the device once."""
        values = values.double()
        if dist.is_initialized():
            dist.all_reduce(values)
        return values.tolist()

    def share(self, value=None):
        """What process 0 says: its value, in every process."""
        if not dist.is_initialized():
            return value
        box = [value]
        dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def gather(self, value) -> list:
        """The values of all processes, in every process, by rank."""
        if not dist.is_initialized():
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        if dist.is_initialized():
            dist.barrier()

    def end(self) -> None:
        """Leave the group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def start(hardware: Hardware) -> Processes:
    """Join the processes that torchrun started, or be the only one.

    Raises:
        UserError: GPUs are asked for and there are none; torchrun started another number of processes than configured.
    """
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if hardware.processes not in (None, world):
        raise UserError(
            f"hardware.processes: {hardware.processes} asked for, {world} started: "
            f"start the training with torchrun --nproc_per_node {hardware.processes}"
        )
    device = _device(hardware, local)
    torch.set_num_threads(hardware.threads)
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = (
            "cpu"  # else DeepSpeed, which transformers imports when it saves, warns that it found no GPU
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if hardware.engine == "deepspeed":
        _start_deepspeed(device)
    elif "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(dist.get_rank() if dist.is_initialized() else 0, world, device)


def _device(hardware: Hardware, local: int) -> torch.device:
    available = torch.cuda.device_count()
    wanted = (1 if available else 0) if hardware.gpus == "auto" else hardware.gpus
    if not wanted:
        return torch.device("cpu")
    if local >= available:
        raise UserError(
            f"hardware.gpus: {hardware.gpus}, but process {local + 1} of this machine finds {available} GPUs: "
            "set `gpus: 0` to train on the CPU, or fewer processes"
        )
    return torch.device("cuda", local)


def _start_deepspeed(device: torch.device) -> None:
    """DeepSpeed wants a process group even for one process."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in alone.items()})
    import logging

    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
        False  # inference only; on a CPU it would compile for minutes
    )
    deepspeed.init_distributed("gloo" if device.type == "cpu" else None)
