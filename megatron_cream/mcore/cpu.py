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
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

from megatron_cream.errors import UserError
from megatron_cream.mcore.arguments import flag_of, marked


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
    # Twenty lines a rank on GPU packages that are missing: here they are meant to be.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    # Its random-state tracker wonders, at every dropout, why the CPU's state changed with the
    # GPU's: they are one.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(lambda record: False)
    # Megatron asks for it under tensor parallelism; it orders work on a GPU.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    import torch

    if getattr(torch.cuda, "_stood_in_by_cpu", False):
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
    _answer_queries(torch)
    _answer_streams(torch)
    _answer_rng(torch)
    _answer_tensors(torch)
    torch.cuda._stood_in_by_cpu = True


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
    _refuse_weight_shards(args)
    if args.num_experts:
        _refuse_unserved_experts(args)


def _refuse_weight_shards(args: Any) -> None:
    """Refuse weights in more shards than tensor parallelism makes, gathered by streams of a GPU."""
    tensor = args.tensor_model_parallel_size
    experts = args.expert_tensor_parallel_size or tensor  # Megatron's default
    for name, size in (("tensor", tensor), ("expert_tensor", experts)):
        shards = getattr(args, f"{name}_parallel_num_weight_shards")
        if shards not in (None, size):
            flag = f"--{name.replace('_', '-')}-parallel-num-weight-shards"
            raise UserError(
                f"{flag} is {shards} with --cpu: it must be left out, or be {size}, as many as "
                f"{name.replace('_', '-')} parallelism has ranks"
            )


def _refuse_unserved_experts(args: Any) -> None:
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


def _answer_queries(torch: Any) -> None:
    cpu = torch.device("cpu")
    cuda = torch.cuda
    cuda.is_available = lambda: True
    cuda.is_initialized = lambda: True
    # Megatron skips model-parallel set-up where it counts no device.
    cuda.device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cuda.current_device = lambda: cpu
    cuda.get_device_capability = lambda *_: (0, 0)
    cuda.get_device_properties = lambda *_: SimpleNamespace(
        name="CPU", major=0, minor=0, total_memory=0, multi_processor_count=os.cpu_count()
    )
    cuda.get_device_name = lambda *_: "CPU"
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats", "init"):
        setattr(cuda, name, lambda *_, **__: None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        setattr(cuda, name, lambda *_, **__: 0)
    cuda.max_memory_reserved = lambda *_, **__: 0
    cuda.mem_get_info = lambda *_: (0, 0)
    cuda.memory_stats = lambda *_, **__: {}
    torch.accelerator.is_available = lambda: False  # the data loader would pin memory
    for name in ("range_push", "range_pop"):
        setattr(cuda.nvtx, name, lambda *_: None)


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


def _answer_streams(torch: Any) -> None:
    torch.cuda.Stream = torch.cuda.Event = _Inert
    torch.cuda.stream = lambda *_: nullcontext()
    for name in ("current_stream", "default_stream"):
        setattr(torch.cuda, name, lambda *_: _Inert())


def _answer_rng(torch: Any) -> None:
    def get_state(*_: Any, **__: Any) -> Any:
        return torch.get_rng_state()

    def set_state(state: Any, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)

    # Megatron's random-state tracker sets the state of the current device's generator.
    torch.cuda.default_generators = {torch.device("cpu"): torch.default_generator}
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = get_state
        module.set_rng_state = set_state
        module.manual_seed = module.manual_seed_all = torch.default_generator.manual_seed


# Functions that Megatron asks for tensors on "cuda" by name. Wrapping them costs nothing where no
# tensor is made; a torch function mode would cost 15 us at every operation.
_FACTORIES = [
    *("arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like"),
    *("linspace", "ones", "ones_like", "rand", "rand_like", "randint", "randn", "randn_like"),
    *("randperm", "scalar_tensor", "tensor", "zeros", "zeros_like"),
]
_METHODS = ["new_empty", "new_full", "new_ones", "new_tensor", "new_zeros", "to"]


def _answer_tensors(torch: Any) -> None:
    from torch.utils._device import _device_constructors

    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.nn.Module.cuda = lambda self, *_, **__: self
    # Torch lists its factories when a device context is first entered; it must list its own.
    _device_constructors()
    torch.Tensor.pin_memory = lambda self, *_, **__: self
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in _METHODS:
        setattr(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))
    own_type = torch.Tensor.type

    def cuda_type(self: Any, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return own_type(self, dtype, *args, **kwargs)
        # Gradient clipping asserts a CUDA type.
        return own_type(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = cuda_type


def _on_cpu(function: Any) -> Any:
    """Wrap a function to answer ``device="cuda"`` with the CPU, and to pin no memory."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            kwargs.pop("pin_memory", None)
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = "cpu"
        if len(args) > 1 and _is_cuda(args[1]):  # tensor.to("cuda")
            args = (args[0], "cpu", *args[2:])
        return function(*args, **kwargs)

    return wrapped


def _is_cuda(device: Any) -> bool:
    # Not str(device): that would print a tensor, were it one.
    kind = device if isinstance(device, str) else getattr(device, "type", None)
    return isinstance(kind, str) and kind.startswith("cuda")
