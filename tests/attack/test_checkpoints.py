# SPDX-License-Identifier: Apache-2.0
"""Random damage to a saved checkpoint: every reader ends well or names the file, and nothing runs.

``support/attack.py`` says what decides its size and its seed.
"""

import os
import random
import shutil
from functools import partial
from pathlib import Path

import pytest
from support import hf_models
from support.attack import SEED, rounds
from support.checkpoints import PLACES, TRACKER, copy_run, plant

pytestmark = [pytest.mark.usefixtures("cpu_megatron"), pytest.mark.slow]

ROUNDS = rounds(30)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    from megatron_cream.checkpoint.import_hf import import_checkpoint

    folder = tmp_path_factory.mktemp("imported")
    hf_models.make(folder / "hf")
    import_checkpoint(str(folder / "hf"), str(folder / "base"), quiet=True)
    return folder / "base"


def flip_bytes(draw, folder, path):
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 1, 3, 50])):
        data[draw.randrange(len(data))] ^= draw.randrange(1, 256)
    path.write_bytes(data)


def truncate(draw, folder, path):
    os.truncate(path, draw.randrange(path.stat().st_size))


def remove(draw, folder, path):
    path.unlink()


def fill(draw, folder, path):
    data = bytearray(path.read_bytes())
    at = draw.randrange(len(data))
    data[at : at + 4096] = draw.choice([bytes, draw.randbytes])(len(data[at : at + 4096]))
    path.write_bytes(data)


def append(draw, folder, path):
    with path.open("ab") as file:
        file.write(draw.randbytes(draw.randrange(1, 5000)))


def move_bytes(draw, folder, path):
    data = path.read_bytes()
    at = draw.randrange(len(data))
    path.write_bytes(data[at:] + data[:at])


def swap_files(draw, folder, path):
    other = draw.choice([each for each in files(folder) if each != path])
    path.rename(folder / "swapped")
    other.rename(path)
    (folder / "swapped").rename(other)


KINDS = (flip_bytes, truncate, remove, fill, append, move_bytes, swap_files)


def files(folder):
    return sorted(path for path in folder.iterdir() if path.is_file())


def contents(folder):
    return {path.name: path.read_bytes() for path in files(folder)}


def ends_well(call, root):
    """Whether it returned; its only other end is an error that names a file of the checkpoint."""
    from megatron_cream.errors import UserError

    try:
        call()
    except (UserError, OSError) as error:
        assert str(root) in str(error), error
        assert "\n" not in str(error).strip()
        return False
    return True


def readers(root, output):
    from argparse import Namespace

    from megatron_cream.checkpoint.export_hf import export_checkpoint
    from megatron_cream.checkpoint.iterations import read_saved_arguments
    from megatron_cream.checkpoint.loading import validate_start

    more = {"save": None, "ckpt_step": None, "finetune": False, "non_persistent_ckpt_type": None}
    load = Namespace(load=str(root), pretrained_checkpoint=None, **more)
    start = Namespace(load=None, pretrained_checkpoint=str(root), **more)
    yield lambda: validate_start(load)
    yield lambda: validate_start(start)
    yield lambda: read_saved_arguments(str(root))
    if output is not None:
        yield lambda: export_checkpoint(str(root), str(output), quiet=True)


def examine_iteration(folder):
    from megatron_cream.checkpoint.doctor import examine_iteration

    return examine_iteration(str(folder)).problems


def _examine_into(found, folder):
    found += examine_iteration(folder)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("source", ["saved", "imported"])
def test_random_damage(kind, source, initial, imported, tmp_path):
    saved, exports = {"saved": (initial, False), "imported": (imported, True)}[source]
    for number in range(ROUNDS):
        draw = random.Random(f"{SEED} {kind.__name__} {source} {number}")
        root = copy_run(saved, tmp_path / f"run{number}", [1])
        folder, output = root / "iter_0000001", tmp_path / "out"
        before = contents(folder)
        path = draw.choice(files(folder))
        kind(draw, folder, path)
        changed = contents(folder) != before
        summed = path.name.startswith("megatron_cream_checksums") and kind in (remove, swap_files)
        for read in readers(root, output if exports else None):
            ends_well(read, root)
            shutil.rmtree(output, ignore_errors=True)
        found = []
        if ends_well(partial(_examine_into, found, folder), root):
            assert [line for line in found if str(folder) not in line or "\n" in line] == []
            if changed and not summed:
                assert found, f"round {number}: a change of {path.name} was not found"
        shutil.rmtree(root)


@pytest.mark.parametrize("kind", [flip_bytes, truncate, fill, move_bytes])
def test_random_damage_without_checksums(kind, initial, tmp_path):
    """What torch writes into its records finds most of it; no reader fails in another way."""
    for number in range(ROUNDS):
        draw = random.Random(f"{SEED} {kind.__name__} {number}")
        root = copy_run(initial, tmp_path / f"run{number}", [1])
        folder = root / "iter_0000001"
        for sums in folder.glob("megatron_cream_checksums_*"):
            sums.unlink()
        kind(draw, folder, draw.choice(files(folder)))
        for read in readers(root, None):
            ends_well(read, root)
        ends_well(partial(examine_iteration, folder), root)
        shutil.rmtree(root)


@pytest.mark.parametrize("place", PLACES)
def test_payloads(place, initial, imported, tmp_path):
    for name, saved in (("saved", initial), ("imported", imported)):
        root, marker = copy_run(saved, tmp_path / name, [1]), tmp_path / "marker"
        plant(root / "iter_0000001", place, marker)
        refused = [not ends_well(read, root) for read in readers(root, None)]
        assert all(refused[:2]), "both checks before training"
        assert refused[2] or place in ("object", "within a tensor")
        ends_well(partial(read_export, root, tmp_path / "out"), root)
        assert examine_iteration(root / "iter_0000001")
        assert not marker.exists()


def read_export(root, output):
    from megatron_cream.checkpoint.export_hf import export_checkpoint
    from megatron_cream.errors import UserError

    try:
        export_checkpoint(str(root), str(output), quiet=True)
    except UserError as error:
        if str(root) in str(error):
            raise  # else: no model of a Hugging Face family
    finally:
        shutil.rmtree(output, ignore_errors=True)


@pytest.mark.parametrize("number", range(3))
def test_random_trackers(number, initial, tmp_path):
    draw = random.Random(f"{SEED} tracker {number}")
    root = copy_run(initial, tmp_path / "run", [1])
    for _ in range(ROUNDS):
        content = draw.choice(
            [b"", b"0", b"-1", b"1.0", b"release", b"\xff\xfe", b"1\n2", draw.randbytes(9)]
        )
        (root / TRACKER).write_bytes(content)
        for read in readers(root, None):
            assert not ends_well(read, root), content


def test_the_scripts_folder_is_left_alone(initial):
    """The damage above is done to copies."""
    assert not examine_iteration(Path(initial) / "iter_0000001")
