"""Planning and policies with a model against independent oracles: LQR, loops, numbers by hand."""
import dataclasses
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from benchmark.planning import Pendulum
from conftest import same, small

import mbrl_mpc
from mbrl_mpc import Agent, Args, Model, Normalizer, UserError, cem

DEFAULTS = {field.name: field.default for field in dataclasses.fields(Args)}
BOX = gym.spaces.Box(-2, 2, (1,), np.float32)


def settings(**changes):
    return Args(**DEFAULTS | small("mbrl_mpc") | changes)


def train(env, **changes):
    return mbrl_mpc.train(settings(env=env, **changes))


def make_agent(obs_size=1, action_space=BOX, step=None, **changes):
    """An agent; `step`, a function of (obs, actions), replaces the predictions of its model."""
    torch.manual_seed(0)
    space = gym.spaces.Box(-np.inf, np.inf, (obs_size,), np.float32)
    if step:
        changes = dict(ensemble_size=1) | changes
    agent = Agent(space, action_space, settings(**changes))
    if step:
        agent.model.predict = lambda obs, actions, noise: step(obs, actions)
    return agent


def best_plan(agent, obs):
    """The plans (N, H, A) that the agent makes at the start of an episode."""
    agent.reset(torch.ones(len(obs)))
    agent.act(obs, deterministic=True)
    return agent.plans.clone()


def returns_of(agent, obs, plans):
    """The returns (N, K) of plans (N, K, H, A) from obs (N, obs_size)."""
    actions = plans.flatten(0, 1).transpose(0, 1)
    obs = obs.repeat_interleave(plans.shape[1], 0)
    returns = agent.rollout_model(obs, lambda t, obs: actions[t], *agent.sample_noise()[1:])
    return returns.view(plans.shape[:2])


def test_returns_stop_at_a_termination():
    """Observations count the steps, and rewards and terminations are read from a table."""
    generator, H = torch.Generator().manual_seed(0), 6
    rewards = torch.randn(H, 50, generator=generator)
    p_ends = torch.rand(H, 50, generator=generator)
    p_ends[:, :25] = (p_ends[:, :25] < 0.2).float()  # certain, or with some probability
    agent = make_agent(step=lambda obs, actions: (
        obs + 1, rewards[obs[0, 0, 0].long()].unsqueeze(0), p_ends[obs[0, 0, 0].long()]),
        horizon=H, gamma=0.9)
    got = agent.rollout_model(torch.zeros(50, 1), lambda t, obs: obs, *agent.sample_noise()[1:])
    for n in range(50):
        expected = sum(0.9 ** t * math.prod((1 - p_ends[:t, n]).tolist()) * rewards[t, n].item()
                       for t in range(H))
        assert got[n].item() == pytest.approx(expected, abs=1e-5)


def mountain_car(obs, actions):
    """MountainCar-v0 as its source code has it; actions are one-hot."""
    position, velocity = obs.unbind(-1)
    force = actions.argmax(-1) - 1
    velocity = (velocity + 0.001 * force - 0.0025 * (3 * position).cos()).clamp(-0.07, 0.07)
    position = (position + velocity).clamp(-1.2, 0.6)
    velocity = torch.where((position == -1.2) & (velocity < 0), 0.0, velocity)
    ends = (position >= 0.5) & (velocity >= 0)
    return torch.stack([position, velocity], -1), -torch.ones_like(position), ends.float()


def test_reaching_the_goal_of_mountain_car_ends_its_costs():
    agent = make_agent(2, gym.spaces.Discrete(3), mountain_car, horizon=20, gamma=1,
                       population=100, elites=10, rounds=4)
    obs = torch.tensor([[0.25, 0.035]])
    plans = torch.eye(3)[torch.tensor([[[2] * 20, [0] * 20]])]  # full throttle, full reverse
    assert returns_of(agent, obs, plans).tolist() == [[-8, -13]]
    assert (best_plan(agent, obs).argmax(-1)[0, :5] == 2).all()



# CEM.


def normal(rounds=20, population=100, size=2):
    return torch.randn(rounds, population, 1, size, generator=torch.Generator().manual_seed(0))


def unbounded(plans):
    return plans


@pytest.mark.parametrize("elites", [1, 10])
def test_cem_finds_the_optimum_of_a_shifted_quadratic_for_each_environment(elites):
    best = torch.tensor([[1.0, -2.0], [3.0, 0.5]])

    def score(plans):
        return -((plans[:, :, 0] - best[:, None]) ** 2 * torch.tensor([1.0, 10.0])).sum(-1)

    mean = cem(score, unbounded, torch.zeros(2, 1, 2), 2 * torch.ones(2, 1, 2), normal(), elites)
    assert torch.allclose(mean[:, 0], best, atol=0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_plan_without_a_finite_score_is_no_elite(bad):
    drawn = []

    def score(plans):
        drawn.append(plans)
        x = plans[:, :, 0, 0]
        return torch.where(x > 0, torch.tensor(bad), -1 + 0.1 * x)  # all the others cost something

    start = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
    mean = cem(score, unbounded, *start, normal(rounds=1), 10)
    assert mean[0, 0, 0] < 0
    order = drawn[0][0, :, 0, 0].where(drawn[0][0, :, 0, 0] <= 0, -9).argsort(descending=True)
    assert torch.allclose(mean[0, 0], drawn[0][0, order[:10], 0].mean(0))
    # With fewer finite plans than elites only they count; without any all stays finite.
    few = cem(score, unbounded, start[0] + 2.3, start[1], normal(rounds=1), 50)
    assert few[0, 0, 0] < 0
    none = cem(lambda plans: plans[..., 0, 0] * math.nan, unbounded, *start, normal(), 10)
    assert none.isfinite().all()


@pytest.mark.parametrize("elites", [1, 10])
def test_constant_scores_leave_the_std_at_its_minimum(elites):
    stds, noise = [], normal(50)

    def watch(plans):  # two plans of known noise tell the std
        row = noise[len(stds)]
        stds.append((plans[:, 1] - plans[:, 2]) / (row[1] - row[2]))
        return plans

    start = torch.zeros(1, 1, 2), torch.tensor([[[1.0, 5.0]]])
    mean = cem(lambda plans: torch.zeros(plans.shape[:2]), watch, *start, noise, elites)
    min_std = mbrl_mpc.MIN_STD_FRACTION * start[1]
    assert mean.isfinite().all() and all((std >= min_std - 1e-4).all() for std in stds)
    if elites == 1:
        assert torch.allclose(stds[-1], min_std, atol=1e-4)


def test_elites_are_the_actions_that_would_be_executed():
    agent = make_agent(step=lambda obs, actions: (obs, actions.sum(-1), 0 * actions[..., 0]),
                       population=50, elites=5, rounds=8, sigma=3.0)
    plans = best_plan(agent, torch.zeros(1, 1))
    assert (plans <= 2).all() and plans.min() > 1.99  # the mean of unclamped samples overshoots
    agent = make_agent(step=lambda obs, actions: (obs, -(actions[..., 0] - 1.9) ** 2,
                                                  0 * actions[..., 0]),
                       population=200, elites=5, rounds=1, sigma=3.0, horizon=1)
    assert best_plan(agent, torch.zeros(1, 1)).item() == pytest.approx(1.9, abs=0.1)


# The planner.


@pytest.mark.parametrize("correlation", [0, 0.7])
def test_the_plan_for_a_linear_system_with_quadratic_costs_is_that_of_lqr(correlation):
    A, B = np.array([[1, 0.3], [0, 1]]), np.array([[0.0], [0.3]])
    Q, R, H = np.diag([1.0, 0.1]), np.array([[0.1]]), 8
    V = np.zeros((2, 2))
    for _ in range(H):  # the Riccati recursion, back from the horizon
        K = np.linalg.solve(R + B.T @ V @ B, B.T @ V @ A)
        V = Q + A.T @ V @ (A - B @ K)
    At, Bt, Qt = (torch.from_numpy(x).float() for x in (A, B, Q))

    def step(obs, actions):
        costs = ((obs @ Qt) * obs).sum(-1) + 0.1 * actions.square().sum(-1)
        return obs @ At.T + actions @ Bt.T, -costs, torch.zeros_like(costs)

    space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    agent = make_agent(2, space, step, horizon=H, population=200, elites=15, rounds=20,
                       sigma=2.0, gamma=1, correlation=correlation)
    obs = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.5, -2.0]])  # three environments at once
    plans = best_plan(agent, obs)
    returns = returns_of(agent, obs, plans[:, None]).squeeze(1)
    for x, plan, got in zip(obs.double().numpy(), plans, returns):
        assert -got.item() == pytest.approx(x @ V @ x, rel=0.02)
        assert plan[0].item() == pytest.approx((-K @ x).item(), abs=0.1)


@pytest.mark.parametrize("planner, population", [("cem", 64), ("random", 3000)])
def test_discrete_plans_find_the_combination_that_pays(planner, population):
    combination = torch.tensor([2, 0, 1, 1, 2])

    def step(obs, actions):  # obs counts the steps
        right = actions.argmax(-1) == combination[obs[..., 0].long().clamp(max=4)]
        return obs + 1, right.float(), torch.zeros_like(obs[..., 0])

    agent = make_agent(1, gym.spaces.Discrete(3), step, planner=planner, population=population,
                       elites=8, rounds=10, horizon=5)
    obs = torch.zeros(2, 1)
    assert best_plan(agent, obs).argmax(-1).tolist() == [combination.tolist()] * 2
    for action in combination:
        assert agent.act(obs, deterministic=True).tolist() == [action, action]
        obs = obs + 1


def test_random_plans_fill_the_bounds_evenly_and_the_best_is_taken():
    space = gym.spaces.Box(np.array([-1, 0], np.float32), np.array([2, 10], np.float32))
    agent = make_agent(1, space, lambda obs, actions: (obs, -(actions - 1).square().sum(-1),
                                                       0 * obs[..., 0]),
                       planner="random", population=2000, horizon=1)
    scored = []
    predict = agent.model.predict
    agent.model.predict = lambda obs, actions, noise: (scored.append(actions[0]),
                                                       predict(obs, actions, noise))[1]
    plan = best_plan(agent, torch.zeros(1, 1))[0, 0]
    assert torch.equal(plan, scored[0][(scored[0] - 1).square().sum(-1).argmin()])
    assert torch.allclose(scored[0].mean(0), torch.tensor([0.5, 5.0]), atol=0.3)
    assert torch.allclose(scored[0].std(0), torch.tensor([3, 10]) / 12 ** 0.5, rtol=0.05)


def test_random_plans_try_all_discrete_actions_equally_often():
    counts = []

    def step(obs, actions):
        counts.append(actions.mean((0, 1)))
        return obs, obs[..., 0], 0 * obs[..., 0]

    best_plan(make_agent(1, gym.spaces.Discrete(8), step, planner="random", population=3000),
              torch.zeros(1, 1))
    assert torch.allclose(torch.stack(counts), torch.full((3, 8), 1 / 8), atol=0.03)


def test_an_end_is_avoided_where_steps_pay_and_sought_where_it_stops_costs_for_free():
    for reward, last, wanted in [(1, 1, 1), (-1, 0, 0)]:  # CartPole, Acrobot
        agent = make_agent(1, gym.spaces.Discrete(2), lambda obs, actions: (
            obs, reward + (last - reward) * actions[..., 0], actions[..., 0]), horizon=10,
            population=64, elites=8, rounds=6)
        assert best_plan(agent, torch.zeros(1, 1)).argmax(-1)[0, 0] == wanted


def test_the_value_of_the_last_state_is_a_part_of_the_return_with_what_is_still_alive():
    """V is obs here, which the actions add up to; a plan ends with probability 1/4 at each step."""
    agent = make_agent(step=lambda obs, actions: (
        obs + actions, torch.ones_like(obs[..., 0]), 0.25 * torch.ones_like(obs[..., 0])),
        terminal_value=True, horizon=3, gamma=0.9)
    agent.value = lambda obs: obs[..., 0]
    plans = torch.tensor([[2.0, 2, 2], [-2, -2, -2]]).view(1, 2, 3, 1)
    got = returns_of(agent, torch.ones(1, 1), plans)
    steps, alive = 1 + 0.9 * 0.75 + (0.9 * 0.75) ** 2, (0.9 * 0.75) ** 3
    assert got.tolist() == [pytest.approx([steps + alive * 7, steps - alive * 5])]
    assert best_plan(agent, torch.zeros(1, 1)).sum() > 2


def test_a_plan_that_leads_to_nan_is_avoided_although_all_others_cost():
    agent = make_agent(step=lambda obs, actions: (
        torch.where(actions > 0, math.nan, obs), -1 - obs[..., 0].square(), 0 * obs[..., 0]),
        horizon=3, population=100, elites=10, rounds=4)
    plans = best_plan(agent, torch.ones(2, 1))
    assert plans.isfinite().all() and (plans[:, :2] <= 0).all()


def test_environments_are_planned_for_at_once_as_each_alone():
    agent = make_agent(3, gym.spaces.Box(-1, 1, (2,)), lambda obs, actions: (
        obs, (3 * actions.sum(-1) + obs.sum(-1)).sin(), 0 * obs[..., 0]), population=16)
    obs, noise = torch.randn(4, 3), agent.sample_noise(fixed=True)
    mean = torch.zeros(4, 3, 2)
    together = agent.plan(obs, mean, *noise)
    for n in range(4):
        alone = agent.plan(obs[n:n + 1], mean[n:n + 1], *noise)
        assert torch.allclose(together[n], alone[0], atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_the_first_action_is_executed_and_a_deterministic_one_is_always_the_same():
    agent = make_agent(1, step=lambda obs, actions: (
        obs, (3 * actions[..., 0] + obs[..., 0]).sin(), 0 * obs[..., 0]))
    obs = torch.randn(5, 1)
    agent.reset(torch.ones(5))
    action = agent.act(obs, deterministic=True)
    assert action.shape == (5, 1) and torch.equal(action, agent.plans[:, 0])
    assert torch.equal(best_plan(agent, obs)[:, 0], action)
    agent.reset(torch.ones(5))
    assert not torch.equal(agent.act(obs), action)


# The warm start.


def planned(**changes):
    """An agent whose plans are always 1, 2, 3, and the list of the means it was given."""
    agent, means = make_agent(horizon=3, **changes), []

    def plan(obs, mean, *noise):
        means.append(mean)
        return torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1).repeat(len(obs), 1, 1)

    agent.plan = plan
    return agent, means


def test_a_plan_starts_from_the_rest_of_the_last_one():
    agent, means = planned()
    agent.act(torch.zeros(2, 1)), agent.act(torch.zeros(2, 1))
    assert (means[0] == 0).all()
    assert means[1].squeeze(-1).tolist() == [[2, 3, 0]] * 2


def test_a_plan_is_forgotten_where_an_episode_starts_and_only_there():
    agent, means = planned()
    agent.act(torch.zeros(3, 1))
    agent.reset(torch.tensor([0.0, 1.0, 0.0]))
    agent.act(torch.zeros(3, 1))
    assert means[1].squeeze(-1).tolist() == [[2, 3, 0], [0, 0, 0], [2, 3, 0]]
    agent.reset(torch.zeros(3))
    agent.act(torch.zeros(3, 1))
    assert means[2].squeeze(-1).tolist() == [[2, 3, 0]] * 3


def test_plans_adapt_to_the_number_of_environments_and_are_no_part_of_the_state():
    agent, means = planned()
    before = agent.state_dict().keys()
    for n in (2, 5, 1):
        agent.act(torch.zeros(n, 1))
        assert means[-1].shape == (n, 3, 1) and (means[-1] == 0).all()
    assert agent.state_dict().keys() == before and "plans" not in before
    agent.reset(torch.zeros(4))
    agent.act(torch.zeros(4, 1))
    assert means[-1].shape == (4, 3, 1)


def test_a_plan_is_followed_for_replan_every_steps_or_until_an_episode_starts():
    agent, means = planned(replan_every=3)
    actions = [agent.act(torch.zeros(1, 1)).item() for _ in range(7)]
    assert actions == [1, 2, 3, 1, 2, 3, 1] and len(means) == 3
    agent.reset(torch.ones(1))
    assert agent.act(torch.zeros(1, 1)).item() == 1 and len(means) == 4


def test_an_episode_that_starts_elsewhere_does_not_change_a_plan():
    agent, _ = planned(replan_every=3)
    actions = []
    for t in range(6):
        agent.reset(torch.tensor([0.0, 1.0 if t == 2 else 0.0]))
        actions.append(agent.act(torch.zeros(2, 1)).flatten().tolist())
    assert actions == [[1, 1], [2, 2], [3, 1], [1, 2], [2, 3], [3, 1]]


def test_training_forgets_plans_where_episodes_start(spy):
    calls = spy(Agent, "plan")
    train("probes:Counter-v0", total_timesteps=256, learning_starts=0, elites=3)
    begun = torch.stack([(call["mean"] == 0).all(-1).all(-1) for call in calls])
    steps = torch.stack([call["obs"][:, 0] for call in calls])
    assert begun[steps == 0].all() and not begun[steps > 0].any() and (steps > 0).any()


# The model.


@torch.no_grad()
def particles(propagation, horizon=6, num_particles=4):
    """What is added to each of the particles at each step (H, P).

    Member 0 of two always adds 1 to the first observation, member 1 adds 10. The second one tells
    the particles apart."""
    agent = make_agent(2, propagation=propagation, ensemble_size=num_particles, horizon=horizon)
    for x in agent.model.parameters():
        x.zero_()
    agent.model.biases[-1][:, 0, 0] = torch.tensor([1.0, 1, 10, 10])
    predict, added = agent.model.predict, []

    def watch(obs, actions, noise):
        if not added:
            obs = torch.stack([obs[..., 0], torch.arange(num_particles).view(-1, 1)], -1)
        next_obs, *rest = predict(obs, actions, 0 * noise)
        order = next_obs[:, 0, 1].argsort()
        added.append((next_obs - obs)[order, 0, 0])
        return next_obs, *rest

    agent.model.predict = watch
    agent.rollout_model(torch.zeros(1, 2), lambda t, obs: obs[:1, :, :1], *agent.sample_noise()[1:])
    return torch.stack(added)


def test_tsinf_keeps_a_particle_with_its_member():
    assert particles("tsinf").tolist() == [[1, 1, 10, 10]] * 6


def test_ts1_gives_a_particle_to_another_member_at_each_step():
    added = particles("ts1", horizon=300)
    assert (added.sort(-1)[0] == torch.tensor([1, 1, 10, 10])).all()  # each has its share
    assert torch.allclose((added == 10).float().mean(0), torch.full((4,), 0.5), atol=0.1)
    changes = (added[1:] != added[:-1]).float().mean(0)
    assert torch.allclose(changes, torch.full((4,), 0.5), atol=0.1)


def test_the_dead_stay_dead_when_particles_change_members():
    """Half of the particles end at the first step; the other half gets every later reward."""
    step = iter(range(99))

    def predict(obs, actions, noise):
        ends = (torch.arange(4) < 2 if next(step) == 0 else torch.zeros(4)).view(4, 1).float()
        return obs + torch.where(ends > 0, 100, 0).unsqueeze(-1), (obs[..., 0] < 100).float(), ends

    agent = make_agent(propagation="ts1", ensemble_size=4, horizon=6, gamma=1)
    agent.model.predict = predict
    returns = agent.rollout_model(torch.zeros(1, 1), lambda t, obs: obs, *agent.sample_noise()[1:])
    assert returns.item() == 1 + 5 / 2


def test_particles_are_spread_by_the_predicted_std_and_all_plans_share_their_noise():
    agent = make_agent(ensemble_size=4000, hidden_size=4, propagation="tsinf")
    with torch.no_grad():
        for x in agent.model.parameters():
            x.zero_()
    agent.model.delta_norm.std.fill_(3)
    low, high = mbrl_mpc.LOG_VAR_RANGE
    obs = torch.zeros(4000, 7, 1)
    next_obs, rewards, _ = agent.model.predict(obs, obs, agent.sample_noise()[1][0])
    assert next_obs[:, 0].std().item() == pytest.approx(3 * math.exp((low + high) / 4), rel=0.05)
    assert torch.equal(next_obs, next_obs[:, :1].expand_as(next_obs)) and (rewards == 0).all()


def test_what_is_predicted_behind_an_imagined_end_does_not_count(monkeypatch):
    agent = make_agent(horizon=3, terminal_value=True)
    answers = [(math.nan, 5.0, 1.0)] + [(0.0, 1.0, 0.0)] * 2  # obs, reward, P(termination)

    def predict(obs, actions, noise):
        new_obs, reward, end = (x + 0 * obs for x in answers.pop(0))
        return new_obs, reward[..., 0], end[..., 0]

    monkeypatch.setattr(agent.model, "predict", predict)
    _, noise, orders = agent.sample_noise(7)
    obs = torch.zeros(7, 1)
    returns = agent.rollout_model(obs, lambda t, obs: torch.zeros(7, 1), noise, orders)
    assert returns.tolist() == [5.0] * 7


def test_a_plan_whose_end_is_not_a_number_is_never_the_best():
    agent = make_agent(step=lambda obs, actions: (
        obs, 0 * obs[..., 0] - 1, torch.where(actions[..., 0] > 0, math.nan, 0.0)),
        horizon=3, population=100, elites=10, rounds=4)
    assert (best_plan(agent, torch.zeros(1, 1)) <= 0).all()  # steps that cost, without an end


def test_random_plans_are_independent_in_time():
    noise = make_agent(planner="random", horizon=4, population=20000).sample_noise()[0][0, ..., 0]
    assert np.allclose(np.corrcoef(noise.T.numpy()), np.eye(4), atol=0.03)


def test_the_noise_of_plans_is_correlated_in_time():
    agent = make_agent(horizon=4, population=20000, rounds=1, correlation=0.7)
    noise = agent.sample_noise()[0][0, 1:, :, 0]
    assert (agent.sample_noise()[0][:, 0] == 0).all()  # the mean itself is one of the plans
    t = np.arange(4)
    expected = 0.7 ** abs(t - t[:, None])
    assert np.allclose(np.cov(noise.T.numpy()), expected, atol=0.05)


def test_members_are_separate_networks():
    torch.manual_seed(0)
    model, x = Model(3, 2, settings(hidden_size=8)), torch.randn(2, 5, 5)
    outputs = model(x[..., :3], x[..., 3:])
    for e in range(2):
        y = x[e]
        for n, (weight, bias) in enumerate(zip(model.weights, model.biases)):
            y = (torch.nn.functional.silu(y) if n else y) @ weight[e] + bias[e]
        mean, log_var, logit = y[:, :4], y[:, 4:8], y[:, 8]
        low, high = mbrl_mpc.LOG_VAR_RANGE
        assert torch.allclose(outputs[0][e], mean, atol=1e-5)
        assert torch.allclose(outputs[1][e], low + (high - low) * log_var.sigmoid(), atol=1e-4)
        assert torch.allclose(outputs[2][e], logit, atol=1e-5)


def test_log_variances_stay_within_their_bounds():
    model = Model(3, 2, settings(hidden_size=8))
    log_var = model(1e6 * torch.randn(2, 50, 3), 1e6 * torch.randn(2, 50, 2))[1]
    assert log_var.min() >= mbrl_mpc.LOG_VAR_RANGE[0] and log_var.max() <= mbrl_mpc.LOG_VAR_RANGE[1]


def test_the_loss_is_the_negative_log_likelihood_up_to_a_constant():
    torch.manual_seed(0)
    agent = make_agent(3, gym.spaces.Box(-1, 1, (2,)), hidden_size=8)
    model = agent.model
    obs, next_obs = torch.randn(2, 2, 6, 3)
    actions, rewards = torch.randn(2, 6, 2), torch.randn(2, 6)
    terminations = (torch.rand(2, 6) < 0.5).float()
    agent.fit_normalizers(*(x.flatten(0, 1) for x in (obs, actions, next_obs, rewards)))
    losses = model.loss(obs, actions, next_obs, rewards, terminations)
    mean, log_var, logit = model(obs, actions)
    assert losses.shape == (2, 6)
    total = 0
    for e in range(2):
        for b in range(6):
            delta = torch.cat([next_obs[e, b] - obs[e, b], rewards[e, b, None]])
            delta = (delta - model.delta_norm.mean) / model.delta_norm.std
            normal = torch.distributions.Normal(mean[e, b], (log_var[e, b] / 2).exp())
            ends = torch.distributions.Bernoulli(logits=logit[e, b])
            nll = -normal.log_prob(delta) - math.log(2 * math.pi) / 2
            w = log_var[e, b].exp().detach()  # a constant of the gradient, too
            expected = (w * nll).sum() - ends.log_prob(terminations[e, b])
            assert losses[e, b].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)
            total = total + expected
    parameters = list(model.parameters())
    for gradient, expected in zip(*(
            torch.autograd.grad(x, parameters, retain_graph=True) for x in (losses.sum(), total))):
        assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-4)
    # So weighted, the gradient of a squared error does not depend on the variance.
    mean_grads = []
    for bias in (0.0, 3.0):
        with torch.no_grad():
            model.weights[-1][..., 4:8] = 0
            model.biases[-1][..., 4:8] = bias
        model.zero_grad()
        model.loss(obs, actions, next_obs, rewards, terminations).sum().backward()
        mean_grads.append(model.biases[-1].grad[..., :4].clone())
    assert torch.allclose(*mean_grads, rtol=1e-4, atol=1e-5)


def test_a_constant_dimension_is_harmless_and_predicted_exactly():
    norm, x = Normalizer(3), torch.randn(100, 3)
    x[:, 1], x[:, 2] = 0.1, 7 + 2 * x[:, 2]
    norm.fit(x)
    assert norm.std[1] == 0 and (norm(x)[:, 1].abs() < 1e-6).all()
    assert torch.allclose(norm(x)[:, 2].std(correction=0), torch.tensor(1.0), atol=1e-4)
    agent = make_agent(3)
    agent.model.delta_norm.load_state_dict(dict(mean=torch.tensor([0, 0.1, 7, 0]),
                                            std=torch.tensor([1.0, 0, 2, 1])))
    next_obs, _, _ = agent.model.predict(torch.ones(2, 5, 3), torch.ones(2, 5, 1), torch.randn(4))
    assert (next_obs[..., 1] == 1.1).all() and next_obs[..., 2].std() > 0


class Linear(gym.Env):
    """next_obs and reward are linear in obs and action; a third number never changes."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    A, B = np.array([[0.95, 0.05], [-0.1, 0.9]]), np.array([0.1, 0.2])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.normal(size=2)
        return np.append(self.x + 50, 7), {}

    def step(self, action):
        reward = 3 + 0.1 * self.x[0] - 0.2 * action[0]
        self.x = self.A @ self.x + self.B * action[0]
        return np.append(self.x + 50, 7), reward, False, False, {}


gym.register("Linear-v0", Linear, max_episode_steps=20)


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """The agent and the checkpoint of a run on the linear system."""
    folder = str(tmp_path_factory.mktemp("linear"))
    agent, history = train("Linear-v0", run_dir=folder, total_timesteps=1000, num_steps=100,
                           num_envs=5, learning_starts=500, num_updates=700, batch_size=128,
                           hidden_size=32, learning_rate=1e-2, population=4)
    return agent, history, mbrl_mpc.load_checkpoint(folder)


def test_linear_dynamics_are_recovered(linear):
    agent, _, saved = linear
    obs, actions, next_obs, rewards, *_ = saved["dataset"]["tensors"]
    obs, actions, next_obs, rewards = (x[-300:] for x in (obs, actions, next_obs, rewards))
    P = 2
    got, reward, _ = agent.model.predict(obs.expand(P, -1, -1), actions.expand(P, -1, -1), 0)
    errors = torch.cat([got - next_obs, (reward - rewards).unsqueeze(-1)], -1)
    assert (errors.square().mean((0, 1)).sqrt() < 1e-3).all()  # the std of obs is 1
    assert (errors[..., 2] == 0).all() and agent.model.delta_norm.std[2] == 0


def test_the_statistics_are_those_of_all_data(linear):
    agent, _, saved = linear
    obs, actions, next_obs, rewards, *_ = saved["dataset"]["tensors"]
    assert len(obs) == 1000
    inputs = torch.cat([obs, actions], -1)
    targets = torch.cat([next_obs - obs, rewards.unsqueeze(-1)], -1)
    for norm, x in [(agent.model.input_norm, inputs), (agent.model.delta_norm, targets),
                    (agent.obs_norm, obs)]:
        assert torch.allclose(norm.mean, x.mean(0), atol=1e-4)
        assert torch.allclose(norm.std, x.std(0, correction=0), atol=1e-3)


def test_the_data_are_the_transitions(linear):
    obs, actions, next_obs, rewards, terminations = linear[2]["dataset"]["tensors"]
    expected = obs[:, :2] - 50
    assert torch.allclose(rewards, 3 + 0.1 * expected[:, 0] - 0.2 * actions[:, 0], atol=1e-4)
    expected = expected @ torch.from_numpy(Linear.A.T).float() + actions * torch.from_numpy(
        Linear.B).float()
    assert torch.allclose(next_obs[:, :2] - 50, expected, atol=1e-4)  # also where episodes ended
    assert (terminations == 0).all()


def test_each_member_learns_from_a_bootstrap_of_its_own(spy):
    """A bootstrap of n of n transitions leaves out 1/e of them."""
    calls = spy(Model, "loss")
    train("Pendulum-v1", total_timesteps=256, learning_starts=256, num_updates=200, batch_size=64)
    seen = torch.stack([call["obs"] for call in calls])
    members = [set(map(tuple, x.flatten(0, 1).tolist())) for x in seen.transpose(0, 1)]
    assert len(members) == 2 and len(members[0] | members[1]) <= 256
    for one in members:
        assert len(one) / 256 == pytest.approx(1 - 1 / math.e, abs=0.08)
    assert len(members[0] & members[1]) / 256 == pytest.approx((1 - 1 / math.e) ** 2, abs=0.1)


def test_the_step_size_falls_to_0_in_each_round(monkeypatch):
    rates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *args: (
        rates.append(float(self.param_groups[0]["lr"])), step(self, *args))[1])
    train("Pendulum-v1", total_timesteps=128, num_updates=4, learning_rate=1e-3)
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4] * 2)
    rates.clear()
    train("Pendulum-v1", total_timesteps=128, num_updates=4, learning_rate=1e-3,
          terminal_value=True)
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4] * 4)


# The critic.


@pytest.mark.parametrize("env, length, ends", [("Counter", 5, True), ("Truncated3", 3, False)])
def test_the_critic_learns_what_follows_after_a_truncation_but_not_after_an_end(env, length, ends):
    agent, history = train(f"probes:{env}-v0", total_timesteps=192, num_updates=150, gamma=0.8,
                           learning_rate=1e-2, terminal_value=True)
    values = agent.value(torch.arange(length).float().unsqueeze(-1)).tolist()
    if ends:
        expected = [sum(0.8 ** k for k in range(length - t)) for t in range(length)]
        assert values == pytest.approx(expected, rel=0.1)
    else:  # the last observation leads nowhere, so that V is anything there, but consistent
        last = agent.value(torch.tensor([[float(length)]])).item()
        expected = [sum(0.8 ** k for k in range(length - t)) + 0.8 ** (length - t) * last
                    for t in range(length)]
        assert values == pytest.approx(expected, rel=0.05)
    assert history[-1]["value_loss"] < 0.1


def test_the_targets_of_the_critic_come_from_a_copy_that_moves_by_tau(monkeypatch):
    """With rewards of 2 and truncations, V(0) = 2 + gamma * target_V(1), target_V as at first."""
    agents, init = [], Agent.__init__
    monkeypatch.setattr(Agent, "__init__", lambda self, *args: (agents.append(self),
                                                                init(self, *args))[1])
    for tau, learning_rate in ((0, 0), (0, 1e-2), (1, 1e-2)):
        agents.clear()
        train("probes:Truncated-v0", total_timesteps=64, terminal_value=True, num_updates=150,
              gamma=0.9, learning_rate=learning_rate, tau=tau)
        agent, target = agents
        assert same(agent.critic.state_dict(), target.critic.state_dict()) == (
            tau == 1 or learning_rate == 0)
        if learning_rate:
            first, last = torch.zeros(1, 1), torch.ones(1, 1)
            assert agent.value(first).item() == pytest.approx(
                2 + 0.9 * target.value(last).item(), rel=0.02)
        assert not any(p.requires_grad for p in target.parameters())


class NaNBehind(gym.Env):
    """After five steps an episode terminates, and the observation is NaN."""

    observation_space, action_space = gym.spaces.Box(-9, 9, (2,)), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.array([0, 1], np.float32), {}

    def step(self, action):
        self.steps += 1
        end = self.steps == 5
        return np.array([np.nan if end else self.steps, 1], np.float32), 1.0, end, False, {}


gym.register("NaNBehind-v0", NaNBehind)


@pytest.mark.parametrize("terminal_value", [False, True])
def test_an_observation_behind_a_termination_may_be_nan(terminal_value):
    agent, history = train("NaNBehind-v0", terminal_value=terminal_value, total_timesteps=128)
    assert all(p.isfinite().all() for p in agent.state_dict().values())
    assert all(math.isfinite(value) for name, value in history[-1].items())
    assert best_plan(agent, torch.tensor([[3.0, 1]])).isfinite().all()


def test_random_actions_are_uniform():
    low, high = np.array([-1, 0], np.float32), np.array([2, 10], np.float32)
    actions = make_agent(1, gym.spaces.Box(low, high)).random_actions(torch.zeros(5000, 1))
    assert torch.allclose(actions.mean(0), torch.tensor([0.5, 5.0]), atol=0.2)
    assert torch.allclose(actions.std(0), torch.tensor([3, 10]) / 12 ** 0.5, rtol=0.05)
    actions = make_agent(1, gym.spaces.Discrete(3)).random_actions(torch.zeros(3000, 1))
    assert torch.allclose(actions.bincount() / 3000, torch.full((3,), 1 / 3), atol=0.05)


@pytest.mark.parametrize("wrong, words", [
    (dict(population=4, elites=4), "elites is 4.*population 4"), (dict(horizon=0), "horizon"),
    (dict(population=0), "population"), (dict(ensemble_size=0), "ensemble_size"),
    (dict(learning_starts=513), "--learning-starts 51"), (dict(env="probes:BoxImage-v0"), "images"),
    (dict(replan_every=4), "replan_every.*3"),
    (dict(env="CartPole-v1", planner="policy"), "policy needs Box actions")])
def test_settings_that_cannot_work_are_refused(wrong, words):
    with pytest.raises(UserError, match=words):
        train(**dict(env="Pendulum-v1") | wrong)


def test_all_data_may_be_random_and_random_plans_have_no_elites():
    _, history = train("Pendulum-v1", learning_starts=512, planner="random", elites=9)
    assert ["model_loss" in row for row in history] == [row["step"] == 512 for row in history]


# The policy.


def linear_step(obs, actions):
    """Linear dynamics, quadratic costs, and an end that is the more probable the larger obs is."""
    A, B = torch.tensor([[1.0, 0.3], [-0.2, 0.9]]), torch.tensor([[0.1], [0.3]])
    costs = obs.square().sum(-1) + 0.1 * actions.square().sum(-1)
    return obs @ A.T.to(obs) + actions @ B.T.to(obs), -costs, 0.1 * obs[..., 0].sigmoid()


def test_the_gradient_of_the_imagined_return_is_that_of_finite_differences():
    agent = make_agent(2, step=linear_step, planner="policy", horizon=5, gamma=0.9, hidden_size=4,
                       terminal_value=True).double()
    obs = torch.randn(6, 2, dtype=torch.double)
    _, noise, orders = agent.sample_noise()

    def objective():
        return agent.rollout_model(obs, lambda t, obs: agent.policy(obs), noise, orders).mean()

    objective().backward()
    for p in agent.actor.parameters():
        for i in range(min(3, p.numel())):
            with torch.no_grad():
                values = []
                for shift in (1e-5, -2e-5):
                    p.view(-1)[i] += shift
                    values.append(objective().item())
                p.view(-1)[i] += 1e-5
            expected = (values[0] - values[1]) / 2e-5
            assert p.grad.view(-1)[i].item() == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_the_gradient_goes_through_the_networks_of_the_ensemble_and_their_noise():
    agent = make_agent(3, planner="policy", horizon=3, terminal_value=True).double()
    obs, (_, noise, orders) = torch.randn(5, 3).double(), agent.sample_noise(5)
    assert noise.shape == (3, 2, 5, 4)
    bias, values = agent.actor[-1].bias, []
    for shift in (1e-5, -2e-5):
        with torch.no_grad():
            bias += shift
        returns = agent.rollout_model(obs, lambda t, obs: agent.policy(obs), noise.double(), orders)
        values.append(returns.mean())
    values[1].backward()
    expected = (values[0] - values[1]).item() / 2e-5
    assert bias.grad.item() == pytest.approx(expected, rel=1e-3) and expected != 0


class LQR(gym.Env):
    """x' = x + 0.5 u, cost x^2 + u^2: the best u is -K x, and the costs to come are V x^2."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Box(-2, 2, (1,), np.float32)
    gamma = 0.8
    V = 1.0
    for _ in range(100):
        K = gamma * V * 0.5 / (1 + gamma * V * 0.25)
        V = 1 + K ** 2 + gamma * V * (1 - 0.5 * K) ** 2

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-2, 2, 1)
        return self.x, {}

    def step(self, action):
        cost = self.x ** 2 + action ** 2
        self.x = self.x + 0.5 * action
        return self.x, -cost.item(), False, False, {}


gym.register("LQR-v0", LQR, max_episode_steps=10, disable_env_checker=True)


def test_the_policy_is_that_of_lqr_and_so_is_its_value():
    # Two steps without V would make K 1/3 instead of 0.62.
    agent, _ = train("LQR-v0", planner="policy", total_timesteps=400, learning_starts=400,
                     num_steps=100, num_updates=300, batch_size=64, learning_rate=1e-2, horizon=2,
                     hidden_size=32, gamma=LQR.gamma, terminal_value=True)
    obs = torch.linspace(-1.5, 1.5, 7).unsqueeze(-1)
    assert torch.allclose(agent.act(obs, deterministic=True), -LQR.K * obs, atol=0.15)
    assert torch.allclose(agent.value(obs), -LQR.V * obs.squeeze(-1) ** 2, atol=1)


def test_policies_explore_with_noise_within_the_bounds():
    agent = make_agent(3, BOX, planner="policy", sigma=0.5)
    obs = torch.randn(1, 3).expand(5000, 3)
    mean, actions = agent.act(obs, deterministic=True), agent.act(obs)
    assert torch.equal(mean, agent.policy(obs)) and (mean == mean[0]).all()
    assert (actions.abs() <= 2).all()
    inside = actions[(actions.abs() < 2).all(-1)]
    assert (actions - mean).std().item() == pytest.approx(1.0, abs=0.1) and len(inside) > 4000


def test_the_model_is_frozen_while_the_policy_learns(spy):
    """The model that the policy climbs is the one that the last update of the round left."""
    updates, rollouts = spy(torch.optim.Adam, "step"), spy(Agent, "rollout_model")
    agent, _ = train("Pendulum-v1", planner="policy", total_timesteps=128, num_updates=3)
    assert len(updates) == 2 * (3 + 3) and len(rollouts) == 2 * 3
    assert rollouts[0]["noise"].shape == (3, 2, 16, 4)  # each observation has its own
    assert len({id(call["self"]) for call in rollouts}) == 1
    target = rollouts[0]["self"]
    assert target is not agent and same(target.model.state_dict(), agent.model.state_dict())


def test_the_loss_of_v_has_no_gradient_for_the_policy(monkeypatch):
    init, step, gradients = Agent.__init__, torch.optim.Adam.step, []

    def init_with(bias):
        def wrapper(self, *args):
            init(self, *args)
            self.critic[-1].bias.data.fill_(bias)
        return wrapper

    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (
        gradients.append(self.param_groups[0]["params"][0].grad.clone()), step(self)))
    for limit, bias in (math.inf, 0), (math.inf, 100), (0.5, 100):
        monkeypatch.setattr(mbrl_mpc, "MAX_GRAD_NORM", limit)
        monkeypatch.setattr(Agent, "__init__", init_with(bias))
        agent, _ = train("Pendulum-v1", planner="policy", total_timesteps=64, num_updates=1,
                         terminal_value=False)
    size = len(torch.nn.utils.parameters_to_vector(agent.actor.parameters()))
    (_, first, _, second, _, clipped) = gradients
    assert not torch.equal(first[:-size], second[:-size])
    assert torch.equal(first[-size:], second[-size:]) and first[-size:].abs().max() > 0
    assert second.norm() > 10 and torch.allclose(clipped, second * 0.5 / second.norm())


def test_the_penalty_pulls_the_outputs_of_the_actor_to_0(monkeypatch):
    outputs = {}
    for penalty in (0, 100):
        monkeypatch.setattr(mbrl_mpc, "ACTOR_PENALTY", penalty)
        agent, _ = train("Pendulum-v1", planner="policy", total_timesteps=64, num_updates=50,
                         learning_rate=1e-2)
        outputs[penalty] = agent.actor(agent.obs_norm(torch.randn(500, 3))).abs().mean().item()
    assert outputs[100] < 0.1 < outputs[0]


def test_settings_of_the_policy_beat_presets_and_given_ones_beat_both():
    args = Args(env="Pendulum-v1", planner="policy", sigma=0.2)
    assert args.horizon == 8 and args.terminal_value and args.sigma == 0.2
    assert args.total_timesteps == 4000  # of the preset of the environment
    assert Args(env="Pendulum-v1", planner="policy", horizon=3, terminal_value=False) == Args(
        **dataclasses.asdict(args) | dict(horizon=3, terminal_value=False, sigma=0.5))
    assert Args(env="Pendulum-v1").horizon == 20
    everything = {field.name: field.default for field in dataclasses.fields(Args)}
    everything |= dict(env="Pendulum-v1", planner="policy")
    assert dataclasses.asdict(Args(**everything)) == everything  # the settings of a saved run
    with pytest.raises(UserError, match="env"):
        Args(env=[], planner="policy")


# Learning.


def test_the_benchmarks_pendulum_is_that_of_gymnasium():
    envs = mbrl_mpc.VecEnv("Pendulum-v1", 50, torch.device("cpu"))
    envs.reset(1)
    for t in range(20):
        obs, actions = envs.obs, 6 * torch.rand(50, 1) - 3
        expected = envs.step(actions)
        got = Pendulum().predict(obs, actions, None)
        for x, y in zip(got, expected):
            assert torch.allclose(x, y, atol=1e-4)


def test_the_best_action_is_found_by_a_learned_reward():
    agent, _ = train("probes:Target-v0", total_timesteps=600, learning_starts=200, num_updates=200,
                     learning_rate=1e-2, horizon=1, population=50, elites=5, rounds=4, sigma=1.0,
                     batch_size=64, hidden_size=32, num_steps=50)
    assert torch.allclose(agent.act(torch.zeros(1, 1), True), torch.ones(1, 2), atol=0.2)


def test_an_end_is_learnt_to_be_avoided():
    agent, history = train("CartPole-v1", total_timesteps=600, learning_starts=400, num_updates=150,
                           num_steps=50, learning_rate=1e-2, batch_size=128, hidden_size=32,
                           horizon=12, population=20, elites=4)
    # Random actions last 22 steps.
    score = mbrl_mpc.evaluate(agent, settings(env="CartPole-v1"), 4).mean()
    assert score > 35, score
