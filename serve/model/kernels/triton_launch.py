"""Programmatic dependent launch: start a kernel while the one before it still runs. Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# On Hopper and newer the small kernels of a layer launch early and wait on the device for the
# results of the kernel before. Until they have waited they may read weights only, never data that
# the kernel before writes.
IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9
LAUNCH = {"USE_PDL": True, "launch_pdl": True} if IS_HOPPER else {"USE_PDL": False}


@triton.jit
def wait_for_previous_kernel():
    """Wait for the previous kernel's results, then let the next kernel launch early."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
