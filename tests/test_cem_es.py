"""CEM, ES and CMA-ES against independent oracles: loops, known optima, episodes played alone."""
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys

import gymnasium as gym
import numpy as np
import probes
import pytest
import torch
from conftest import ROOT, TESTS, same, small, timeless

import cem_es
from cem_es import Agent, Args, RunningNorm, Search, centered_ranks, cma, square_root

DEFAULTS = {field.name: field.default for field in dataclasses.fields(Args)}
METHODS = "cem", "es", "cma"
NAN, INF = math.nan, math.inf


def train(env, **changes):
    """A short run without presets and, but where asked for, without statistics."""
    settings = DEFAULTS | small("cem_es", norm_obs=False, max_episode_steps=1000) | changes
    return cem_es.train(Args(**settings | dict(env=env)))


def maximise(fitness, start, method, generations, population, sigma, num_elites=10,
             extra_noise=0.1, min_sigma=1e-3, **settings):
    """The mean after a search for the maximum of `fitness`, without an environment."""
    torch.manual_seed(0)
    search = Search(method, torch.tensor(start), sigma)
    for generation in range(generations):
        noise = torch.randn(population, len(start))
        state = list(search.buffers())
        if method == "es":
            noise[1::2] = -noise[::2]
        steps = noise @ square_root(search.C) if method == "cma" else noise
        samples = search.mean + search.sigma * steps
        if method == "cem":
            remaining = 1 - generation / generations
            new = cem_es.cem(samples, fitness(samples), num_elites, extra_noise * remaining,
                             min_sigma)
        else:
            new = getattr(cem_es, method)(*state, noise, fitness(samples), **settings)
        for old, value in zip(state, new):
            old.copy_(value)
    return search


OPTIMUM = torch.linspace(-2, 3, 6)


def quadratic(x):
    """Six dimensions, ten times as steep in the last as in the first; at most 0, at OPTIMUM."""
    return -(torch.linspace(1, 10, 6) * (x - OPTIMUM).square()).sum(-1)


def rosenbrock(x):
    """At most 0, at (1, ..., 1), at the end of a bent valley."""
    return -(100 * (x[..., 1:] - x[..., :-1] ** 2) ** 2 + (1 - x[..., :-1]) ** 2).sum(-1)


# CEM.


def test_cem_fits_mean_and_deviation_to_the_elites():
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


def test_the_deviation_of_one_elite_is_finite():
    mean, sigma = cem_es.cem(torch.randn(5, 3), torch.arange(5.0), 1, 0.0, 0.1)
    assert torch.allclose(sigma, torch.tensor(0.1)) and mean.isfinite().all()


def test_constant_fitness_for_50_generations_keeps_sigma_at_or_above_its_floor():
    settings = dict(num_elites=1, extra_noise=0.0, min_sigma=0.05)
    search = maximise(lambda x: torch.zeros(len(x)), [0.0] * 4, "cem", 50, 10, 1.0, **settings)
    assert torch.allclose(search.sigma, torch.tensor(0.05)) and search.mean.isfinite().all()


def test_the_extra_noise_falls_to_0_with_the_steps(spy):
    calls = spy(cem_es, "cem")
    train("probes:Counter-v0", extra_noise=0.4, total_timesteps=200)  # of 20 steps a generation
    assert [call["extra_noise"] for call in calls] == pytest.approx(
        [0.4 * (1 - k / 10) for k in range(10)])


@pytest.mark.parametrize("fraction, elites", [(0.0, 1), (0.1, 1), (0.5, 4), (1.0, 8)])
def test_the_elites_are_a_fraction_of_the_population_and_at_least_one(fraction, elites, spy):
    calls = spy(cem_es, "cem")
    train("probes:Counter-v0", elite_fraction=fraction, population=8, total_timesteps=100)
    assert {call["num_elites"] for call in calls} == {elites}


# ES.


def test_centered_ranks_equal_a_loop_that_gives_equals_the_same_rank():
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
    noise, mean = torch.randn(8, 5), torch.randn(5)
    assert (centered_ranks(torch.full((8,), 3.0)) == 0).all()
    state = list(Search("es", mean.clone(), 0.1).buffers())
    for _ in range(3):
        state = cem_es.es(*state, noise, torch.full((8,), 3.0), 0.1, weight_decay=0.0)
    assert torch.equal(state[0], mean)


@pytest.mark.parametrize("sigma", [0.01, 1.0, 20.0])
def test_linear_fitness_recovers_its_slope(sigma):
    D, slope = 6, torch.randn(6, dtype=torch.double)
    axes = math.sqrt(D) * torch.eye(D, dtype=torch.double)
    noise = torch.stack([axes, -axes], 1).flatten(0, 1)  # whose second moments are exactly 1
    fitness = 7 + (2 + sigma * noise) @ slope
    assert torch.allclose(cem_es.es_gradient(fitness, noise, sigma), slope)
    # With real draws it is so in the mean.
    noise = torch.randn(200_000, D, dtype=torch.double)
    estimate = cem_es.es_gradient(sigma * noise @ slope, noise, sigma)
    assert torch.allclose(estimate, slope, atol=0.05)


def test_es_is_adam_on_the_negative_gradient_with_the_decay_added_to_it():
    torch.manual_seed(0)
    mean = torch.randn(5)
    weights = mean.clone().requires_grad_()
    optimizer = torch.optim.Adam([weights], 0.03, weight_decay=0.1)
    state = list(Search("es", mean, 0.2).buffers())
    for _ in range(20):
        noise, fitness = torch.randn(8, 5), torch.randn(8)
        weights.grad = -(centered_ranks(fitness).unsqueeze(1) * noise).mean(0) / 0.2
        optimizer.step()
        state = cem_es.es(*state, noise, fitness, 0.03, 0.1)
        assert torch.allclose(state[0], weights, atol=1e-5)


def test_pairs_have_opposite_noise_and_the_same_episodes(spy):
    calls, resets = spy(cem_es, "es"), spy(cem_es.Envs, "reset")
    train("Pendulum-v1", method="es", num_envs=12, pairs=3, es_sigma=1e-7,
          total_timesteps=6000, episodes_per_member=2)
    noise, fitness = (torch.stack([call[name] for call in calls]) for name in ("noise", "fitness"))
    assert len(calls) == 2 and torch.equal(noise[:, ::2], -noise[:, 1::2])
    assert len(noise[:, ::2].unique()) == noise[:, ::2].numel()  # drawn anew for each pair
    assert torch.allclose(fitness[:, ::2], fitness[:, 1::2], rtol=1e-3)  # as sigma is next to 0
    assert not torch.isclose(fitness[:, 0], fitness[:, 2], rtol=1e-3).any()
    for seeds in (np.array(call["seed"]) for call in resets if isinstance(call["seed"], tuple)):
        pairs = seeds.reshape(3, 2, 2)  # pair, member, repeat
        assert (pairs[:, 0] == pairs[:, 1]).all() and len(set(pairs[:, 0].flatten())) == 6


# CMA-ES.


def test_the_square_root_of_a_covariance():
    A = torch.randn(7, 7, dtype=torch.double)
    root = square_root(A @ A.T)
    assert torch.allclose(root @ root, A @ A.T) and torch.allclose(root, root.T)


def test_cma_follows_the_equations_of_the_tutorial_step_by_step():
    """Written out again with loops, as Hansen 2016 has it, for minimisation."""
    torch.manual_seed(0)
    n, population, double = 4, 9, dict(dtype=torch.double)
    state = [torch.randn(n, **double), torch.full((n,), 0.3, **double), torch.eye(n, **double),
             torch.zeros(n, **double), torch.zeros(n, **double), torch.zeros((), **double)]
    m, sigma, C, ps, pc = (x.numpy() for x in state[:5])
    sigma = sigma[0]
    usual = []
    for g in range(30):
        noise = torch.randn(population, n, **double)
        values, vectors = np.linalg.eigh(C)
        root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
        y = [root @ z for z in noise.numpy()]
        x = [m + sigma * one for one in y]
        # At first a slope, where steps are longer than by chance, then a bowl.
        cost = [one.sum() * 10 if g < 12 else (one ** 2).sum() for one in x]
        state = cma(*state, noise, -torch.tensor(cost))

        mu = population // 2
        w = np.array([math.log((population + 1) / 2) - math.log(i + 1) for i in range(mu)])
        w /= w.sum()
        mueff = 1 / (w ** 2).sum()
        cs = (mueff + 2) / (n + mueff + 5)
        ds = 1 + 2 * max(0, math.sqrt((mueff - 1) / (n + 1)) - 1) + cs
        cc = (4 + mueff / n) / (n + 4 + 2 * mueff / n)
        c1 = 2 / ((n + 1.3) ** 2 + mueff)
        cmu = min(1 - c1, 2 * (mueff - 2 + 1 / mueff) / ((n + 2) ** 2 + mueff))
        chi = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n ** 2))
        order = np.argsort(cost)
        yw = sum(w[i] * y[order[i]] for i in range(mu))
        m = m + sigma * yw
        ps = (1 - cs) * ps + math.sqrt(cs * (2 - cs) * mueff) * np.linalg.inv(root) @ yw
        norm = np.linalg.norm(ps)
        h = norm / math.sqrt(1 - (1 - cs) ** (2 * (g + 1))) < (1.4 + 2 / (n + 1)) * chi
        usual.append(bool(h))
        pc = (1 - cc) * pc + h * math.sqrt(cc * (2 - cc) * mueff) * yw
        C = ((1 + c1 * (1 - h) * cc * (2 - cc) - c1 - cmu) * C + c1 * np.outer(pc, pc)
             + cmu * sum(w[i] * np.outer(y[order[i]], y[order[i]]) for i in range(mu)))
        sigma = sigma * math.exp(cs / ds * (norm / chi - 1))
        for got, expected in zip(state, (m, sigma, C, ps, pc, g + 1)):
            assert np.allclose(got, expected, rtol=1e-9)
    assert True in usual and False in usual


def test_cma_does_not_notice_a_rotation():
    Q = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0]
    settings = dict(generations=130, population=12, sigma=1.0)
    ends = [quadratic_ellipse(maximise(lambda x: quadratic_ellipse(x @ turn), [1.0] * 6, "cma",
                                       **settings).mean @ turn) for turn in (torch.eye(6), Q)]
    assert all(-1e-6 < end <= 0 for end in ends)


def quadratic_ellipse(x):
    """A thousand times as steep in the last dimension as in the first."""
    return -(torch.logspace(0, 3, 6) * x.square()).sum(-1)


def test_cma_lengthens_its_steps_on_a_slope_and_shortens_them_at_the_top():
    slope = maximise(lambda x: x.sum(-1), [0.0] * 6, "cma", 30, 10, 0.1)
    assert (slope.sigma > 1).all() and slope.mean.sum() > 10
    top = maximise(lambda x: -x.square().sum(-1), [0.0] * 6, "cma", 60, 10, 1.0)
    assert (top.sigma < 0.01).all()


def test_cma_refuses_policies_beyond_a_few_hundred_parameters_with_their_number():
    with pytest.raises(cem_es.UserError, match="1,282"):  # 5 * 32 + 33 * 32 + 33 * 2
        train("CartPole-v1", method="cma", hidden_size=32)
    train("CartPole-v1", method="cma", hidden_size=16, total_timesteps=200)


# All three.


@pytest.mark.parametrize("method, settings, distance", [
    ("cem", dict(generations=100, population=40, sigma=1.0), 0.1),
    ("es", dict(generations=600, population=40, sigma=0.1, learning_rate=0.03, weight_decay=0.0),
     0.1),
    ("cma", dict(generations=100, population=12, sigma=1.0), 1e-3)])
def test_the_optimum_of_a_shifted_quadratic_is_found(method, settings, distance):
    search = maximise(quadratic, [0.0] * 6, method, **settings)
    assert (search.mean - OPTIMUM).abs().max() < distance


@pytest.mark.parametrize("method, settings, distance", [
    ("cem", dict(generations=300, population=100, sigma=0.5, num_elites=5, extra_noise=0.03), 0.1),
    ("es", dict(generations=1500, population=20, sigma=0.01, learning_rate=0.01, weight_decay=0.0),
     0.1),
    ("cma", dict(generations=200, population=12, sigma=0.5), 1e-3)])
def test_the_optimum_of_rosenbrock_is_found(method, settings, distance):
    search = maximise(rosenbrock, [-1.0, 1.0], method, **settings)
    assert (search.mean - 1).abs().max() < distance


@pytest.mark.parametrize("method", METHODS)
def test_nan_counts_as_the_worst_in_every_method(method):
    settings = dict(learning_rate=0.03, weight_decay=0.0) if method == "es" else {}

    def fitness(x):
        return torch.where(x[:, 0] > 0, NAN, -(x + 1).square().sum(-1))

    search = maximise(fitness, [-0.1] * 3, method, 150, 20, 0.2, **settings)
    assert (search.mean + 1).abs().max() < 0.2


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
    got, layers = agent.policies(obs, *agent.layers(weights)), agent.layers(weights)
    for i in range(7):
        x = obs[i]
        for k, layer in enumerate(layers):
            x = torch.nn.functional.linear(x.tanh() if k else x, layer[i, :, :-1], layer[i, :, -1])
        assert got[i] == x.argmax()
    agent.weights.data = weights[3]
    assert torch.equal(agent.act(obs), agent.act(obs, deterministic=True))
    assert agent.act(obs[3:4]) == got[3]


def test_outputs_between_minus_1_and_1_cover_the_bounds_of_each_dimension():
    agent, _, obs = agents(0, BOUNDS, 1)
    assert agent.act(obs).tolist() == [[0.5, 5.0]]  # at first the centre
    for output, bound in ((-1, BOUNDS.low), (1, BOUNDS.high)):
        agent.layers(agent.weights.data)[-1][:, -1] = output  # the biases
        assert agent.act(obs)[0].tolist() == bound.tolist()


@pytest.mark.parametrize("hidden_size", [0, 16, 33])
@pytest.mark.parametrize("obs_size", [1, 4, 17, 300])
def test_an_action_has_the_same_bits_whoever_else_acts(hidden_size, obs_size):
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
def test_running_norm_knows_the_moments_of_all_it_was_told_of(offset):
    generator, norm = np.random.default_rng(0), RunningNorm(3)
    batches = [generator.normal(offset + k, [0.5, 1, 4], (n, 3)).astype(np.float32)
               for k, n in enumerate([2, 7, 100, 64, 64, 512])]
    for batch in batches:
        x = torch.from_numpy(batch).double()
        norm.update(torch.cat([torch.tensor([len(x)]), x.sum(0), x.square().sum(0)]))
    everything = np.concatenate(batches).astype(np.float64)
    assert np.allclose(norm.mean, everything.mean(0), atol=1e-5 * (offset + 10))
    assert np.allclose(norm.std, everything.std(0), rtol=1e-3)
    outputs = norm(torch.from_numpy(batches[-1])).numpy()
    assert np.allclose(outputs, (batches[-1] - everything.mean(0)) / everything.std(0), atol=1e-2)


def test_running_norm_leaves_what_never_varied_as_wide_as_it_is():
    norm, x = RunningNorm(4), torch.tensor([[0.0, 0.1, 300.0, 1e-6], [0.0, 0.1, 300.0, -1e-6]])
    norm.update(torch.cat([torch.tensor([2]), x.double().sum(0), x.double().square().sum(0)]))
    assert norm.std.tolist() == pytest.approx([1, 1, 1, 1e-6])


def test_statistics_of_observations_far_from_0_keep_their_digits(monkeypatch):
    monkeypatch.setattr(Agent, "features", lambda agent, obs: obs + 30_000)
    agent, _ = train("probes:Counter-v0", norm_obs=True, total_timesteps=200)
    assert agent.norm.mean.item() == 30_002  # of 0 to 4
    assert agent.norm.std.item() == pytest.approx(math.sqrt(2), rel=1e-6)


# Episodes.


def alone(env_id, agent, weights, seed, limit=1000):
    """Return and observations of an episode of one policy in an environment of its own."""
    env, total, seen = gym.make(env_id), 0, []
    obs, _ = env.reset(seed=seed)
    layers = agent.layers(weights.unsqueeze(0))
    for _ in range(limit):
        seen.append(torch.as_tensor(np.array(obs, np.float32)))
        action = agent.policies(seen[-1].unsqueeze(0), *layers)[0].numpy()
        if isinstance(env.action_space, gym.spaces.Box):
            action = action.clip(env.action_space.low, env.action_space.high)
        obs, reward, terminated, truncated, _ = env.step(action)
        total += reward
        if terminated or truncated:
            break
    return total, seen


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("num_envs, repeats", [(64, 1), (3, 2)])
def test_fitness_is_the_mean_return_of_a_members_own_episodes(env, num_envs, repeats, spy):
    calls, resets = spy(cem_es, "cem"), spy(cem_es.Envs, "reset")
    agent, _ = train(env, num_envs=num_envs, episodes_per_member=repeats, total_timesteps=2500,
                     population=5)
    seeds = [call["seed"] for call in resets if isinstance(call["seed"], tuple)]
    seeds = [seed for part in seeds for seed in part if seed is not None][:5 * repeats]
    samples, fitness = calls[0]["samples"], calls[0]["fitness"]
    for m in range(5):
        returns = [alone(env, agent, samples[m], seed)[0]
                   for seed in seeds[m * repeats:(m + 1) * repeats]]
        assert fitness[m].item() == pytest.approx(np.mean(returns), rel=1e-4)
    assert len(set(fitness.tolist())) > 1


def count_steps(monkeypatch, name):
    counts, step = [], probes.Probe.step
    monkeypatch.setattr(probes.Probe, "step", lambda self, action: (
        counts.append(self.steps), step(self, action))[1])
    return counts, f"probes:{name}-v0"


@pytest.mark.parametrize("num_envs", [1, 3, 64])
def test_every_step_of_an_environment_is_counted_and_belongs_to_an_episode_that_is_wanted(
        num_envs, monkeypatch, spy):
    counts, env = count_steps(monkeypatch, "Uneven")  # episodes of 1 step or of 9
    calls = spy(cem_es, "cem")
    agent, history = train(env, num_envs=num_envs, population=6, norm_obs=True,
                           total_timesteps=400)
    assert history[-1]["step"] == len(counts)
    assert {x for call in calls for x in call["fitness"].tolist()} == {1.0, 9.0}
    # The statistics are of all observations acted on in the generations that were learnt from.
    learnt = np.array(counts[:int(agent.norm.sums[0])])
    assert agent.norm.sums[0] == sum(call["fitness"].sum() for call in calls)
    assert agent.norm.mean.item() == pytest.approx(learnt.mean())
    assert agent.norm.std.item() == pytest.approx(learnt.std(), rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_the_number_of_environments_does_not_change_the_result(method):
    results = [train("Pendulum-v1", method=method, population=6, pairs=3, num_envs=num_envs,
                     hidden_size=5, total_timesteps=1000, max_episode_steps=30, norm_obs=True)
               for num_envs in (1, 4, 64)]
    for agent, history in results[1:]:
        assert same(agent.state_dict(), results[0][0].state_dict())
        for row, expected in zip(history[:-1], results[0][1][:-1], strict=True):
            assert row["weight_norm"] == expected["weight_norm"]


def test_an_episode_is_left_after_the_most_steps_that_are_allowed(spy):
    calls = spy(cem_es, "cem")
    _, history = train("probes:Endless-v0", max_episode_steps=7, total_timesteps=100)
    assert {x for call in calls for x in call["fitness"].tolist()} == {7.0}
    assert {(row["episode_return"], row["episode_length"]) for row in history} == {(7.0, 7.0)}


def test_the_last_episodes_are_not_those_that_ended_last():
    _, history = train("probes:Uneven-v0", population=64, num_envs=64, total_timesteps=64 * 64)
    logged = [row["episode_length"] for row in history]  # of 20 of 64 episodes, of 1 or 9 steps
    assert len(logged) >= 8 and sum(logged) / len(logged) == pytest.approx(5, abs=1)


def test_a_generation_lasts_as_long_as_its_longest_episode(spy):
    calls = spy(cem_es.Envs, "step")
    train("probes:Counter-v0", total_timesteps=80)  # four generations of four episodes of 5 steps
    assert len(calls) == 4 * 5


def test_a_generation_that_the_budget_cuts_short_is_not_learnt_from(spy):
    calls = spy(cem_es, "cem")
    agent, history = train("probes:Counter-v0", total_timesteps=70)  # 20 a generation
    assert len(calls) == 3 and history[-1]["step"] == 72
    assert torch.equal(agent.weights, calls[-1]["out"][0])
    calls.clear()
    train("probes:Counter-v0", total_timesteps=80)
    assert len(calls) == 4


def test_a_budget_below_a_generation_is_refused():
    with pytest.raises(cem_es.UserError, match="19 steps"):
        train("probes:Counter-v0", total_timesteps=19)


# Learning.


@pytest.mark.parametrize("method", METHODS)
def test_the_agent_acts_by_the_mean_and_not_by_a_member_of_the_population(method, spy):
    calls = spy(cem_es, method)
    agent, _ = train("probes:Target-v0", method=method, total_timesteps=40)
    assert torch.equal(agent.weights, calls[-1]["out"][0])


@pytest.mark.parametrize("method", METHODS)
def test_continuous_actions_move_to_the_best_one(method):
    agent, _ = train("probes:Target-v0", method=method, total_timesteps=3000, population=20,
                     pairs=10, learning_rate=0.05, elite_fraction=0.3)
    assert torch.allclose(agent.act(torch.zeros(1, 1)), torch.ones(1, 2), atol=0.2)


@pytest.mark.parametrize("method, steps", [("cem", 25_000), ("es", 25_000), ("cma", 25_000)])
def test_cartpole_is_learnt_within_25_thousand_steps(method, steps):
    args = Args(env="CartPole-v1", method=method, total_timesteps=steps, seed=1, device="cpu")
    agent, _ = cem_es.train(args)
    assert cem_es.evaluate(agent, args, 20).mean() > 150  # a random policy gets 22


# Reliability.


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_search_goes_on_exactly_with_all_that_the_method_remembers(
        method, monkeypatch, tmp_path):
    settings = dict(method=method, norm_obs=True, total_timesteps=2000, max_episode_steps=30,
                    checkpoint_every=100)
    save = cem_es.Run.save

    def keep(run):
        save(run)
        if 200 <= run.step < 1000 and not os.path.exists("part"):
            shutil.copytree("whole", "part")

    monkeypatch.setattr(cem_es.Run, "save", keep)
    whole, history = train("CartPole-v1", run_dir="whole", **settings)
    args = Args(**cem_es.load("part")["args"] | {"run_dir": "part"})
    part, resumed = cem_es.train(args, "part")
    assert same(part.state_dict(), whole.state_dict())
    assert same(timeless(resumed), timeless(history))
    assert same(cem_es.load("part")["search"], cem_es.load("whole")["search"])


def test_a_resumed_search_takes_a_new_deviation():
    settings = dict(method="es", run_dir="run", es_sigma=0.5, total_timesteps=400)
    train("CartPole-v1", **settings)
    args = Args(**cem_es.load("run")["args"] | dict(total_timesteps=800, es_sigma=0.25))
    _, history = cem_es.train(args, "run")
    assert history[-1]["sigma"] == 0.25


@pytest.mark.parametrize("method, settings", [
    ("es", dict(learning_rate=3e38)), ("es", dict(es_sigma=3e38)), ("cma", dict(init_sigma=3e38))])
def test_a_search_that_diverges_is_stopped(method, settings):
    with pytest.raises(FloatingPointError):
        train("Pendulum-v1", method=method, total_timesteps=2000, max_episode_steps=20, **settings)


# Several processes.

RUNS = [dict(method="cem", hidden_size=16, env="Pendulum-v1", max_episode_steps=40, norm_obs=True),
        dict(method="es", hidden_size=16, env="Pendulum-v1", max_episode_steps=40),
        dict(method="cma", env="CartPole-v1")]


def test_two_processes_give_the_same_result_as_one_to_the_last_bit_and_send_only_returns(tmp_path):
    base = DEFAULTS | small("cem_es", norm_obs=False, population=6, pairs=3, total_timesteps=2000)
    runs = [base | run for run in RUNS]
    runs[2]["episodes_per_member"] = 3
    (tmp_path / "driver.py").write_text(f"""
import json, os, sys
sys.path[:0] = {[str(ROOT), str(TESTS)]!r}
import torch, torch.distributed as dist
import cem_es

sent, send = [0], dist.all_reduce
for name in "broadcast all_gather send reduce gather scatter all_to_all all_gather_object".split():
    setattr(dist, name, None)  # that would be another way
dist.all_reduce = lambda x: (sent.append(x.numel() * x.element_size()), send(x))[1]
for k, run in enumerate(json.loads({json.dumps(runs)!r})):
    sent.clear()
    agent, history = cem_es.train(cem_es.Args(**run))
    torch.save((agent.state_dict(), history, sum(sent)), f"{{k}}-{{cem_es.RANK}}.pt")
dist.barrier()
sys.stdout.flush(), os._exit(0)
""")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "driver.py"], cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120,
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for k, run in enumerate(runs):
        agent, history = cem_es.train(Args(**run))
        for rank in (0, 1):
            state, rows, sent = torch.load(tmp_path / f"{k}-{rank}.pt", weights_only=True)
            assert same(state, agent.state_dict()), run["method"]
            own = [{name: value for name, value in row.items() if "episode" not in name}
                   for row in timeless(history)]
            # The last generation was cut short, and by each process where its steps ended.
            assert [{name: row[name] for name in own[0]} for row in rows[:-1]] == own[:-1]
            generations = len(rows)
            moments = 2 * 3 if run["norm_obs"] else 0
            each = 6 * run["episodes_per_member"] * 8 * (2 + moments)
            assert sent == generations * (each + 4), (sent, generations, each)  # 4: shall we stop?
            assert sent < generations * 4 * 6 * len(agent.weights) or (
                run["method"] == "cma")
