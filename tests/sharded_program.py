"""A trainer's own main() under real FSDP2 on the CPU, for test_sharding.py: torchrun ... tests/sharded_program.py SCRIPT ARGUMENT ...

accelerate would use plain data parallelism there: its wrapping alone is replaced.
"""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import sharded
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from src import full, sharding


def prepare(accelerator, model, optimizer):
    sharded.shard(model)
    (group,) = optimizer.param_groups
    group["params"] = full.parameters(model)
    return model, AcceleratedOptimizer(optimizer, device_placement=False, scaler=None)


Accelerator.is_fsdp2 = property(lambda self: True)
sharding.prepare = prepare
script = importlib.import_module(sys.argv[1])
script.main(script.parse_args(sys.argv[2:]))
