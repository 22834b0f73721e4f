# SPDX-License-Identifier: Apache-2.0
"""Parts that a run can do without: each registers itself where it is asked for."""
