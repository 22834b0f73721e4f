# SPDX-License-Identifier: Apache-2.0
"""What a model makes of long text.

perplexity      sliding-window perplexity by context length
position_plots  pictures of layouts and of the distances they train
"""
