# SPDX-License-Identifier: Apache-2.0
"""How a dataset is made: text to a Megatron indexed dataset."""
