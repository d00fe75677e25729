"""What a GPU is worth: its tests, then steps/s with CUDA graphs, without them, and on the CPU.

    python tests/benchmark/gpu.py                     all settings
    python tests/benchmark/gpu.py --only ppo          the settings that contain the word
    python tests/benchmark/gpu.py --pong 10000000     also Pong by ppo.py and dqn.py, so many steps

Each run is a process of its own, with seed 1 and the presets; the return is that of its final agent
over 100 episodes, 10 of Pong. The three returns of a row should differ no more than those of three
seeds."""
import argparse
import json
import pathlib
import subprocess
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
SETTINGS = [  # script, settings
    ("reinforce", dict(env="CartPole-v1", total_timesteps=200_000)),
    ("a2c", dict(env="CartPole-v1", total_timesteps=200_000)),
    ("ppo", dict(env="CartPole-v1", total_timesteps=100_000)),
    ("ppo", dict(env="HalfCheetah-v5", total_timesteps=200_000)),
    ("ppo", dict(env="ALE/Pong-v5", total_timesteps=100_000)),
    ("trpo", dict(env="CartPole-v1", total_timesteps=100_000)),
    ("dqn", dict(env="CartPole-v1", total_timesteps=50_000)),
    ("dqn", dict(env="ALE/Pong-v5", total_timesteps=100_000)),
    ("ddpg", dict(env="Pendulum-v1", total_timesteps=20_000)),
    ("ddpg", dict(env="HalfCheetah-v5", total_timesteps=20_000)),
    ("naf", dict(env="Pendulum-v1", total_timesteps=20_000)),
    ("cem_es", dict(env="CartPole-v1", total_timesteps=50_000)),
    ("mbrl_mpc", dict(env="Pendulum-v1", total_timesteps=4_000)),
    ("mbrl_mpc", dict(env="Pendulum-v1", total_timesteps=4_000, planner="policy"))]
TRAIN = """
import importlib, json, sys
script, settings, graphs, episodes = json.loads(sys.argv[1])
module = importlib.import_module(script)
if not graphs:
    module.cuda_graph = lambda function, device: function
args = module.Args(**settings)
sys.stdout = sys.stderr
agent, history = module.train(args)
last = history[-1]
score = module.evaluate(agent, args, episodes).mean()
sys.stdout = sys.__stdout__
print(json.dumps([last["step"] / last["seconds"], last["seconds"], score]))
"""


def train(script, settings, graphs=True):
    """(steps per second, seconds, return of the final agent)"""
    episodes = 10 if "ALE/" in settings["env"] else 100  # they are long
    words = json.dumps([script, settings, graphs, episodes])
    done = subprocess.run([sys.executable, "-c", TRAIN, words], cwd=ROOT, capture_output=True,
                          text=True)
    if done.returncode:
        sys.exit(f"{script} with {settings}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="settings that contain this")
    parser.add_argument("--pong", type=int, default=0, help="steps of Pong, for its return")
    parser.add_argument("--device", default="cuda", help="cpu: to try this script without a GPU")
    args = parser.parse_args()
    if args.device == "cuda":
        if not torch.cuda.is_available():
            sys.exit("there is no CUDA device")
        subprocess.run([sys.executable, "-m", "pytest", "-q", "--all", "tests/test_gpu.py"],
                       cwd=ROOT, check=True)
        print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print("\n| script | environment | steps | graphs, steps/s | eager | CPU | graphs / eager | "
          "graphs / CPU | returns: graphs, eager, CPU |\n|---|---|---|---|---|---|---|---|---|")
    for script, settings in SETTINGS:
        name = " ".join([script, *map(str, settings.values())])
        if args.only in name:
            on_gpu = settings | dict(device=args.device)
            (graphs, _, score), (eager, _, eager_score), (cpu, _, cpu_score) = (
                train(script, on_gpu), train(script, on_gpu, graphs=False),
                train(script, settings | dict(device="cpu")))
            print(f"| `{script}.py` | {settings['env']} | {settings['total_timesteps']:,} | "
                  f"{graphs:,.0f} | {eager:,.0f} | {cpu:,.0f} | {graphs / eager:.1f} | "
                  f"{graphs / cpu:.1f} | {score:.1f}, {eager_score:.1f}, {cpu_score:.1f} |",
                  flush=True)
    for script in ("ppo", "dqn") if args.pong else ():
        settings = dict(env="ALE/Pong-v5", total_timesteps=args.pong, device=args.device,
                        run_dir=f"runs/pong_{script}")
        speed, seconds, score = train(script, settings)
        print(f"{script} on Pong: return {score:.1f} after {args.pong:,} steps in "
              f"{seconds / 60:.0f} minutes, {speed:,.0f} steps/s")


if __name__ == "__main__":
    main()
