"""What the planner of mbrl_mpc.py costs, and what it is worth with and without a true model.

    python tests/benchmark/planning.py speed        a plan beside its matrix products alone
    python tests/benchmark/planning.py truth RUN    a run's agent on Pendulum-v1, and the same
                                                    planner on the true dynamics
"""
import argparse
import pathlib
import sys
import time

import torch
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent.parent))
import mbrl_mpc


class Pendulum(nn.Module):
    """The equations of Pendulum-v1, in the place of a Model."""

    def __init__(self):
        super().__init__()
        self.device = nn.Parameter(torch.zeros(()))  # says where the agent is
        self.delta_norm = mbrl_mpc.Normalizer(4)

    def predict(self, obs, actions, noise):
        cos, sin, speed = obs.unbind(-1)
        angle, torque = torch.atan2(sin, cos), actions[..., 0].clamp(-2, 2)
        rewards = -(angle.square() + 0.1 * speed.square() + 0.001 * torque.square())
        speed = (speed + 0.05 * (15 * sin + 3 * torque)).clamp(-8, 8)
        angle = angle + 0.05 * speed
        return torch.stack([angle.cos(), angle.sin(), speed], -1), rewards, 0 * rewards


def make_agent(args):
    envs = mbrl_mpc.VecEnv(args.env, 1, torch.device("cpu"))
    return mbrl_mpc.Agent(envs.obs_space, envs.action_space, args)


def true_agent(args):
    """The planner of `args` on the true dynamics, for which one particle is enough."""
    agent = make_agent(mbrl_mpc.Args(**vars(args) | dict(ensemble_size=1)))
    agent.model = Pendulum()
    return agent


@torch.inference_mode()
def seconds(function, repeats):
    function()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def speed():
    torch.set_num_threads(1)
    print("settings, environments: seconds of a plan, of its matrix products alone, their ratio")
    for name, changes in {"Pendulum-v1's preset": dict(),
                          "the defaults": dict(ensemble_size=5, hidden_size=200,
                                               population=200, elites=20, horizon=25)}.items():
        args = mbrl_mpc.Args(env="Pendulum-v1", **changes)
        agent = make_agent(args)
        for num_envs in (1, 4, 20):
            obs, noise = torch.randn(num_envs, 3), agent.sample_noise()
            mean = agent.center.expand(num_envs, args.horizon, -1)
            rows = num_envs * args.population
            inputs = [torch.randn(args.ensemble_size, rows, x.shape[1])
                      for x in agent.model.weights]

            def products():
                for _ in range(args.rounds * args.horizon):
                    for x, weight, bias in zip(inputs, agent.model.weights, agent.model.biases):
                        torch.baddbmm(bias, x, weight)

            repeats = 2 if rows > 500 else 8
            plan = seconds(lambda: agent.plan(obs, mean, *noise), repeats)
            alone = seconds(products, repeats)
            print(f"{name}, {num_envs}: {plan:.4f} {alone:.4f} {alone / plan:.0%}", flush=True)
    agent = make_agent(mbrl_mpc.Args(env="Pendulum-v1", planner="policy"))
    print(f"a policy, 1: {seconds(lambda: agent.act(torch.randn(1, 3)), 100):.6f}")


def truth(folder, episodes):
    agent, args = mbrl_mpc.load_agent(folder)
    learned, true = (mbrl_mpc.evaluate(x, args, episodes) for x in (agent, true_agent(args)))
    print(f"learned dynamics {learned.mean():.2f}, true dynamics {true.mean():.2f}, "
          f"{episodes} episodes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "truth"])
    parser.add_argument("run", nargs="?")
    parser.add_argument("--episodes", type=int, default=100)
    given = parser.parse_args()
    truth(given.run, given.episodes) if given.what == "truth" else speed()
