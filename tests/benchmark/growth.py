"""How steps per second change with the number of environments, units, transitions and processes.

    python tests/benchmark/growth.py     writes results/growth.csv and growth.svg in 10 minutes

One setting changes at a time. Speed is counted over the last three quarters of a run; the median of
three runs, one torch thread to a process."""
import csv
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PANELS = [  # script, environment, steps, flags, the setting that changes and its values
    ("ppo", "CartPole-v1", 40_960, "--num-minibatches 8", "num_envs", [1, 2, 4, 8, 16, 32, 64]),
    ("ppo", "CartPole-v1", 40_960, "--num-minibatches 8", "hidden_size",
     [16, 32, 64, 128, 256, 512]),
    ("dqn", "CartPole-v1", 20_000, "", "buffer_size", [1_000, 10_000, 100_000, 1_000_000]),
    ("a2c", "CartPole-v1", 100_000, "", "processes", [1, 2]),
    ("a2c", "CartPole-v1", 100_000, "--asynchronous", "processes", [1, 2])]


def speed(script, env, steps, flags, name, value):
    """Steps per second of one run."""
    command = [sys.executable]
    if name == "processes":
        command += f"-m torch.distributed.run --standalone --nproc-per-node {value}".split()
    command += [str(ROOT / f"{script}.py"), *f"--env {env} --total-timesteps {steps}".split(),
                *"--device cpu --episodes 1".split(), *flags.split()]
    if name == "num_envs":  # the same batch of 2,048 steps
        command += ["--num-steps", str(2048 // value)]
    if name != "processes":
        command += ["--" + name.replace("_", "-"), str(value)]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*command, "--run-dir", f"{folder}/run"], check=True, capture_output=True,
                       env=os.environ | {"OMP_NUM_THREADS": "1"})
        with open(f"{folder}/run/metrics.csv") as file:
            rows = [(float(row["step"]), float(row["seconds"])) for row in csv.DictReader(file)]
    first = next(row for row in rows if row[0] >= steps / 4)
    return (rows[-1][0] - first[0]) / (rows[-1][1] - first[1])


def main():
    with open(HERE / "results/growth.csv", "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["script", "flags", "setting", "value", "steps_per_second"])
        for script, env, steps, flags, name, values in PANELS:
            for value in values:
                result = np.median([speed(script, env, steps, flags, name, value)
                                    for _ in range(3)])
                print(script, flags, name, value, f"{result:,.0f}", flush=True)
                table.writerow([script, flags, name, value, f"{result:.0f}"])
    from pictures import growth
    growth(HERE / "growth.svg")


if __name__ == "__main__":
    main()
