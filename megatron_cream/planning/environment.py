# SPDX-License-Identifier: Apache-2.0
"""Names the environment variables that a layout runs fastest with, each with its reason.

They are those of NVIDIA's own recipes for Hopper; what is set already is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cream.parallel_layout import ParallelLayout


@dataclass(frozen=True)
class Setting:
    """An environment variable of a run, and why it has this value."""

    name: str
    value: str
    reason: str

    @property
    def line(self) -> str:
        """A line of bash that leaves a value from outside as it is."""
        return f"export {self.name}=${{{self.name}:-{self.value}}}"


_MEMORY = [
    Setting(
        "PYTORCH_CUDA_ALLOC_CONF",
        "expandable_segments:True",
        "Freed memory is joined again, so that none is lost to fragments.",
    ),
    Setting(
        "NCCL_NVLS_ENABLE",
        "0",
        "Multicast buffers of NCCL would take memory of every GPU, and its links do not need them.",
    ),
    Setting(
        "NCCL_GRAPH_REGISTER",
        "0",
        "NCCL cannot register expandable segments; with CUDA graphs Megatron asks for this.",
    ),
]


def environment(layout: ParallelLayout) -> list[Setting]:
    """Return the variables of a run on ``layout``, those of one GPU where it has only one."""
    if layout.gpus == 1:
        return _MEMORY[:1]
    margins = [
        Setting(f"NVTE_{way}_LAYERNORM_SM_MARGIN", "16", reason)
        for way, reason in (
            ("FWD", "Norms leave 16 multiprocessors to what is sent meanwhile."),
            ("BWD", "The same in the backward pass."),
        )
    ]
    return [*_MEMORY, *margins, _connections(layout)]


def _connections(layout: ParallelLayout) -> Setting:
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    if layout.tensor > 1 or layout.context > 1:
        reason = "Kernels start in the order of the host: sending before the product that hides it."
        return Setting(name, "1", reason)
    reason = "No layer sends: gradients and stages need not wait in one queue with products."
    return Setting(name, "8", reason)


def environment_lines(layout: ParallelLayout) -> list[str]:
    """Return lines of bash, each variable after its reason."""
    return [text for one in environment(layout) for text in (f"# {one.reason}", one.line)]
