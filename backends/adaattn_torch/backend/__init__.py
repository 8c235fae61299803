"""The backend ``torch``: the same budgets on every device that PyTorch runs on.

It is made of PyTorch's own operations and holds no kernel of its own:

=============  =======================================================================
`backend`      the contract: measure, run, row_errors, forward, provenance
`dense`        exact attention of the heads of a sequence, by a fused kernel or spelled out
`kernels`      which of PyTorch's attention kernels, and what is known of its arithmetic
`masking`      masks as tensors; what rows see
`operands`     inputs in a format, their norms and residuals
`landmark`     near field, landmarks and pools as a few attention calls, merged by lse
`probing`      sampled rows, the clusters of like queries, and what they see of the far field
`measuring`    what candidates would make of held-out rows
`costing`      what this machine's operations cost, measured once
=============  =======================================================================
"""

from __future__ import annotations

from adaattn_torch.backend.backend import TorchBackend

__all__ = ["TorchBackend"]
