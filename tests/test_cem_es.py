"""CEM and ES against independent oracles: loops, known optima, episodes played alone."""
import dataclasses
import functools
import json
import math
import os
import shutil
import socket

import gymnasium as gym
import numpy as np
import probes
import processes
import pytest
import torch
from conftest import ROOT, TESTS, same, small, timeless

import cem_es
from cem_es import Agent, Args, RunningNorm, centered_ranks, es_gradient

DEFAULTS = {field.name: field.default for field in dataclasses.fields(Args)}
METHODS = "cem", "es"
NAN, INF = math.nan, math.inf


def train(env, **changes):
    """A short run without presets and, unless asked for, without statistics."""
    settings = DEFAULTS | small("cem_es", norm_obs=False, max_episode_steps=1000) | changes
    return cem_es.train(Args(**settings | dict(env=env)))


def maximize(fitness, start, method, generations, population, sigma, num_elites=10,
             extra_noise=0.1, min_sigma=1e-3, learning_rate=0.03):
    """Mean and sigma after a search for the maximum of `fitness`, without an environment."""
    torch.manual_seed(0)
    mean, sigma = torch.tensor(start), torch.full((len(start),), sigma)
    optimizer = torch.optim.Adam([mean], learning_rate, maximize=True)
    for generation in range(generations):
        noise = torch.randn(population, len(mean))
        if method == "es":
            noise[1::2] = -noise[::2]
        samples = mean + sigma * noise
        if method == "cem":
            remaining = 1 - generation / generations
            mean, sigma = cem_es.cem(samples, fitness(samples), num_elites,
                                     extra_noise * remaining, min_sigma)
        else:
            mean.grad = es_gradient(centered_ranks(fitness(samples)), noise, sigma)
            optimizer.step()
    return mean, sigma


OPTIMUM = torch.linspace(-2, 3, 6)


def quadratic(x):
    """Six dimensions, ten times as steep in the last as in the first; at most 0, at OPTIMUM."""
    return -(torch.linspace(1, 10, 6) * (x - OPTIMUM).square()).sum(-1)


def rosenbrock(x):
    """At most 0, at (1, ..., 1), at the end of a bent valley."""
    return -(100 * (x[..., 1:] - x[..., :-1] ** 2) ** 2 + (1 - x[..., :-1]) ** 2).sum(-1)


# CEM.


def test_cem_fits_mean_and_sigma_to_the_elites():
    samples = torch.tensor([[1.0, 10.0], [9.0, 9.0], [3.0, 10.0], [8.0, 8.0]])
    fitness = torch.tensor([5.0, -1.0, 7.0, 2.0])  # the first and the third are the best
    mean, sigma = cem_es.cem(samples, fitness, 2, extra_noise=0.0, min_sigma=0.5)
    assert mean.tolist() == [2, 10] and sigma.tolist() == [1, 0.5]
    _, sigma = cem_es.cem(samples, fitness, 2, extra_noise=3.0, min_sigma=0.5)
    assert sigma.tolist() == pytest.approx([2, math.sqrt(3)])


@pytest.mark.parametrize("fitness, elites, expected", [
    ([NAN, 1, 2, NAN], 2, 1.5), ([NAN, NAN, 2, NAN], 2, 2), ([NAN, -INF, 2, 1], 3, 2.5),
    ([3, NAN, -2, -1], 3, 5 / 3)])
def test_a_nan_is_never_an_elite(fitness, elites, expected):
    samples = torch.arange(4.0).unsqueeze(1)
    mean, sigma = cem_es.cem(samples, torch.tensor(fitness), elites, 0.0, 0.1)
    assert mean.item() == pytest.approx(expected) and sigma.isfinite().all()


def test_the_sigma_of_one_elite_is_finite():
    mean, sigma = cem_es.cem(torch.randn(5, 3), torch.arange(5.0), 1, 0.0, 0.1)
    assert torch.allclose(sigma, torch.tensor(0.1)) and mean.isfinite().all()


def test_constant_fitness_for_50_generations_keeps_sigma_at_its_floor():
    settings = dict(num_elites=1, extra_noise=0.0, min_sigma=0.05)
    mean, sigma = maximize(lambda x: torch.zeros(len(x)), [0.0] * 4, "cem", 50, 10, 1.0, **settings)
    assert torch.allclose(sigma, torch.tensor(0.05)) and mean.isfinite().all()


def test_the_extra_noise_falls_to_0_with_the_steps(spy):
    calls = spy(cem_es, "cem")
    train("probes:Counter-v0", extra_noise=0.4, total_timesteps=200)  # of 20 steps a generation
    assert [call["extra_noise"] for call in calls] == pytest.approx(
        [0.4 * (1 - k / 10) for k in range(10)])


@pytest.mark.parametrize("fraction, elites", [(0.0, 1), (0.1, 1), (0.5, 4), (1.0, 7)])
def test_the_elites_are_a_fraction_of_the_population_never_none_or_all(fraction, elites, spy):
    calls = spy(cem_es, "cem")
    train("probes:Counter-v0", elite_fraction=fraction, population=8, total_timesteps=100)
    assert {call["num_elites"] for call in calls} == {elites}


def test_each_generation_is_drawn_around_the_mean_and_sigma_of_the_last(spy):
    calls = spy(cem_es, "cem")
    agent, _ = train("probes:Target-v0", population=1000, num_envs=64, elite_fraction=0.5,
                     extra_noise=0.0, min_sigma=0.3, init_sigma=2.0, total_timesteps=3000)
    assert len(calls) == 3
    for call, (mean, sigma) in zip(calls, [(torch.zeros(4), torch.full((4,), 2.0)),
                                           *(call["out"] for call in calls)]):
        samples = call["samples"]
        assert torch.allclose(samples.mean(0), mean, atol=0.1 * sigma.max())
        assert torch.allclose(samples.std(0), sigma, rtol=0.1)
    assert torch.equal(agent.sigma, calls[-1]["out"][1])


# ES.


def test_centered_ranks_equal_a_loop_in_which_ties_share_a_rank():
    torch.manual_seed(0)
    for fitness in (torch.randn(9), torch.randint(4, (12,)).float(), torch.tensor([3.0, -1e30])):
        n, expected = len(fitness), []
        for one in fitness.tolist():
            places = [k for k, other in enumerate(sorted(fitness.tolist())) if other == one]
            expected.append(sum(places) / len(places) / (n - 1) - 0.5)
        assert centered_ranks(fitness).tolist() == pytest.approx(expected, abs=1e-6)
    assert centered_ranks(torch.tensor([1.0, NAN, 0.0])).tolist() == [0.5, -0.5, 0]
    assert centered_ranks(torch.tensor([NAN, NAN, INF, -INF])).tolist() == pytest.approx(
        [-1 / 6, -1 / 6, 0.5, -1 / 6])


def test_equal_fitness_moves_nothing():
    assert (centered_ranks(torch.full((8,), 3.0)) == 0).all()
    settings = dict(method="es", weight_decay=0.0, total_timesteps=100)  # every return is 5
    agent, _ = train("probes:Counter-v0", **settings)
    assert (agent.weights == 0).all()
    settings = dict(method="es", weight_decay=0.1, hidden_size=16)  # nor does the decay alone
    once, often = (train("probes:Counter-v0", total_timesteps=n, **settings)[0] for n in (1, 100))
    assert torch.equal(once.weights, often.weights) and once.weights.any()


class SeedOnly(gym.Env):
    """Episodes of one step, whose reward depends on the seed and on nothing else."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (4,)), gym.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 4).astype(np.float32), {}

    def step(self, action):
        return np.zeros(4, np.float32), float(self.np_random.integers(100)), True, False, {}


gym.register("SeedOnly-v0", SeedOnly)


def test_pairs_that_tie_move_nothing_although_the_pairs_differ():
    settings = dict(method="es", weight_decay=0.0, total_timesteps=100, pairs=16)
    agent, history = train("SeedOnly-v0", **settings)
    assert (agent.weights == 0).all() and len({row["episode_return"] for row in history}) > 1


@pytest.mark.parametrize("sigma", [0.01, 1.0, 20.0])
def test_linear_fitness_recovers_its_slope(sigma):
    D, slope = 6, torch.randn(6, dtype=torch.double)
    axes = math.sqrt(D) * torch.eye(D, dtype=torch.double)
    noise = torch.stack([axes, -axes], 1).flatten(0, 1)  # whose second moments are exactly 1
    fitness = 7 + (2 + sigma * noise) @ slope
    assert torch.allclose(es_gradient(fitness, noise, sigma), slope)
    # With random noise it is so in the mean.
    noise = torch.randn(200_000, D, dtype=torch.double)
    assert torch.allclose(es_gradient(sigma * noise @ slope, noise, sigma), slope, atol=0.05)


def test_es_is_adam_on_the_negative_gradient_with_the_decay_added_to_it(spy):
    gradients = spy(cem_es, "es_gradient")
    settings = dict(method="es", es_sigma=0.2, learning_rate=0.03, weight_decay=0.1)
    agent, _ = train("probes:Target-v0", total_timesteps=80, **settings)  # 20 generations of 4
    weights = torch.zeros_like(agent.weights, requires_grad=True)
    optimizer = torch.optim.Adam([weights], 0.03, weight_decay=0.1)
    assert len(gradients) == 20
    for call in gradients:
        assert (call["sigma"] == 0.2).all()
        weights.grad = -(call["utilities"].unsqueeze(1) * call["noise"]).mean(0) / 0.2
        optimizer.step()
    assert torch.allclose(agent.weights, weights, atol=1e-5) and weights.abs().min() > 0.01


def seeds_of(resets):
    """The seeds of all episodes of a run, in their order, from the resets of its environments."""
    lists = [call["seed"] for call in resets if isinstance(call["seed"], list)]
    return [seed for part in lists for seed in part if seed is not None]


def test_pairs_have_opposite_noise_and_the_same_episode(spy):
    calls, ranks = spy(cem_es, "es_gradient"), spy(cem_es, "centered_ranks")
    resets = spy(cem_es.VecEnv, "reset")
    train("Pendulum-v1", method="es", num_envs=5, pairs=3, es_sigma=1e-7, learning_rate=1e-7,
          total_timesteps=2400)
    noise, fitness = (torch.stack([call[name] for call in some]).unflatten(1, (2, 3))
                      for name, some in (("noise", calls), ("fitness", ranks)))
    assert len(calls) == 2 and torch.equal(noise[:, 0], -noise[:, 1])
    assert len(noise[:, 0].unique()) == noise[:, 0].numel()  # new noise for each pair
    assert torch.allclose(fitness[:, 0], fitness[:, 1], rtol=1e-3)  # as sigma is almost 0
    assert not torch.isclose(fitness[:, 0, 0], fitness[:, 0, 1], rtol=1e-3).any()
    seeds = np.array(seeds_of(resets)).reshape(2, 2, 3)  # generation, sign, pair
    assert (seeds[:, 0] == seeds[:, 1]).all() and len(set(seeds.flatten())) == 6


def test_the_members_of_cem_play_different_episodes(spy):
    resets = spy(cem_es.VecEnv, "reset")
    train("probes:Counter-v0", population=6, total_timesteps=60)
    assert len(seeds_of(resets)) == len(set(seeds_of(resets))) == 12


# Both.


@pytest.mark.parametrize("method, settings", [
    ("cem", dict(generations=100, population=40, sigma=1.0)),
    ("es", dict(generations=600, population=40, sigma=0.1))])
def test_the_optimum_of_a_shifted_quadratic_is_found(method, settings):
    mean, _ = maximize(quadratic, [0.0] * 6, method, **settings)
    assert (mean - OPTIMUM).abs().max() < 0.1


@pytest.mark.parametrize("method, settings", [
    ("cem", dict(generations=300, population=100, sigma=0.5, num_elites=5, extra_noise=0.03)),
    ("es", dict(generations=1500, population=20, sigma=0.01, learning_rate=0.01))])
def test_the_optimum_of_rosenbrock_is_found(method, settings):
    mean, _ = maximize(rosenbrock, [-1.0, 1.0], method, **settings)
    assert (mean - 1).abs().max() < 0.1


@pytest.mark.parametrize("method", METHODS)
def test_nan_counts_as_the_worst_in_both_methods(method):
    def fitness(x):
        return torch.where(x[:, 0] > 0, NAN, -(x + 1).square().sum(-1))

    mean, _ = maximize(fitness, [-0.1] * 3, method, 150, 20, 0.2)
    assert (mean + 1).abs().max() < 0.2


# The policies.


def space(*shape):
    return gym.spaces.Box(-np.inf, np.inf, shape, np.float32)


BOUNDS = probes.BOUNDS


def agents(hidden_size, action_space, N, obs_size=5):
    torch.manual_seed(0)
    agent = Agent(space(obs_size), action_space, Args(norm_obs=False, hidden_size=hidden_size))
    return agent, torch.randn(N, len(agent.weights)), torch.randn(N, obs_size)


@pytest.mark.parametrize("hidden_size, size", [(0, 6 * 3), (4, 6 * 4 + 5 * 4 + 5 * 3)])
def test_each_policy_is_the_network_that_its_weights_describe(hidden_size, size):
    agent, weights, obs = agents(hidden_size, gym.spaces.Discrete(3), 7)
    assert weights.shape == (7, size)
    layers = agent.layers(weights)
    actions = agent.policies(obs, *layers)
    for i in range(7):
        x = obs[i]
        for k, layer in enumerate(layers):
            x = torch.nn.functional.linear(x.tanh() if k else x, layer[i, :, :-1], layer[i, :, -1])
        assert actions[i] == x.argmax()
    agent.weights.data = weights[3]
    assert torch.equal(agent.act(obs), agent.act(obs, deterministic=True))
    assert agent.act(obs[3:4]) == actions[3]


def test_outputs_between_minus_1_and_1_cover_the_bounds_of_each_dimension():
    agent, _, obs = agents(0, BOUNDS, 1)
    assert agent.act(obs).tolist() == [[0.5, 5.0]]  # the center at first
    for output, bound in ((-1, BOUNDS.low), (1, BOUNDS.high)):
        agent.layers(agent.weights.data)[-1][:, -1] = output  # the biases
        assert agent.act(obs)[0].tolist() == bound.tolist()


@pytest.mark.parametrize("hidden_size", [0, 16, 33])
@pytest.mark.parametrize("obs_size", [1, 4, 17, 300])
def test_an_action_has_the_same_bits_for_every_number_of_policies(hidden_size, obs_size):
    agent, weights, obs = agents(hidden_size, BOUNDS, 40, obs_size)
    whole = agent.policies(obs, *agent.layers(weights))
    for start, end in [(0, 1), (39, 40), (3, 5), (7, 20), (0, 31), (1, 40)]:
        part = agent.policies(obs[start:end].clone(), *agent.layers(weights[start:end].clone()))
        assert torch.equal(part, whole[start:end])


def test_images_become_8_by_8_means_between_0_and_1():
    agent = Agent(gym.spaces.Box(0, 255, (3, 40, 48), np.uint8), BOUNDS, Args())
    images = torch.randint(256, (2, 3, 40, 48), dtype=torch.uint8)
    features = agent.features(images).view(2, 3, 8, 8)
    for i, c, row, column in [(0, 0, 0, 0), (1, 2, 7, 7), (1, 0, 3, 5)]:
        block = images[i, c, 5 * row:5 * row + 5, 6 * column:6 * column + 6]
        assert features[i, c, row, column].item() == pytest.approx(
            block.float().mean().item() / 255, abs=1e-6)
    assert agent.act(images).shape == (2, 2) and len(agent.weights) == 2 * (3 * 64 + 1)


@pytest.mark.parametrize("offset", [0, 1000])
def test_running_norm_knows_the_moments_of_all_that_was_added(offset):
    generator, norm = np.random.default_rng(0), RunningNorm(3)
    batches = [generator.normal(offset + k, [0.5, 1, 4], (n, 3)).astype(np.float32)
               for k, n in enumerate([2, 7, 100, 64, 64, 512])]
    for k, batch in enumerate(batches):
        before = norm.mean.clone()
        norm.add(torch.from_numpy(batch))
        assert torch.equal(norm.mean, before)
        if k != 3:
            norm.update()
    everything = np.concatenate(batches).astype(np.float64)
    assert norm.sums[0].tolist() == [len(everything)] * 3
    assert np.allclose(norm.mean, everything.mean(0), atol=1e-5 * (offset + 10))
    assert np.allclose(norm.std, everything.std(0), rtol=1e-3)
    outputs = norm(torch.from_numpy(batches[-1])).numpy()
    assert np.allclose(outputs, (batches[-1] - everything.mean(0)) / everything.std(0), atol=1e-2)
    assert norm(torch.full((1, 3), 1e9)).tolist() == [[10.0] * 3]


def test_running_norm_does_not_scale_what_never_varied():
    norm = RunningNorm(4)
    norm.add(torch.tensor([[0.0, 0.1, 300.0, 1e-6], [0.0, 0.1, 300.0, -1e-6]]))
    norm.update()
    assert norm.std.tolist() == pytest.approx([1, 1, 1, 1e-6])


def test_statistics_of_observations_far_from_0_keep_their_digits(monkeypatch):
    monkeypatch.setattr(Agent, "features", lambda agent, obs: obs + 30_000)
    agent, _ = train("probes:Counter-v0", norm_obs=True, total_timesteps=200)
    assert agent.norm.mean.item() == 30_002  # of 0 to 4
    assert agent.norm.std.item() == pytest.approx(math.sqrt(2), rel=1e-6)


# The policy.


def test_actions_are_within_the_bounds_and_first_weights_fit_the_number_of_inputs():
    space = gym.spaces.Box(np.array([-1, 5], np.float32), np.array([2, np.inf], np.float32))
    agent = Agent(gym.spaces.Box(-9, 9, (3,)), space, cem_es.Args(hidden_size=1000))
    layers = agent.layers(agent.weights.detach())
    assert layers[0].std().item() == pytest.approx(1 / 2, rel=0.05)  # three inputs and the bias
    assert (layers[-1] == 0).all() and all(x.isfinite().all() for x in agent.state_dict().values())
    agent.weights.data.normal_()
    actions = agent.act(torch.randn(50, 3))
    assert ((actions >= torch.tensor(space.low)) & (actions <= torch.tensor(space.high))).all()
    assert actions[:, 0].min() == -1 and actions[:, 0].max() == 2


# Episodes.


def alone(env_id, agent, weights, seed):
    """The return of an episode of one policy in an environment of its own."""
    env, total, done = gym.make(env_id), 0, False
    obs, _ = env.reset(seed=seed)
    layers = agent.layers(weights.unsqueeze(0))
    while not done:
        obs = torch.as_tensor(np.array(obs, np.float32))
        action = agent.policies(obs.unsqueeze(0), *layers)[0].numpy()
        if isinstance(env.action_space, gym.spaces.Box):
            action = action.clip(env.action_space.low, env.action_space.high)
        obs, reward, terminated, truncated, _ = env.step(action)
        total, done = total + reward, terminated or truncated
    return total


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("num_envs", [64, 3])
def test_fitness_is_the_return_of_a_members_own_episode(env, num_envs, spy):
    calls, resets = spy(cem_es, "cem"), spy(cem_es.VecEnv, "reset")
    agent, history = train(env, num_envs=num_envs, total_timesteps=50, population=5)
    samples, fitness = calls[0]["samples"], calls[0]["fitness"].tolist()
    returns = [alone(env, agent, sample, seed) for sample, seed in zip(samples, seeds_of(resets))]
    assert fitness == pytest.approx(returns, rel=1e-4) and len(set(fitness)) > 1
    assert history[0]["episode_return"] == pytest.approx(np.mean(returns), rel=1e-4)


def count_steps(monkeypatch, name):
    counts, step = [], probes.Probe.step
    monkeypatch.setattr(probes.Probe, "step", lambda self, action: (
        counts.append(self.steps), step(self, action))[1])
    return counts, f"probes:{name}-v0"


@pytest.mark.parametrize("num_envs", [1, 4, 64])
def test_every_step_of_an_environment_is_counted_and_belongs_to_an_episode_that_is_wanted(
        num_envs, monkeypatch, spy):
    counts, env = count_steps(monkeypatch, "Uneven")  # episodes of 1 step or of 9
    calls = spy(cem_es, "cem")
    agent, history = train(env, num_envs=num_envs, population=6, norm_obs=True,
                           total_timesteps=400)
    assert history[-1]["step"] == len(counts) == sum(call["fitness"].sum() for call in calls)
    assert {x for call in calls for x in call["fitness"].tolist()} == {1.0, 9.0}
    # The statistics are of all observations that were acted on.
    assert agent.norm.sums[0] == len(counts)
    assert agent.norm.mean.item() == pytest.approx(np.mean(counts))
    assert agent.norm.std.item() == pytest.approx(np.std(counts), rel=1e-3)


@pytest.mark.parametrize("name", ["NaNEnd", "InfEnd"])
def test_nothing_depends_on_the_observation_after_a_termination(name):
    agents = [train(f"probes:{name}-v0", num_envs=3, population=4, norm_obs=True,
                    total_timesteps=100)[0] for name in (name, "Counter")]
    assert same(agents[0].state_dict(), agents[1].state_dict())


def same_agents(a, b):
    """To the last bit, except the double precision sums, whose terms may be in another order."""
    a, b = dict(a), dict(b)
    sums = [x.pop("norm.sums", torch.zeros(1)) for x in (a, b)]
    return same(a, b) and torch.allclose(*sums, rtol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_the_number_of_environments_does_not_change_the_result(method):
    results = [train("Pendulum-v1", method=method, population=6, pairs=3, num_envs=num_envs,
                     hidden_size=5, total_timesteps=1000, max_episode_steps=30, norm_obs=True)
               for num_envs in (1, 4, 64)]
    for agent, history in results[1:]:
        assert same_agents(agent.state_dict(), results[0][0].state_dict())
        assert same(timeless(history), timeless(results[0][1]))


def test_max_episode_steps_cuts_an_episode_off(spy):
    calls = spy(cem_es, "cem")
    _, history = train("probes:Long-v0", max_episode_steps=7, total_timesteps=100)
    assert {x for call in calls for x in call["fitness"].tolist()} == {7.0}
    assert {(row["episode_return"], row["episode_length"]) for row in history} == {(7.0, 7.0)}


def test_the_last_episodes_are_not_those_that_ended_last():
    _, history = train("probes:Uneven-v0", population=64, num_envs=64, total_timesteps=64 * 64)
    logged = [row["episode_length"] for row in history]  # of 20 of 64 episodes, of 1 or 9 steps
    assert len(logged) >= 8 and sum(logged) / len(logged) == pytest.approx(5, abs=1)


def test_a_generation_lasts_as_long_as_its_longest_episode(spy):
    calls = spy(cem_es.VecEnv, "step")
    train("probes:Counter-v0", total_timesteps=80)  # four generations of four episodes of 5 steps
    assert len(calls) == 4 * 5


@pytest.mark.parametrize("steps, generations", [(1, 1), (20, 1), (21, 2), (80, 4), (81, 5)])
def test_a_run_plays_whole_generations_and_learns_from_each(steps, generations, spy):
    calls = spy(cem_es, "cem")
    agent, history = train("probes:Counter-v0", total_timesteps=steps)  # 20 a generation
    assert len(calls) == generations and history[-1]["step"] == 20 * generations
    assert torch.equal(agent.weights, calls[-1]["out"][0])


# Learning.


@pytest.mark.parametrize("method", METHODS)
def test_continuous_actions_move_to_the_best_one(method):
    agent, _ = train("probes:Target-v0", method=method, total_timesteps=3000, population=20,
                     pairs=10, learning_rate=0.05, elite_fraction=0.3)
    assert torch.allclose(agent.act(torch.zeros(1, 1)), torch.ones(1, 2), atol=0.2)


@pytest.mark.parametrize("method", METHODS)
def test_cartpole_is_learnt_within_25_thousand_steps(method):
    args = Args(env="CartPole-v1", method=method, total_timesteps=25_000, seed=1, device="cpu")
    agent, _ = cem_es.train(args)
    assert cem_es.evaluate(agent, args, 20).mean() > 150  # a random policy gets 22


# Reliability.


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_equals_an_unbroken_one(method, monkeypatch, tmp_path):
    settings = dict(method=method, norm_obs=True, total_timesteps=1500, max_episode_steps=30,
                    checkpoint_every=100)
    save = cem_es.Run.save

    def keep(run):
        save(run)
        if 200 <= run.step < 1000 and not os.path.exists("part"):
            shutil.copytree("whole", "part")

    monkeypatch.setattr(cem_es.Run, "save", keep)
    whole, history = train("CartPole-v1", run_dir="whole", **settings)
    args = Args(**cem_es.load_checkpoint("part")["args"] | {"run_dir": "part"})
    part, resumed = cem_es.train(args, "part")
    assert same(part.state_dict(), whole.state_dict())
    assert same(timeless(resumed), timeless(history))
    assert same(cem_es.load_checkpoint("part")["optimizer"],
                cem_es.load_checkpoint("whole")["optimizer"])


def test_a_resumed_run_takes_a_new_sigma_and_learning_rate():
    settings = dict(method="es", run_dir="run", es_sigma=0.5, weight_decay=0.0,
                    total_timesteps=400)
    before, _ = train("CartPole-v1", **settings)
    args = Args(**cem_es.load_checkpoint("run")["args"] | dict(
        total_timesteps=800, es_sigma=0.25, learning_rate=0.0))
    agent, history = cem_es.train(args, "run")
    assert history[-1]["sigma"] == 0.25 and history[-1]["step"] >= 800
    assert torch.equal(agent.weights, before.weights) and agent.weights.abs().sum() > 0


@pytest.mark.parametrize("settings", [
    dict(method="es", learning_rate=3e38), dict(method="es", es_sigma=3e38),
    dict(method="cem", init_sigma=3e38)])
def test_a_run_that_diverges_is_stopped(settings):
    with pytest.raises(FloatingPointError):
        train("Pendulum-v1", total_timesteps=2000, max_episode_steps=20, **settings)


# Several processes.

RUNS = [dict(method="cem", hidden_size=16, env="Pendulum-v1", max_episode_steps=40, norm_obs=True,
             population=5),
        dict(method="es", hidden_size=16, env="CartPole-v1", pairs=3)]


def test_two_processes_give_the_result_of_one_and_send_only_returns_and_sums(tmp_path):
    base = DEFAULTS | small("cem_es", norm_obs=False, total_timesteps=1500)
    runs = [base | run for run in RUNS]
    driver = tmp_path / "driver.py"
    driver.write_text(f"""
import json, sys
sys.path[:0] = {[str(ROOT), str(TESTS)]!r}
import torch, torch.distributed as dist
import cem_es

sent, send = [], dist.all_reduce
for name in "broadcast all_gather send reduce gather scatter all_to_all all_gather_object".split():
    setattr(dist, name, None)  # there must be no other way
dist.all_reduce = lambda x: (sent.append(x.numel()), send(x))[1]
for k, run in enumerate(json.loads({json.dumps(runs)!r})):
    sent.clear()
    agent, history = cem_es.train(cem_es.Args(**run))
    torch.save((agent.state_dict(), history, sum(sent)), f"{{k}}-{{cem_es.RANK}}.pt")
dist.destroy_process_group()
""")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = []
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
        started.append(processes.Script(driver, folder=tmp_path / str(rank),
                                        bomb=functools.partial(processes.join, rank, port)))
    alone = [cem_es.train(Args(**run)) for run in runs]
    for code, _, err in [script.end() for script in started]:
        assert code == 0, err
    for k, (run, (agent, history)) in enumerate(zip(runs, alone)):
        for rank in (0, 1):
            state, rows, sent = torch.load(tmp_path / f"{rank}/{k}-{rank}.pt", weights_only=True)
            assert same_agents(state, agent.state_dict()), run["method"]
            assert same(timeless(rows), timeless(history))
            # The run ends with the first generation that reaches total_timesteps.
            assert rows[-2]["step"] < 1500 <= rows[-1]["step"]
            population = run["population"] if run["method"] == "cem" else 2 * run["pairs"]
            sums = 3 * 3 if run["norm_obs"] else 0  # of three features of Pendulum-v1
            each = 2 * population + sums + 1  # return and length; 1: whether to stop
            assert sent == len(rows) * each and each < len(agent.weights)


def test_more_processes_than_members_are_refused(monkeypatch):
    monkeypatch.setattr(cem_es, "WORLD_SIZE", 5)
    monkeypatch.setattr(cem_es, "setup", lambda args: torch.device("cpu"))
    with pytest.raises(cem_es.UserError, match="5 processes .* population of 4"):
        train("probes:Counter-v0", population=4)
