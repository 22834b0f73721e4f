# SPDX-License-Identifier: Apache-2.0
"""Checkpoints to break: copies of a saved one, damaged, or with a payload in a pickle."""

import io
import os
import pickle
import shutil
from pathlib import Path

import torch

TRACKER = "latest_checkpointed_iteration.txt"
COMMON = "common_state/shard_0_1"
PLACES = ("table", "common state", "common file", "object", "within a tensor")


def copy_run(saved, root, iterations=(1, 2), tracker=None):
    """Copy the one iteration of ``saved`` to a folder with several; return it."""
    (source,) = [path for path in Path(saved).iterdir() if (path / ".metadata").is_file()]
    for iteration in iterations:
        shutil.copytree(source, root / f"iter_{iteration:07d}")
    (root / TRACKER).write_text(str(iterations[-1] if tracker is None else tracker))
    return root


class Payload:
    """Pickled, it makes a folder when it is read without limits."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def table(folder):
    return pickle.loads((folder / ".metadata").read_bytes())


def write_table(folder, metadata):
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def plant(folder, place, marker):
    """Put a payload into one of the pickles of an iteration."""
    payload = Payload(marker)
    if place == "table":
        metadata = table(folder)
        metadata.planner_data = payload
        write_table(folder, metadata)
    elif place == "common state":
        replace_object(folder, COMMON, [{"args": payload}])
    elif place == "common file":
        torch.save({"args": payload}, folder / "common.pt")
    elif place == "object":
        replace_object(folder, extra_state(folder), [payload])
    else:
        hidden = torch.frombuffer(bytearray(pickle.dumps(payload)), dtype=torch.uint8)
        replace_object(folder, extra_state(folder), [hidden])


def extra_state(folder):
    """Name of one of Megatron's objects beside tensors."""
    return next(key for key in table(folder).state_dict_metadata if "._extra_state/" in key)


def replace_object(folder, name, value):
    """Have a record hold another object: it goes to the end of its file."""
    data = io.BytesIO()
    torch.save(value, data)
    metadata = table(folder)
    (info,) = [info for index, info in metadata.storage_data.items() if index.fqn == name]
    path = folder / info.relative_path
    info.offset, info.length = path.stat().st_size, len(data.getvalue())
    with path.open("ab") as file:
        file.write(data.getvalue())
    write_table(folder, metadata)


def data_file(folder):
    return folder / "__0_0.distcp"


def cut(path, count):
    os.truncate(path, path.stat().st_size - count)


def flip(path, at, mask=0xFF):
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ mask]))


def overwrite(path, at, count):
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes(count))


def offset_of(folder, name):
    (info,) = [info for index, info in table(folder).storage_data.items() if index.fqn == name]
    return info.offset


def _damage_common(folder):
    overwrite(data_file(folder), offset_of(folder, COMMON), 3000)


DAMAGES = {
    "data file missing": (lambda folder: data_file(folder).unlink(), "__0_0.distcp"),
    "data file cut off": (lambda folder: cut(data_file(folder), 5), "__0_0.distcp"),
    "data file empty": (lambda folder: os.truncate(data_file(folder), 0), "__0_0.distcp"),
    "table missing": (lambda folder: (folder / ".metadata").unlink(), ".metadata"),
    "table cut off": (lambda folder: cut(folder / ".metadata", 100), ".metadata"),
    "table of zeros": (lambda folder: overwrite(folder / ".metadata", 0, 400), ".metadata"),
    "common state of zeros": (_damage_common, COMMON),
    "format missing": (lambda folder: (folder / "metadata.json").unlink(), "metadata.json"),
    "format empty": (lambda folder: (folder / "metadata.json").write_text(""), "metadata.json"),
}
"""Kinds of damage: what does it, and what the message must name."""
