"""Draw the pictures of the READMEs from the records of run.py and compare.py in results/.

    python tests/benchmark/pictures.py           draw the curves and the speeds
    python tests/benchmark/pictures.py frames    train agents and draw frames of them (minutes)
"""
import collections
import csv
import importlib
import pathlib
import sys

import matplotlib
import matplotlib.image
import numpy as np
from matplotlib.figure import Figure

HERE = pathlib.Path(__file__).resolve().parent
GREY = "#808080"  # readable on white and on black
COLORS = {  # of Okabe and Ito, which color-blind readers can tell apart
    "reinforce": "#999999", "a2c": "#56B4E9", "ppo": "#0072B2", "trpo": "#009E73", "dqn": "#CC79A7",
    "ddpg": "#D55E00", "naf": "#E69F00", "cem": "#8C6BB1", "es": "#B2A000", "mbrl_mpc": "#E6194B"}
matplotlib.rcParams.update({
    "svg.fonttype": "none", "svg.hashsalt": "curves", "font.size": 11, "text.color": GREY,
    "axes.edgecolor": GREY, "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY,
    "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none"})


def label(row):
    return row.flags.split()[-1] if row.flags else row.script


def curves(row, read):
    """Mean and standard deviation over seeds of the return, at common steps, or None."""
    runs = [run[2] for seed in row.seeds if (run := read(row, seed))]
    runs = [run[np.isfinite(run[:, 2])] for run in runs]
    runs = [run for run in runs if len(run) > 1]
    if not runs:
        return None
    first, last = max(run[0, 0] for run in runs), min(run[-1, 0] for run in runs)
    steps = np.geomspace(first, last, 40)
    returns = np.array([np.interp(steps, run[:, 0], run[:, 2]) for run in runs])
    return steps, returns.mean(0), returns.std(0)


def panel(axes, rows, read):
    """The curve of each row, its band over seeds, and the published return as a dotted line."""
    for row in rows:
        if (found := curves(row, read)) is None:
            continue
        steps, mean, std = found
        color = COLORS[label(row)]
        axes.plot(steps, mean, color=color, label=label(row), linewidth=2)
        axes.fill_between(steps, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)
        axes.plot([steps[-1] / 2, steps[-1]], [row.published] * 2, color=color, linestyle=":")
    axes.set(title=rows[0].env, xscale="log")
    axes.grid(alpha=0.2)
    axes.legend(fontsize=9, frameon=False, labelcolor=GREY, loc="upper left",
                bbox_to_anchor=(1, 1))  # beside the curves


def grid(rows, read, path, columns=3):
    by_env = collections.defaultdict(list)
    for row in rows:
        if curves(row, read) is not None:
            by_env[row.env].append(row)
    lines = -(-len(by_env) // columns)
    figure = Figure((5 * columns, 3 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for ax, rows_of_env in zip(axes, by_env.values()):
        panel(ax, rows_of_env, read)
    for ax in axes[len(by_env):]:
        ax.axis("off")
    figure.supxlabel("environment steps")
    figure.supylabel("return while training; dotted: best published")
    save(figure, path)


def bars(path):
    """Speed as a multiple of the peer's, with the spread of the pairs."""
    with open(HERE / "results/speed.csv") as file:
        rows = [row for row in csv.DictReader(file)
                if row["peer"] and not row["peer"].startswith("sbx.")][::-1]
    ratio, low, high = (np.array([float(row[key]) for row in rows])
                        for key in ("ratio", "low", "high"))
    figure = Figure((8, 0.5 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    axes.barh([row["name"] for row in rows], ratio, color="#0072B2", height=0.6,
              xerr=[ratio - low, high - ratio], error_kw=dict(ecolor=GREY, capsize=3))
    axes.axvline(1, color=GREY, linestyle=":")
    for place, value in enumerate(ratio):
        axes.text(0.05, place, f"{value:.1f}", va="center", color="white")
    axes.set(xlabel="times the steps per second of Stable-Baselines3, same cores, in turn")
    save(figure, path)


def growth(path):
    """Steps per second against one setting at a time."""
    lines = collections.defaultdict(list)
    with open(HERE / "results/growth.csv") as file:
        for row in csv.DictReader(file):
            lines[row["setting"], row["script"], row["flags"]].append(
                (float(row["value"]), float(row["steps_per_second"])))
    names = list(dict.fromkeys(name for name, _, _ in lines))
    figure = Figure((3.2 * len(names), 3), layout="constrained")
    panels = dict(zip(names, figure.subplots(1, len(names), sharey=True)))
    for (name, script, flags), points in lines.items():
        x, y = zip(*points)
        asynchronous = "--asynchronous" in flags
        panels[name].plot(x, y, "o--" if asynchronous else "o-", color=COLORS[script],
                          label=script + " --asynchronous" * asynchronous)
        panels[name].set(xlabel=name, xscale="log", yscale="log", xticks=x, ylim=(1e3, 1e5))
        panels[name].set_xticks(x, [f"{v:g}" if v < 1e6 else "1e6" for v in x], fontsize=8)
        panels[name].minorticks_off()
        panels[name].grid(alpha=0.2)
        panels[name].set_title(f"{script}.py", fontsize=11)
    panels["processes"].legend(fontsize=8, frameon=False, labelcolor=GREY, loc="lower center")
    panels[names[0]].set_ylabel("steps per second")
    save(figure, path)


def save(figure, path):
    figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})


# Script, environment, steps of training and settings of the agents in the strip of frames, and the
# step of the episode that is shown.
FRAMES = [("ppo", "CartPole-v1", 50_000, {}, 100), ("a2c", "Acrobot-v1", 300_000, {}, 60),
          ("mbrl_mpc", "Pendulum-v1", 4_000, {}, 20),
          ("cem_es", "InvertedPendulum-v5", 200_000, {}, 50),
          ("a2c", "HalfCheetah-v5", 1_000_000, {}, 100)]


def frames(path, height=160):
    """A strip of frames, one of each agent of FRAMES, trained with its preset."""
    import torch
    sys.path.insert(0, str(HERE.parent.parent))
    images = []
    for script, env, steps, settings, step in FRAMES:
        module = importlib.import_module(script)
        args = module.Args(env=env, total_timesteps=steps, device="cpu", **settings)
        agent, _ = module.train(args)
        with module.clean_up():
            envs = module.VecEnv(env, 1, torch.device("cpu"), render_mode="rgb_array")
            envs.reset(1)
            for _ in range(step):
                if hasattr(agent, "reset"):
                    agent.reset(envs.episode_starts)
                envs.step(agent.act(envs.obs, deterministic=True))
            image = envs.envs.envs[0].render()
        size = height, height * image.shape[1] // image.shape[0]
        small = torch.nn.functional.interpolate(
            torch.tensor(image.copy()).permute(2, 0, 1)[None] / 255, size, mode="area")
        images.append(small[0].permute(1, 2, 0).numpy())
    matplotlib.image.imsave(path, np.concatenate(images, 1))


def first(rows, read, path):
    """The picture of the README: the scripts of CartPole-v1 and those of Pendulum-v1."""
    figure = Figure((10, 3.2), layout="constrained")
    for axes, env in zip(figure.subplots(1, 2), ("CartPole-v1", "Pendulum-v1")):
        panel(axes, [row for row in rows if row.env == env and "--" not in row.flags
                     or row.env == env and row.script == "cem_es"], read)
        axes.set(xlabel="environment steps", ylabel="return while training")
    save(figure, path)


def draw():
    from run import ROWS, read
    first(ROWS, read, HERE / "first.svg")
    grid([row for row in ROWS if label(row) in COLORS], read, HERE / "curves.svg")
    pendulum = [row for row in ROWS if row.env == "Pendulum-v1"
                and row.script in ("mbrl_mpc", "ddpg", "naf", "ppo") and not row.flags]
    figure = Figure((7, 4), layout="constrained")
    axes = figure.subplots()
    panel(axes, pendulum, read)
    axes.set(xlabel="environment steps", ylabel="return while training")
    save(figure, HERE / "pendulum.svg")
    if (HERE / "results/speed.csv").exists():
        bars(HERE / "speed.svg")


if __name__ == "__main__":
    if sys.argv[1:] == ["frames"]:
        frames(HERE / "frames.png")
    else:
        draw()
