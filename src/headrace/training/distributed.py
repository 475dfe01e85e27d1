"""Several processes that train one network together, as torchrun starts them.

What is shared is arithmetic, so little has to be said between the processes. Every rank holds the
same weights, reads its slice of the same global batch (``data/order.py``), and after the backward
pass the gradients are added up. A loss is a sum over rows divided by a sum of row weights, so each
rank divides by the weights of the *global* batch: then the sum of the ranks' gradients is the
gradient of one process over all rows, whatever the slices' sizes, weights and missing labels. The
same goes for batch norm, whose means are taken over the global batch, and for the losses that
decide on early stopping.

Per step: one small all-reduce (losses and weights), one of all gradients in one flat tensor, three
per batch norm (two forward, one or two back). Not torch's DistributedDataParallel: it averages
what ranks of unequal slices must not average, wraps the network (other names in its state,
another object to call), and its gain, sending while the backward pass still runs, is for networks
far larger than those of tables. The flat tensor costs one more copy of the gradients.

Ranks say through the rendezvous store how they ended, so that one that fails ends the others with
its name and message; one that dies or hangs is found by its closed connection or by the time-out.

With 2 ranks and with 1, the same: rows of every global batch, steps, initial weights. Equal up to
rounding: losses, gradients, weights. Not the same: dropout masks (each rank draws its own, a pure
function of seed, rank and step), so with dropout the weights differ as those of two seeds do.
"""

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeAlias, TypeVar, cast

import psutil
import torch
import torch.distributed as dist
from torch import nn

from headrace.errors import (
    ConfigError,
    DependencyError,
    HeadraceError,
    IntegrityError,
    ResourceError,
    Stopped,
    explain,
)
from headrace.storage import digest_bytes
from headrace.training.device import pick_device

T = TypeVar("T")
Store: TypeAlias = Any  # torch.distributed.Store, which torch does not export to type checkers
TIMEOUT_S = 600.0  # a checkpoint is written and a slow rank waited for in less
_HEAR_S = 3.0  # how long a rank that was cut off listens for the reason
_POLL_S = 0.05


@dataclass(frozen=True)
class Launch:
    """What torchrun tells each process it starts."""

    rank: int
    size: int
    local_rank: int  # among the processes of this machine
    local_size: int
    has_agent: bool  # whether the parent process is torchrun's own


def read_launch(environ: Mapping[str, str]) -> Launch | None:
    """Return the launch that ``environ`` describes; None for a process that trains alone.

    Raises:
        ConfigError: if some of torchrun's variables are missing or make no sense.
    """
    world = environ.get("WORLD_SIZE", "1")
    if world == "1":
        return None
    remedy = (
        "start with `torchrun --nproc-per-node N -m headrace stage train@nn`, or unset WORLD_SIZE"
    )
    if not world.isdecimal():
        raise ConfigError(f"WORLD_SIZE is {world!r}, which is no number of processes; {remedy}")
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if not environ.get(name)]:
        are = "is" if len(missing) == 1 else "are"
        raise ConfigError(
            f"WORLD_SIZE is {world!r}, but {', '.join(missing)} {are} not set; {remedy}"
        )
    numbers = {
        name: environ.get(name, world)
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    }
    if wrong := [f"{name} is {text!r}" for name, text in numbers.items() if not text.isdecimal()]:
        raise ConfigError(f"{', '.join(wrong)}, which is no whole number; let torchrun set it")
    size, rank, local_rank, local_size = map(int, numbers.values())
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise ConfigError(
            f"RANK {rank} of WORLD_SIZE {size}, LOCAL_RANK {local_rank} of LOCAL_WORLD_SIZE "
            f"{local_size} make no sense; let torchrun set them"
        )
    return Launch(rank, size, local_rank, local_size, "TORCHELASTIC_RUN_ID" in environ)


@dataclass(frozen=True)
class Ranks:
    """This process among those that train one network; every method is called by all of them.

    A process alone is rank 0 of 1, for which each method costs nothing and changes no bit.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def share_of(self, batch_rows: int) -> int:
        """Return a rank's rows of a global batch of ``batch_rows``.

        Raises:
            ConfigError: if the ranks cannot divide it evenly.
        """
        if batch_rows % self.size:
            less = batch_rows - batch_rows % self.size
            near = f"{less} or {less + self.size}" if less else f"{self.size}"
            raise ConfigError(
                f"`train.nn.batch_rows`, the rows of all ranks together, is {batch_rows}, which "
                f"{self.size} ranks cannot divide evenly; set it to a multiple of {self.size}, "
                f"such as {near}, or start another number of ranks"
            )
        return batch_rows // self.size

    def device(self, wanted: str) -> torch.device:
        """Return the device of this rank; see ``pick_device``.

        Raises:
            ConfigError: if ranks of one machine would share a GPU.
            DependencyError: if the device asked for is not there.
        """
        device = pick_device(wanted)
        if self.size == 1 or device.type == "cpu":
            return device
        if device.type != "cuda":
            raise ConfigError(
                f"{self.size} ranks cannot share the device {device.type}; set `train.nn.device` "
                f"to cpu"
            )
        if self.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"rank {self.rank} has no GPU of its own: this machine has "
                f"{torch.cuda.device_count()}; start as many ranks per machine, or set "
                f"`train.nn.device` to cpu"
            )
        return torch.device("cuda", self.local_rank)

    def summed(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of ``values`` over the ranks: on each the same bits; no gradient."""
        if self.size == 1:
            return values
        total = values.detach().clone()
        with _talk("a sum over the ranks"):
            dist.all_reduce(total)
        return total

    def sum_gradients(self, network: nn.Module) -> None:
        """Replace each gradient by its sum over the ranks.

        A parameter that no rank used keeps none, as with one process.
        """
        if self.size == 1:
            return
        parameters = [p for p in network.parameters() if p.requires_grad]
        parts = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
        is_used = parts[0].new_tensor([p.grad is not None for p in parameters])
        total = self.summed(torch.cat([*parts, is_used]))
        *sums, is_used = torch.split(total, [*map(torch.numel, parameters), len(parameters)])
        for parameter, gradient, uses in zip(parameters, sums, is_used.tolist(), strict=True):
            parameter.grad = gradient.view_as(parameter) if uses else None

    def gathered(self, value: T) -> list[T]:
        """Return the value of every rank, by rank; anything that pickles."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _talk("a message to all ranks"):
            dist.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """Return what ``make`` returns on rank 0, which alone calls it."""
        if self.size == 1:
            return make()
        box = [make() if self.is_first else None]
        with _talk("a message from rank 0"):
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        value: Any = box[0]
        return value  # type: ignore[no-any-return]

    def require_same(self, what: str, digest: str) -> None:
        """Check that every rank has the same ``digest`` of ``what``.

        Raises:
            IntegrityError: if not, naming the ranks that differ from rank 0.
        """
        digests = self.gathered(digest)
        if others := [rank for rank, one in enumerate(digests) if one != digests[0]]:
            raise IntegrityError(
                f"{what} on rank {', '.join(map(str, others))} is not that of rank 0; all machines "
                f"need the same data, params.yaml, and versions of headrace and torch"
            )

    def share_norms(self, network: nn.Module) -> None:
        """Let every batch norm of ``network`` take its statistics over the global batch."""
        for module in network.modules() if self.size > 1 else ():
            if type(module) is nn.BatchNorm1d:
                # The same parameters and names, another forward: state and optimiser stay valid.
                module.__class__ = GlobalBatchNorm1d


def own_norms(network: nn.Module) -> None:
    """Let the batch norms of ``network`` take their statistics over this rank's rows again."""
    for module in network.modules():
        if type(module) is GlobalBatchNorm1d:
            module.__class__ = nn.BatchNorm1d  # type: ignore[assignment]  # what it was


ALONE = Ranks()
_current = ALONE


def current_ranks() -> Ranks:
    """Return this process's place in the group that ``joined`` opened; alone outside of one."""
    return _current


@contextlib.contextmanager
def joined(launch: Launch, *, timeout_s: float = TIMEOUT_S) -> Iterator[Ranks]:
    """Be one of the ranks that ``launch`` tells of until the block ends; they leave together.

    Collectives use gloo for tensors in memory and nccl for those on a GPU. If the block fails on
    one rank it ends on all of them, each with an error that names the first that failed.

    Raises:
        DependencyError: if the ranks do not find each other within ``timeout_s``.
        HeadraceError: of another rank, with that one's exit code.
        ResourceError: if a rank died or did not answer within ``timeout_s``.
    """
    global _current
    store = _meet(launch, timeout_s)
    ends = _Ends(store, launch, timeout_s)
    _current = Ranks(launch.rank, launch.size, launch.local_rank)
    try:
        yield _current
    except BaseException as error:
        told = ends.after(error)
        if told is error:
            raise
        raise told from error
    else:
        ends.leave()
    finally:
        _current = ALONE
        if dist.is_initialized():
            dist.destroy_process_group()
        ends.close()


class GlobalBatchNorm1d(nn.BatchNorm1d):
    """Batch norm over the rows of all ranks; one rank's rows may be few, or none.

    Shape: (B, F) -> (B, F). The mean first, then the squares around it, as exact as with one
    process. torch's own SyncBatchNorm is for GPUs only.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise ``input``; in training, by the statistics of the global batch."""
        if not self.training:
            return super().forward(input)
        num_rows = _summed(input.new_tensor([float(len(input))]))
        mean_F = _summed(input.sum(dim=0)) / num_rows
        centred_BF = input - mean_F
        var_F = _summed((centred_BF**2).sum(dim=0)) / num_rows
        if self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                rate = 0.1 if self.momentum is None else self.momentum
                unbiased_F = var_F * num_rows / (num_rows - 1).clamp_min(1)
                self.running_mean.lerp_(mean_F.detach(), rate)
                self.running_var.lerp_(unbiased_F.detach(), rate)
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
        out_BF = centred_BF * torch.rsqrt(var_F + self.eps)
        return torch.addcmul(self.bias, out_BF, self.weight) if self.affine else out_BF


def _summed(values: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, _SumOverRanks.apply(values))  # type: ignore[no-untyped-call]


class _SumOverRanks(torch.autograd.Function):
    """The sum over the ranks; its gradient is summed too, for every rank's loss depends on it."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        del ctx
        return _current.summed(values)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        del ctx
        return _current.summed(gradients[0])


class _LostContact(ResourceError):
    """A collective did not come to its end: the effect, on this rank, of another's trouble."""


@contextlib.contextmanager
def _talk(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what gloo and nccl raise; they have no class of their own
        reason = re.sub(r"^\[[^]]*\] *", "", str(error))  # gloo begins with its source file
        raise _LostContact(f"{what} failed: {reason}") from error


def _meet(launch: Launch, timeout_s: float) -> Store:
    """Open torch's process group; return the store through which the ranks found each other."""
    timeout = timedelta(seconds=timeout_s)
    backend = "gloo"
    if torch.cuda.is_available() and launch.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(launch.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    try:
        found = dist.rendezvous(  # type: ignore[attr-defined]
            "env://", launch.rank, launch.size, timeout=timeout
        )
        store = next(iter(found))[0]
        store.set_timeout(timeout)
        store = dist.PrefixStore("headrace", store)  # type: ignore[attr-defined]
        dist.init_process_group(
            backend, store=store, rank=launch.rank, world_size=launch.size, timeout=timeout
        )
    except RuntimeError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise DependencyError(
            f"rank {launch.rank} did not find the other ranks of {launch.size} at {where} within "
            f"{timeout_s:g} s ({error}); check that all were started and that the port is open"
        ) from error
    return store


class _Ends:
    """How each rank ended, told through the store: a code, a message, and whose fault it was."""

    def __init__(self, store: Store, launch: Launch, timeout_s: float) -> None:
        self._store = store
        self._launch = launch
        self._timeout_s = timeout_s
        store.set(f"process/{launch.rank}", json.dumps([socket.gethostname(), os.getpid()]))

    def leave(self) -> None:
        """Say that this rank is done; all but the first wait until that one is, however long."""
        with contextlib.suppress(RuntimeError):  # the store has gone with rank 0: it is done
            self._tell(0, "", is_echo=False)
            while self._launch.rank != 0 and not self._store.check(["end/0"]):
                time.sleep(_POLL_S)

    def close(self) -> None:
        """Keep the store until all ranks have heard; without torchrun it is in rank 0's process."""
        if self._launch.has_agent:
            return
        with contextlib.suppress(RuntimeError):
            if self._launch.rank > 0:
                self._store.set(f"left/{self._launch.rank}", "")
                return
            until = time.monotonic() + _HEAR_S
            waited_for = set(range(1, self._launch.size))
            while waited_for and time.monotonic() < until:
                waited_for -= {rank for rank in waited_for if self._has_left(rank)}
                time.sleep(_POLL_S)

    def _has_left(self, rank: int) -> bool:
        return bool(self._store.check([f"left/{rank}"])) or self._is_dead(rank)

    def after(self, error: BaseException) -> BaseException:
        """Return what to raise in place of ``error``: itself, or what made it happen."""
        is_echo = isinstance(error, _LostContact)
        message, code = explain(error)
        try:
            self._tell(code, message, is_echo=is_echo)
            if not is_echo and not isinstance(error, Stopped):
                return error
            return self._cause(error)
        except RuntimeError:  # the store is gone too
            return error
        except Stopped:  # torchrun stops all ranks as soon as one has failed
            return self._cause(error)

    def _cause(self, error: BaseException) -> BaseException:
        ends, dead = self._listen()
        size = self._launch.size
        own = [(rank, end) for rank, end in ends.items() if not end["is_echo"]]
        for rank, end in own:
            if end["code"] not in (0, Stopped.exit_code):
                cause = HeadraceError(f"rank {rank} of {size} failed: {end['message']}")
                cause.exit_code = end["code"]
                return cause
        if dead:
            return ResourceError(
                f"rank {', '.join(map(str, dead))} of {size} ended without a word: killed, perhaps "
                f"for want of memory; run again to resume from the last checkpoint"
            )
        if isinstance(error, Stopped):
            return error
        if stopped := [end for _, end in own if end["code"] == Stopped.exit_code]:
            return Stopped(stopped[0]["message"])
        silent = [r for r in range(size) if r != self._launch.rank and r not in ends]
        if not silent:
            return error
        return ResourceError(
            f"rank {', '.join(map(str, silent))} of {size} did not answer within "
            f"{self._timeout_s:g} s: it hangs, or its machine cannot be reached ({error}); run "
            f"again to resume from the last checkpoint"
        )

    def _listen(self) -> tuple[dict[int, Any], list[int]]:
        """Return how the other ranks ended, and which died without telling."""
        until = time.monotonic() + _HEAR_S
        others = [rank for rank in range(self._launch.size) if rank != self._launch.rank]
        while True:
            told = [rank for rank in others if self._store.check([f"end/{rank}"])]
            ends = {rank: json.loads(self._store.get(f"end/{rank}")) for rank in told}
            dead = [rank for rank in others if rank not in ends and self._is_dead(rank)]
            if len(ends) + len(dead) == len(others) or time.monotonic() > until:
                return ends, dead
            time.sleep(_POLL_S)

    def _tell(self, code: int, message: str, *, is_echo: bool) -> None:
        end = {"code": code, "message": message, "is_echo": is_echo}
        self._store.set(f"end/{self._launch.rank}", json.dumps(end))

    def _is_dead(self, rank: int) -> bool:
        """Whether the process of ``rank``, if it was on this machine, is gone."""
        if not self._store.check([f"process/{rank}"]):
            return False
        host, pid = json.loads(self._store.get(f"process/{rank}"))
        if host != socket.gethostname():
            return False
        try:
            return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True


def weights_digest(network: nn.Module) -> str:
    """Return the digest of all weights and buffers of ``network``, by name and bit."""
    parts = []
    for name, value in network.state_dict().items():
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        parts.append(f"{name} {digest_bytes(content.tobytes())}")
    return digest_bytes("\n".join(parts).encode())
