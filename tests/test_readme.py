"""What the README shows runs as it stands there."""
import re
import sys

from conftest import ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_lines_for_your_own_code_run(tmp_path):
    import torch
    lines, = (block for block in BLOCKS if "import Args" in block)
    lines = lines.replace("20_000", "2_000")
    exec(lines, {"obs": torch.zeros(3, 4)})
    assert not list(tmp_path.iterdir())


def test_the_environment_of_ones_own_trains(tmp_path, monkeypatch):
    import ppo
    code, = (block for block in BLOCKS if "gym.register" in block)
    (tmp_path / "corridor.py").write_text(code)
    monkeypatch.setattr(sys, "argv", ["ppo.py", "--env", "corridor:Corridor-v0",
                                      "--total-timesteps", "4096", "--episodes", "2"])
    ppo.main()
    assert list((tmp_path / "runs").glob("corridor-Corridor-v0__ppo__1__*/checkpoint.pt"))
