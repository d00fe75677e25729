"""The benchmark's statistics, its records, and that the README shows what they say."""
import csv
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import NAMES, ROOT, TESTS, flags, small

sys.path.insert(0, str(TESTS / "benchmark"))
import run as benchmark  # noqa: E402


def test_statistics_are_those_of_the_textbook():
    s = benchmark.statistics([5.0, 1.0, 3.0, 2.0, 100.0])
    assert s["mean"] == pytest.approx(22.2) and s["worst"] == 1
    assert s["std"] == pytest.approx(np.std([5, 1, 3, 2, 100], ddof=1))
    assert s["iqm"] == pytest.approx((2 + 3 + 5) / 3)  # without the lowest and the highest quarter
    assert 1 < s["low"] < s["mean"] < s["high"] < 100
    same = benchmark.statistics([7.0] * 3)
    assert all(same[name] == 7 for name in ("mean", "iqm", "worst", "low", "high"))


def test_a_run_is_trained_recorded_and_read_back_and_one_that_was_interrupted_resumed(
        tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "RUNS", tmp_path / "runs")
    settings = small("ppo")
    row = benchmark.Row("ppo", "CartPole-v1", settings.pop("total_timesteps"), 500,
                        flags=" ".join(flags(settings)), episodes=3)
    version = str(benchmark.VERSION["ppo"])
    folder = tmp_path / "runs" / "results" / version / benchmark.name(row, 2)
    words = benchmark.command(row, 2).split()[2:] + ["--total-timesteps", "256"]
    begun = [sys.executable, str(ROOT / "ppo.py"), *words, "--run-dir", str(folder)]
    assert subprocess.run(begun, capture_output=True).returncode == 0
    assert benchmark.read(row, 2, tmp_path / "results") is None
    # The checkpoint of a shorter run stands for an interrupted one; its own steps are kept.
    benchmark.train(row, 2, tmp_path / "results")
    score, seconds, curve = benchmark.read(row, 2, tmp_path / "results")
    assert 8 < score <= 500 and seconds >= 0 and curve[-1, 0] == 256 and len(curve) <= 101
    (path,) = (tmp_path / "results").iterdir()
    text = path.read_text()
    assert f"# command: {benchmark.command(row, 2)}" in text and "torch" in text
    assert "| 256 |" not in benchmark.table([row], tmp_path / "results")
    assert f"`ppo.py {row.flags}`" in benchmark.table([row], tmp_path / "results")


def test_every_script_is_measured_and_quickly_too():
    assert {row.script for row in benchmark.ROWS} == set(NAMES)
    assert {row.script for row in benchmark.QUICK} == set(NAMES)


def test_fresh_seeds_are_those_of_no_row():
    seen = {(row.script, row.env, row.flags, seed) for row in benchmark.ROWS for seed in row.seeds}
    fresh = {(row.script, row.env, row.flags, seed) for row in benchmark.FRESH
             for seed in row.seeds}
    assert fresh and seen.isdisjoint(fresh)


def test_the_tables_of_the_readme_are_what_the_records_say():
    first, long = (path.read_text() for path in (ROOT / "README.md",
                                                 TESTS / "benchmark/README.md"))
    tables = benchmark.tables()
    assert tables.keys() > {"ladder", "results", "fresh", "solved", "objectives"}
    for what, lines in tables.items():
        text = first if what == "ladder" else long
        assert re.search(f"<!-- {what} -->\n(.*?)\n<!-- end -->", text, re.DOTALL)[1] == lines


def test_the_ladder_shows_the_speed_beside_stable_baselines3_and_not_beside_sbx():
    ladder = dict(re.findall(r"^\| `(\w+).py` .*\| (\S*) ×? *\|$", benchmark.ladder(), re.M))
    with open(TESTS / "benchmark/results/speed.csv") as file:
        rows = list(csv.DictReader(file))
    for peer in ("A2C", "TRPO", "DQN", "DDPG"):
        (row,) = (row for row in rows if row["peer"] == peer)
        assert ladder[peer.lower()] == f"{float(row['ratio']):.1f}"


def test_a_record_of_an_earlier_version_is_marked_and_run_again(tmp_path):
    row = benchmark.Row("ppo", "CartPole-v1", 256, seeds=[1])
    benchmark.record(tmp_path, row, 1, 10.0, 1.0, [[256, 1.0, 10.0]])
    assert benchmark.is_current(row, 1, tmp_path) and "†" not in benchmark.table([row], tmp_path)
    path = tmp_path / f"{benchmark.name(row, 1)}.csv"
    path.write_text(path.read_text().replace("# version:", "# an older version:"))
    assert not benchmark.is_current(row, 1, tmp_path)
    assert "`ppo.py` †" in benchmark.table([row], tmp_path)
    assert "as preset † |" in benchmark.ablation([row], tmp_path)


@pytest.mark.parametrize("words, part", [
    (["compare.py", "--peer-python", "/no"], "/no"), (["gpu.py"], "no CUDA device")])
def test_a_missing_peer_or_gpu_is_a_clear_line(words, part):
    if words == ["gpu.py"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, TESTS / "benchmark" / words[0], *words[1:]],
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and part in done.stderr
