"""How much of the policy gradient's variance the baselines of reinforce.py leave.

    python tests/benchmark/variance.py

Policies of CartPole-v1 after 2, 20 and 60 thousand steps of training with V, seeds 1 to 3. Each
plays 40 batches of 8 episodes; on the same batches, every baseline gives 40 gradients (3), whose
variances are summed over the actor's weights. Results go to results/gradient_variance.csv."""
import pathlib
import sys

import numpy as np
import torch

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
import reinforce  # noqa: E402

BASELINES = "none", "mean", "value"


@torch.no_grad()
def episodes(agent, envs):
    """obs (B, ...), actions (B,) and returns (B,) of one episode in each environment, and the mean
    return of the other environments (B,)."""
    envs.reset(int(torch.randint(2**31, ())))
    rollout, counts = [], torch.ones(len(envs.obs))
    while counts.any():
        obs, actions = envs.obs, agent.act(envs.obs)
        next_obs, rewards, terminations, dones = envs.step(actions)
        values = agent.value(next_obs) * agent.return_norm.std
        rollout.append((obs, actions, rewards, values, terminations, dones, counts))
        counts = counts * (1 - dones)
    obs, actions, *rest, counts = (torch.stack(x) for x in zip(*rollout))
    returns = reinforce.compute_returns(*rest, gamma=0.99) / agent.return_norm.std
    mean = reinforce.mean_of_others(returns, counts)
    return [x[counts.bool()] for x in (obs, actions, returns, mean)]


def gradient(agent, baseline, obs, actions, returns, mean):
    """The gradient (3) of the actor's weights, one vector."""
    log_probs, _, values = agent.evaluate_actions(obs, actions)
    b = {"none": 0, "mean": mean, "value": values.detach()}[baseline]
    loss = -(log_probs * (returns - b)).mean()
    return torch.cat([x.flatten() for x in torch.autograd.grad(loss, agent.actor.parameters())])


def main():
    rows = []
    for seed in (1, 2, 3):
        for steps in (2000, 20_000, 60_000):
            args = reinforce.Args(env="CartPole-v1", seed=seed, total_timesteps=steps,
                                  baseline="value", anneal=False, device="cpu")
            agent, history = reinforce.train(args)
            envs = reinforce.VecEnv(args.env, 8, torch.device("cpu"))
            batches = [episodes(agent, envs) for _ in range(40)]
            variances = [torch.stack([gradient(agent, baseline, *batch) for batch in batches])
                         .var(0).sum().item() for baseline in BASELINES]
            rows.append([seed, steps, *variances])
    lines = [",".join(["seed", "step", *BASELINES])]
    lines += [",".join(f"{x:.4g}" for x in row) for row in rows]
    (HERE / "results/gradient_variance.csv").write_text("\n".join(lines) + "\n")
    ratios = np.array([row[2:] for row in rows]).reshape(3, 3, 3)
    ratios = (ratios / ratios[..., :1]).mean(0)  # means over seeds, by steps and baseline
    for baseline, ratio in zip(BASELINES, ratios.T):
        print(f"{baseline}: {', '.join(f'{x:.2f}' for x in ratio)}")


if __name__ == "__main__":
    main()
