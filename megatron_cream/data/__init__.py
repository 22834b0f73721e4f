# SPDX-License-Identifier: Apache-2.0
"""What training reads: an indexed dataset, the samples drawn from it, the batch of a stage."""
