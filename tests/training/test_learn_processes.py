"""``learn`` on two processes takes the steps of one, whatever the images come from."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.helpers import forked, run_program
from tests.training import learn_apart


def test_two_processes_learn_as_one(tmp_path: Path) -> None:
    done = run_program(*forked(2, "tests/training/learn_apart.py", tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    alone = learn_apart.train()
    for rank in range(2):
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert found.keys() == alone.keys()
        for name, expected in alone.items():
            torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-9, msg=name)
