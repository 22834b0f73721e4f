# SPDX-License-Identifier: Apache-2.0
"""Reads what training takes: an indexed dataset, the samples of it, the batch of a stage."""
