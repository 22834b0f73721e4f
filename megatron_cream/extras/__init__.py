# SPDX-License-Identifier: Apache-2.0
"""Parts that a run can do without: each is asked at the same few places (``mcore.hooks``).

clex                CLEX: trained frequencies; a ``rope.scaling.ScalingTrainer``
dual_chunk          --dual-chunk: training with dual chunk attention
hybrid              HybridModel's patterns, and its layers without Transformer Engine
long_validation     --validate-lengths: validation at long lengths while a run trains
rotation            --rope-kernel: queries and keys turned by our Triton kernel
te_cross_entropy    Transformer Engine's cross entropy
"""
