"""What differs between plain PyTorch and DeepSpeed, behind one interface. The training loop above it is written once.

Both average gradients over the processes. The loop multiplies a sum over response tokens by world / N, N being the response tokens of
the whole global batch, so that the averaged gradient is that of the mean over N tokens however they are spread.
"""

import contextlib
import math
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdbench.errors import UserError
from kdbench.settings import Hardware, Training
from kdbench.training.distiller import Distiller
from kdbench.training.processes import Processes


class Engine(Protocol):
    """Gradients, the optimizer and their state on disk.

    Attributes:
        module: the distiller; to run without gradient.
        net: the same as it has to be called when gradients are wanted.
    """

    module: Distiller
    net: nn.Module

    def accumulate(self, last: bool):
        """A context for forward and backward of one micro-batch; `last` of its step or not."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss that is scaled as the module's docstring says."""

    def step(self, rate: float) -> float:
        """Clip, update at this share of the peak rates, clear the gradients; the gradient's norm before clipping."""

    def save(self, folder: Path) -> None:
        """Write weights and optimizer; called in all processes."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""

    def weights(self) -> dict[str, Tensor]:
        """The student's whole trainable weights in float32, by name, in process 0; called in all processes."""

    def rates(self) -> list[float]:
        """Current learning rate of the student, and of the method if it learns."""


def groups(distiller: Distiller, training: Training) -> list[dict]:
    """Parameter groups of AdamW: student and method at their own rates, each with and without weight decay."""
    found = []
    for module, peak in (
        (distiller.student, training.learning_rate),
        (distiller.method, training.projector_learning_rate),
    ):
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in trained if parameter.ndim >= 2]
        vectors = [parameter for parameter in trained if parameter.ndim < 2]  # biases and norms
        for parameters, decay in ((matrices, training.weight_decay), (vectors, 0.0)):
            if parameters:
                found.append({"params": parameters, "lr": peak, "weight_decay": decay})
    return found


def build(distiller: Distiller, training: Training, hardware: Hardware, processes: Processes) -> Engine:
    """The configured engine around a distiller on its device."""
    kind = DeepSpeed if hardware.engine == "deepspeed" else Plain
    return kind(distiller, training, hardware, processes)


class _Rates:
    """Learning rates as a function of the step alone, so that there is no scheduler whose state could be lost."""

    def __init__(self, optimizer: torch.optim.Optimizer, distiller: Distiller):
        self.optimizer = optimizer  # not its groups: loading a checkpoint makes new ones
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        own = {id(parameter) for parameter in distiller.method.parameters()}
        of_method = [any(id(parameter) in own for parameter in group["params"]) for group in optimizer.param_groups]
        self.shown = [of_method.index(kind) for kind in (False, True) if kind in of_method]

    def set(self, share: float) -> None:
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * share

    def get(self) -> list[float]:
        return [self.optimizer.param_groups[index]["lr"] for index in self.shown]


def _adamw(distiller: Distiller, training: Training, fused: bool = False) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups(distiller, training), betas=tuple(training.betas), fused=fused)


class Plain:
    """PyTorch as it is; with several processes DistributedDataParallel. bf16 is autocast over float32 weights."""

    def __init__(self, distiller: Distiller, training: Training, hardware: Hardware, processes: Processes):
        self.module = self.net = distiller
        self.clip_norm = training.clip_norm
        self.parameters = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
        self.optimizer = _adamw(distiller, training, fused=True)  # on a CPU the default takes 4 to 8 times as long
        self._rates = _Rates(self.optimizer, distiller)
        self._parallel = dist.is_initialized()
        if self._parallel:
            self.net = nn.parallel.DistributedDataParallel(distiller, broadcast_buffers=False)

    def accumulate(self, last: bool):
        return contextlib.nullcontext() if last or not self._parallel else self.net.no_sync()

    def backward(self, loss: Tensor) -> None:
        if self._parallel:  # a projector that had no pairs in this micro-batch: DDP waits for its gradient all the same
            loss = loss + sum(0.0 * parameter.sum() for parameter in self.module.method.parameters())
        loss.backward()

    def step(self, rate: float) -> float:
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip_norm).item()
        if math.isfinite(norm):
            self._rates.set(rate)
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def save(self, folder: Path) -> None:
        if dist.is_initialized() and dist.get_rank():
            return
        torch.save({"module": self._state(), "optimizer": self.optimizer.state_dict()}, folder / "state.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        self.module.load_state_dict(self.module.state_dict() | state["module"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _state(self) -> dict[str, Tensor]:
        named = self.module.named_parameters(remove_duplicate=False)  # a tied head goes by two names
        frozen = {name for name, parameter in named if not parameter.requires_grad}
        return {name: value for name, value in self.module.state_dict().items() if name not in frozen}

    def weights(self) -> dict[str, Tensor]:
        named = self.module.student.named_parameters()
        return {name: parameter.detach() for name, parameter in named if parameter.requires_grad}

    def rates(self) -> list[float]:
        return self._rates.get()


class DeepSpeed:
    """ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054), stages 0 to 3.

    bf16 keeps bf16 weights for the forward and backward pass, and float32 weights in the optimizer; the latter are what is exported.

    Raises:
        UserError: stage 0 with bf16. DeepSpeed then makes an AdamW step with zero gradients at the start and does not take it back, which
            spoils the bias correction of every later step.
    """

    persistent = 100_000  # weights smaller than this stay whole in stage 3 (DeepSpeed's default)

    def __init__(self, distiller: Distiller, training: Training, hardware: Hardware, processes: Processes):
        import deepspeed

        stage, narrow = hardware.zero_stage, training.precision == "bf16"
        if stage == 0 and narrow:
            raise UserError(
                "hardware.zero_stage 0 with training.precision bf16: DeepSpeed's optimizer for this pair starts with a false step; "
                "set `zero_stage: 1`, `precision: fp32` or `engine: plain`"
            )
        config = {
            "train_micro_batch_size_per_gpu": 1,  # only counts samples for DeepSpeed's own log
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "gradient_clipping": training.clip_norm if stage else 0.0,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": self.persistent},
            "bf16": {"enabled": narrow},
            "steps_per_print": 10**9,
        }
        if narrow:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        optimizer = _adamw(distiller, training)
        rates = _Rates(optimizer, distiller)
        self.module = distiller
        self.net, *_ = deepspeed.initialize(model=distiller, optimizer=optimizer, config=config)
        rates.optimizer = self.net.basic_optimizer
        self._rates, self._stage, self._rank = rates, stage, processes.rank
        self._norm = torch.zeros(())
        if not stage:  # stage 0 does not tell the norm: clip between its all-reduce and the update
            parameters = [parameter for parameter in distiller.parameters() if parameter.requires_grad]

            def clip(*_):
                self._norm = nn.utils.clip_grad_norm_(parameters, training.clip_norm)

            self.net.basic_optimizer.register_step_pre_hook(clip)

    def accumulate(self, last: bool):
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.net.backward(loss, scale_wrt_gas=False)

    def step(self, rate: float) -> float:
        self._rates.set(rate)
        self.net.step()
        return float(self.net.get_global_grad_norm() if self._stage else self._norm)

    def save(self, folder: Path) -> None:
        self.net.save_checkpoint(str(folder), tag="zero", save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        path, _ = self.net.load_checkpoint(str(folder), tag="zero", load_module_strict=False)
        if path is None:
            raise UserError(f"{folder} holds no DeepSpeed checkpoint: delete it and run again")

    def weights(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        found = {}
        for name, parameter in self.module.student.named_parameters():
            if not parameter.requires_grad:
                continue
            full = safe_get_full_fp32_param(parameter) if self._stage else parameter.detach()
            if self._rank == 0:
                found[name] = full.float().cpu().clone()
        return found

    def rates(self) -> list[float]:
        return self._rates.get()
