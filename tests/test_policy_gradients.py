"""What the policy-gradient scripts have in common, seen in the training loop of each."""
import dataclasses
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import small

import a2c
import ppo
import reinforce
import trpo

COUNT = gym.spaces.Box(0, np.inf, (1,), np.float32)
PLAIN = dict(norm_obs=False, norm_returns=False, anneal=False)


gym.register("ScaledPendulum-v0", lambda **kwargs: gym.wrappers.TransformReward(
    gym.make("Pendulum-v1", **kwargs), lambda reward: 1000 * reward))


def train(module, env, **changes):
    """A short run without presets, statistics and schedules, which would hide the numbers."""
    defaults = {field.name: field.default for field in dataclasses.fields(module.Args)}
    settings = small(module.__name__, **PLAIN)
    return module.train(module.Args(**defaults | settings | dict(env=env) | changes))


@pytest.mark.parametrize("module", [a2c, ppo, trpo])
@pytest.mark.parametrize("env, bootstrapped", [
    ("probes:Truncated-v0", 1), ("probes:Terminated-v0", 0), ("probes:Both-v0", 0)])
def test_a_truncation_bootstraps_from_the_true_last_observation_a_termination_does_not(
        module, env, bootstrapped, spy):
    calls = spy(module, "compute_gae")
    agent, _ = train(module, env, learning_rate=0, total_timesteps=64)  # V does not change
    start, end = agent.value(torch.tensor([[0.0], [1.0]])).tolist()
    assert abs(start - end) > 1e-4  # or else the reset observation would give the same
    assert calls
    for call in calls:
        advantages, returns = call["out"]
        expected = 2 + bootstrapped * 0.99 * end
        assert torch.allclose(returns, torch.full_like(returns, expected), atol=1e-5)
        assert torch.allclose(advantages, torch.full_like(returns, expected - start), atol=1e-5)


@pytest.mark.parametrize("module, batches", [(reinforce, 16), (a2c, 20), (ppo, 5), (trpo, 5)])
def test_the_critic_sees_scaled_rewards_while_the_history_keeps_raw_ones(module, batches, spy):
    calls = spy(module, "compute_returns" if module is reinforce else "compute_gae")
    agent, history = train(module, "probes:Constant-v0", norm_returns=True, total_timesteps=320)
    rows = [row for row in history if not math.isnan(row["episode_return"])]
    assert {row["episode_return"] for row in rows} == {50.0}
    assert {row["episode_length"] for row in rows} == {5.0}
    args = module.Args(env="probes:Constant-v0")
    assert module.evaluate(agent, args, 7).tolist() == [50.0] * 7
    raw, scale = [], 1.0  # the std of all returns until now, in the units of the rewards
    for call in calls:
        rtol = 1e-5 if module in (ppo, trpo) else 1e-3
        assert torch.allclose(call["rewards"], torch.tensor(10 / scale), rtol=rtol)
        raw.append((call["out"] if module is reinforce else call["out"][1]) * scale)
        scale = torch.cat(raw).std(correction=0).item()
    assert len(calls) == batches and scale > 5


@pytest.mark.parametrize("module", [ppo, trpo])
def test_v_stays_the_same_in_rewards_when_their_unit_changes(module):
    """A learning rate of 0 changes V only by the unit."""
    obs = torch.randn(50, 4)
    scaled, plain = (train(module, "CartPole-v1", learning_rate=0, norm_returns=norm_returns,
                           total_timesteps=640)[0] for norm_returns in (True, False))
    std = scaled.return_norm.std
    assert std > 1.05 and torch.allclose(std * scaled.value(obs), plain.value(obs), rtol=1e-3)


@pytest.mark.parametrize("module", [ppo, trpo])
def test_v_does_not_feed_back_on_the_unit_of_the_returns(module):
    agent, _ = train(module, "ScaledPendulum-v0", num_envs=2, norm_returns=True, learning_rate=1e-2,
                     total_timesteps=4000)
    # Without PopArt it is 2 million with trpo, as V means more and more in each larger unit.
    assert 20_000 < agent.return_norm.std < 400_000  # about 170,000 with random actions


@pytest.mark.parametrize("module", [reinforce, a2c, ppo, trpo])
def test_observations_are_normalized_and_the_state_dict_holds_the_statistics(module):
    agent, _ = train(module, "probes:Counter-v0", norm_obs=True, total_timesteps=640)
    state = agent.state_dict()
    near = 1e-4 if module is reinforce else 0.1  # whole episodes, which act on 0 to 4, or parts
    assert state["encoder.mean"].item() == pytest.approx(2, rel=near)
    assert state["encoder.std"].item() == pytest.approx(2**0.5, rel=near)
    args = module.Args(norm_obs=True, hidden_size=16)
    fresh = module.Agent(COUNT, gym.spaces.Discrete(2), args)
    obs = torch.arange(5.0).unsqueeze(-1)
    assert not torch.allclose(fresh.value(obs), agent.value(obs), atol=1e-3)
    fresh.load_state_dict(state)
    assert torch.allclose(fresh.value(obs), agent.value(obs), atol=1e-6)


@pytest.mark.parametrize("module", [reinforce, a2c, ppo, trpo])
def test_an_action_with_only_one_possible_value_leaves_everything_finite(module):
    space = gym.spaces.Box(np.array([-1, 3], np.float32), np.array([1, 3], np.float32))
    agent = module.Agent(COUNT, space, module.Args())
    assert all(x.isfinite().all() for x in agent.state_dict().values())
    assert agent.act(torch.zeros(4, 1)).shape == (4, 2)


@pytest.mark.parametrize("module", [a2c, ppo])
def test_the_entropy_bonus_keeps_a_policy_undecided(module):
    settings = dict(total_timesteps=2048, learning_rate=3e-3)
    decided, _ = train(module, "probes:Arms-v0", **settings)
    undecided, _ = train(module, "probes:Arms-v0", ent_coef=10.0, **settings)
    start, arms = torch.zeros(2, 1), torch.arange(2)
    assert undecided.evaluate_actions(start, arms)[1][0] > 0.99 * math.log(2)
    assert decided.evaluate_actions(start, arms)[1][0] < 0.9 * math.log(2)


@pytest.mark.parametrize("anneal", [True, False])
@pytest.mark.parametrize("module, optimizer, steps", [
    (reinforce, torch.optim.Adam, 200), (a2c, torch.optim.RMSprop, 160)])
def test_each_batch_takes_one_step_whose_size_falls_linearly_to_0(
        module, optimizer, steps, anneal, monkeypatch):
    rates, step = [], optimizer.step
    monkeypatch.setattr(optimizer, "step", lambda self, *args: (
        rates.append(float(self.param_groups[0]["lr"])), step(self, *args))[1])
    train(module, "probes:Counter-v0", total_timesteps=steps, anneal=anneal, learning_rate=1e-3)
    remaining = [1 - k / 10 if anneal else 1 for k in range(10)]  # start 1, middle 0.5, end 0.1
    assert rates == pytest.approx([1e-3 * x for x in remaining])


@pytest.mark.parametrize("module, optimizer, env", [
    (reinforce, torch.optim.Adam, "CartPole-v1"), (a2c, torch.optim.RMSprop, "Pendulum-v1"),
    (ppo, torch.optim.Adam, "Pendulum-v1")])
def test_gradients_longer_than_max_grad_norm_are_scaled_to_it(module, optimizer, env, monkeypatch):
    norms, step = [], optimizer.step
    monkeypatch.setattr(optimizer, "step", lambda self, *args: (
        norms.append(self.param_groups[0]["params"][0].grad.norm().item()), step(self, *args))[1])
    train(module, env, total_timesteps=256, max_grad_norm=1e-3)
    assert norms == pytest.approx([1e-3] * len(norms), rel=1e-4)
    norms.clear()
    train(module, env, total_timesteps=256, max_grad_norm=1e9)
    assert min(norms) > 0.1


@pytest.mark.parametrize("module, steps", [(reinforce, 20), (a2c, 16), (ppo, 64), (trpo, 64)])
def test_a_batch_is_learned_from_with_the_statistics_it_was_collected_with(module, steps, spy):
    calls = spy(module.RunningNorm, "forward")
    agent, history = train(module, "probes:Counter-v0", norm_obs=True, total_timesteps=steps)
    assert len(history) == 1 and agent.encoder.mean.item() > 0.5  # but 0 during the batch
    assert all(torch.equal(call["x"], call["out"]) for call in calls)


def test_actions_with_one_bound_start_at_the_nearest_allowed_number_to_0():
    space = gym.spaces.Box(np.array([100, -9, -np.inf], np.float32), np.array([np.inf, np.inf, -5],
                                                                           np.float32))
    _, _, center, scale = ppo.box_bounds(space)
    assert center.tolist() == [100, 0, -5] and scale.tolist() == [1, 1, 1]


@pytest.mark.parametrize("module", [reinforce, a2c, ppo, trpo])
def test_log_std_is_that_of_actions_in_minus_1_to_1(module):
    space = gym.spaces.Box(np.array([-1, 0], np.float32), np.array([2, 10], np.float32))
    std = module.Agent(COUNT, space, module.Args(log_std=-1.0)).act(torch.zeros(20_000, 1)).std(0)
    assert torch.allclose(std, torch.tensor([1.5, 5.0]) * math.exp(-1), rtol=0.05)


@pytest.mark.parametrize("module", [reinforce, a2c, ppo])
def test_the_logged_entropy_is_that_of_the_policy(module):
    _, history = train(module, "Pendulum-v1", learning_rate=0, total_timesteps=1, log_std=-1.0)
    expected = math.log(2 * math.exp(-1) * math.sqrt(2 * math.pi * math.e))
    assert history[0]["entropy"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("module", [a2c, ppo, trpo])
def test_the_logged_explained_variance_compares_values_with_returns(module, spy):
    gae = spy(module, "compute_gae")
    _, history = train(module, "Pendulum-v1", total_timesteps=1)
    values, returns = gae[0]["values"].numpy(), gae[0]["out"][1].numpy()
    expected = 1 - (returns - values).var() / returns.var()
    assert history[0]["explained_variance"] == pytest.approx(expected, abs=0.01)
