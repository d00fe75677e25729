"""Speed beside Stable-Baselines3 and sb3-contrib: the same settings, in turn, on the same cores.

    python tests/benchmark/compare.py --peer-python PATH_TO_A_PYTHON_THAT_HAS_THEM
    python tests/benchmark/compare.py --peer-python PATH --sbx    SBX, their JAX version, instead

Steps per second are counted over the last three quarters of a run, so that neither side pays for
imports and compiling or has yet to begin to learn; `startup` is the time before that, less what its
steps would take at this speed. The median of all pairs is reported, as other programs may disturb
one. `--only WORD` takes the settings whose name contains the word; `--solve` measures seconds of
training to a policy that solves the task instead, the peer with the settings that rl-baselines3-zoo
tuned for it. Results go to results/speed.csv and results/solve.csv."""
import argparse
import csv
import json
import os
import pathlib
import subprocess
import sys

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent

# Each: our script, environment, num_envs, steps, our settings, the peer's class and settings;
# without a peer the other side is gymnasium's vector environment alone, with any actions.
NO_NORMS = dict(norm_obs=False, norm_returns=False)
SPEED = {
    "ppo CartPole 4x128": (
        "ppo", "CartPole-v1", 4, 100_000,
        dict(num_steps=128, num_minibatches=4, update_epochs=4, anneal=False) | NO_NORMS,
        "PPO", dict(n_steps=128, batch_size=128, n_epochs=4)),
    "ppo HalfCheetah 1x2048": (
        "ppo", "HalfCheetah-v5", 1, 20_480,
        dict(num_steps=2048, num_minibatches=32, update_epochs=10, anneal=False) | NO_NORMS,
        "PPO", dict(n_steps=2048, batch_size=64, n_epochs=10)),
    "a2c CartPole 8x5": (
        "a2c", "CartPole-v1", 8, 80_000, NO_NORMS, "A2C", dict(n_steps=5)),
    "trpo CartPole 4x512": (
        "trpo", "CartPole-v1", 4, 40_960,
        dict(num_steps=512, num_minibatches=16, update_epochs=10, cg_iters=15) | NO_NORMS,
        "TRPO", dict(n_steps=512, batch_size=128)),
    "dqn CartPole": (
        "dqn", "CartPole-v1", 1, 20_000,
        dict(batch_size=128, train_every=10, num_updates=1, buffer_size=10_000, target_every=500,
             double=False, hidden_size=100),
        "DQN", dict(batch_size=128, train_freq=10, gradient_steps=1, buffer_size=10_000,
                    learning_starts=1000, target_update_interval=500,
                    policy_kwargs=dict(net_arch=[100, 100]))),
    "ddpg HalfCheetah": (
        "ddpg", "HalfCheetah-v5", 1, 6000, dict(batch_size=256, learning_starts=1000),
        "DDPG", dict(batch_size=256, learning_starts=1000, learning_rate=1e-3, train_freq=1,
                     gradient_steps=1, noise=0.1, policy_kwargs=dict(net_arch=[256, 256]))),
    "cem_es CartPole": ("cem_es", "CartPole-v1", 32, 200_000, dict(population=32), "", {}),
    "cem_es HalfCheetah": ("cem_es", "HalfCheetah-v5", 16, 100_000, dict(population=16), "", {}),
}

# Each: our script, environment, episodes to score, the peer's num_envs, steps, class and settings.
SOLVE = {
    "ppo CartPole": (
        "ppo", "CartPole-v1", 100, 8, 100_000, "PPO",
        dict(n_steps=32, batch_size=256, gae_lambda=0.8, gamma=0.98, n_epochs=20, ent_coef=0.0,
             learning_rate="lin_1e-3", clip_range="lin_0.2")),
    "a2c CartPole": ("a2c", "CartPole-v1", 100, 8, 500_000, "A2C", dict(ent_coef=0.0)),
    "trpo CartPole": (
        "trpo", "CartPole-v1", 100, 2, 100_000, "TRPO",
        dict(n_steps=512, batch_size=512, cg_damping=1e-3, gae_lambda=0.98, gamma=0.99,
             learning_rate=1e-3, n_critic_updates=20)),
    "dqn CartPole": (
        "dqn", "CartPole-v1", 100, 1, 50_000, "DQN",
        dict(learning_rate=2.3e-3, batch_size=64, buffer_size=100_000, learning_starts=1000,
             gamma=0.99, target_update_interval=10, train_freq=256, gradient_steps=128,
             exploration_fraction=0.16, exploration_final_eps=0.04,
             policy_kwargs=dict(net_arch=[256, 256]))),
    "ddpg Pendulum": (
        "ddpg", "Pendulum-v1", 500, 1, 20_000, "DDPG",
        dict(gamma=0.98, buffer_size=200_000, learning_starts=10_000, noise=0.1,
             gradient_steps=1, train_freq=1, learning_rate=1e-3,
             policy_kwargs=dict(net_arch=[400, 300]))),
}

OURS = """
import importlib, json, sys
from dataclasses import fields
script, env, num_envs, steps, settings = json.loads(sys.argv[1])
module = importlib.import_module(script)
args = {f.name: f.default for f in fields(module.Args)} | settings | dict(
    env=env, num_envs=num_envs, total_timesteps=steps, device="cpu")
sys.stdout = sys.stderr
history = module.train(module.Args(**args))[1]
first = next(row for row in history if row["step"] >= steps / 4)
last = history[-1]
sys.stdout = sys.__stdout__
speed = (last["step"] - first["step"]) / (last["seconds"] - first["seconds"])
print(speed, first["seconds"] - first["step"] / speed)
"""

PEER = """
import json, sys, time
import torch
torch.set_num_threads(1)
env, num_envs, steps, name, settings, seed, episodes = json.loads(sys.argv[1])
import gymnasium
if name.startswith("sbx."):
    import sbx as library
else:
    import stable_baselines3 as library
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
try:
    import sb3_contrib
except ImportError:
    sb3_contrib = None

def value(x):
    if isinstance(x, str) and x.startswith("lin_"):
        return lambda remaining: remaining * float(x[4:])
    return x

settings = {key: value(x) for key, x in settings.items()}
if "noise" in settings:
    import numpy as np
    from stable_baselines3.common.noise import NormalActionNoise
    std = settings.pop("noise")
    size = gymnasium.make(env).action_space.shape[0]
    settings["action_noise"] = NormalActionNoise(np.zeros(size), std * np.ones(size))

class Clock(BaseCallback):
    times = []
    def _on_rollout_end(self):
        if not self.times or self.num_timesteps > self.times[-1][0]:
            self.times.append((self.num_timesteps, time.perf_counter()))
    def _on_step(self):
        return True

peer = getattr(library, name.removeprefix("sbx."), None) or getattr(sb3_contrib, name)
envs = make_vec_env(env, n_envs=num_envs, seed=seed)
model = peer("MlpPolicy", envs, device="cpu", seed=seed, **settings)
clock, began = Clock(), time.perf_counter()
model.learn(steps, callback=clock)
seconds = time.perf_counter() - began
if episodes:
    from stable_baselines3.common.evaluation import evaluate_policy
    score = evaluate_policy(model, make_vec_env(env, n_envs=20, seed=seed + 1000), episodes)[0]
    print(seconds, score)
else:
    first = next(x for x in clock.times if x[0] >= steps / 4)
    last = clock.times[-1]
    speed = (last[0] - first[0]) / (last[1] - first[1])
    print(speed, first[1] - began - first[0] / speed)
"""

BARE = """
import json, sys, time
import gymnasium as gym
env, num_envs = json.loads(sys.argv[1])
mode = dict(autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
envs = gym.make_vec(env, num_envs, "sync", mode)
envs.reset(seed=1), envs.action_space.seed(1)
actions = [envs.action_space.sample() for _ in range(100)]
for repeat in range(2):  # the first warms up
    began, steps = time.perf_counter(), 0
    while time.perf_counter() < began + 2:
        for action in actions:
            envs.step(action)
        steps += 100 * num_envs
print(steps / (time.perf_counter() - began), 0)
"""


def run(python, code, *what):
    """The numbers that the last line of the program's output holds."""
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    done = subprocess.run([python, "-c", code, json.dumps(what)], capture_output=True, text=True,
                          env=env)
    if done.returncode:
        sys.exit(f"{python} failed: {(done.stderr.strip() or '?').splitlines()[-1]}")
    return [float(x) for x in done.stdout.splitlines()[-1].split()]


def speed(peer, only, pairs, sbx):
    for name, (script, env, num_envs, steps, ours, peer_name, theirs) in SPEED.items():
        if only not in name or sbx and peer_name not in ("PPO", "DQN", "DDPG"):
            continue
        if sbx:
            name, peer_name = f"{name} (SBX)", f"sbx.{peer_name}"
        measured = []
        for pair in range(pairs):
            a, startup = run(sys.executable, OURS, script, env, num_envs, steps, ours)
            b, peer_startup = (
                run(peer, PEER, env, num_envs, steps, peer_name, theirs, 1, 0) if peer_name
                else run(sys.executable, BARE, env, num_envs))
            measured.append((a, b, a / b, startup, peer_startup))
            print(f"{name}: {a:,.0f} against {b:,.0f} steps/s, {a / b:.2f} times", flush=True)
        bare, _ = run(sys.executable, BARE, env, num_envs)
        a, b, ratio, startup, peer_startup = np.median(measured, 0)
        ratios = [x[2] for x in measured]
        print(f"{name}: {ratio:.2f} times, {min(ratios):.2f} to {max(ratios):.2f}; "
              f"environments alone {bare:,.0f} steps/s", flush=True)
        yield dict(name=name, peer=peer_name, ratio=ratio, low=min(ratios), high=max(ratios),
                   pairs=pairs, ours=a, theirs=b, environments_alone=bare, startup=startup,
                   peer_startup=peer_startup)


def solve(peer, only, seeds):
    for name, (script, env, episodes, num_envs, steps, peer_name, theirs) in SOLVE.items():
        for seed in seeds if only in name else ():
            seconds, score = run(sys.executable, SOLVED, script, env, seed, episodes)
            peer_seconds, peer_score = run(
                peer, PEER, env, num_envs, steps, peer_name, theirs, seed, episodes)
            print(f"{name}, seed {seed}: {score:.1f} in {seconds:.1f} s against {peer_score:.1f} "
                  f"in {peer_seconds:.1f} s", flush=True)
            yield dict(name=name, seed=seed, seconds=seconds, score=score,
                       peer_seconds=peer_seconds, peer_score=peer_score)


SOLVED = """
import importlib, json, sys
script, env, seed, episodes = json.loads(sys.argv[1])
module = importlib.import_module(script)
args = module.Args(env=env, seed=seed, device="cpu")
sys.stdout = sys.stderr
agent, history = module.train(args)
returns = module.evaluate(agent, args, episodes)
sys.stdout = sys.__stdout__
print(history[-1]["seconds"], returns.mean())
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="a python with Stable-Baselines3")
    parser.add_argument("--only", default="", help="settings whose name contains this")
    parser.add_argument("--pairs", type=int, default=4, help="how often each side runs (4)")
    parser.add_argument("--solve", action="store_true", help="seconds to solve instead of speed")
    parser.add_argument("--sbx", action="store_true", help="SBX instead of Stable-Baselines3")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    args = parser.parse_args()
    try:
        packages = "stable_baselines3, " + ("sbx" if args.sbx else "sb3_contrib")
        subprocess.run([args.peer_python, "-c", f"import {packages}"],
                       check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        sys.exit(f"{args.peer_python} cannot import {packages}: pip install stable-baselines3 "
                 "sb3-contrib sbx-rl in a virtual environment of their own")
    path = HERE / "results" / ("solve.csv" if args.solve else "speed.csv")
    path.parent.mkdir(exist_ok=True)
    old = list(csv.DictReader(path.open())) if path.exists() else []
    rows = solve(args.peer_python, args.only, args.seeds) if args.solve else speed(
        args.peer_python, args.only, args.pairs, args.sbx)
    for row in rows:
        key = row["name"], str(row.get("seed"))
        old = [x for x in old if (x["name"], str(x.get("seed"))) != key]
        old.append({k: f"{x:.4g}" if isinstance(x, float) else x for k, x in row.items()})
        with path.open("w", newline="") as file:
            columns = dict.fromkeys(key for row in old for key in row)
            writer = csv.DictWriter(file, columns)
            writer.writeheader(), writer.writerows(old)


if __name__ == "__main__":
    main()
