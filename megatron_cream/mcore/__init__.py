# SPDX-License-Identifier: Apache-2.0
"""The one door to Megatron-Core: hooks, patches, its arguments, and the CPU stand-in."""
