"""A run that was saved on eight devices goes on with other devices, or with another mesh. Each is a run of its own."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dppo_jax.storage.run_log import MACHINE, read_scalars
from tests.devices.test_hosts import environment
from tests.helpers.fixtures import config_file, same, tiny
from tests.helpers.places import ROOT

SAVED, STEPS = 2, 3
# Devices, and what a command changes of the mesh, whose axis fsdp takes all devices by default.
OTHERS = {
    "4": (4, {}),
    "2": (2, {}),
    "1": (1, {}),
    "8 as 2 x 4": (8, {"fsdp": 2, "tensor": 4}),
}
# Sums over rows and over parts of matrices come in another order, and float32 has 24 bits: 6e-8 of the largest term of
# each sum. After two updates a scalar differed by 6e-6 of itself at most, in a difference of two probabilities, or by
# 3e-8, in one that should be 0. An eps of 1e-4 keeps Adam from making more of gradients that are nearly 0.
RELATIVE, ABSOLUTE = 1e-4, 1e-6


def start(tmp_path_factory, folder: Path, workdir: Path, devices: int, mesh: dict[str, int]) -> str:
    """Runs or resumes; what it said."""
    flags = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    command = [sys.executable, "-m", "experiments.train", "--config", str(folder / "config.py")]
    done = subprocess.run(
        [*command, "--workdir", str(workdir), *flags],
        cwd=ROOT, env=environment(tmp_path_factory, devices), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "compiled after the first step" not in done.stderr  # what a save of several devices compiles is not
    return done.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run of eight devices."""
    folder = tmp_path_factory.mktemp("restoring")
    config_file(
        folder / "config.py", tiny(tmp_path_factory), steps=STEPS, checkpoint__every=SAVED, train__staleness=1,
        optimizer__eps=1e-4, log__samples=0, log__histograms=0,
    )  # fmt: skip
    start(tmp_path_factory, folder, folder / "whole", 8, {})
    return folder


def resumed(tmp_path_factory, whole: Path, devices: int, mesh: dict[str, int]) -> tuple[Path, str]:
    """A copy of the run that goes on from its first checkpoint, and what it said."""
    workdir = whole / "-".join(map(str, (devices, *mesh.values())))
    shutil.copytree(whole / "whole", workdir)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    said = start(tmp_path_factory, whole, workdir, devices, mesh)
    assert f"going on from the checkpoint at step {SAVED}" in said and "damaged" not in said
    return workdir, said


def test_on_the_same_devices_it_goes_on_to_the_bit(tmp_path_factory, whole):
    same(whole / "whole", resumed(tmp_path_factory, whole, 8, {})[0])


@pytest.mark.parametrize("which", OTHERS)
def test_on_others_the_curve_is_the_same_to_float_tolerance(tmp_path_factory, whole, which):
    devices, mesh = OTHERS[which]
    workdir, said = resumed(tmp_path_factory, whole, devices, mesh)
    if mesh:
        assert "mesh.fsdp: -1 -> 2" in said and "mesh.tensor: 1 -> 4" in said
    else:
        assert f"devices 8, here {devices}: numbers may differ in their last bits" in said
    found, wanted = read_scalars(workdir), read_scalars(whole / "whole")
    assert found.keys() == wanted.keys()
    for tag in wanted.keys() - {tag for tag in wanted if tag.startswith(MACHINE)}:
        np.testing.assert_array_equal(found[tag][0], wanted[tag][0], err_msg=tag)
        np.testing.assert_allclose(found[tag][1], wanted[tag][1], rtol=RELATIVE, atol=ABSOLUTE, err_msg=tag)
