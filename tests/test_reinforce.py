"""REINFORCE against independent oracles: numbers by hand, loops, torch.distributions, exact sums."""
import dataclasses
import inspect
import math

import numpy as np
import pytest
import torch
from conftest import small
from torch.distributions import Categorical, Independent, Normal

import a2c
import reinforce
from reinforce import Agent, Args, RunningNorm

BASELINES = "none", "mean", "value"
DEFAULTS = {field.name: field.default for field in dataclasses.fields(Args)}
PLAIN = dict(norm_obs=False, norm_returns=False, anneal=False)


def train(env, **changes):
    """A short run without presets, statistics and schedules, which would hide the numbers."""
    settings = DEFAULTS | small("reinforce") | PLAIN | dict(env=env)
    return reinforce.train(Args(**settings | changes))


# What REINFORCE shares with A2C is tested there.


@pytest.mark.parametrize("name", ["RunningNorm", "NatureCNN", "mlp", "Agent", "explained_variance"])
def test_what_it_shares_with_a2c_is_the_same_text(name):
    mine, theirs = reinforce, a2c
    for part in name.split("."):
        mine, theirs = getattr(mine, part), getattr(theirs, part)
    assert inspect.getsource(mine) == inspect.getsource(theirs)


# Returns.


def column(*numbers):
    return torch.tensor(numbers, dtype=torch.double).unsqueeze(-1)


def test_rewards_1_2_3_with_gamma_a_half_give_rewards_to_go_by_hand():
    zeros, ends = column(0, 0, 0), column(0, 0, 1)
    returns = reinforce.compute_returns(column(1, 2, 3), zeros, ends, ends, 0.5)
    assert returns.flatten().tolist() == [2.75, 3.5, 3]


def test_returns_are_the_discounted_rewards_up_to_the_end_of_the_episode():
    T, N, gamma = 9, 40, 0.9
    torch.manual_seed(0)
    rewards, next_values = torch.randn(2, T, N, dtype=torch.double)
    terminations, truncations = (torch.rand(2, T, N) < 0.2).double()
    assert terminations[-1].any() and truncations[-1].any() and (terminations * truncations).any()
    dones = torch.maximum(terminations, truncations)
    returns = reinforce.compute_returns(rewards, next_values, terminations, dones, gamma)
    for n in range(N):
        for t in range(T):
            expected = 0
            for k in range(t, T):
                expected += gamma ** (k - t) * rewards[k, n]
                if dones[k, n] or k == T - 1:
                    if not terminations[k, n]:
                        expected += gamma ** (k + 1 - t) * next_values[k, n]
                    break
            assert returns[t, n] == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("env, bootstrapped", [
    ("probes:Truncated-v0", 1), ("probes:Terminated-v0", 0), ("probes:Both-v0", 0)])
def test_only_a_truncation_is_completed_and_only_by_a_trained_value(env, bootstrapped, baseline, spy):
    calls = spy(reinforce, "compute_returns")
    agent, _ = train(env, learning_rate=0, total_timesteps=16, baseline=baseline)
    start, end = agent.value(torch.tensor([[0.0], [1.0]])).tolist()
    assert abs(start - end) > 1e-4  # or else the reset observation would give the same
    expected = 2 + bootstrapped * (baseline == "value") * 0.99 * end
    for call in calls:
        assert torch.allclose(call["out"], torch.full_like(call["out"], expected), atol=1e-5)


def test_a_nan_behind_a_termination_does_not_reach_the_returns():
    one = torch.ones(1, 1)
    assert reinforce.compute_returns(one, math.nan * one, one, one, 0.9).item() == 1
    agent, history = train("probes:NaNEnd-v0", norm_obs=True, norm_returns=True)
    assert all(value.isfinite().all() for value in agent.state_dict().values())


# Baselines.


def test_the_mean_of_the_others_leaves_out_the_own_environment_and_what_does_not_count():
    returns, mask = torch.randn(5, 3), torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 0, 0],
                                                     [1, 0, 0]])
    returns[4, 2] = math.nan
    b = reinforce.mean_of_others(returns, mask)
    assert b.shape == (5, 3)
    for n in range(3):
        others = [returns[t, m] for m in range(3) if m != n for t in range(5) if mask[t, m]]
        assert b[:, n].tolist() == pytest.approx([sum(others).item() / len(others)] * 5, abs=1e-6)


def test_the_mean_baseline_leaves_the_expected_gradient_as_it_is():
    """With actions of 0 or 1 at the first of 20 steps; 1 costs 1 and pays 1.1 at the end.

    The mean of all returns, one's own included, would turn the gradient around."""
    gradients, ones = [], torch.ones(20, 2)
    for actions in torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]):  # equally probable
        rewards, zeros = torch.zeros(2, 20, 2)
        rewards[0], rewards[-1] = -actions, 1.1 * actions
        ends = zeros.clone()
        ends[-1] = 1
        returns = reinforce.compute_returns(rewards, zeros, ends, ends, 1.0)
        grad_log_pi = actions - 0.5
        gradients.append([(grad_log_pi * (returns - b)[0]).mean().item() for b in (
            zeros, reinforce.mean_of_others(returns, ones), returns.mean())])
    none, others, everything = np.mean(gradients, 0)
    assert none == pytest.approx(0.025) == others and everything < -0.1


# Whole episodes.


def batches(spy, env, **changes):
    """(obs, actions, returns) of each update, and the history."""
    evaluated, explained = spy(Agent, "evaluate_actions"), spy(reinforce, "explained_variance")
    _, history = train(env, learning_rate=0, **changes)
    return [(call["obs"], call["actions"], explained[k]["returns"])
            for k, call in enumerate(evaluated)], history


def test_a_batch_is_one_whole_episode_of_each_environment(spy):
    for obs, actions, returns in batches(spy, "probes:Counter-v0", total_timesteps=100)[0]:
        assert len(obs) == len(actions) == len(returns) == 4 * 5
        assert sorted(obs.flatten().tolist()) == sorted([0, 1, 2, 3, 4] * 4)
        for step, value in zip(obs.flatten().tolist(), returns.tolist()):
            assert value == pytest.approx(sum(0.99**k for k in range(5 - int(step))))


def test_long_episodes_are_waited_for_and_none_that_began_meanwhile_counts(spy):
    # Episodes have 1 or 9 steps; counting those that end first would see the short ones only.
    found, _ = batches(spy, "probes:Uneven-v0", total_timesteps=2000, num_envs=8)
    starts = [(obs == 0).sum().item() for obs, *_ in found]
    assert set(starts) == {8}
    ends = torch.cat([obs.flatten() for obs, *_ in found])
    long, all_episodes = (ends == 8).sum().item(), 8 * len(found)
    assert long / all_episodes == pytest.approx(0.5, abs=0.15)


def test_the_episodes_that_are_reported_are_those_that_count(spy):
    found, history = batches(spy, "probes:Uneven-v0", total_timesteps=80, num_envs=8)
    lengths = sum(len(obs) for obs, *_ in found) / 16
    assert len(found) == 2 and history[-1]["episode_length"] == lengths


def test_the_last_episodes_are_not_those_that_ended_last():
    _, history = train("probes:Uneven-v0", total_timesteps=8 * 64 * 9, num_envs=64)
    logged = [row["episode_length"] for row in history]  # of 20 of 64 episodes, of 1 or 9 steps
    assert len(logged) >= 8 and sum(logged) / len(logged) == pytest.approx(5, abs=1)


def test_steps_that_were_only_waited_through_are_counted_as_steps(spy):
    steps = spy(reinforce.VecEnv, "step")
    _, history = train("probes:Uneven-v0", total_timesteps=300)
    assert history[-1]["step"] == len(steps) * 4


def test_an_environment_that_never_ends_gives_an_error_that_says_what_to_pass(monkeypatch):
    def step(self, actions):  # at once, for the thousands of steps it takes
        self.episode_starts = torch.zeros(1)
        return torch.zeros(1, 1), *torch.zeros(3, 1)

    monkeypatch.setattr(reinforce.VecEnv, "step", step)
    monkeypatch.setattr(Agent, "act", lambda self, obs: None)
    with pytest.raises(reinforce.UserError, match="max_episode_steps=1000"):
        train("probes:Endless-v0", num_envs=1)


@pytest.mark.parametrize("baseline", BASELINES)
def test_what_a_time_limit_cuts_off_is_completed_by_v_if_it_is_trained(baseline, spy):
    calls = spy(reinforce, "compute_returns")
    agent, history = train("probes:Truncated3-v0", total_timesteps=24, learning_rate=0,
                           baseline=baseline, gamma=0.9)
    end = agent.value(torch.tensor([[3.0]])).item() * (baseline == "value")
    expected = torch.tensor([1 + 0.9 + 0.81 + 0.729 * end, 1 + 0.9 + 0.81 * end, 1 + 0.9 * end])
    assert len(calls) == 2
    for call in calls:
        assert torch.allclose(call["out"], expected.unsqueeze(-1).expand(3, 4), atol=1e-5)


# The loss.


@pytest.mark.parametrize("env", ["CartPole-v1", "probes:Bounds-v0"])
@pytest.mark.parametrize("baseline", BASELINES)
def test_the_gradient_of_an_update_is_that_of_the_loss_on_constant_targets(env, baseline, spy):
    evaluated, explained = spy(Agent, "evaluate_actions"), spy(reinforce, "explained_variance")
    agent, history = train(env, total_timesteps=1, learning_rate=0, max_grad_norm=1e9, vf_coef=0.3,
                           baseline=baseline)
    got = {name: p.grad.clone() for name, p in agent.named_parameters()}
    agent.zero_grad(set_to_none=False)
    obs, actions, returns = evaluated[0]["obs"], evaluated[0]["actions"], explained[0]["returns"]
    assert not returns.requires_grad
    outputs, values = agent.actor(obs), agent.critic(obs).squeeze(-1)
    pi = Categorical(logits=outputs) if agent.discrete else Independent(
        Normal(agent.center + agent.scale * outputs, agent.log_std.exp()), 1)
    mean = explained[0]["values"]  # of the others, see above
    advantages = returns - dict(none=0, mean=mean, value=values.detach())[baseline]
    policy_loss = -(pi.log_prob(actions) * advantages).mean()
    value_loss = (values - returns).square().mean()
    loss = policy_loss + 0.3 * (baseline == "value") * value_loss
    for (name, _), expected in zip(agent.named_parameters(), torch.autograd.grad(
            loss, list(agent.parameters()))):
        tolerance = 1e-4 * expected.abs().max()
        assert torch.allclose(got[name], expected, rtol=1e-3, atol=tolerance), name
    moved = any((got[name] != 0).any() for name in got if name.startswith("critic"))
    assert moved == (baseline == "value")
    assert history[0]["policy_loss"] == pytest.approx(policy_loss.item(), rel=1e-4)


def test_the_losses_equal_a_loop_over_single_transitions(spy):
    evaluated, explained = spy(Agent, "evaluate_actions"), spy(reinforce, "explained_variance")
    _, history = train("CartPole-v1", total_timesteps=1)
    log_probs, _, values = evaluated[0]["out"]
    returns, policy_loss, value_loss = explained[0]["returns"], 0, 0
    for log_prob, value, target in zip(*(x.tolist() for x in (log_probs, values, returns))):
        policy_loss -= log_prob * (target - value) / len(returns)
        value_loss += (value - target) ** 2 / len(returns)
    assert history[0]["policy_loss"] == pytest.approx(policy_loss, rel=1e-4)
    assert history[0]["value_loss"] == pytest.approx(value_loss, rel=1e-4)


# The step.


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("num_envs", [1, 4])
def test_episodes_of_one_step_leave_everything_finite(num_envs, baseline):
    settings = dict(total_timesteps=64, num_envs=num_envs, baseline=baseline, norm_obs=True,
                    norm_returns=True)
    if baseline == "mean" and num_envs == 1:  # there are no others
        with pytest.raises(reinforce.UserError, match="num_envs"):
            train("probes:Terminated-v0", **settings)
        return
    agent, history = train("probes:Terminated-v0", **settings)
    assert all(value.isfinite().all() for value in agent.state_dict().values())
    assert all(math.isfinite(value) for value in history[-1].values())


# Statistics.


def test_processes_with_batches_of_different_sizes_agree_on_the_statistics(monkeypatch):
    torch.manual_seed(0)
    parts = [3 + torch.randn(5, 2), 1 + 2 * torch.randn(20, 2)]
    norm = RunningNorm((2,))

    def all_reduce_mean(sums):  # of two processes, of which this is one
        other = parts[1].double()
        sums += torch.stack([torch.ones_like(other), other, other.square()]).sum(1)
        sums /= 2

    monkeypatch.setattr(reinforce, "all_reduce_mean", all_reduce_mean)
    norm.update(parts[0])
    everything = torch.cat(parts)
    assert torch.allclose(norm.mean, everything.mean(0), atol=1e-5)
    assert torch.allclose(norm.std, everything.std(0, correction=0), atol=1e-5)


@pytest.mark.parametrize("baseline", BASELINES)
def test_the_logged_explained_variance_is_what_the_baseline_takes_away(baseline, spy):
    evaluated, explained = spy(Agent, "evaluate_actions"), spy(reinforce, "explained_variance")
    _, history = train("CartPole-v1", total_timesteps=1, baseline=baseline)
    values, returns = evaluated[0]["out"][2].numpy(force=True), explained[0]["returns"].numpy()
    b = dict(none=0, mean=explained[0]["values"].numpy(), value=values)[baseline]
    expected = 1 - (returns - b).var() / returns.var()
    assert history[0]["explained_variance"] == pytest.approx(expected, abs=1e-4)


# Learning.


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("norm_returns", [False, True])
def test_the_arm_that_pays_becomes_more_probable(baseline, norm_returns):
    agent, _ = train("probes:Arms-v0", total_timesteps=1024, num_envs=8, learning_rate=5e-3,
                     baseline=baseline, norm_returns=norm_returns)
    log_probs, _, _ = agent.evaluate_actions(torch.zeros(2, 1), torch.arange(2))
    assert log_probs[1].exp() > 0.8


def test_continuous_actions_move_to_the_best_one():
    agent, _ = train("probes:Target-v0", total_timesteps=4096, num_envs=16, learning_rate=1e-2,
                     norm_returns=True, anneal=True)
    assert torch.allclose(agent.act(torch.zeros(1, 1), True), torch.ones(1, 2), atol=0.35)


def test_cartpole_is_learned_within_20_thousand_steps():
    args = Args(env="CartPole-v1", total_timesteps=20_000, seed=1, device="cpu")
    agent, _ = reinforce.train(args)
    # A random policy gets 22.
    assert reinforce.evaluate(agent, args, 20).mean() > 80
