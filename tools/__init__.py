# SPDX-License-Identifier: Apache-2.0
"""Scripts over the package; an installed wheel has them as ``megatron_cream.tools``."""
