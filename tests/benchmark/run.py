"""Train, score and record every result; print them as a table.

    python tests/benchmark/run.py --quick      all nine scripts on one task each, a few minutes
    python tests/benchmark/run.py              everything that is not recorded yet, many hours
    python tests/benchmark/run.py --only ppo   the rows that contain the word
    python tests/benchmark/run.py --table      train nothing, only read what is recorded
    python tests/benchmark/run.py --readme     write the tables and pictures of both READMEs

One process per core with one torch thread each. Each finished run is a file of results/: its
command, versions and processor, the return of its final agent on fresh episodes, and its learning
curve. It is run again if it is of an earlier VERSION of its script; an interrupted run is resumed
from its checkpoint in runs/benchmark/. To measure a row again, delete its files."""
import argparse
import collections
import concurrent.futures
import csv
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RUNS = ROOT / "runs/benchmark"

Row = collections.namedtuple("Row", "script env steps published seeds flags episodes",
                             defaults=[None, range(1, 6), "", 100])
# Raised when a script changes in a way that changes its numbers.
VERSION = dict(reinforce=3, a2c=2, ppo=3, trpo=3, dqn=3, ddpg=2, naf=2, cem_es=2, mbrl_mpc=2)
# `published` is the best published return that we know for the algorithm at this number of steps.
ROWS = [
    Row("reinforce", "CartPole-v1", 200_000, 495),
    Row("reinforce", "Acrobot-v1", 500_000),
    Row("reinforce", "Pendulum-v1", 1_000_000, episodes=500),
    Row("reinforce", "InvertedPendulum-v5", 2_000_000, 999),
    Row("reinforce", "HalfCheetah-v5", 3_000_000, 884),
    Row("a2c", "CartPole-v1", 200_000, 497),
    Row("a2c", "Acrobot-v1", 300_000, -84.0),
    Row("a2c", "Pendulum-v1", 1_000_000, -163, episodes=500),
    Row("a2c", "InvertedDoublePendulum-v5", 1_000_000, 9258),
    Row("a2c", "HalfCheetah-v5", 1_000_000, 1830),
    Row("ppo", "CartPole-v1", 100_000, 500),
    Row("ppo", "Acrobot-v1", 300_000, -81.3),
    Row("ppo", "Pendulum-v1", 100_000, -172, episodes=500),
    Row("ppo", "LunarLander-v3", 1_000_000, 242),
    Row("ppo", "Hopper-v5", 1_000_000, 2609),
    Row("ppo", "HalfCheetah-v5", 1_000_000, 5819),
    Row("ppo", "MountainCar-v0", 1_000_000, -110),
    Row("trpo", "CartPole-v1", 100_000, 500),
    Row("trpo", "Pendulum-v1", 200_000, episodes=500),
    Row("trpo", "Hopper-v5", 1_000_000, 3372),
    Row("trpo", "HalfCheetah-v5", 1_000_000, 4471),
    Row("trpo", "Walker2d-v5", 1_000_000, 4502),
    Row("trpo", "Swimmer-v5", 1_000_000, 359),
    Row("dqn", "CartPole-v1", 50_000, 500),
    Row("dqn", "MountainCar-v0", 120_000, -100.8),
    Row("dqn", "Acrobot-v1", 100_000, -76.6),
    Row("dqn", "LunarLander-v3", 300_000, 195),
    Row("ddpg", "Pendulum-v1", 20_000, -152, episodes=500),
    Row("ddpg", "MountainCarContinuous-v0", 50_000, 93.5),
    Row("ddpg", "MountainCarContinuous-v0", 50_000, seeds=range(1, 4),
        flags="--noise gaussian --sigma 0.95"),
    Row("ddpg", "HalfCheetah-v5", 100_000, 4339),
    Row("ddpg", "Reacher-v5", 100_000),
    Row("naf", "Pendulum-v1", 20_000, -152, episodes=500),
    Row("naf", "InvertedPendulum-v5", 100_000, 1000),
    Row("naf", "Reacher-v5", 100_000),
    Row("naf", "HalfCheetah-v5", 100_000),
    Row("cem_es", "CartPole-v1", 50_000, 500, flags="--method cem"),
    Row("cem_es", "CartPole-v1", 50_000, 500, flags="--method es"),
    Row("cem_es", "InvertedPendulum-v5", 200_000, 1000, flags="--method es"),
    Row("cem_es", "MountainCarContinuous-v0", 500_000, 96.7, flags="--method es"),
    Row("cem_es", "HalfCheetah-v5", 1_000_000, 2894, flags="--method cem"),
    Row("cem_es", "Swimmer-v5", 2_000_000, 355, flags="--method es"),
    Row("mbrl_mpc", "CartPole-v1", 5_000, 500),
    Row("mbrl_mpc", "Pendulum-v1", 4_000, -160),
    Row("mbrl_mpc", "Pendulum-v1", 4_000, -160, range(1, 11), "--planner policy"),
    Row("mbrl_mpc", "InvertedPendulum-v5", 5_000, 1000, flags="--planner policy"),
]
# PPO at equal steps with clipping, with the KL penalty, and with neither.
OBJECTIVES = [Row("ppo", env, steps, seeds=range(1, 4), flags=flags)
              for env, steps in (("CartPole-v1", 100_000), ("Hopper-v5", 300_000),
                                 ("HalfCheetah-v5", 300_000))
              for flags in ("--objective clip", "--objective kl", "--clip-coef 1000")]
# DDPG with each of its maximizers; policies inside the model with each horizon (the preset has 8).
MAXIMIZERS = [Row("ddpg", "Pendulum-v1", 20_000, flags=f"--maximizer {maximizer}", episodes=500)
              for maximizer in ("actor", "random", "cem")] + [
    Row("ddpg", "InvertedPendulum-v5", 50_000, seeds=range(6, 9), flags=f"--maximizer {maximizer}")
    for maximizer in ("actor", "cem")]
HORIZONS = [Row("mbrl_mpc", "Pendulum-v1", 4_000, seeds=range(1, 4),
                flags=f"--planner policy --horizon {horizon}") for horizon in (3, 8, 20)]
# Rows whose settings were changed after a look at their own seeds, on seeds not looked at before.
FRESH = [row._replace(seeds=range(6, 11)) for row in ROWS if (row.script, row.env) in {
    ("reinforce", "CartPole-v1"), ("reinforce", "InvertedPendulum-v5"), ("a2c", "Pendulum-v1"),
    ("a2c", "HalfCheetah-v5"), ("ppo", "Acrobot-v1"), ("ppo", "HalfCheetah-v5"),
    ("trpo", "CartPole-v1"), ("trpo", "Hopper-v5"), ("trpo", "HalfCheetah-v5"),
    ("dqn", "CartPole-v1"), ("dqn", "MountainCar-v0"), ("dqn", "Acrobot-v1"),
    ("naf", "Pendulum-v1"), ("cem_es", "CartPole-v1"), ("cem_es", "InvertedPendulum-v5"),
    ("cem_es", "Swimmer-v5")}]
# What each option of a script is worth: one change at a time, with fewer steps than it needs.
ABLATIONS = {
    script: [Row(script, "CartPole-v1", steps, flags=option) for option in options]
    for script, steps, options in [
        ("reinforce", 100_000, [f"--baseline {name}" for name in ("none", "mean", "value")]),
        ("dqn", 20_000, ["", "--no-double", "--dueling", "--prioritized", "--n-step 1",
                         "--exploration boltzmann"])]}
QUICK = [row for row in ROWS if (row.script, row.env) in {
    ("reinforce", "CartPole-v1"), ("a2c", "CartPole-v1"), ("ppo", "CartPole-v1"),
    ("trpo", "CartPole-v1"), ("dqn", "CartPole-v1"), ("ddpg", "Pendulum-v1"),
    ("naf", "Pendulum-v1"), ("mbrl_mpc", "Pendulum-v1")} or row.flags == "--method cem"
    and row.env == "CartPole-v1"]


def name(row, seed):
    words = [row.script, row.env, str(row.steps), *row.flags.replace("--", "").split(), str(seed)]
    return "__".join(words)


def command(row, seed):
    return (f"python {row.script}.py --env {row.env} --total-timesteps {row.steps} --seed {seed} "
            f"{row.flags}".strip() + f" --episodes {row.episodes}" * (row.episodes != 100))


def train(row, seed, results):
    """Run the command, or what is left of it, and record what came out."""
    folder = RUNS / results.name / str(VERSION[row.script]) / name(row, seed)
    words = ["--device", "cpu", "--run-dir", str(folder)]
    words = shlex.split(command(row, seed))[2:] + words
    if (folder / "checkpoint.pt").exists():
        words = ["--resume", str(folder), "--episodes", str(row.episodes)]
    done = subprocess.run([sys.executable, str(ROOT / f"{row.script}.py"), *words],
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{name(row, seed)}: {(done.stderr.strip() or '?').splitlines()[-1]}")
    score = re.search(r"return (-?[\d.]+) \+/- ([\d.]+) over", done.stdout.splitlines()[-1])
    with open(folder / "metrics.csv") as file:
        header, *rows = (line.strip().split(",") for line in file)
    columns = [header.index(column) for column in ("step", "seconds", "episode_return")]
    record(results, row, seed, float(score[1]), float(score[2]),
           [[float(values[i]) for i in columns] for values in rows])
    shutil.rmtree(folder)


def record(results, row, seed, mean, std, curve):
    """Write NAME.csv: comments with the figures, then at most 100 points of the curve."""
    versions = " ".join(f"{package} {importlib.metadata.version(package)}"
                        for package in ("numpy", "torch", "gymnasium"))
    thin = curve[:: -(-len(curve) // 100)]
    thin += [curve[-1]] * (thin[-1] != curve[-1])
    lines = [f"# command: {command(row, seed)}", f"# version: {VERSION[row.script]}",
             f"# versions: Python {platform.python_version()} {versions}",
             f"# processor: {processor()}",
             f"# return: {mean} std {std} episodes {row.episodes}", "step,seconds,episode_return",
             *(f"{step:.0f},{seconds:.1f},{value:.2f}" for step, seconds, value in thin)]
    results.mkdir(parents=True, exist_ok=True)
    part = results / f"{name(row, seed)}.part"
    part.write_text("\n".join(lines) + "\n")
    os.replace(part, results / f"{name(row, seed)}.csv")


def processor():
    info = pathlib.Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return f"{os.cpu_count()} x {models[0] if models else platform.machine()}"


def read(row, seed, results=HERE / "results"):
    """(return, seconds, curve (points, 3)) of a recorded run, or None."""
    path = results / f"{name(row, seed)}.csv"
    if not path.exists():
        return None
    text = path.read_text()
    curve = np.array([[float(x) for x in line.split(",")]
                      for line in text.splitlines() if line[0].isdigit()])
    return float(re.search(r"# return: (\S+)", text)[1]), curve[-1, 1], curve


def is_current(row, seed, results=HERE / "results"):
    """Whether a run is recorded, and of the scripts as they are now."""
    path = results / f"{name(row, seed)}.csv"
    return path.exists() and f"# version: {VERSION[row.script]}\n" in path.read_text()


def statistics(returns):
    """Mean, standard deviation, interquartile mean, worst and 95 % bootstrap interval."""
    returns = np.sort(returns)
    cut = len(returns) // 4
    means = np.random.default_rng(0).choice(returns, (10_000, len(returns))).mean(1)
    return dict(mean=returns.mean(), std=returns.std(ddof=len(returns) > 1),
                iqm=returns[cut:len(returns) - cut].mean(), worst=returns[0],
                low=np.percentile(means, 2.5), high=np.percentile(means, 97.5))


def number(x):
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.1f}"


def table(rows, results=HERE / "results"):
    """The recorded rows in Markdown."""
    lines = ["| script | environment | steps | seeds | mean ± std | IQM | worst | 95 % interval | "
             "published | seconds |", "|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        runs = {seed: run for seed in row.seeds if (run := read(row, seed, results))}
        if not runs:
            continue
        s = statistics([run[0] for run in runs.values()])
        first, last = min(runs), max(runs)
        seeds = f"{first}–{last}" if 1 < len(runs) == last - first + 1 else ", ".join(
            map(str, runs))
        script = f"`{row.script}.py{' ' * bool(row.flags)}{row.flags}`"
        script += " †" * (not all(is_current(row, seed, results) for seed in runs))
        seconds = np.mean([run[1] for run in runs.values()])
        lines.append(
            f"| {script} | {row.env} | {row.steps:,} | {seeds} | "
            f"{number(s['mean'])} ± {number(s['std'])} | {number(s['iqm'])} | "
            f"{number(s['worst'])} | {number(s['low'])} to {number(s['high'])} | "
            f"{number(row.published) if row.published else ''} | {seconds:,.0f} |")
    return "\n".join(lines).replace("| -", "| −").replace("to -", "to −")


def ablation(rows, results=HERE / "results"):
    """The recorded rows of one script, by its options, in Markdown."""
    lines = ["| option | mean ± std | worst |", "|---|---|---|"]
    for row in rows:
        runs = {seed: run[0] for seed in row.seeds if (run := read(row, seed, results))}
        if runs:
            s = statistics(list(runs.values()))
            option = f"`{row.flags}`" if row.flags else "as preset"
            option += " †" * (not all(is_current(row, seed, results) for seed in runs))
            lines.append(f"| {option} | {number(s['mean'])} ± {number(s['std'])} | "
                         f"{number(s['worst'])} |")
    return "\n".join(lines)


def solved(path=HERE / "results/solve.csv"):
    """Seconds of training to a solution, ours and the peer's, in Markdown."""
    lines = ["| task | return | seconds | the peer's return | its seconds | speedup, least |",
             "|---|---|---|---|---|---|"]
    runs = collections.defaultdict(list)
    with open(path) as file:
        for row in csv.DictReader(file):
            runs[row["name"]].append([float(row[key]) for key in (
                "score", "seconds", "peer_score", "peer_seconds")])
    for task, rows in runs.items():
        means, times = np.mean(rows, 0), min(peer / ours for _, ours, _, peer in rows)
        lines.append(f"| {task} | {' | '.join(map(number, means))} | {times:.1f} |")
    return "\n".join(lines).replace("| -", "| −")


def sbx(path=HERE / "results/speed.csv"):
    """Speed beside SBX, and for PPO the seconds lost at the start, in Markdown."""
    lines = ["| setting | steps/s | those of SBX | ratio | startup | that of SBX |",
             "|---|---|---|---|---|---|"]
    with open(path) as file:
        for row in csv.DictReader(file):
            if row["peer"].startswith("sbx."):
                setting = row.pop("name").removesuffix(" (SBX)")
                x = {key: float(value) for key, value in row.items() if key != "peer"}
                startup = (f"{max(0, x['startup']):.1f} s | {x['peer_startup']:.1f} s"
                           if row["peer"] == "sbx.PPO" else " | ")
                lines.append(f"| {setting} | {x['ours']:,.0f} | {x['theirs']:,.0f} | "
                             f"{x['ratio']:.2f} ({x['low']:.2f} to {x['high']:.2f}) | {startup} |")
    return "\n".join(lines)


LADDER = [  # script, what it adds, its equation, the row that the README shows
    ("reinforce", "policy gradient, reward-to-go, baselines", "∇J = E[∇log π(a∣s) · (G − b)]",
     "CartPole-v1"),
    ("a2c", "a critic, n-step returns, GAE, parallel workers; A3C", "∇J = E[∇log π(a∣s) · Â]",
     "CartPole-v1"),
    ("ppo", "several epochs on a batch; clipping or a KL penalty",
     "max E[min(r Â, clip(r, 1 − ε, 1 + ε) Â)]", "CartPole-v1"),
    ("trpo", "natural gradient, trust region", "max E[r Â] with KL(old ∥ new) ≤ δ", "Hopper-v5"),
    ("dqn", "replay, target network; double, dueling, prioritized", "y = r + γ max Q⁻(s′, a)",
     "CartPole-v1"),
    ("ddpg", "continuous actions: an actor, or a search, maximizes Q", "max Q(s, μ(s))",
     "Pendulum-v1"),
    ("naf", "a Q whose maximum is known", "Q = V − ½ (a − μ)ᵀ P (a − μ)", "Pendulum-v1"),
    ("cem_es", "cross-entropy method, evolution strategies", "θ ~ N(μ, σ²); μ, σ ← mean, std of the elites",
     "CartPole-v1"),
    ("mbrl_mpc", "a learned model: PETS, MPC, a policy inside the model",
     "max Σ γᵗ r(s, a), s′ = s + f(s, a)", "Pendulum-v1")]


def ladder(results=HERE / "results"):
    """The first table of the README: a row for each script."""
    with open(HERE / "results/speed.csv") as file:
        speed = {row["name"].split()[0]: row for row in list(csv.DictReader(file))[::-1]
                 if not row["peer"].startswith("sbx.")}
    lines = ["| script | idea | equation | solves | steps | seconds | return | SB3 |",
             "|---|---|---|---|---|---|---|---|"]
    for script, idea, equation, env in LADDER:
        row = next(row for row in ROWS if (row.script, row.env) == (script, env))
        runs = [run for seed in row.seeds if (run := read(row, seed, results))]
        score, seconds = np.mean([run[0] for run in runs]), np.mean([run[1] for run in runs])
        ratio = f"{float(speed[script]['ratio']):.1f} ×" if speed.get(script, {}).get(
            "peer") else ""
        old = " †" * (not all(is_current(row, seed, results) for seed in row.seeds))
        lines.append(f"| `{script}.py` | {idea} | {equation} | {env} | {row.steps:,} | "
                     f"{seconds:.0f} | {number(score)}{old} | {ratio} |")
    return "\n".join(lines).replace("| -", "| −")


def tables():
    """Every table, by the name between <!-- name --> and <!-- end --> where it belongs."""
    ablations = {f"ablation of {script}": ablation(rows) for script, rows in ABLATIONS.items()}
    return dict(ladder=ladder(), results=table(ROWS), fresh=table(FRESH), solved=solved(),
                objectives=table(OBJECTIVES), maximizers=table(MAXIMIZERS),
                horizons=table(HORIZONS), sbx=sbx()) | ablations


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="seed 1 of one row of each script")
    parser.add_argument("--only", default="", help="rows whose script, task or flags contain this")
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--readme", action="store_true", help="train nothing, write the READMEs")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="one per core")
    args = parser.parse_args()
    results = HERE / "results"
    if args.quick:  # always anew
        results = RUNS / "quick"
        shutil.rmtree(results, ignore_errors=True)
    everything = sum(ABLATIONS.values(), ROWS + FRESH + OBJECTIVES + MAXIMIZERS + HORIZONS)
    rows = [row for row in (QUICK if args.quick else everything)
            if args.only in f"{row.script} {row.env} {row.flags}"]
    jobs = [(row, seed) for row in rows for seed in (row.seeds[:1] if args.quick else row.seeds)
            if not is_current(row, seed, results)]
    if args.table or args.readme:
        jobs = []
    failures, start = [], time.time()
    with concurrent.futures.ThreadPoolExecutor(args.processes) as pool:
        # The slowest scripts are the last rows: they start first, so that no core waits for one.
        futures = {pool.submit(train, *job, results): job for job in reversed(jobs)}
        for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
            row, seed = futures[future]
            if future.exception():
                failures.append(str(future.exception()))
            left = (time.time() - start) / done * (len(jobs) - done)
            score = "failed" if future.exception() else number(read(row, seed, results)[0])
            print(f"{done} of {len(jobs)}: {name(row, seed)} {score}, about {left / 60:.0f} "
                  "minutes left", flush=True)
    print(table(rows, results))
    if args.readme:
        from pictures import draw
        draw()
        for path in (ROOT / "README.md", HERE / "README.md"):
            text = path.read_text()
            for what, lines in tables().items():
                text = re.sub(f"(?<=<!-- {what} -->\n).*?(?=<!-- end -->)",
                              lambda _, lines=lines: lines + "\n", text, count=1, flags=re.DOTALL)
            path.write_text(text)
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
