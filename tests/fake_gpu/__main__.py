"""`python -m tests.fake_gpu COMMAND ...` runs a command with the fake GPU."""

import os
import sys

from tests import fake_gpu

if lacking := fake_gpu.missing():
    sys.exit(f"error: the fake GPU needs {lacking}")
os.execvpe(sys.argv[1], sys.argv[1:], os.environ | fake_gpu.environment())
