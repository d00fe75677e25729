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

BOUNDS = gym.spaces.Box(np.array([-1, 0], np.float32), np.array([2, 10], np.float32))
LOW, HIGH = torch.tensor(BOUNDS.low), torch.tensor(BOUNDS.high)
BOTH = pytest.mark.parametrize("algorithm", [ddpg, naf], ids=["ddpg", "naf"])


def arguments(algorithm, env, **changes):
    """The settings of a short run without presets."""
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
    """Q of the actions that the policy takes."""
    if isinstance(agent, naf.Agent):
        return agent.heads(obs)[0]
    return agent.q_values(agent.encoder(obs), agent.act(obs, True))


# The losses.


@BOTH
@pytest.mark.parametrize("env, bootstraps", [
    ("probes:BoxTruncated-v0", 1), ("probes:BoxTerminated-v0", 0), ("probes:BoxBoth-v0", 0)])
def test_a_truncation_bootstraps_from_the_true_last_observation_a_termination_does_not(
        algorithm, env, bootstraps, spy):
    calls = spy(algorithm, "td_target")
    agent, _ = train(env, algorithm, learning_rate=0)  # the target network stays what it was
    values = [best_values(agent, obs).item() for obs in (torch.zeros(1, 1), torch.ones(1, 1))]
    assert abs(values[0] - values[1]) > 1e-3  # the test can tell the two
    expected = torch.full((16,), 2 + bootstraps * 0.99 * values[1])
    for call in calls:
        assert torch.allclose(call["out"], expected, atol=1e-5)


@BOTH
@pytest.mark.parametrize("unknown", [20.0, math.nan, math.inf])
def test_the_target_ignores_what_follows_a_termination(algorithm, unknown):
    rewards, next_values = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, unknown, 30.0])
    targets = algorithm.td_target(rewards, next_values, torch.tensor([0.0, 1.0, 0.0]), 0.5)
    assert targets.tolist() == [6, 2, 18]


class NaNAtTheEnd(gym.Env):
    """Episodes of three steps. The observation that follows the termination is NaN."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), BOUNDS

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.steps += 1
        obs = np.full(2, math.nan if self.steps == 3 else 0.1 * self.steps, np.float32)
        return obs, 1.0, self.steps == 3, False, {}


gym.register("NaNAtTheEnd-v0", NaNAtTheEnd, disable_env_checker=True)


@pytest.mark.parametrize("algorithm, changes", [
    (ddpg, {}), (ddpg, dict(maximizer="cem")), (naf, {})], ids=["ddpg", "cem", "naf"])
def test_nan_after_a_termination_changes_nothing(algorithm, changes, spy):
    samples = spy(algorithm.ReplayBuffer, "sample")
    agent, history = train("NaNAtTheEnd-v0", algorithm, **changes)
    assert any(call["out"][2].isnan().any() for call in samples)
    assert all(x.isfinite().all() for x in agent.state_dict().values())
    assert all(map(math.isfinite, history[-1].values()))


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
        zero = 0 * self.critic[-1].bias.sum()  # keeps the critic's loss a function of it
        return -((actions - best) / (HIGH - LOW)).square().sum(-1) + zero

    monkeypatch.setattr(ddpg.Agent, "q_values", q_values)
    agent, _ = train("probes:Bounds-v0", total_timesteps=1600, learning_rate=3e-3)
    actions = agent.act(torch.arange(5.0).unsqueeze(-1), True)
    assert torch.allclose(actions, best.expand(5, 2), atol=0.1)


@pytest.mark.parametrize("algorithm, changes", [
    (ddpg, {}), (ddpg, dict(maximizer="cem")), (naf, {}),
    pytest.param(ddpg, dict(maximizer="random"), marks=pytest.mark.exhaustive)],
    ids=["ddpg", "cem", "naf", "random"])
def test_it_learns_which_action_pays(algorithm, changes):
    agent, history = train(
        "probes:BoxTarget-v0", algorithm, total_timesteps=1200, learning_starts=600, hidden_size=64,
        buffer_size=1200, learning_rate=3e-3, batch_size=64, num_updates=12, **changes)
    action = agent.act(torch.zeros(1, 1), True)[0]
    assert ((action - torch.tensor([1.5, 3])) / torch.tensor([1, 5])).square().sum() < 0.1
    assert ("actor_loss" in history[-1]) == (algorithm is ddpg and not changes)
    if changes:
        assert not [name for name in agent.state_dict() if "actor" in name]


# The target network.


@BOTH
def test_the_target_follows_by_tau_and_shares_no_memory(algorithm, spy):
    runs = spy(algorithm.Run, "__init__")
    settings = dict(total_timesteps=8, learning_starts=8, num_updates=1, tau=0.25)  # one update
    agents = [train("probes:Bounds-v0", algorithm, learning_rate=rate, **settings)[0]
              for rate in (0, 1e-2)]
    target = runs[1]["modules"]["target"]
    for old, new, moved in zip(*(x.parameters() for x in (*agents, target)), strict=True):
        assert torch.allclose(moved, old + 0.25 * (new - old), atol=1e-7)
        assert not torch.equal(new, old) and new.data_ptr() != moved.data_ptr()


def test_the_actor_climbs_the_critic_and_the_target_comes_from_the_target_networks(spy):
    runs, calls = spy(ddpg.Run, "__init__"), spy(ddpg.Agent, "q_values")
    train("probes:Bounds-v0", ddpg)
    target = runs[0]["modules"]["target"]
    assert [call["self"] is target for call in calls] == len(calls) // 3 * [True, False, False]
    assert calls


@BOTH
@pytest.mark.parametrize("env", ["probes:Bounds-v0", "probes:BoxImage-v0"])
def test_next_values_come_from_the_target_network(algorithm, env, spy):
    runs, targets = spy(algorithm.Run, "__init__"), spy(algorithm, "td_target")
    samples = spy(algorithm.ReplayBuffer, "sample")
    train(env, algorithm, learning_rate=1e-2, tau=0)  # it never moves
    agent, target = (runs[0]["modules"][name] for name in ("agent", "target"))
    next_obs = samples[-1]["out"][2]
    values, others = (best_values(x, next_obs) for x in (target, agent))
    assert torch.allclose(targets[-1]["next_values"], values, atol=1e-5)
    assert (values - others).abs().max() > 1e-2


# Actions.


@BOTH
def test_the_policy_covers_the_bounds_of_each_dimension(algorithm):
    agent, obs = an_agent(algorithm), torch.randn(50, 1)
    parts = (agent.act(obs, True) - (LOW + HIGH) / 2) / ((HIGH - LOW) / 2)
    assert parts.abs().max() < 0.6  # at first it is far from the bounds
    last = agent.actor[-1] if algorithm is ddpg else agent.network[-1]
    for output, bound in ((-50, LOW), (50, HIGH)):
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.constant_(last.bias, output)
        assert torch.equal(agent.act(obs, True), bound.expand(50, 2))


@BOTH
def test_noise_is_relative_to_the_bounds_and_deterministic_actions_have_none(algorithm):
    agent, obs = an_agent(algorithm), torch.randn(50, 1)
    best, noise = agent.act(obs, True), 0.1 * torch.rand(50, 2)
    half = torch.tensor([1.5, 5.0])
    assert torch.allclose(agent.act(obs, noise=noise), best + half * noise, atol=1e-5)
    assert torch.equal(agent.act(obs, True, noise), best) and torch.equal(agent.act(obs), best)
    assert torch.equal(agent.act(obs, noise=torch.tensor(9.0)), HIGH.expand(50, 2))
    assert torch.equal(agent.act(obs, noise=torch.tensor(-9.0)), LOW.expand(50, 2))


def test_the_critic_sees_actions_scaled_to_minus_1_to_1():
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
def test_the_first_actions_are_uniform_within_the_bounds(algorithm, spy):
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
def test_bounds_without_a_finite_range_are_refused_before_anything_is_written(
        algorithm, low, high, tmp_path):
    space = gym.spaces.Box(np.array([-1, low], np.float32), np.array([1, high], np.float32))
    with pytest.raises(algorithm.UserError, match="bounds.*ppo"):
        an_agent(algorithm, space)
    with pytest.raises(algorithm.UserError, match="bounds.*Unbounded.*ppo"):
        train("probes:Unbounded-v0", algorithm, run_dir="run")
    assert list(tmp_path.iterdir()) == []


# Noise.


def test_noise_decays_by_theta_and_starts_from_0_with_an_episode():
    noise = torch.tensor([[1.0, -2.0], [3.0, 4.0], [5.0, 6.0]])
    episode_starts = torch.tensor([0.0, 1.0, 0.0])
    next_noise = ddpg.next_noise(noise, episode_starts, 0.25, 0.0)
    assert next_noise.tolist() == [[0.75, -1.5], [0, 0], [3.75, 4.5]]
    assert torch.equal(ddpg.next_noise(noise, episode_starts, 1, 0.0), torch.zeros(3, 2))
    torch.manual_seed(0)
    next_noise = ddpg.next_noise(torch.zeros(50_000, 2), torch.zeros(50_000), 0.25, 0.3)
    assert next_noise.std(0).tolist() == pytest.approx([0.3, 0.3], rel=0.02)
    assert torch.corrcoef(next_noise.T)[0, 1].abs() < 0.02  # each dimension has its own


@pytest.mark.parametrize("noise, theta", [("gaussian", 1), ("ou", 0.25)])
def test_the_noise_of_each_environment_continues_until_its_own_episode_ends(noise, theta, spy):
    calls, acts = spy(ddpg, "next_noise"), spy(ddpg.Agent, "act")
    added = spy(ddpg.ReplayBuffer, "add")
    train("probes:BoxUneven-v0", noise=noise, theta=0.25, sigma=0.2, learning_starts=0,
          num_envs=3, checkpoint_every=24)
    assert len(calls) == len(acts) == len(added) == 32
    for before, call in zip([None, *calls], calls):
        assert call["theta"] == theta and call["sigma"] == 0.2
        if before:
            assert torch.equal(call["noise"], before["out"])
    starts = torch.stack([call["episode_starts"] for call in calls])
    obs = torch.stack([call["transition"][0] for call in added]).squeeze(-1)
    assert torch.equal(starts.bool(), obs == 0)
    assert starts[1:].any(0).all() and not starts[1:].all(1).all()  # at different times
    for call, act in zip(calls, acts):
        assert torch.equal(act["noise"], call["out"])


# The replay buffer.


def new_buffer(algorithm, size, num_envs=3):
    obs_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    return algorithm.ReplayBuffer(size, num_envs, obs_space, BOUNDS, torch.device("cpu"))


def transition(k, num_envs=3):
    """Transition k of every environment: each number tells the step, environment and part."""
    x = 100.0 * k + torch.arange(num_envs)
    return x.unsqueeze(-1), x.repeat(2, 1).T + 0.25, x.unsqueeze(-1) + 0.5, x + 0.75, x % 2


@BOTH
def test_the_buffer_holds_the_last_transitions_and_samples_uniformly(algorithm):
    buffer = new_buffer(algorithm, 14)  # 4 rows of 3; the rest is not used
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
def test_a_checkpoint_holds_the_filled_rows_and_restores_them_exactly(algorithm, tmp_path):
    for steps, rows in ((5, 5), (130, 100)):
        buffer, other = (new_buffer(algorithm, 300) for _ in range(2))
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
        smaller = new_buffer(algorithm, 60 if rows > 20 else 12)
        with pytest.raises(ValueError, match="its buffer"):
            smaller.load_state_dict(buffer.state_dict())
        wider = new_buffer(algorithm, 900, num_envs=9)
        with pytest.raises(ValueError, match="its buffer"):  # without a check it would broadcast
            wider.load_state_dict({**buffer.state_dict(), "data": {
                name: x[:, :1] for name, x in buffer.state_dict()["data"].items()}})


@BOTH
def test_a_buffer_that_does_not_fit_into_memory_is_refused(algorithm, tmp_path):
    with pytest.raises(algorithm.UserError, match="buffer_size is 1,000,000,000,000,000"):
        train("Pendulum-v1", algorithm, buffer_size=10**15, run_dir="run")
    assert list(tmp_path.iterdir()) == []


# The loop.


@BOTH
def test_updates_come_in_rounds_after_learning_starts(algorithm, spy):
    samples, acts = spy(algorithm.ReplayBuffer, "sample"), spy(algorithm.Agent, "act")
    added = spy(algorithm.ReplayBuffer, "add")
    train("probes:Bounds-v0", algorithm, num_envs=2, train_every=3, num_updates=5,
          total_timesteps=60, learning_starts=12)
    assert len(added) == 30 and len(samples) == 9 * 5  # the first of ten rounds is too early
    assert len(acts) == 30 - 6  # the first steps are random


@BOTH
def test_settings_that_cannot_work_are_refused_before_anything_is_written(algorithm, tmp_path):
    for wrong in (dict(learning_starts=97), dict(buffer_size=15),
                  dict(buffer_size=19, num_envs=20)):
        with pytest.raises(algorithm.UserError, match=next(iter(wrong))):
            train("Pendulum-v1", algorithm, run_dir="run", **wrong)
    with pytest.raises(algorithm.UserError, match="96: pass --learning-starts 9$"):
        train("Pendulum-v1", algorithm, run_dir="run", learning_starts=97)
    with pytest.raises(algorithm.UserError, match="sigma"):
        algorithm.Args(sigma=-1)
    assert list(tmp_path.iterdir()) == []


@BOTH
def test_the_logged_returns_are_those_of_the_environment(algorithm):
    _, history = train("probes:BoxUneven-v0", algorithm)  # 1 a step
    assert history[-1]["episode_return"] == history[-1]["episode_length"] > 1
    assert all(map(math.isfinite, history[-1].values()))


@BOTH
def test_hooks_of_the_layers_are_called(algorithm):
    agent, calls = an_agent(algorithm), []
    network = agent.actor if algorithm is ddpg else agent.network
    for layer in network:
        layer.register_forward_hook(lambda layer, args, out: calls.append(layer))
    agent.act(torch.zeros(1, 1))
    assert calls == list(network)


# The search for the best action (6).


def quadratic(best):
    """q(actions) = -|actions - best|^2, with `best` (N, action_dim)."""
    return lambda actions: -(actions - best.unsqueeze(1)).square().sum(-1)


def test_cem_finds_the_maximum_inside_and_at_a_bound():
    torch.manual_seed(0)
    best = torch.tensor([[0.3, -0.7], [1.0, -1.0], [3.0, 0.0], [-0.2, -9.0]])
    actions, values = ddpg.cem(quadratic(best), (4, 2), 64, 6, 5)
    assert torch.allclose(actions, best.clamp(-1, 1), atol=0.03)
    assert torch.allclose(values, quadratic(best)(actions.unsqueeze(1)).squeeze(1))


def test_cem_samples_from_the_elites_of_each_state_and_clips():
    torch.manual_seed(0)
    best, tried = torch.tensor([[-0.5], [0.5], [1.0]]), []

    def q(actions):
        tried.append(actions.clone())
        return quadratic(best)(actions)

    ddpg.cem(q, (3, 1), 1000, 100, 2)
    first, second = (x.squeeze(-1) for x in tried)
    assert first.shape == second.shape == (3, 1000)
    assert first.abs().max() <= 1 and first.mean(1).abs().max() < 0.1
    for i in range(3):
        elites = first[i, (first[i] - best[i]).abs().argsort()[:100]]
        std = elites.std(correction=0) + 0.01
        z = (second[i] - elites.mean()) / std
        if i < 2:  # far from the bounds
            assert z.mean().abs() < 0.1 and z.std().item() == pytest.approx(1, abs=0.1)
    assert second.max() == 1 and (second[2] == 1).float().mean() > 0.01


def test_cem_returns_the_best_of_all_iterations():
    torch.manual_seed(0)
    for _ in range(20):
        tried = []

        def q(actions):
            tried.append(actions)
            return (1e4 * actions).sin().sum(-1)  # too rugged to improve from one to the next

        actions, values = ddpg.cem(q, (3, 2), 8, 2, 3)
        assert [x.shape[1] for x in tried] == [8, 8, 8]
        assert torch.equal(values, q(torch.cat(tried, 1)).max(1).values)
        assert torch.equal(q(actions.unsqueeze(1)).squeeze(1), values)


def test_one_elite_leaves_the_smallest_std():
    torch.manual_seed(0)
    tried = []
    ddpg.cem(lambda actions: (tried.append(actions), -actions.square().sum(-1))[1], (1, 2), 5000, 1,
             2)
    assert tried[1].std(1).flatten().tolist() == pytest.approx([0.01, 0.01], rel=0.05)


def test_nan_is_never_an_elite_and_never_the_best():
    torch.manual_seed(0)
    best = torch.tensor([[0.5, 0.0], [-0.5, 0.0]])

    def q(actions):  # unknown where the first number is positive
        return torch.where(actions[..., 0] > 0, math.nan, quadratic(best)(actions))

    actions, values = ddpg.cem(q, (2, 2), 64, 6, 5)
    expected = torch.tensor([[0.0, 0.0], [-0.5, 0.0]])
    assert values.isfinite().all() and torch.allclose(actions, expected, atol=0.05)
    actions, values = ddpg.cem(lambda actions: math.nan * actions.sum(-1), (2, 2), 64, 6, 5)
    assert actions.isfinite().all() and (values == -math.inf).all()


def test_one_iteration_is_random_shooting(spy):
    tried = []
    torch.manual_seed(0)
    q = quadratic(torch.tensor([[0.3, -0.7], [-1.0, 0.0]]))
    actions, values = ddpg.cem(lambda x: (tried.append(x), q(x))[1], (2, 2), 64, 6, 1)
    assert len(tried) == 1 and tried[0].shape == (2, 64, 2)
    assert torch.equal(values, q(tried[0]).max(1).values)
    for action, draws, i in zip(actions, tried[0], q(tried[0]).argmax(1)):
        assert torch.equal(action, draws[i])
    calls = spy(ddpg, "cem")
    for maximizer, iterations in (("random", 1), ("cem", 3)):
        train("Pendulum-v1", maximizer=maximizer, iterations=3, population=9)
        assert {(call["iterations"], call["population"]) for call in calls} == {(iterations, 9)}
        calls.clear()


@pytest.mark.parametrize("maximizer", ["random", "cem"])
def test_the_target_of_a_search_is_reward_plus_gamma_times_the_maximum_of_q(maximizer, spy):
    targets = spy(ddpg, "td_target")
    agent, batch, row = last_batch(
        "Pendulum-v1", spy, maximizer=maximizer, population=300, gamma=0.9)
    obs, actions, next_obs, rewards, terminations = batch
    grid = torch.linspace(-2, 2, 2001).view(1, -1, 1).expand(16, -1, -1)  # the torques of Pendulum
    q_values = agent.q_values(next_obs.unsqueeze(1).expand(-1, 2001, -1), grid)
    maximum, minimum = q_values.amax(1), q_values.amin(1)
    assert torch.allclose(targets[-1]["out"], rewards + 0.9 * maximum, atol=1e-3)
    assert (maximum - minimum).min() > 0.01  # the test can tell the maximum from another value
    td_errors = agent.q_values(obs, actions) - targets[-1]["out"]
    assert row["critic_loss"] == pytest.approx(td_errors.square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("env", ["Pendulum-v1", "probes:Bounds-v0", "probes:BoxImage-v0"])
def test_a_search_trains_the_critic_only(env, spy):
    targets = spy(ddpg, "td_target")
    agent, (obs, actions, *_), row = last_batch(env, spy, maximizer="cem")
    loss = (agent.q_values(agent.encoder(obs), actions) - targets[-1]["out"]).square().mean()
    parameters = list(agent.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
        tolerance = 1e-5 * gradient.abs().max()
        assert torch.allclose(parameter.grad, gradient, rtol=1e-3, atol=tolerance)
    assert "actor_loss" not in row and not hasattr(agent, "actor")


@pytest.mark.parametrize("maximizer", ["random", "cem"])
def test_a_search_repeats_itself_only_if_it_is_deterministic(maximizer):
    space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    torch.manual_seed(0)
    agent = ddpg.Agent(space, BOUNDS, arguments(ddpg, "Pendulum-v1", maximizer=maximizer))
    obs, state = torch.randn(7, 1), torch.get_rng_state()
    actions = agent.act(obs, True)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(agent.act(obs, True), actions)
    assert torch.allclose(agent.act(obs[3:5], True), actions[3:5])  # does not depend on the batch
    assert ((actions >= LOW) & (actions <= HIGH)).all()
    assert not torch.equal(agent.act(obs), agent.act(obs))  # training draws anew
    noise = torch.tensor([1.0, -9.0])
    torch.manual_seed(1)
    explored = agent.act(obs, noise=noise)
    torch.manual_seed(1)
    expected = agent.act(obs) + noise * torch.tensor([1.5, 5.0])
    assert torch.allclose(explored, torch.minimum(torch.maximum(expected, LOW), HIGH))


def test_more_elites_than_actions_are_refused():
    with pytest.raises(ddpg.UserError, match="elites is 7, more than the population 5"):
        train("Pendulum-v1", maximizer="cem", population=5, elites=7)
    train("Pendulum-v1", maximizer="random", population=5, elites=7)  # which has none
