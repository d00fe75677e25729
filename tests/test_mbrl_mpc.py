"""Planning with a learned model against independent oracles: LQR, loops, numbers by hand."""
import dataclasses
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from benchmark.planning import Pendulum
from conftest import same, small

import mbrl_mpc
from mbrl_mpc import Agent, Args, Model, Norm, UserError, cem, plan_returns

DEFAULTS = {field.name: field.default for field in dataclasses.fields(Args)}
BOX = gym.spaces.Box(-2, 2, (1,), np.float32)


def settings(**changes):
    return Args(**DEFAULTS | small("mbrl_mpc") | changes)


def train(env, reward=None, termination=None, **changes):
    args = settings(env=env, **changes)
    return mbrl_mpc.train(args, reward=reward, termination=termination)


def make_agent(obs_size=1, action_space=BOX, step=None, **changes):
    """An agent; with `step`, a function (obs, actions) of which is the truth, as its model."""
    torch.manual_seed(0)
    space = gym.spaces.Box(-np.inf, np.inf, (obs_size,), np.float32)
    if step:
        changes = dict(ensemble_size=1, num_particles=1) | changes
    agent = Agent(space, action_space, settings(**changes))
    if step:
        agent.model.predict = lambda obs, actions, noise, order: step(obs, actions)
    return agent


def best_plan(agent, obs):
    """The plans (N, H, A) that the agent makes from nothing."""
    agent.begin(torch.ones(len(obs)))
    agent.act(obs, deterministic=True)
    return agent.plans


def test_returns_of_plans_stop_at_an_end_but_costs_do_not():
    generator = np.random.default_rng(0)
    rewards, ends = generator.normal(size=(6, 50)), generator.random((6, 50)) < 0.2
    discounts = 0.9 ** np.arange(6)
    got = plan_returns(*(torch.from_numpy(x) for x in (rewards, ends.astype(float), discounts)))
    for n in range(50):
        expected, last = 0, None
        for t in range(6):
            expected += discounts[t] * (rewards[t, n] if last is None else min(last, 0))
            last = rewards[t, n] if last is None and ends[t, n] else last
        assert got[n].item() == pytest.approx(expected)
    # An end with chance 1/2 is worth the mean of an end and of none.
    rewards, ones = torch.tensor([-1.0, 2.0]), torch.ones(2)
    half, never, always = (plan_returns(rewards, torch.tensor([p, 0]), ones) for p in (0.5, 0, 1))
    assert half == (never + always) / 2 == (1 - 2) / 2


# CEM.


def normal(rounds=20, population=100, size=2):
    return torch.randn(rounds, population, 1, size, generator=torch.Generator().manual_seed(0))


def draw(mean, std, noise):
    return mean.unsqueeze(1) + std.unsqueeze(1) * noise


@pytest.mark.parametrize("elites", [1, 10])
def test_cem_finds_the_optimum_of_a_shifted_quadratic_for_each_environment(elites):
    best = torch.tensor([[1.0, -2.0], [3.0, 0.5]])

    def score(plans):
        return -((plans[:, :, 0] - best[:, None]) ** 2 * torch.tensor([1.0, 10.0])).sum(-1)

    mean = cem(score, draw, torch.zeros(2, 1, 2), 2 * torch.ones(2, 1, 2), normal(), elites)
    assert torch.allclose(mean[:, 0], best, atol=0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_plan_without_a_finite_score_is_no_elite(bad):
    drawn = []

    def score(plans):
        drawn.append(plans)
        x = plans[:, :, 0, 0]
        return torch.where(x > 0, torch.tensor(bad), -1 + 0.1 * x)  # all the others cost something

    start = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
    mean = cem(score, draw, *start, normal(rounds=1), 10)
    assert mean[0, 0, 0] < 0
    order = drawn[0][0, :, 0, 0].where(drawn[0][0, :, 0, 0] <= 0, -9).argsort(descending=True)
    assert torch.allclose(mean[0, 0], drawn[0][0, order[:10], 0].mean(0))
    # With fewer finite plans than elites only they count; without any all stays finite.
    few = cem(score, draw, start[0] + 2.3, start[1], normal(rounds=1), 50)
    assert few[0, 0, 0] < 0
    none = cem(lambda plans: plans[..., 0, 0] * math.nan, draw, *start, normal(), 10)
    assert none.isfinite().all()


@pytest.mark.parametrize("elites", [1, 10])
def test_constant_scores_leave_the_deviation_at_its_floor(elites):
    stds = []

    def watch(mean, std, noise):
        stds.append(std)
        return draw(mean, std, noise)

    start = torch.zeros(1, 1, 2), torch.tensor([[[1.0, 5.0]]])
    mean = cem(lambda plans: torch.zeros(plans.shape[:2]), watch, *start, normal(50), elites)
    floor = mbrl_mpc.FLOOR * start[1]
    assert mean.isfinite().all() and all((std >= floor).all() for std in stds)
    if elites == 1:
        assert torch.equal(stds[-1], floor)


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

    unbounded = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    agent = make_agent(2, unbounded, step, horizon=H, population=200, elites=15, rounds=20,
                       sigma=2.0, gamma=1, correlation=correlation)
    obs = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.5, -2.0]])  # three environments at once
    plans = best_plan(agent, obs)
    returns = agent.imagine(obs, plans[:, None], agent.discounts, *agent.luck()[1:]).squeeze(1)
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
    agent.model.predict = lambda obs, actions, *luck: (scored.append(actions[0]),
                                                       predict(obs, actions, *luck))[1]
    plan = best_plan(agent, torch.zeros(1, 1))[0, 0]
    assert torch.equal(plan, scored[0][(scored[0] - 1).square().sum(-1).argmin()])
    assert torch.allclose(scored[0].mean(0), torch.tensor([0.5, 5.0]), atol=0.3)
    assert torch.allclose(scored[0].std(0), torch.tensor([3, 10]) / 12 ** 0.5, rtol=0.05)


def test_random_plans_try_all_discrete_actions_alike(monkeypatch):
    agent, plans = make_agent(1, gym.spaces.Discrete(8), planner="random", population=3000), []
    monkeypatch.setattr(agent, "imagine", lambda obs, x, *luck: (plans.append(x), x.sum((2, 3)))[1])
    best_plan(agent, torch.zeros(1, 1))
    assert torch.allclose(plans[0].mean((0, 1)), torch.full((3, 8), 1 / 8), atol=0.03)


def test_an_end_is_no_way_out_of_costs():
    """Action 0 ends the episode at -1, action 1 goes on at -0.9 a step."""
    def step(obs, actions):
        ends = actions[..., 0]
        return obs, -0.9 - 0.1 * ends, ends

    agent = make_agent(1, gym.spaces.Discrete(2), step, horizon=10, population=64, elites=8,
                       rounds=6)
    assert (best_plan(agent, torch.zeros(3, 1)).argmax(-1)[:, :8] == 1).all()
    # At -1 a step in any case, an end makes no difference.
    agent.model.predict = lambda obs, actions, *luck: (
        obs, 0 * actions[..., 0] - 1, actions[..., 0])
    plans = torch.eye(2)[torch.tensor([[0] * 10, [1] * 10])].unsqueeze(0)
    returns = agent.imagine(torch.zeros(1, 1), plans, agent.discounts, *agent.luck()[1:])
    assert torch.allclose(returns[0, 0], returns[0, 1])


def test_an_end_is_avoided_where_steps_pay_and_sought_where_it_stops_costs_for_free():
    for reward, last, wanted in [(1, 1, 1), (-1, 0, 0)]:  # CartPole, Acrobot
        agent = make_agent(1, gym.spaces.Discrete(2), lambda obs, actions: (
            obs, reward + (last - reward) * actions[..., 0], actions[..., 0]), horizon=10,
            population=64, elites=8, rounds=6)
        assert best_plan(agent, torch.zeros(1, 1)).argmax(-1)[0, 0] == wanted


def test_the_value_of_where_a_plan_leads_is_a_part_of_its_return_and_of_no_shorter_one():
    """V is obs here, which the actions add up to; a plan ends with chance 1/4 at each step."""
    agent = make_agent(step=lambda obs, actions: (
        obs + actions, torch.ones_like(obs[..., 0]), 0.25 * torch.ones_like(obs[..., 0])),
        terminal_value=True, horizon=3, gamma=0.9)
    agent.model.critic = torch.nn.Flatten(-2)
    plans = torch.tensor([[2.0, 2, 2], [-2, -2, -2]]).view(1, 2, 3, 1)
    steps, luck = 1 + 0.9 * 0.75 + (0.9 * 0.75) ** 2, agent.luck()[1:]
    got = agent.imagine(torch.ones(1, 1), plans, agent.discounts, *luck)
    # The value 7 counts where the plan has not ended, the cost -5 everywhere.
    assert got.tolist() == [pytest.approx([steps + (0.9 * 0.75) ** 3 * 7, steps - 0.9 ** 3 * 5])]
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
    obs, luck = torch.randn(4, 3), agent.luck(True)
    mean = torch.zeros(4, 3, 2)
    together = agent.plan(obs, mean, *luck)
    for n in range(4):
        alone = agent.plan(obs[n:n + 1], mean[n:n + 1], *luck)
        assert torch.allclose(together[n], alone[0], atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_the_first_action_of_the_plan_is_executed_and_a_mode_has_no_luck():
    agent = make_agent(1, step=lambda obs, actions: (
        obs, (3 * actions[..., 0] + obs[..., 0]).sin(), 0 * obs[..., 0]))
    obs = torch.randn(5, 1)
    agent.begin(torch.ones(5))
    action = agent.act(obs, deterministic=True)
    assert action.shape == (5, 1) and torch.equal(action, agent.plans[:, 0])
    assert torch.equal(best_plan(agent, obs)[:, 0], action)
    agent.begin(torch.ones(5))
    assert not torch.equal(agent.act(obs), action)


# The warm start.


def planned(**changes):
    """An agent whose plans are always 1, 2, 3, and the list of the means it was given."""
    agent, means = make_agent(horizon=3, **changes), []

    def plan(obs, mean, *luck):
        means.append(mean)
        return torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1).repeat(len(obs), 1, 1)

    agent.plan = plan
    return agent, means


def test_a_plan_begins_with_what_is_left_of_the_last_one():
    agent, means = planned()
    agent.act(torch.zeros(2, 1)), agent.act(torch.zeros(2, 1))
    assert (means[0] == 0).all()
    assert means[1].squeeze(-1).tolist() == [[2, 3, 0]] * 2


def test_a_plan_is_forgotten_where_an_episode_begins_and_only_there():
    agent, means = planned()
    agent.act(torch.zeros(3, 1))
    agent.begin(torch.tensor([0.0, 1.0, 0.0]))
    agent.act(torch.zeros(3, 1))
    assert means[1].squeeze(-1).tolist() == [[2, 3, 0], [0, 0, 0], [2, 3, 0]]
    agent.begin(torch.zeros(3))
    agent.act(torch.zeros(3, 1))
    assert means[2].squeeze(-1).tolist() == [[2, 3, 0]] * 3


def test_plans_adapt_to_the_number_of_environments_and_are_no_part_of_the_state():
    agent, means = planned()
    before = agent.state_dict().keys()
    for n in (2, 5, 1):
        agent.act(torch.zeros(n, 1))
        assert means[-1].shape == (n, 3, 1) and (means[-1] == 0).all()
    assert agent.state_dict().keys() == before and "plans" not in before
    agent.begin(torch.zeros(4))
    agent.act(torch.zeros(4, 1))
    assert means[-1].shape == (4, 3, 1)


def test_a_plan_is_followed_for_replan_every_steps_or_until_an_episode_begins():
    agent, means = planned(replan_every=3)
    actions = [agent.act(torch.zeros(1, 1)).item() for _ in range(7)]
    assert actions == [1, 2, 3, 1, 2, 3, 1] and len(means) == 3
    agent.begin(torch.ones(1))
    assert agent.act(torch.zeros(1, 1)).item() == 1 and len(means) == 4


def test_training_forgets_plans_where_episodes_begin(spy):
    calls = spy(Agent, "plan")
    train("probes:Counter-v0", total_timesteps=256, learning_starts=0, elites=3)
    begun = torch.stack([(call["mean"] == 0.5).all(-1).all(-1) for call in calls])
    steps = torch.stack([call["obs"][:, 0] for call in calls])
    assert begun[steps == 0].all() and not begun[steps > 0].any() and (steps > 0).any()


# The model.


def constant_members(propagation, num_particles=4):
    """Member 0 of two always adds 1 to the observation, member 1 adds 10."""
    agent = make_agent(propagation=propagation, num_particles=num_particles, horizon=6)
    with torch.no_grad():
        for x in agent.model.parameters():
            x.zero_()
        agent.model.biases[-1][:, 0, 0] = torch.tensor([1.0, 10.0])
    return agent


def trajectories(agent, num_particles=4):
    """What each step adds (H, P) to observations that begin at 0, 100, 200, ..."""
    noise, orders = agent.luck()[1:]
    obs = 100.0 * torch.arange(num_particles).view(-1, 1, 1)
    deltas = []
    for t in range(6):
        next_obs, _, _ = agent.model.predict(obs, torch.zeros_like(obs), 0 * noise[t], orders[t])
        deltas.append((next_obs - obs)[:, 0, 0])
        obs = next_obs
    return torch.stack(deltas)


def test_tsinf_keeps_a_particle_with_its_member():
    assert trajectories(constant_members("tsinf")).tolist() == [[1, 1, 10, 10]] * 6


def test_ts1_gives_a_particle_to_another_member_at_each_step():
    deltas = torch.cat([trajectories(constant_members("ts1")) for _ in range(20)])
    assert (deltas.sort(-1)[0] == torch.tensor([1, 1, 10, 10])).all()  # each has its share
    assert torch.allclose((deltas == 10).float().mean(0), torch.full((4,), 0.5), atol=0.2)
    changes = (deltas[1:] != deltas[:-1]).float().mean(0)
    assert torch.allclose(changes, torch.full((4,), 0.5), atol=0.2)


def test_mean_moves_all_particles_by_the_mean_of_the_members():
    assert trajectories(constant_members("mean")).tolist() == [[5.5] * 4] * 6


def test_particles_are_spread_by_the_predicted_deviation_and_all_plans_share_their_luck():
    agent = make_agent(propagation="tsinf", num_particles=4000, hidden_size=4)
    with torch.no_grad():
        for x in agent.model.parameters():
            x.zero_()
    agent.model.targets.std.fill_(3)
    low, high = mbrl_mpc.LOG_VARS
    noise, orders = agent.luck()[1:]
    obs = torch.zeros(4000, 7, 1)
    next_obs, rewards, _ = agent.model.predict(obs, obs, noise[0], orders[0])
    assert next_obs[:, 0].std().item() == pytest.approx(3 * math.exp((low + high) / 4), rel=0.05)
    assert torch.equal(next_obs, next_obs[:, :1].expand_as(next_obs)) and (rewards == 0).all()


def test_members_are_separate_networks():
    torch.manual_seed(0)
    model, x = Model(3, 2, settings(hidden_size=8)), torch.randn(2, 5, 5)
    outputs = model(x[..., :3], x[..., 3:])
    for e in range(2):
        y = x[e]
        for n, (weight, bias) in enumerate(zip(model.weights, model.biases)):
            y = (torch.nn.functional.silu(y) if n else y) @ weight[e] + bias[e]
        mean, log_var, logit = y[:, :4], y[:, 4:8], y[:, 8]
        low, high = mbrl_mpc.LOG_VARS
        assert torch.allclose(outputs[0][e], mean, atol=1e-5)
        assert torch.allclose(outputs[1][e], low + (high - low) * log_var.sigmoid(), atol=1e-4)
        assert torch.allclose(outputs[2][e], logit, atol=1e-5)


def test_log_variances_stay_within_their_bounds():
    model = Model(3, 2, settings(hidden_size=8))
    log_var = model(1e6 * torch.randn(2, 50, 3), 1e6 * torch.randn(2, 50, 2))[1]
    assert log_var.min() >= mbrl_mpc.LOG_VARS[0] and log_var.max() <= mbrl_mpc.LOG_VARS[1]


def test_the_loss_is_the_negative_log_likelihood_up_to_a_constant():
    torch.manual_seed(0)
    model = Model(3, 2, settings(hidden_size=8))
    obs, next_obs = torch.randn(2, 2, 6, 3)
    actions, rewards = torch.randn(2, 6, 2), torch.randn(2, 6)
    terminations = (torch.rand(2, 6) < 0.5).float()
    model.fit(*(x.flatten(0, 1) for x in (obs, actions, next_obs, rewards)))
    losses = model.loss(obs, actions, next_obs, rewards, terminations)
    mean, log_var, logit = model(obs, actions)
    assert losses.shape == (2, 6)
    for e in range(2):
        for b in range(6):
            delta = torch.cat([next_obs[e, b] - obs[e, b], rewards[e, b, None]])
            delta = (delta - model.targets.mean) / model.targets.std
            normal = torch.distributions.Normal(mean[e, b], (log_var[e, b] / 2).exp())
            ends = torch.distributions.Bernoulli(logits=logit[e, b])
            expected = -normal.log_prob(delta).sum() - 4 * math.log(2 * math.pi) / 2
            expected = expected - ends.log_prob(terminations[e, b])
            assert losses[e, b].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)
    # With beta 1 the gradient of a squared error does not depend on the variance.
    mean_grads = []
    for bias in (0.0, 3.0):
        with torch.no_grad():
            model.weights[-1][..., 4:8] = 0
            model.biases[-1][..., 4:8] = bias
        model.zero_grad()
        model.loss(obs, actions, next_obs, rewards, terminations, beta=1).sum().backward()
        mean_grads.append(model.biases[-1].grad[..., :4].clone())
    assert torch.allclose(*mean_grads, rtol=1e-4, atol=1e-5)


def test_a_constant_dimension_is_harmless_and_predicted_exactly():
    norm, x = Norm(3), torch.randn(100, 3)
    x[:, 1], x[:, 2] = 0.1, 7 + 2 * x[:, 2]
    norm.fit(x)
    assert norm.std[1] == 0 and (norm(x)[:, 1].abs() < 1e-6).all()
    assert torch.allclose(norm(x)[:, 2].std(correction=0), torch.tensor(1.0), atol=1e-4)
    assert torch.allclose(norm.invert(norm(x)), x, atol=1e-5)
    assert torch.allclose(norm.invert(torch.randn(5, 3))[:, 1], torch.tensor(0.1))


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
                           num_envs=5, learning_starts=500, num_updates=1500, batch_size=128,
                           hidden_size=32, learning_rate=1e-2, population=4)
    return agent, history, mbrl_mpc.load(folder)


def test_linear_dynamics_are_recovered(linear):
    agent, _, saved = linear
    obs, actions, next_obs, rewards, *_ = saved["data"]["data"]
    obs, actions, next_obs, rewards = (x[-300:] for x in (obs, actions, next_obs, rewards))
    (noise, orders), P = agent.luck()[1:], 2
    got, reward, _ = agent.model.predict(obs.expand(P, -1, -1), actions.expand(P, -1, -1),
                                         0 * noise[0], orders[0])
    errors = torch.cat([got - next_obs, (reward - rewards).unsqueeze(-1)], -1)
    assert (errors.square().mean((0, 1)).sqrt() < 1e-3).all()  # where obs has the deviation 1
    assert (errors[..., 2] == 0).all() and agent.model.targets.std[2] == 0


def test_the_statistics_are_those_of_all_data(linear):
    agent, _, saved = linear
    obs, actions, next_obs, rewards, *_ = saved["data"]["data"]
    assert len(obs) == 1000
    inputs = torch.cat([obs, actions], -1)
    targets = torch.cat([next_obs - obs, rewards.unsqueeze(-1)], -1)
    for norm, x in ((agent.model.inputs, inputs), (agent.model.targets, targets)):
        assert torch.allclose(norm.mean, x.mean(0), atol=1e-4)
        assert torch.allclose(norm.std, x.std(0, correction=0), atol=1e-3)


def test_the_data_are_the_transitions_and_each_member_has_its_own_bootstrap(linear):
    obs, actions, next_obs, rewards, terminations, counts = linear[2]["data"]["data"]
    expected = obs[:, :2] - 50
    assert torch.allclose(rewards, 3 + 0.1 * expected[:, 0] - 0.2 * actions[:, 0], atol=1e-4)
    expected = expected @ torch.from_numpy(Linear.A.T).float() + actions * torch.from_numpy(
        Linear.B).float()
    assert torch.allclose(next_obs[:, :2] - 50, expected, atol=1e-4)  # also where episodes ended
    assert (terminations == 0).all()
    assert counts.shape == (1000, 2)
    assert torch.allclose(counts.mean(0), torch.ones(2), atol=0.1)
    assert torch.allclose(counts.var(0), torch.ones(2), atol=0.2)
    assert np.corrcoef(counts.T.numpy())[0, 1] == pytest.approx(0, abs=0.1)


def test_a_member_learns_only_from_its_bootstrap(monkeypatch):
    def poisson(rates):
        counts = torch.ones_like(rates)
        counts[..., 1] = 0
        return counts

    monkeypatch.setattr(torch, "poisson", poisson)
    agent, _ = train("Pendulum-v1", total_timesteps=128, learning_rate=0)
    before = [weight.clone() for weight in agent.model.weights]
    agent, _ = train("Pendulum-v1", total_timesteps=128)
    for weight, old in zip(agent.model.weights, before):
        assert torch.equal(weight[1], old[1]) and not torch.equal(weight[0], old[0])


def test_the_step_size_falls_to_0_in_each_round(monkeypatch):
    rates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *args: (
        rates.append(float(self.param_groups[0]["lr"])), step(self, *args))[1])
    train("Pendulum-v1", total_timesteps=128, num_updates=4, learning_rate=1e-3)
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4] * 2)


# What is known of an environment, and what is logged.


@pytest.mark.parametrize("env, length, ends", [("Counter", 5, True), ("Truncated3", 3, False)])
def test_the_critic_learns_what_follows_after_a_truncation_but_not_after_an_end(env, length, ends):
    agent, history = train(f"probes:{env}-v0", total_timesteps=512, num_updates=100, gamma=0.8,
                           learning_rate=1e-2, terminal_value=True)
    values = agent.model.critic(torch.arange(length).float().unsqueeze(-1)).tolist()
    if ends:
        expected = [sum(0.8 ** k for k in range(length - t)) for t in range(length)]
        assert values == pytest.approx(expected, rel=0.1)
    else:  # the last observation leads nowhere, so that V is anything there, but consistent
        last = agent.model.critic(torch.tensor([[float(length)]])).item()
        expected = [sum(0.8 ** k for k in range(length - t)) + 0.8 ** (length - t) * last
                    for t in range(length)]
        assert values == pytest.approx(expected, rel=0.05)
    assert history[-1]["value_loss"] < 0.1


def test_the_targets_of_the_critic_come_from_a_copy_that_follows_by_tau(tmp_path):
    for tau, learning_rate in ((0, 0), (0, 1e-2), (1, 1e-2)):
        folder = tmp_path / f"{tau}-{learning_rate}"
        agent, _ = train("probes:Truncated-v0", terminal_value=True, num_updates=60, gamma=0.9,
                         learning_rate=learning_rate, tau=tau, run_dir=str(folder))
        target = make_agent(1, gym.spaces.Discrete(2), terminal_value=True)
        target.load_state_dict(torch.load(folder / "checkpoint.pt")["target"])
        critic, copy = agent.model.critic, target.model.critic
        assert same(critic.state_dict(), copy.state_dict()) == (tau == 1 or learning_rate == 0)
        assert critic[0].std.item() == 0  # as all obs are 0
        if learning_rate:
            first, last = torch.zeros(1, 1), torch.ones(1, 1)
            assert critic(first).item() == pytest.approx(2 + 0.9 * copy(last).item(), abs=0.1)


def test_known_rewards_and_terminations_are_used():
    seen = []

    def reward(obs, actions, next_obs):
        seen.append((obs, actions, next_obs))
        return actions.float()

    def termination(obs, actions, next_obs):
        return actions == 2

    agent = make_agent(1, gym.spaces.Discrete(3), gamma=0.5, horizon=3)
    agent.reward, agent.termination = reward, termination
    plans = torch.eye(3)[torch.tensor([[[1, 2, 1], [1, 1, 1]]])]
    returns = agent.imagine(torch.zeros(1, 1), plans, agent.discounts, *agent.luck()[1:])
    assert returns.tolist() == [[1 + 0.5 * 2, 1 + 0.5 + 0.25]]
    assert seen[0][1].tolist() == [[1, 1]] * 2 and torch.equal(seen[0][2], seen[1][0])


def test_the_random_policy_of_the_beginning_is_even():
    low, high = np.array([-1, 0], np.float32), np.array([2, 10], np.float32)
    actions = make_agent(1, gym.spaces.Box(low, high)).explore(5000)
    assert torch.allclose(actions.mean(0), torch.tensor([0.5, 5.0]), atol=0.2)
    assert torch.allclose(actions.std(0), torch.tensor([3, 10]) / 12 ** 0.5, rtol=0.05)
    actions = make_agent(1, gym.spaces.Discrete(3)).explore(3000)
    assert torch.allclose(actions.bincount() / 3000, torch.full((3,), 1 / 3), atol=0.05)


@pytest.mark.parametrize("horizon, terminal_value", [(1, False), (6, False), (6, True), (20, True)])
@pytest.mark.parametrize("env, length, ends", [("Counter", 5, True), ("Truncated3", 3, False)])
def test_predicted_returns_are_compared_with_what_the_same_steps_brought(
        env, length, ends, horizon, terminal_value):
    _, history = train(f"probes:{env}-v0", total_timesteps=128, horizon=horizon, gamma=0.9,
                       terminal_value=terminal_value,
                       reward=lambda obs, actions, next_obs: torch.ones_like(obs[..., 0]),
                       termination=lambda obs, actions, next_obs: torch.zeros_like(obs[..., 0]))
    steps = min(horizon, length - 16 % length)  # of the first plan, which the 17th step begins
    realised = sum(0.9 ** t for t in range(steps))
    assert len(history) == 1
    assert history[0]["realised_return"] == pytest.approx(realised, rel=1e-5)
    # A truncation stops the comparison; an end that the model does not foresee shows in it.
    foreseen = sum(0.9 ** t for t in range(min(horizon, 16))) if ends else realised
    assert history[0]["predicted_return"] == pytest.approx(foreseen, rel=1e-5)


def test_the_validation_loss_is_that_of_data_not_yet_learnt(spy):
    losses, fits = spy(Model, "loss"), spy(Model, "fit")
    _, history = train("Pendulum-v1", total_timesteps=192, num_updates=3)
    validations = [call for call in losses if "beta" not in call]
    assert len(history) == 2 and len(losses) == 2 * 2 + 9
    assert len(fits) == 2 * 3  # the target's statistics are the same
    # In turn before and after the updates, the same loss, so that the two can be compared.
    assert [row[name] for row in history for name in ("validation_loss", "model_loss")] == [
        pytest.approx(call["out"].mean().item()) for call in validations]
    assert same(validations[1]["obs"], losses[-6]["obs"])  # that of the last update
    assert "beta" not in losses[3] and losses[3]["obs"].shape == (2, 64, 3)
    learnt = fits[0]["obs"]
    assert not any((learnt == x).all(-1).any() for x in losses[3]["obs"][0])


@pytest.mark.parametrize("wrong, words", [
    (dict(population=4, elites=5), "5 elites.*4"), (dict(horizon=0), "horizon"),
    (dict(population=0), "population"), (dict(num_particles=3), "3 particles.*2"),
    (dict(learning_starts=449), "learning_starts"), (dict(env="probes:BoxImage-v0"), "images"),
    (dict(replan_every=4), "replan_every.*3")])
def test_settings_that_cannot_work_are_refused(wrong, words):
    with pytest.raises(UserError, match=words):
        train(**dict(env="Pendulum-v1") | wrong)


def test_the_last_round_alone_may_be_planned_and_random_plans_have_no_elites():
    _, history = train("Pendulum-v1", learning_starts=448, planner="random", elites=9)
    assert [row["step"] for row in history] == [512]


# Learning.


def test_the_benchmarks_equations_of_pendulum_are_the_environments():
    envs = mbrl_mpc.Envs("Pendulum-v1", 50, torch.device("cpu"))
    envs.reset(1)
    for t in range(20):
        obs, actions = envs.obs, 6 * torch.rand(50, 1) - 3
        expected = envs.step(actions)
        got = Pendulum().predict(obs, actions, None, None)
        for x, y in zip(got, expected):
            assert torch.allclose(x, y, atol=1e-4)


def test_the_best_action_is_found_by_a_learned_reward():
    agent, _ = train("probes:Target-v0", total_timesteps=600, learning_starts=200, num_updates=200,
                     learning_rate=1e-2, horizon=1, population=50, elites=5, rounds=4, sigma=1.0,
                     batch_size=64, hidden_size=32, num_steps=50)
    assert torch.allclose(agent.act(torch.zeros(1, 1), True), torch.ones(1, 2), atol=0.2)


def test_an_end_is_learnt_to_be_avoided():
    agent, history = train("CartPole-v1", total_timesteps=800, learning_starts=400, num_updates=200,
                           num_steps=50, learning_rate=1e-2, batch_size=128, hidden_size=32,
                           horizon=12, population=20, elites=4)
    # Random actions last 22 steps.
    score = mbrl_mpc.evaluate(agent, settings(env="CartPole-v1"), 10).mean()
    assert score > 35, score
