"""Launching the small kernels of a layer while the kernel before them still runs, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# On Hopper and newer the kernels of a layer are set up while the kernel before still runs, and wait
# for its results on the device (programmatic dependent launch). What they read before they wait
# must be older than that kernel: weights.
IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9
LAUNCH = {"EARLY": True, "launch_pdl": True} if IS_HOPPER else {"EARLY": False}


@triton.jit
def await_kernel_before():
    """Wait for its results; whatever is launched ahead next may be set up from now on."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
