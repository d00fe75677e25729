"""Every block of the README runs exactly as it is printed, in order, in one folder."""
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import NAMES, ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the scripts alone, like a fresh clone."""
    folder = tmp_path_factory.mktemp("clone")
    for name in NAMES:
        shutil.copy(ROOT / f"{name}.py", folder)
    return folder


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_runs_as_printed(number, folder):
    kind, text = BLOCKS[number]
    if "gym.register" in text:  # the text says in which file it belongs
        (folder / "my_envs.py").write_text(text)
        return
    # `python` of the block is this one; pictures need no display.
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    command = ["bash", "-e", "-c", text] if kind == "bash" else [sys.executable, "-c", text]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True,
                          env=os.environ | dict(PATH=path, MPLBACKEND="agg"))
    assert done.returncode == 0, done.stderr
    if "load_agent" in text:
        score, mean = done.stdout.splitlines()[-1].split()
        assert float(score) > 400 and float(mean) > 400  # the agent of the block before
    if "diff" in text:
        assert 10 < len(done.stdout.splitlines())


def test_the_blocks_left_their_results(folder):
    if not (folder / "runs").exists():
        pytest.skip("needs the blocks to have run")
    assert (folder / "runs/cartpole/learning_curve.png").exists()
    assert list((folder / "runs/cartpole/videos").iterdir()) and (folder / "seeds.png").exists()
    assert list((folder / "runs").glob("my_envs-My-v0__ppo__1__*/checkpoint.pt"))


def test_every_flag_and_file_that_the_readme_names_exists():
    source = (ROOT / "ppo.py").read_text() + (ROOT / "a2c.py").read_text()
    for flag in set(re.findall(r"--([a-z][a-z-]+)", README)) - {"nproc-per-node"}:
        assert flag.replace("-", "_") in source, flag
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / link).exists(), link


def test_the_first_page_is_short():
    assert len(README.splitlines()) <= 122
