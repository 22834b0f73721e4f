# SPDX-License-Identifier: Apache-2.0
"""Train at 4K, use at 256K: CREAM, PoSE and interpolated RoPE for Megatron-Core, without a fork.

megatron_cream.positions   where training tokens pretend to stand (numpy only)
megatron_cream.rope        how a position becomes an angle
megatron_cream.data        text to dataset, and samples that read only their spans
megatron_cream.training    flags, hooks and the entry: torchrun -m megatron_cream.pretrain
megatron_cream.evaluation  perplexity at any length, plots
megatron_cream.config      the settings of an extension, as flags, checkpoint metadata and text

Importing this package imports none of them and changes nothing.
"""

__version__ = "0.1.0"
