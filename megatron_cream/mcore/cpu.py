# SPDX-License-Identifier: Apache-2.0
"""Megatron's own trainer on a machine with no GPU: the CPU stands in for ``torch.cuda``.

For trying things out, for tests and for demos; opted into by ``--cpu``, never by import, and
refused where a real GPU is present. ``install`` must run before megatron is imported. The
trainer, its parallel groups (over gloo), optimizer, data loaders and checkpoints are the real
ones. What needs real GPU kernels stays out of reach: sequence parallelism (torch's norms refuse
it), context parallelism and fp8 (Transformer Engine).
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections import UserDict
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

from megatron_cream.errors import UserError
from megatron_cream.mcore.argument_table import flag_of, marked
from megatron_cream.mcore.patches import Patch, patch


def install() -> None:
    """Have ``torch.cuda`` answered by the CPU in this process. Idempotent.

    Raises:
        UserError: a GPU is present.
    """
    # The jit warm-up of Megatron's fusions has nothing to compile for.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if "torch" in sys.modules:  # which may have read that variable already
        import torch._dynamo

        torch._dynamo.config.disable = True
    # Twenty lines per rank on GPU packages that are missing: here they are meant to be.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set")  # by Megatron, always
    # Its random-state tracker wonders, at every dropout, why the CPU's state changed with the
    # GPU's: they are one.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(lambda record: False)
    # Megatron asks for it under tensor parallelism; it orders work on a GPU.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    import torch

    if is_installed():
        return
    if torch.cuda.is_available():
        raise UserError(
            f"--cpu is given and this machine has {torch.cuda.device_count()} GPU(s): leave out "
            "--cpu to use them, or hide them with CUDA_VISIBLE_DEVICES="
        )
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is None:
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_ranks))
    # Torch lists its factories when a device context is first entered; it must list its own.
    from torch.utils._device import _device_constructors

    _device_constructors()
    for each in _PATCHES:
        each.apply()


def is_installed() -> bool:
    """Say whether the CPU stands in for ``torch.cuda`` in this process."""
    return _PATCHES[0].in_place


def validate_flags(args: Any) -> None:
    """Refuse flags that need a GPU's kernels.

    Raises:
        UserError: naming the flag.
    """
    for name in marked("needs_gpu"):
        if getattr(args, name, None):
            raise UserError(f"{flag_of(name)} is given with --cpu: it needs GPUs; leave it out")
    if args.context_parallel_size > 1:
        raise UserError(
            f"--context-parallel-size is {args.context_parallel_size} with --cpu: it must be 1, "
            "ring attention needs Transformer Engine and GPUs"
        )
    if args.cuda_graph_impl != "none":
        raise UserError(
            f"--cuda-graph-impl is {args.cuda_graph_impl!r} with --cpu: it must be 'none'"
        )
    _validate_weight_shards(args)
    if args.num_experts:
        _validate_experts(args)


def _validate_weight_shards(args: Any) -> None:
    """Refuse weights in more shards than tensor parallelism makes, gathered by streams of a GPU."""
    tensor = args.tensor_model_parallel_size
    experts = args.expert_tensor_parallel_size or tensor  # Megatron's default
    for name, size in (("tensor", tensor), ("expert_tensor", experts)):
        shards = getattr(args, f"{name}_parallel_num_weight_shards")
        if shards not in (None, size):
            flag = flag_of(f"{name}_parallel_num_weight_shards")
            raise UserError(
                f"{flag} is {shards} with --cpu: it must be left out, or be {size}, as many as "
                f"{name.replace('_', '-')} parallelism has ranks"
            )


def _validate_experts(args: Any) -> None:
    if args.moe_token_dispatcher_type != "allgather":
        raise UserError(
            f"--moe-token-dispatcher-type is {args.moe_token_dispatcher_type!r} with --cpu: it "
            "must be 'allgather', the others wait for streams of a GPU"
        )
    if args.add_bias_linear:
        raise UserError(
            "--num-experts is given with --cpu: --disable-bias-linear must be given, too; the "
            "local experts add their bias to a tensor that autograd keeps"
        )


_WHY = "torch.cuda and tensors on it are answered by the CPU (--cpu)."
_GROUP = "torch.cuda by the CPU"
_PATCHES: list[Patch] = []


def _replace(*names: str) -> Callable[[Callable[[Any], Any]], None]:
    """Declare what makes the replacement of each of these names of torch's."""

    def declare(make: Callable[[Any], Any]) -> None:
        for name in names:
            _PATCHES.append(patch(name, why=_WHY, group=_GROUP)(make))

    return declare


def _answer(answer: Callable[[], Any], *names: str) -> None:
    """Have functions of ``torch.cuda`` answer so whatever they are given."""
    for name in names:
        _replace(f"torch.cuda:{name}")(lambda own: lambda *_, **__: answer())


def _torch() -> Any:
    import torch

    return torch


def _cpu() -> Any:
    return _torch().device("cpu")


def _properties() -> SimpleNamespace:
    numbers = {"major": 0, "minor": 0, "total_memory": 0, "multi_processor_count": os.cpu_count()}
    return SimpleNamespace(name="CPU", **numbers)


_answer(lambda: True, "is_available", "is_initialized")
# Megatron skips model-parallel set-up where it counts no device.
_answer(lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")), "device_count")
_answer(_cpu, "current_device")
_answer(lambda: (0, 0), "get_device_capability", "mem_get_info")
_answer(_properties, "get_device_properties")
_answer(lambda: "CPU", "get_device_name")
_answer(lambda: None, "set_device", "synchronize", "empty_cache", "reset_peak_memory_stats", "init")
_answer(lambda: None, "nvtx.range_push", "nvtx.range_pop")
_answer(lambda: 0, "memory_allocated", "max_memory_allocated", "memory_reserved")
_answer(lambda: 0, "max_memory_reserved")
_answer(dict, "memory_stats")
_answer(nullcontext, "stream")
# The data loader would pin memory.
_replace("torch.accelerator:is_available")(lambda own: lambda: False)


class _Inert:
    """A stream or event: work on a CPU is done when the call returns."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = "cpu"

    def elapsed_time(self, _: Any) -> float:
        return 0.0

    def query(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        if name in ("record", "wait", "synchronize", "wait_stream", "wait_event", "record_event"):
            return lambda *_, **__: None
        raise AttributeError(name)


_answer(_Inert, "current_stream", "default_stream")
_replace("torch.cuda:Stream", "torch.cuda:Event")(lambda own: type(own.__name__, (_Inert,), {}))


def _both(name: str) -> tuple[str, str]:
    return f"torch.cuda:{name}", f"torch.cuda.random:{name}"


_replace(*_both("get_rng_state"))(lambda own: lambda *_, **__: _torch().get_rng_state())
_replace(*_both("set_rng_state"))(lambda own: lambda state, *_, **__: _torch().set_rng_state(state))
_replace(*_both("manual_seed"), *_both("manual_seed_all"))(
    lambda own: lambda seed: _torch().default_generator.manual_seed(seed)
)
# Megatron's random-state tracker sets the state of the current device's generator.
_replace("torch.cuda:default_generators")(
    lambda own: UserDict({_cpu(): _torch().default_generator})
)
_replace("torch:Tensor.cuda", "torch:Tensor.pin_memory", "torch.nn:Module.cuda")(
    lambda own: lambda self, *_, **__: self
)

# Functions that Megatron asks for tensors on "cuda" by name. Wrapping them costs nothing where no
# tensor is made; a torch function mode would cost 15 us at every operation.
_FACTORIES = [
    *("arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like"),
    *("linspace", "ones", "ones_like", "rand", "rand_like", "randint", "randn", "randn_like"),
    *("randperm", "scalar_tensor", "tensor", "zeros", "zeros_like"),
]
_METHODS = ["new_empty", "new_full", "new_ones", "new_tensor", "new_zeros", "to"]


@_replace(*(f"torch:{name}" for name in _FACTORIES), *(f"torch:Tensor.{m}" for m in _METHODS))
def _on_cpu(own: Any) -> Any:
    """Answer ``device="cuda"`` with the CPU, and pin no memory."""

    @functools.wraps(own)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            kwargs.pop("pin_memory", None)
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = "cpu"
        if len(args) > 1 and _is_cuda(args[1]):  # tensor.to("cuda")
            args = (args[0], "cpu", *args[2:])
        return own(*args, **kwargs)

    return wrapped


def _is_cuda(device: Any) -> bool:
    # Not str(device): that would print a tensor, were it one.
    kind = device if isinstance(device, str) else getattr(device, "type", None)
    return isinstance(kind, str) and kind.startswith("cuda")


@_replace("torch:Tensor.type")
def _cuda_type(own: Any) -> Any:
    def type_of(self: Any, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return own(self, dtype, *args, **kwargs)
        # Gradient clipping asserts a CUDA type.
        return own(self).replace("torch.", "torch.cuda.", 1)

    return type_of
