"""A2C against independent oracles: loops, torch.distributions, the formula of RMSprop."""
import dataclasses
import functools
import inspect
import math
import socket
import subprocess
import sys

import gymnasium as gym
import numpy as np
import processes
import pytest
import torch
from conftest import ROOT, same, small, timeless
from torch.distributions import Categorical, Independent, Normal

import a2c
import ppo
from a2c import Agent, Args

BOUNDS = gym.spaces.Box(np.array([-1, 0], np.float32), np.array([2, 10], np.float32))
DEFAULTS = {field.name: field.default for field in dataclasses.fields(Args)}
PLAIN = dict(norm_obs=False, norm_returns=False, anneal=False)


def train(env, resume="", **changes):
    """A short run without presets, statistics and schedules, which would hide the numbers."""
    return a2c.train(Args(**DEFAULTS | small("a2c", **PLAIN) | dict(env=env) | changes), resume)


# What A2C shares with PPO is tested in test_ppo.py.


@pytest.mark.parametrize("name", ["RunningNorm", "NatureCNN", "mlp", "Agent.value", "compute_gae",
                                  "Agent.evaluate_actions", "Agent.act", "explained_variance"])
def test_what_it_shares_with_ppo_is_the_same_text(name):
    mine, theirs = a2c, ppo
    for part in name.split("."):
        mine, theirs = getattr(mine, part), getattr(theirs, part)
    assert inspect.getsource(mine) == inspect.getsource(theirs)


# Advantages and returns.


def test_by_default_returns_are_n_step_returns_that_bootstrap_from_the_value(spy):
    calls = spy(a2c, "compute_gae")
    agent, _ = train("probes:Truncated3-v0", learning_rate=0, total_timesteps=64, num_steps=7,
                     gamma=0.9)
    values = agent.value(torch.arange(4.0).unsqueeze(-1)).tolist()
    full = [1 + 0.9 + 0.81 + 0.729 * values[3], 1 + 0.9 + 0.81 * values[3], 1 + 0.9 * values[3]]
    expected = torch.tensor(full + full + [1 + 0.9 * values[1]])  # two episodes and a first step
    assert torch.allclose(calls[0]["out"][1], expected.unsqueeze(-1).expand(7, 4), atol=1e-5)


# The loss.


@pytest.mark.parametrize("env", ["probes:Counter-v0", "Pendulum-v1"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_gradient_of_each_update_is_that_of_the_loss_of_its_own_batch(env, asynchronous, spy):
    evaluated, gae = spy(Agent, "evaluate_actions"), spy(a2c, "compute_gae")
    agent, _ = train(env, total_timesteps=48, learning_rate=0, max_grad_norm=1e9, vf_coef=0.3,
                     ent_coef=0.1, asynchronous=asynchronous)
    assert len(gae) == 3  # the gradients of three updates must not add up
    got = {name: p.grad.clone() for name, p in agent.named_parameters()}
    agent.zero_grad(set_to_none=False)
    obs, actions, (advantages, returns) = (
        evaluated[2]["obs"], evaluated[2]["actions"], gae[2]["out"])
    assert not advantages.requires_grad and not returns.requires_grad
    features = agent.encoder(obs)
    outputs, values = agent.actor(features), agent.critic(features).squeeze(-1)
    pi = Categorical(logits=outputs) if agent.discrete else Independent(
        Normal(agent.center + agent.scale * outputs, agent.log_std.exp()), 1)
    loss = -(pi.log_prob(actions) * advantages).mean() - 0.1 * pi.entropy().mean()
    loss = loss + 0.3 * (values - returns).square().mean()
    for (name, _), expected in zip(agent.named_parameters(), torch.autograd.grad(
            loss, list(agent.parameters()))):
        tolerance = 1e-4 * expected.abs().max()
        assert torch.allclose(got[name], expected, rtol=1e-3, atol=tolerance), name


def test_the_policy_loss_leaves_no_gradient_on_the_critic_nor_the_value_loss_on_the_actor():
    settings = dict(total_timesteps=16, learning_rate=0, max_grad_norm=1e9)
    policy_only, _ = train("Pendulum-v1", vf_coef=0.0, **settings)
    both, _ = train("Pendulum-v1", vf_coef=0.5, **settings)
    assert all((p.grad == 0).all() for p in policy_only.critic.parameters())
    assert any((p.grad != 0).any() for p in both.critic.parameters())
    for p, expected in zip(both.actor.parameters(), policy_only.actor.parameters()):
        assert torch.allclose(p.grad, expected.grad) and (p.grad != 0).any()


def test_the_losses_equal_a_loop_over_single_transitions(spy):
    evaluated, gae = spy(Agent, "evaluate_actions"), spy(a2c, "compute_gae")
    _, history = train("Pendulum-v1", total_timesteps=16)
    log_probs, entropy, values = evaluated[0]["out"]
    columns = log_probs, values, *gae[0]["out"]
    policy_loss = value_loss = 0
    for rows in zip(*(x.flatten().tolist() for x in columns), strict=True):
        log_prob, value, advantage, target = rows
        policy_loss -= log_prob * advantage / 16
        value_loss += (value - target) ** 2 / 16
    assert history[0]["policy_loss"] == pytest.approx(policy_loss, rel=1e-4)
    assert history[0]["value_loss"] == pytest.approx(value_loss, rel=1e-4)
    assert history[0]["entropy"] == pytest.approx(entropy.mean().item())


def test_the_agent_learns_from_unclipped_actions_while_the_environment_gets_clipped_ones(spy):
    calls = spy(Agent, "evaluate_actions")
    train("probes:Bounds-v0", total_timesteps=640)  # the probe itself refuses illegal actions
    actions = torch.cat([call["actions"].reshape(-1, 2) for call in calls])
    low, high = torch.tensor(BOUNDS.low), torch.tensor(BOUNDS.high)
    assert ((actions < low) | (actions > high)).any(0).all()  # some are outside, in each dimension
    assert not ((actions == low) | (actions == high)).any()  # and none was moved to a bound


# The step.


def observed_steps(monkeypatch):
    """(weights before, gradient, weights after) of each step of RMSprop."""
    steps, step = [], torch.optim.RMSprop.step

    def observe(self, *args):
        (weights,) = self.param_groups[0]["params"]
        steps.append([weights.clone(), weights.grad.clone()])
        step(self, *args)
        steps[-1].append(weights.clone())

    monkeypatch.setattr(torch.optim.RMSprop, "step", observe)
    return steps


def test_rmsprop_divides_by_the_root_of_the_mean_square_plus_epsilon(monkeypatch):
    steps = observed_steps(monkeypatch)
    train("Pendulum-v1", total_timesteps=160, learning_rate=1e-3)
    assert len(steps) == 10
    square = 0
    for before, gradient, after in steps:
        square = 0.99 * square + 0.01 * gradient.double() ** 2
        expected = before - 1e-3 * gradient / (square.sqrt() + 1e-5)
        assert torch.allclose(after.double(), expected, atol=1e-6)


def test_each_batch_is_used_for_one_step(spy, monkeypatch):
    steps = observed_steps(monkeypatch)
    gae = spy(a2c, "compute_gae")
    _, history = train("probes:Counter-v0", total_timesteps=320, num_steps=5)
    assert len(steps) == len(gae) == 320 // (4 * 5) and history[-1]["step"] == 320
    assert all(call["rewards"].shape == (5, 4) for call in gae)


# A NaN behind a termination.


def test_a_nan_behind_a_termination_does_not_reach_the_advantages():
    one = torch.ones(1, 1)
    advantages, returns = a2c.compute_gae(one, 0.5 * one, math.nan * one, one, one, 0.9, 0.9)
    assert advantages.item() == 0.5 and returns.item() == 1
    agent, _ = train("probes:NaNEnd-v0", norm_obs=True, norm_returns=True)
    assert all(value.isfinite().all() for value in agent.state_dict().values())


# A3C.


def test_one_asynchronous_process_learns_the_same_as_a2c_bit_for_bit(tmp_path):
    results = []
    for asynchronous in (False, True):
        folder = tmp_path / f"asynchronous={asynchronous}"
        settings = dict(norm_obs=True, norm_returns=True, asynchronous=asynchronous, run_dir=folder)
        train("Pendulum-v1", total_timesteps=256, **settings)
        agent, history = train("Pendulum-v1", folder, total_timesteps=512, **settings)
        squares = a2c.load_checkpoint(folder)["optimizer"]["state"][0]["square_avg"]
        results.append([agent.state_dict(), timeless(history), squares])
    assert same(*results) and results[0][2].any()


def test_asynchronous_processes_are_refused_on_cuda(monkeypatch):
    monkeypatch.setattr(a2c, "setup", lambda args: torch.device("cuda"))
    with pytest.raises(a2c.UserError, match="--device cpu"):
        train("CartPole-v1", asynchronous=True)


WORKER = """
import sys, time
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch
import a2c

step_envs, step_weights = a2c.VecEnv.step, torch.optim.RMSprop.step
foreign, last = 0, None  # changes of the weights between two steps of this process

def step(self):
    global foreign, last
    (weights,) = self.param_groups[0]["params"]
    foreign += last is not None and not torch.equal(weights, last)
    step_weights(self)
    last = weights.clone()

torch.optim.RMSprop.step = step
# Both are slow, so that neither is done before the other begins.
a2c.VecEnv.step = lambda self, actions: (time.sleep(0.005), step_envs(self, actions))[1]
agent, history = a2c.train(a2c.Args(
    env="probes:Counter-v0", total_timesteps=3200, num_envs=4, num_steps=4, hidden_size=16,
    asynchronous=True, device="cpu", run_dir="run" if a2c.RANK == 0 else ""))
weights = torch.nn.utils.parameters_to_vector(agent.parameters())
torch.save(dict(foreign=foreign, finite=weights.isfinite().all(), step=history[-1]["step"],
                count=agent.encoder.sums[0].item(), last=last,
                grouped=torch.distributed.is_initialized()), "result.pt")
"""


def start_two(path, folder, *words):
    """Start a script as two processes, as torchrun does."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    scripts = []
    for rank in range(2):
        (folder / f"rank{rank}").mkdir()
        join = functools.partial(processes.join, rank, port)
        scripts.append(processes.Script(path, *words, folder=folder / f"rank{rank}", bomb=join))
    return scripts


def test_two_asynchronous_processes_both_change_the_weights_that_they_share(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "worker.py").write_text(WORKER.format(root=str(ROOT)))
    for script in start_two(tmp_path / "worker.py", tmp_path):
        code, _, errors = script.end()
        assert code == 0, errors
    results = [torch.load(tmp_path / f"rank{rank}/result.pt") for rank in range(2)]
    for result in results:
        assert result["foreign"] > 10 and result["finite"]
        assert 3200 <= result["step"] <= 3200 + 2 * 16  # of both processes together
        assert not result["grouped"]  # so that nothing can wait for the other process
        # Both add to the statistics. Without a lock a batch may get lost now and then.
        assert 0.9 * 3200 < result["count"] <= 3200 + 2 * 16
    assert not list((tmp_path / "temporary").glob("tmp*"))
    saved = a2c.load_checkpoint(tmp_path / "rank0/run")
    assert saved["optimizer"]["state"][0]["square_avg"].any() and saved["step"] >= 3200


@pytest.mark.exhaustive
def test_one_killed_process_of_torchrun_stops_the_other_which_saves(tmp_path):
    (tmp_path / "driver.py").write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import a2c

save = a2c.Run.log
def log(self, **metrics):
    save(self, **metrics)
    if a2c.RANK == 1 and self.step > 5000:
        os.kill(os.getpid(), signal.SIGKILL)

a2c.Run.log = log
a2c.main()
""")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "driver.py", "--asynchronous", "--device", "cpu", "--total-timesteps", "100000000",
         "--run-dir", "run"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode and "stopped; --resume run continues" in done.stderr
    assert a2c.load_checkpoint(tmp_path / "run")["step"] > 5000


# Learning.


@pytest.mark.parametrize("settings", [dict(), dict(norm_returns=True), dict(gae_lambda=0.9),
                                      dict(asynchronous=True)])
def test_the_arm_that_pays_becomes_more_probable(settings):
    agent, _ = train("probes:Arms-v0", total_timesteps=1024, learning_rate=5e-3, **settings)
    log_probs, _, _ = agent.evaluate_actions(torch.zeros(2, 1), torch.arange(2))
    assert log_probs[1].exp() > 0.8


def test_continuous_actions_move_to_the_best_one():
    agent, _ = train("probes:Target-v0", total_timesteps=4096, learning_rate=5e-3,
                     norm_returns=True, anneal=True)
    assert torch.allclose(agent.act(torch.zeros(1, 1), True), torch.ones(1, 2), atol=0.35)


def test_one_environment_and_one_step_are_a_batch_too():
    agent, history = train("probes:Truncated-v0", total_timesteps=64, num_envs=1, num_steps=1,
                           norm_obs=True, norm_returns=True)
    assert all(value.isfinite().all() for value in agent.state_dict().values())
    assert all(math.isfinite(value) for value in history[-1].values())


def test_cartpole_is_learned_within_20_thousand_steps():
    args = Args(env="CartPole-v1", total_timesteps=20_000, seed=1, device="cpu")
    agent, _ = a2c.train(args)
    # A random policy gets 22.
    assert a2c.evaluate(agent, args, 20).mean() > 100


@pytest.mark.exhaustive
def test_cartpole_is_solved_by_two_asynchronous_processes(tmp_path):
    scripts = start_two(ROOT / "a2c.py", tmp_path, "--asynchronous", "--device", "cpu",
                        "--total-timesteps", 200_000, "--run-dir", "run", "--episodes", 20)
    (code, output, errors), (code1, *_) = [script.end() for script in scripts]
    assert code == code1 == 0, errors
    agent, args = a2c.load_agent(tmp_path / "rank0/run", device="cpu")
    assert a2c.evaluate(agent, args, 20).mean() >= 475
