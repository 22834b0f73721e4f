# SPDX-License-Identifier: Apache-2.0
"""CLEX: frequencies solve an ODE over the scale, with a trained term (arXiv:2310.16450).

runge_kutta  steps of the ODE and their exact reverse                         (numpy)
ode        the vector field and its solution on a grid of scales               (torch)
on_gpu     the same solution and its reverse on a GPU, for training            (torch)
kernels    all steps of either in one launch                                  (triton)
frozen     trained weights at one scale as LongRoPE's lists, for serving
table      frequencies of a step, at all scales
rotate     the rotation with a gradient for the frequencies
rotary     the module that takes the place of Megatron's rotary embedding
gradients  the gradient of the weights, over all ranks, once a step
"""
