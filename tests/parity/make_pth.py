"""Writes the small `.pth` files of tests/data, with torch: `.venv-parity/bin/python tests/parity/make_pth.py`.

`pth.npz` beside them holds the same tensors as read by torch itself, with dtypes that NumPy lacks widened.
"""
# pyright: reportMissingImports=false

import argparse
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch


DATA = Path(__file__).parent.parent / "data"
DTYPES = (
    "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 uint16 uint32 uint64 bool complex64 complex128 "
    "float8_e4m3fn float8_e5m2"
)


def make_tensors() -> OrderedDict[str, torch.Tensor]:
    """Layers of a model, and tensors laid out in their storage in every possible way."""
    torch.manual_seed(0)
    conv, norm = torch.nn.Conv2d(3, 2, 2), torch.nn.BatchNorm2d(2)
    model = torch.nn.Sequential(OrderedDict(conv=conv, norm=norm))
    state = model.state_dict()  # an OrderedDict with an attribute `_metadata`
    base = torch.arange(24, dtype=torch.float32)
    state["view.transposed"] = base.reshape(4, 6).T
    state["view.sliced"] = base.reshape(4, 6)[1:, ::2]
    state["view.tail"] = base[20:]
    state["view.expanded"] = torch.arange(3.0)[:, None].expand(3, 4)
    state["view.channels_last"] = torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    state["empty"] = torch.empty(0, 5)
    state["scalar"] = torch.tensor(2.5)
    state["parameter"] = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    for name in DTYPES.split():
        values = torch.tensor([0.0, 1.0, 1.0, 3.0]) if name == "bool" else torch.tensor([0.0, 1.0, 2.0, 96.0])
        state[f"dtype.{name}"] = values.to(getattr(torch, name))
    return state


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 or "float8" in str(tensor.dtype) else tensor).numpy()


if __name__ == "__main__":
    DATA.mkdir(exist_ok=True)
    tensors = make_tensors()
    arrays: dict[str, Any] = {name: to_numpy(tensor) for name, tensor in tensors.items()}
    np.savez_compressed(DATA / "pth.npz", **arrays)
    few = OrderedDict((name, tensors[name]) for name in list(tensors)[:3])
    torch.save(tensors, DATA / "zip.pth")
    torch.save(tensors, DATA / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save(tensors, DATA / "zip_protocol4.pth", pickle_protocol=4)
    torch.save({"model": few, "epoch": 3, "lr": [0.1]}, DATA / "model.pth")
    torch.save(
        {"state_dict": few, "shape": torch.Size([1])}, DATA / "state_dict.pth", _use_new_zipfile_serialization=False
    )
    torch.save({"model": few, "args": argparse.Namespace(lr=0.1)}, DATA / "with_namespace.pth")
