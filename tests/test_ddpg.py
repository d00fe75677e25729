"""DDPG, and what NAF shares with it: replay buffer, exploration, targets, bounds, the loop."""
import dataclasses
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import small

import ddpg
import naf

COUNT = gym.spaces.Box(0, np.inf, (1,), np.float32)
BOUNDS = gym.spaces.Box(np.array([-1, 0], np.float32), np.array([2, 10], np.float32))
LOW, HIGH = torch.tensor(BOUNDS.low), torch.tensor(BOUNDS.high)
BOTH = pytest.mark.parametrize("algorithm", [ddpg, naf], ids=["ddpg", "naf"])


def arguments(algorithm, env, **changes):
    """A short run without presets."""
    defaults = {field.name: field.default for field in dataclasses.fields(algorithm.Args)}
    settings = small(algorithm.NAME, total_timesteps=96, env=env)
    return algorithm.Args(**defaults | settings | changes)


def train(env, algorithm=ddpg, **changes):
    return algorithm.train(arguments(algorithm, env, **changes))


def an_agent(algorithm=ddpg, action_space=BOUNDS, obs_size=1):
    torch.manual_seed(0)
    space = gym.spaces.Box(-np.inf, np.inf, (obs_size,), np.float32)
    return algorithm.Agent(space, action_space, arguments(algorithm, "Pendulum-v1"))


def best_values(agent, obs):
    """Q of the policy's own actions."""
    if isinstance(agent, naf.Agent):
        return agent.heads(obs)[0]
    return agent.q_values(agent.encoder(obs), agent.act(obs, True))


# The losses.


@BOTH
@pytest.mark.parametrize("env, goes_on", [
    ("probes:BoxTruncated-v0", 1), ("probes:BoxTerminated-v0", 0), ("probes:BoxBoth-v0", 0)])
def test_a_truncation_bootstraps_from_the_true_last_observation_a_termination_does_not(
        algorithm, env, goes_on, spy):
    calls = spy(algorithm, "td_target")
    agent, _ = train(env, algorithm, learning_rate=0)  # the target network stays what it was
    values = [best_values(agent, obs).item() for obs in (torch.zeros(1, 1), torch.ones(1, 1))]
    assert abs(values[0] - values[1]) > 1e-3  # else the reset would pass for the last observation
    expected = torch.full((16,), 2 + goes_on * 0.99 * values[1])
    for call in calls:
        assert torch.allclose(call["out"], expected, atol=1e-5)


def test_the_target_is_that_of_the_textbook():
    rewards, next_values = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 30.0])
    targets = ddpg.td_target(rewards, next_values, torch.tensor([0.0, 1.0, 0.0]), 0.5)
    assert targets.tolist() == [6, 2, 18]


def last_batch(env, spy, **changes):
    """The agent and the batch of the last update of a run that learns nothing; its metrics."""
    samples = spy(ddpg.ReplayBuffer, "sample")
    agent, history = train(env, learning_rate=0, **changes)
    return agent, samples[-1]["out"], history[-1]


@pytest.mark.parametrize("env", ["Pendulum-v1", "probes:Bounds-v0", "probes:BoxImage-v0"])
def test_the_losses_equal_a_loop_over_single_transitions(env, spy):
    agent, batch, row = last_batch(env, spy)
    assert [len(x) for x in batch] == [16] * 5 and batch[3].shape == batch[4].shape == (16,)
    critic_loss = actor_loss = q_values = 0
    for obs, action, next_obs, reward, termination in zip(*(x.split(1) for x in batch)):
        next_q = agent.q_values(agent.encoder(next_obs), agent.act(next_obs, True)).item()
        target = reward.item() + (0 if termination else 0.99 * next_q)
        q = agent.q_values(agent.encoder(obs), action).item()
        critic_loss += (q - target) ** 2 / 16
        actor_loss -= agent.q_values(agent.encoder(obs), agent.act(obs, True)).item() / 16
        q_values += q / 16
    assert row["critic_loss"] == pytest.approx(critic_loss, rel=1e-4)
    assert row["actor_loss"] == pytest.approx(actor_loss, rel=1e-4)
    assert row["q_values"] == pytest.approx(q_values, rel=1e-4)


@pytest.mark.parametrize("env", ["Pendulum-v1", "probes:Bounds-v0", "probes:BoxImage-v0"])
def test_each_loss_leaves_its_gradient_on_its_own_network_only(env, spy):
    targets = spy(ddpg, "td_target")
    agent, (obs, actions, *_), _ = last_batch(env, spy)
    values = agent.q_values(agent.encoder(obs), actions)
    critic_loss = (values - targets[-1]["out"]).square().mean()  # on constant targets
    features = agent.encoder(obs)
    actor_loss = -agent.q_values(features, agent.mu(features)).mean()
    for loss, part in ((critic_loss, agent.critic), (critic_loss, agent.encoder),
                       (actor_loss, agent.actor)):
        parameters = list(part.parameters())
        expected = torch.autograd.grad(loss, parameters, retain_graph=True) if parameters else []
        for parameter, gradient in zip(parameters, expected):
            assert gradient.abs().max() > 0
            tolerance = 1e-5 * gradient.abs().max()
            assert torch.allclose(parameter.grad, gradient, rtol=1e-3, atol=tolerance)


def test_a_known_critic_moves_the_actor_to_its_maximum(monkeypatch):
    best = torch.tensor([1.5, 3.0])

    def q_values(self, features, actions):
        nothing = 0 * self.critic[-1].bias.sum()  # keeps the critic's loss a function of it
        return -((actions - best) / (HIGH - LOW)).square().sum(-1) + nothing

    monkeypatch.setattr(ddpg.Agent, "q_values", q_values)
    agent, _ = train("probes:Bounds-v0", total_timesteps=1600, learning_rate=3e-3)
    actions = agent.act(torch.arange(5.0).unsqueeze(-1), True)
    assert torch.allclose(actions, best.expand(5, 2), atol=0.1)


@BOTH
def test_it_learns_what_pays(algorithm):
    agent, _ = train("probes:BoxTarget-v0", algorithm, total_timesteps=2400, learning_starts=1200,
                     buffer_size=2400, learning_rate=3e-3, batch_size=64, num_updates=12)
    action = agent.act(torch.zeros(1, 1), True)[0]
    assert action[0].item() == pytest.approx(1.5, abs=0.3)
    assert action[1].item() == pytest.approx(3, abs=1)


# The target network.


@BOTH
def test_the_target_follows_by_tau_and_shares_no_memory(algorithm, spy):
    runs = spy(algorithm.Run, "__init__")
    settings = dict(total_timesteps=8, learning_starts=8, num_updates=1, tau=0.25)  # one update
    agents = [train("probes:Bounds-v0", algorithm, learning_rate=rate, **settings)[0]
              for rate in (0, 1e-2)]
    target = runs[1]["state"]["target"]
    for old, new, moved in zip(*(x.parameters() for x in (*agents, target)), strict=True):
        assert torch.allclose(moved, old + 0.25 * (new - old), atol=1e-7)
        assert not torch.equal(new, old) and new.data_ptr() != moved.data_ptr()


@BOTH
def test_next_values_come_from_the_target_network(algorithm, spy, monkeypatch):
    runs, targets = spy(algorithm.Run, "__init__"), spy(algorithm, "td_target")
    samples = spy(algorithm.ReplayBuffer, "sample")
    train("probes:Bounds-v0", algorithm, learning_rate=1e-2, tau=0)  # so it keeps its first weights
    agent, target = (runs[0]["state"][name] for name in ("agent", "target"))
    next_obs = samples[-1]["out"][2]
    values, others = (best_values(x, next_obs) for x in (target, agent))
    assert torch.allclose(targets[-1]["next_values"], values, atol=1e-5)
    assert (values - others).abs().max() > 1e-2


# Actions.


@BOTH
def test_the_policy_stretches_over_the_bounds_of_each_dimension(algorithm):
    agent, obs = an_agent(algorithm), torch.randn(50, 1)
    parts = (agent.act(obs, True) - (LOW + HIGH) / 2) / ((HIGH - LOW) / 2)
    assert parts.abs().max() < 0.6  # at first they are far from the bounds
    last = agent.actor[-1] if algorithm is ddpg else agent.network[-1]
    for output, bound in ((-50, LOW), (50, HIGH)):
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.constant_(last.bias, output)
        assert torch.equal(agent.act(obs, True), bound.expand(50, 2))


@BOTH
def test_noise_is_a_part_of_the_bounds_and_the_mode_has_none(algorithm):
    agent, obs = an_agent(algorithm), torch.randn(50, 1)
    mode, noise = agent.act(obs, True), 0.1 * torch.rand(50, 2)
    half = torch.tensor([1.5, 5.0])
    assert torch.allclose(agent.act(obs, noise=noise), mode + half * noise, atol=1e-5)
    assert torch.equal(agent.act(obs, True, noise), mode) and torch.equal(agent.act(obs), mode)
    assert torch.equal(agent.act(obs, noise=torch.tensor(9.0)), HIGH.expand(50, 2))
    assert torch.equal(agent.act(obs, noise=torch.tensor(-9.0)), LOW.expand(50, 2))


def test_the_critic_sees_actions_as_numbers_from_minus_1_to_1():
    agent, inputs = an_agent(), []
    agent.critic.register_forward_pre_hook(lambda layer, args: inputs.append(args[0]))
    agent.q_values(torch.zeros(3, 1), torch.stack([LOW, (LOW + HIGH) / 2, HIGH]))
    assert inputs[0][:, 1:].tolist() == [[-1, -1], [0, 0], [1, 1]]


@BOTH
@pytest.mark.parametrize("learning_starts", [0, 96])
def test_the_stored_action_is_the_executed_one_and_next_obs_the_true_successor(
        algorithm, learning_starts, spy):
    calls = spy(algorithm.ReplayBuffer, "add")
    train("probes:Bounds-v0", algorithm, learning_starts=learning_starts, sigma=1.0)
    obs, actions, next_obs, rewards, terminations = (
        torch.cat(x) for x in zip(*(call["transition"] for call in calls)))
    assert len(obs) == 96 and torch.equal(next_obs, obs + 1)
    assert torch.allclose(rewards, actions.sum(-1))  # the probe pays what was executed
    assert torch.equal(terminations, (next_obs == 5).float().squeeze(-1))
    assert ((actions >= LOW) & (actions <= HIGH)).all()
    clipped = (actions == LOW) | (actions == HIGH)
    assert clipped.any(0).all() if learning_starts == 0 else not clipped.any()


@BOTH
def test_the_first_actions_are_uniform_between_the_bounds(algorithm, spy):
    calls = spy(algorithm.ReplayBuffer, "add")
    train("probes:Bounds-v0", algorithm, learning_starts=4000, total_timesteps=4000, num_envs=20,
          num_updates=1)
    actions = torch.cat([call["transition"][1] for call in calls])
    for part in (0.1, 0.5, 0.9):
        below = (actions < LOW + part * (HIGH - LOW)).float().mean(0)
        assert torch.allclose(below, torch.full((2,), part), atol=0.03)


def test_images_are_bytes_until_the_network_divides_them_by_255(spy):
    samples, inputs = spy(ddpg.ReplayBuffer, "sample"), []
    agent, _ = train("probes:BoxImage-v0")
    obs, _, next_obs, _, _ = samples[-1]["out"]
    assert obs.dtype == next_obs.dtype == torch.uint8 and obs.shape == (16, 3, 36, 40)
    agent.encoder[0].register_forward_pre_hook(lambda layer, args: inputs.append(args[0]))
    agent.act(obs)
    assert torch.allclose(inputs[0], obs / 255)


@BOTH
@pytest.mark.parametrize("low, high", [(-np.inf, np.inf), (0, np.inf), (-3e38, 3e38),
                                       (2, 2)])
def test_bounds_without_a_finite_range_are_refused_before_anything_is_written(algorithm, low, high, tmp_path):
    space = gym.spaces.Box(np.array([-1, low], np.float32), np.array([1, high], np.float32))
    with pytest.raises(algorithm.UserError, match="bounds.*ppo"):
        an_agent(algorithm, space)
    with pytest.raises(algorithm.UserError, match="Unbounded.*bounds.*ppo"):
        train("probes:Unbounded-v0", algorithm, run_dir="run")
    assert list(tmp_path.iterdir()) == []


# Noise.


@BOTH
def test_noise_decays_by_theta_and_starts_anew_where_an_episode_begins(algorithm):
    noise = torch.tensor([[1.0, -2.0], [3.0, 4.0], [5.0, 6.0]])
    begins = torch.tensor([0.0, 1.0, 0.0])
    moved = algorithm.next_noise(noise, begins, 0.25, 0.0)
    assert moved.tolist() == [[0.75, -1.5], [0, 0], [3.75, 4.5]]
    assert torch.equal(algorithm.next_noise(noise, begins, 1, 0.0), torch.zeros(3, 2))
    torch.manual_seed(0)
    moved = algorithm.next_noise(torch.zeros(50_000, 2), torch.zeros(50_000), 0.25, 0.3)
    assert moved.std(0).tolist() == pytest.approx([0.3, 0.3], rel=0.02)
    assert torch.corrcoef(moved.T)[0, 1].abs() < 0.02  # each dimension has its own


@BOTH
@pytest.mark.parametrize("noise, theta", [("gaussian", 1), ("ou", 0.25)])
def test_the_noise_of_each_environment_goes_on_until_its_own_episode_ends(
        algorithm, noise, theta, spy):
    calls, acts = spy(algorithm, "next_noise"), spy(algorithm.Agent, "act")
    added = spy(algorithm.ReplayBuffer, "add")
    train("probes:BoxUneven-v0", algorithm, noise=noise, theta=0.25, sigma=0.2, learning_starts=0,
          num_envs=3, checkpoint_every=24)
    acts = [call for call in acts if "noise" in call]  # the first example of actions has none
    assert len(calls) == len(acts) == len(added) == 32
    for before, call in zip([None, *calls], calls):
        assert call["theta"] == theta and call["sigma"] == 0.2
        if before:
            assert torch.equal(call["noise"], before["out"])
    begins = torch.stack([call["begins"] for call in calls])
    obs = torch.stack([call["transition"][0] for call in added]).squeeze(-1)
    assert torch.equal(begins.bool(), obs == 0)
    assert begins[1:].any(0).all() and not begins[1:].all(1).all()  # at different times
    for call, act in zip(calls, acts):
        assert torch.equal(act["noise"], call["out"])


# The replay buffer.


def transition(k, num_envs=3):
    """Transition k of every environment: each number tells step, environment and part."""
    x = 100.0 * k + torch.arange(num_envs)
    return x.unsqueeze(-1), x.repeat(2, 1).T + 0.25, x.unsqueeze(-1) + 0.5, x + 0.75, x % 2


@BOTH
def test_the_buffer_keeps_the_last_transitions_and_draws_each_alike(algorithm):
    buffer = algorithm.ReplayBuffer(14, *transition(0))  # 4 rows of 3; the rest stays unused
    for k in range(9):
        buffer.add(*transition(k))
        last = range(max(0, k - 3), k + 1)
        torch.manual_seed(k)
        obs, actions, next_obs, rewards, terminations = buffer.sample(6000)
        found, counts = obs.unique(return_counts=True)
        assert found.tolist() == [100 * row + i for row in last for i in range(3)]
        assert (counts / 6000 * len(found) - 1).abs().max() < 0.25
        # The parts of a transition stay together.
        assert torch.equal(actions, obs.expand(6000, 2) + 0.25)
        assert torch.equal(next_obs, obs + 0.5) and torch.equal(rewards, obs.squeeze(-1) + 0.75)
        assert torch.equal(terminations, obs.squeeze(-1) % 2)


@BOTH
def test_a_checkpoint_holds_what_is_filled_and_goes_on_exactly(algorithm, tmp_path):
    for steps, rows in ((5, 5), (130, 100)):
        buffer, other = (algorithm.ReplayBuffer(300, *transition(0)) for _ in range(2))
        for k in range(steps):
            buffer.add(*transition(k))
        torch.save(buffer.state_dict(), "buffer.pt")
        assert (tmp_path / "buffer.pt").stat().st_size < rows * 3 * 6 * 4 + 5000
        other.load_state_dict(torch.load("buffer.pt", weights_only=True))
        for x in (buffer, other):
            x.add(*transition(steps))
        samples = []
        for x in (buffer, other):
            torch.manual_seed(0)
            samples.append(x.sample(1000))
        assert all(map(torch.equal, *samples))
        smaller = algorithm.ReplayBuffer(60 if rows > 20 else 12, *transition(0))
        with pytest.raises(ValueError, match="its buffer"):
            smaller.load_state_dict(buffer.state_dict())
        wider = algorithm.ReplayBuffer(900, *(x.repeat_interleave(3, 0) for x in transition(0)))
        with pytest.raises(ValueError, match="its buffer"):  # or each would be there three times
            wider.load_state_dict({**buffer.state_dict(), "data": [
                x[:, :1] for x in buffer.state_dict()["data"]]})


@BOTH
def test_the_buffer_says_its_bytes_and_is_refused_where_it_cannot_fit(
        algorithm, capsys, monkeypatch):
    obs = torch.zeros(2, 4, 84, 84, dtype=torch.uint8)
    numbers = torch.zeros(2)
    parts = obs, numbers.unsqueeze(-1), obs, numbers, numbers
    algorithm.ReplayBuffer(1000, *parts)
    assert "replay buffer: 1,000 transitions, 56.5 MB" in capsys.readouterr().out
    monkeypatch.setattr(algorithm.os, "sysconf", lambda name: 10 if "PAGES" in name else 4096)
    with pytest.raises(algorithm.UserError, match="56,460,000 bytes.*40,960"):
        algorithm.ReplayBuffer(1000, *parts)
    with pytest.raises(algorithm.UserError, match="buffer_size.*bytes"):
        train("Pendulum-v1", algorithm, buffer_size=10**6)


# The loop.


@BOTH
def test_updates_come_in_rounds_once_enough_was_seen(algorithm, spy):
    samples, acts = spy(algorithm.ReplayBuffer, "sample"), spy(algorithm, "next_noise")
    added = spy(algorithm.ReplayBuffer, "add")
    train("probes:Bounds-v0", algorithm, num_envs=2, train_every=3, num_updates=5,
          total_timesteps=60, learning_starts=12)
    assert len(added) == 30 and len(samples) == 9 * 5  # one round of ten comes too early
    assert len(acts) == 30 - 6  # the first steps are random


@BOTH
def test_settings_that_cannot_work_are_refused_before_anything_is_written(algorithm, tmp_path):
    for wrong in (dict(learning_starts=97), dict(buffer_size=15),
                  dict(buffer_size=19, num_envs=20)):
        with pytest.raises(algorithm.UserError, match=next(iter(wrong))):
            train("Pendulum-v1", algorithm, run_dir="run", **wrong)
    with pytest.raises(algorithm.UserError, match="noise"):
        algorithm.Args(noise="brown")
    assert list(tmp_path.iterdir()) == []


@BOTH
def test_the_logged_returns_are_those_of_the_environment(algorithm):
    _, history = train("probes:BoxUneven-v0", algorithm)  # 1 a step
    assert history[-1]["episode_return"] == history[-1]["episode_length"] > 1
    assert all(map(math.isfinite, history[-1].values()))
