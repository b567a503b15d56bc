"""What a training step takes in memory, read off forward passes of one and two rows of the real model with PyTorch's hooks for
saved tensors: nothing here is known about architectures."""

from __future__ import annotations

import psutil
import torch

from common import models

# Resident bytes on a CPU for each byte in use: the C library's heap keeps blocks that were freed between others. With 4, 8 and 16
# rows of 180 tokens (SmolLM2-135M in NF4) the process grew by 1.3, 2.6 and 5.3 GB, its tensors by 1.0, 2.0 and 4.0. Task 1's training was
# predicted to take 4.0 GiB and took 4.2; in fp32 on a CPU limited to AVX2 4.9 and 4.9.
HEAP = 1.33
# Of the free memory: allocators lose some between blocks, and scoring needs some beside the training.
SPARE = 0.9
ADAPTER = 12  # bytes a trained parameter costs beside itself: a gradient and two moments of Adam in fp32


def saved_bytes(model, forward, compute: str, wide: int = 0) -> dict[str, int]:
    """Bytes of all distinct tensors that `forward()` keeps for the backward pass of `model`: {"activations", "logits"}, the latter
    those whose last dimension is `wide`. The random generators are as before."""
    seen, own = {}, {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kind = "logits" if tensor.dim() and tensor.shape[-1] == wide else "activations"
            seen[storage.data_ptr()] = (kind, storage.nbytes())
        return tensor.detach()  # the tensor itself would keep its own graph alive
    model.train()
    with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), models.autocast(compute):
        forward()
    return {kind: sum(size for what, size in seen.values() if what == kind) for kind in ("activations", "logits")}


def predict(model, **parts: int) -> dict[str, int]:
    """`parts` in bytes with what is in use now ("resident": on a CPU the process with its libraries), the adapter's gradients and
    moments, and the "total", which on a CPU counts what the heap loses."""
    parts = {"adapter_and_optimiser": ADAPTER * sum(p.numel() for p in model.parameters() if p.requires_grad), **parts}
    if model.device.type == "cuda":
        resident, heap = torch.cuda.memory_allocated(), 1.0
    else:
        resident, heap = psutil.Process().memory_info().rss, HEAP
    return {"resident": resident, **parts, "total": resident + int(heap * sum(parts.values()))}


def fits(predicted: dict[str, int], free: int) -> bool:
    """Whether what is not in use yet fits into `free` bytes."""
    return predicted["total"] - predicted["resident"] <= SPARE * free
