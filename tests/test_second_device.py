import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
#: Tests for each device, and what of them torch's spare device type has not, or takes too long.
SHARED = ["test_modules.py", "test_spiral.py", "testing/test_controls.py"]
NO_GENERATOR = ["test_dense_from_torch_is_001_randn", "test_from_torch_it_follows_the_formula"]
NO_STORAGE = ["test_output_is_kept_without_history"]
SLOW = ["test_a_batch_is_its_rows", "test_wide", "test_ten_million_samples"]


@pytest.mark.slow
def test_a_second_device():
    """In a process of its own: a device is registered for all of it."""
    unfit = " or ".join(NO_GENERATOR + NO_STORAGE + SLOW)
    command = [sys.executable, "-m", "pytest", "-p", "second_device", "-p", "no:cacheprovider"]
    command += ["-q", "-k", f"on_second_device or (twin and not ({unfit}))"]
    command += [HERE / name for name in ("on_second_device.py", *SHARED)]
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
