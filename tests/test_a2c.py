"""A2C against independent oracles: loops, torch.distributions, the formulas of the optimisers."""
import dataclasses
import inspect
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import small
from torch.distributions import Categorical, Independent, Normal

import a2c
import ppo
from a2c import Agent, Args

COUNT = gym.spaces.Box(0, np.inf, (1,), np.float32)
BOUNDS = gym.spaces.Box(np.array([-1, 0], np.float32), np.array([2, 10], np.float32))
DEFAULTS = {field.name: field.default for field in dataclasses.fields(Args)}
PLAIN = dict(norm_obs=False, norm_returns=False, anneal=False)


def train(env, **changes):
    """A short run without presets, statistics or schedules, all of which would hide the numbers."""
    return a2c.train(Args(**DEFAULTS | small("a2c", **PLAIN) | dict(env=env) | changes))


# What it shares with PPO, whose tests speak for both.


@pytest.mark.parametrize("name", ["RunningNorm", "NatureCNN", "MLP", "Agent.value", "compute_gae",
                                  "Agent.evaluate", "Agent.act", "explained_variance"])
def test_what_it_shares_with_ppo_is_the_same_text(name):
    mine, theirs = a2c, ppo
    for part in name.split("."):
        mine, theirs = getattr(mine, part), getattr(theirs, part)
    assert inspect.getsource(mine) == inspect.getsource(theirs)


# Advantages and returns.


def test_by_default_returns_are_the_rewards_of_up_to_n_steps_and_the_value_of_what_follows(spy):
    calls = spy(a2c, "compute_gae")
    agent, _ = train("probes:Truncated3-v0", learning_rate=0, total_timesteps=64, num_steps=7,
                     gamma=0.9)
    values = agent.value(torch.arange(4.0).unsqueeze(-1)).tolist()
    full = [1 + 0.9 + 0.81 + 0.729 * values[3], 1 + 0.9 + 0.81 * values[3], 1 + 0.9 * values[3]]
    expected = torch.tensor(full + full + [1 + 0.9 * values[1]])  # two episodes and a first step
    assert torch.allclose(calls[0]["out"][1], expected.unsqueeze(-1).expand(7, 4), atol=1e-5)


# The loss.


@pytest.mark.parametrize("env", ["probes:Counter-v0", "Pendulum-v1"])
@pytest.mark.parametrize("shared_network", [False, True])
def test_the_gradient_of_an_update_is_that_of_the_loss_on_constant_targets(
        env, shared_network, spy):
    evaluated, gae = spy(Agent, "evaluate"), spy(a2c, "compute_gae")
    agent, _ = train(env, total_timesteps=16, learning_rate=0, max_grad_norm=1e9, vf_coef=0.3,
                     ent_coef=0.1, shared_network=shared_network)
    got = {name: p.grad.clone() for name, p in agent.named_parameters()}
    agent.zero_grad(set_to_none=False)
    obs, actions, (advantages, returns) = (
        evaluated[0]["obs"], evaluated[0]["actions"], gae[0]["out"])
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
    evaluated, gae = spy(Agent, "evaluate"), spy(a2c, "compute_gae")
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


def test_the_stored_action_is_the_unclipped_one_while_the_environment_gets_a_legal_one(spy):
    calls = spy(Agent, "evaluate")
    train("probes:Bounds-v0", total_timesteps=640)  # the probe itself refuses illegal actions
    actions = torch.cat([call["actions"].reshape(-1, 2) for call in calls])
    low, high = torch.tensor(BOUNDS.low), torch.tensor(BOUNDS.high)
    assert ((actions < low) | (actions > high)).any(0).all()  # some lie outside, in each dimension
    assert not ((actions == low) | (actions == high)).any()  # and none was moved to a bound


# The step.


def observed_steps(monkeypatch, optimizer):
    """(weights before, gradient, weights after) of each step that the optimizer takes."""
    steps, step = [], optimizer.step

    def observe(self, *args):
        (weights,) = self.param_groups[0]["params"]
        steps.append([weights.clone(), weights.grad.clone()])
        step(self, *args)
        steps[-1].append(weights.clone())

    monkeypatch.setattr(optimizer, "step", observe)
    return steps


def test_rmsprop_divides_by_the_root_of_the_mean_square_plus_the_papers_epsilon(monkeypatch):
    steps = observed_steps(monkeypatch, torch.optim.RMSprop)
    train("Pendulum-v1", total_timesteps=160, learning_rate=1e-3)
    assert len(steps) == 10
    square = 0
    for before, gradient, after in steps:
        square = 0.99 * square + 0.01 * gradient.double() ** 2
        expected = before - 1e-3 * gradient / (square.sqrt() + 1e-5)
        assert torch.allclose(after.double(), expected, atol=1e-6)


def test_adam_takes_the_steps_of_its_formula(monkeypatch):
    assert observed_steps(monkeypatch, torch.optim.RMSprop) == []
    steps = observed_steps(monkeypatch, torch.optim.Adam)
    train("Pendulum-v1", total_timesteps=160, learning_rate=1e-3, optimizer="adam")
    assert len(steps) == 10
    mean = square = 0
    for k, (before, gradient, after) in enumerate(steps, 1):
        mean = 0.9 * mean + 0.1 * gradient.double()
        square = 0.999 * square + 0.001 * gradient.double() ** 2
        root = (square / (1 - 0.999**k)).sqrt()
        expected = before - 1e-3 * mean / (1 - 0.9**k) / (root + 1e-5)
        assert torch.allclose(after.double(), expected, atol=1e-6)


def test_each_transition_is_used_for_one_step_which_comes_after_it(spy, monkeypatch):
    steps = observed_steps(monkeypatch, torch.optim.RMSprop)
    gae = spy(a2c, "compute_gae")
    _, history = train("probes:Counter-v0", total_timesteps=320, num_steps=5)
    assert len(steps) == len(gae) == 320 // (4 * 5) and history[-1]["step"] == 320
    assert all(call["rewards"].shape == (5, 4) for call in gae)


def test_gradients_longer_than_max_grad_norm_are_scaled_to_it(monkeypatch):
    steps = observed_steps(monkeypatch, torch.optim.RMSprop)
    train("Pendulum-v1", total_timesteps=64, max_grad_norm=1e-3)
    assert [g.norm().item() for _, g, _ in steps] == pytest.approx([1e-3] * len(steps), rel=1e-4)
    steps.clear()
    train("Pendulum-v1", total_timesteps=64, max_grad_norm=1e9)
    assert min(g.norm().item() for _, g, _ in steps) > 0.1


@pytest.mark.parametrize("optimizer", ["RMSprop", "Adam"])
@pytest.mark.parametrize("anneal", [True, False])
def test_the_step_size_falls_linearly_from_the_start_to_the_end(anneal, optimizer, monkeypatch):
    kind, rates = getattr(torch.optim, optimizer), []
    step = kind.step
    monkeypatch.setattr(kind, "step", lambda self, *args: (
        rates.append(float(self.param_groups[0]["lr"])), step(self, *args))[1])
    train("probes:Counter-v0", total_timesteps=160, anneal=anneal, learning_rate=1e-3,
          optimizer=optimizer.lower())
    remaining = [1 - k / 10 if anneal else 1 for k in range(10)]  # start 1, middle 0.5, end 0.1
    assert rates == pytest.approx([1e-3 * x for x in remaining])


# One network or two.


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("norm_obs", [False, True])
def test_a_shared_network_has_one_pair_of_hidden_layers(env, norm_obs):
    separate, _ = train(env, norm_obs=norm_obs)
    shared, history = train(env, norm_obs=norm_obs, shared_network=True)
    sizes = [[p.shape for name, p in agent.named_parameters() if name.endswith("weight")]
             for agent in (separate, shared)]
    n, m = sizes[0][0][1], sizes[0][2][0]  # inputs and outputs
    assert sorted(sizes[0]) == sorted([(16, n), (16, 16), (m, 16), (16, n), (16, 16), (1, 16)])
    assert sorted(sizes[1]) == sorted([(16, n), (16, 16), (m, 16), (1, 16)])
    assert history[-1]["step"] == 512
    obs = torch.randn(7, n)
    norm = [x for x in shared.modules() if isinstance(x, a2c.RunningNorm) and x.mean.dim() == 1]
    assert len(norm) == norm_obs
    hidden = norm[0](obs) if norm_obs else obs
    for layer in [x for x in shared.encoder.modules() if isinstance(x, torch.nn.Linear)]:
        hidden = layer(hidden).tanh()
    assert torch.allclose(shared.value(obs), shared.critic[-1](hidden)[:, 0], atol=1e-6)
    log_probs, *_ = shared.evaluate(obs, shared.act(obs, deterministic=True).clone())
    if shared.discrete:
        expected = shared.actor[-1](hidden).log_softmax(-1).max(-1).values
        assert torch.allclose(log_probs, expected, atol=1e-6)


# Statistics.


@pytest.mark.parametrize("shared_network", [False, True])
def test_observations_are_standardised_and_the_statistics_travel_in_the_state_dict(shared_network):
    settings = dict(norm_obs=True, shared_network=shared_network)
    agent, _ = train("probes:Counter-v0", total_timesteps=640, **settings)
    (norm,) = (x for x in agent.encoder.modules() if isinstance(x, a2c.RunningNorm))
    assert norm.mean.item() == pytest.approx(2, abs=0.2)  # an episode of 5 acts on 0 to 4
    assert norm.std.item() == pytest.approx(2**0.5, abs=0.1) and norm.sums[0].item() == 640
    fresh = Agent(COUNT, gym.spaces.Discrete(2), Args(hidden_size=16, **settings))
    obs = torch.arange(5.0).unsqueeze(-1)
    assert not torch.allclose(fresh.value(obs), agent.value(obs), atol=1e-3)
    fresh.load_state_dict(agent.state_dict())
    assert torch.allclose(fresh.value(obs), agent.value(obs), atol=1e-6)


def test_statistics_change_only_after_the_step_that_uses_them(spy):
    calls = spy(Agent, "evaluate")
    agent, _ = train("probes:Counter-v0", total_timesteps=32, norm_obs=True, learning_rate=0)
    assert len(calls) == 2
    values = agent.critic(calls[0]["obs"]).squeeze(-1)  # the first batch as it came
    assert torch.allclose(calls[0]["out"][2], values, atol=1e-6)
    assert not torch.allclose(calls[0]["out"][2], agent.value(calls[0]["obs"]), atol=1e-3)


def test_the_logged_explained_variance_compares_values_with_returns(spy):
    gae = spy(a2c, "compute_gae")
    _, history = train("Pendulum-v1", total_timesteps=64)
    values, returns = gae[0]["values"].numpy(), gae[0]["out"][1].numpy()
    expected = 1 - (returns - values).var() / returns.var()
    assert history[0]["explained_variance"] == pytest.approx(expected, abs=0.01)


# Learning.


@pytest.mark.parametrize("settings", [dict(), dict(norm_returns=True), dict(optimizer="adam"),
                                      dict(shared_network=True), dict(gae_lambda=0.9)])
def test_the_arm_that_pays_becomes_likelier(settings):
    agent, _ = train("probes:Arms-v0", total_timesteps=2048, learning_rate=3e-3, **settings)
    log_probs, _, _ = agent.evaluate(torch.zeros(2, 1), torch.arange(2))
    assert log_probs[1].exp() > 0.8


def test_continuous_actions_move_to_the_best_one():
    agent, _ = train("probes:Target-v0", total_timesteps=8192, learning_rate=3e-3,
                     norm_returns=True, anneal=True)
    assert torch.allclose(agent.act(torch.zeros(1, 1), True), torch.ones(1, 2), atol=0.35)


def test_one_environment_and_one_step_are_a_batch_too():
    agent, history = train("probes:Truncated-v0", total_timesteps=64, num_envs=1, num_steps=1,
                           norm_obs=True, norm_returns=True)
    assert all(value.isfinite().all() for value in agent.state_dict().values())
    assert all(math.isfinite(value) for value in history[-1].values())


def test_cartpole_is_learnt_within_30_thousand_steps():
    args = Args(env="CartPole-v1", total_timesteps=30_000, seed=1, device="cpu")
    agent, _ = a2c.train(args)
    # A random policy gets 22.
    assert a2c.evaluate(agent, args, 20).mean() > 100
