"""NAF against its definition; what it shares with DDPG is in test_ddpg.py."""
import inspect
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import small

import ddpg
import naf

BOUNDS = gym.spaces.Box(np.array([-1, 0, -4], np.float32), np.array([2, 10, -3], np.float32))
LOW, HIGH = torch.tensor(BOUNDS.low), torch.tensor(BOUNDS.high)


def an_agent(weight=1.0):
    """An agent with three action dimensions, whose heads depend on the observation."""
    torch.manual_seed(0)
    space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
    agent = naf.Agent(space, BOUNDS, naf.Args(env="Other-v0", hidden_size=32))
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter *= weight
    return agent


@pytest.mark.parametrize("name", ["NatureCNN", "mlp", "ReplayBuffer", "td_target"])
def test_what_it_shares_with_ddpg_is_the_same_text(name):
    assert inspect.getsource(getattr(naf, name)) == inspect.getsource(getattr(ddpg, name))


def q_values(agent, obs, actions):
    V, mu, _, L = agent.heads(obs)
    return V + naf.advantage((actions - mu) / agent.scale, L)


def random_actions(n):
    return LOW + (HIGH - LOW) * torch.rand(n, 3)


def train(env="probes:Bounds-v0", **changes):
    return naf.train(naf.Args(**small("naf", total_timesteps=96, env=env) | changes))


def test_q_is_the_quadratic_of_the_paper():
    agent, obs, actions = an_agent(3.0), torch.randn(50, 4), random_actions(50)
    V, mu, _, L = agent.heads(obs)
    assert V.shape == (50,) and mu.shape == (50, 3) and L.shape == (50, 3, 3)
    for value, maximum, best, lower, action in zip(
            q_values(agent, obs, actions).tolist(), V.tolist(), *(
                x.detach().double().numpy() for x in (mu, L, actions))):
        offset = (action - best) / (BOUNDS.high - BOUNDS.low) * 2  # the bounds are 2 apart
        P = lower @ lower.T
        assert value == pytest.approx(maximum - offset @ P @ offset / 2, rel=1e-4)


def test_the_maximum_of_q_is_v_and_only_at_mu():
    agent, obs = an_agent(3.0), torch.randn(50, 4)
    V, mu, _, _ = agent.heads(obs)
    assert torch.equal(q_values(agent, obs, mu), V)
    assert torch.equal(agent.act(obs, True), torch.minimum(torch.maximum(mu, LOW), HIGH))
    for _ in range(20):
        actions = random_actions(50)
        assert (q_values(agent, obs, actions) < V).all()


def test_raw_mu_from_minus_2_to_2_covers_the_bounds_and_more_is_clipped():
    agent = an_agent()
    torch.nn.init.zeros_(agent.network[-1].weight)
    for raw, part in ((-9, -1), (-2, -1), (-1, -math.tanh(1) / math.tanh(2)), (0, 0), (2, 1), (9, 1)):
        torch.nn.init.constant_(agent.network[-1].bias, raw)
        _, mu, _, _ = agent.heads(torch.zeros(1, 4))
        expected = (LOW + HIGH) / 2 + part * (HIGH - LOW) / 2
        assert torch.allclose(agent.act(torch.zeros(1, 4), True)[0], expected)
        assert ((mu[0] - expected) / (HIGH - LOW)).abs().max() < 0.02  # tanh(9) / tanh(2) = 1.037


@pytest.mark.parametrize("weight", [1.0, 3.0, 30.0])
def test_l_is_lower_triangular_and_p_positive_definite(weight):
    agent = an_agent(weight)
    _, _, _, L = agent.heads(torch.randn(200, 4))
    assert torch.equal(L, L.tril()) and L.tril(-1).abs().max() > 0
    assert (L.diagonal(dim1=-2, dim2=-1) >= 1).all()  # or mu might get no gradient
    P = L.double() @ L.double().mT
    assert (torch.linalg.eigvalsh(P) > 0).all()
    if weight == 1:  # the diagonal is 1 + the exponential of the outputs
        torch.nn.init.zeros_(agent.network[-1].weight)
        for entry, expected in ((1.5, 1 + np.exp(1.5)), (0.0, 2), (1e9, 1 + np.exp(5))):
            torch.nn.init.constant_(agent.network[-1].bias, entry)
            _, _, _, L = agent.heads(torch.zeros(1, 4))
            assert L[0].diagonal().tolist() == pytest.approx([expected] * 3)
            assert L[0, 2, 0] == min(entry, 5)  # the clamp is for all outputs


@pytest.mark.parametrize("size", [1e3, 1e9, 1e18])
def test_huge_features_stay_finite(size):
    agent, obs = an_agent(3.0), size * torch.randn(50, 4)
    values = q_values(agent, obs, random_actions(50))
    assert values.isfinite().all() and agent.act(obs, True).isfinite().all()
    values.mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in agent.parameters())
    assert any(parameter.grad.abs().max() > 0 for parameter in agent.parameters())


def last_batch(env, spy, **changes):
    """The agent and the batch of the last update of a run that learns nothing; its metrics."""
    samples = spy(naf.ReplayBuffer, "sample")
    agent, history = train(env, learning_rate=0, max_grad_norm=1e9, **changes)
    return agent, samples[-1]["out"], history[-1]


@pytest.mark.parametrize("env", ["Pendulum-v1", "probes:Bounds-v0", "probes:BoxImage-v0"])
def test_the_loss_and_its_gradient_equal_a_loop_over_single_transitions(env, spy):
    agent, batch, row = last_batch(env, spy, gamma=0.9)
    loss = mean_q = 0
    for obs, action, next_obs, reward, termination in zip(*(x.split(1) for x in batch)):
        maximum = agent.heads(next_obs)[0].item()
        target = reward.item() if termination else reward.item() + 0.9 * maximum
        q = q_values(agent, obs, action)
        loss, mean_q = loss + (q - target).square().squeeze(0) / 16, mean_q + q.item() / 16
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert row["q_values"] == pytest.approx(mean_q, rel=1e-4)
    parameters = list(agent.parameters())
    for parameter, expected in zip(parameters, torch.autograd.grad(loss, parameters)):
        tolerance = 1e-4 * expected.abs().max()
        assert torch.allclose(parameter.grad, expected, rtol=1e-3, atol=tolerance)


def test_raw_mu_is_penalized_beyond_2_and_nowhere_else(monkeypatch, spy):
    monkeypatch.setattr(naf.F, "mse_loss", lambda q_values, targets: 0 * q_values.sum())
    init = naf.Agent.__init__
    for value, gradient in ((-3.0, -2.0), (-1.9, 0.0), (1.9, 0.0), (2.5, 1.0)):
        def start(self, *args, value=value):
            init(self, *args)
            torch.nn.init.zeros_(self.network[-1].weight)
            torch.nn.init.constant_(self.network[-1].bias, value)

        monkeypatch.setattr(naf.Agent, "__init__", start)
        agent, _ = train("probes:Bounds-v0", learning_rate=0, max_grad_norm=1e9)
        expected = [0, gradient / 2, gradient / 2, 0, 0, 0, 0]  # a mean over both dimensions
        assert agent.network[-1].bias.grad.tolist() == pytest.approx(expected, abs=1e-6)


def test_gradients_are_clipped_to_max_grad_norm(monkeypatch):
    norms, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *args: (norms.append(
        self.param_groups[0]["params"][0].grad.norm().item()), step(self, *args))[1])
    train(max_grad_norm=1e-3)
    assert norms == pytest.approx([1e-3] * len(norms), rel=1e-4)
    norms.clear()
    train(max_grad_norm=1e9)
    assert min(norms) > 0.1 and len(set(norms)) == len(norms)


def test_mu_leaves_a_wrong_bound():
    """At a bound where Q increases towards the other one, L must not vanish and mu must move."""
    torch.manual_seed(0)
    space, bounds = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(-1, 1, (1,))
    agent = naf.Agent(space, bounds, naf.Args(env="Other-v0", hidden_size=32))
    with torch.no_grad():
        agent.network[-1].bias[1] = -3
    optimizer = torch.optim.Adam(agent.parameters(), 1e-2)
    obs, actions = torch.zeros(64, 1), torch.linspace(-1, 1, 64).unsqueeze(-1)
    assert agent.act(obs[:1], True).item() < -0.98
    for _ in range(500):
        loss = (q_values(agent, obs, actions) - 3 * actions.squeeze(-1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert agent.act(obs[:1], True).item() > 0.9
