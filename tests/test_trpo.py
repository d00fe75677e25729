"""TRPO against independent oracles: dense matrices, torch.distributions, double precision."""
import dataclasses
import inspect
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import same, small
from torch.distributions import Categorical, Independent, Normal, kl_divergence

import ppo
import trpo
from trpo import Agent, Args

BOX = gym.spaces.Box(np.array([-1, 0], np.float32), np.array([2, 10], np.float32))
SPACES = [gym.spaces.Discrete(3), BOX]
DEFAULTS = {field.name: field.default for field in dataclasses.fields(Args)}
PLAIN = dict(norm_obs=False, norm_returns=False, anneal=False)


def train(env, **changes):
    """A short run without presets, statistics or schedules, all of which would hide the numbers."""
    return trpo.train(Args(**DEFAULTS | small("trpo", **PLAIN) | dict(env=env) | changes))


def random_agent(action_space, obs_size=3, hidden_size=16, noise=0.3):
    """An agent whose policy is far from its initial near-indifference."""
    torch.manual_seed(0)
    space = gym.spaces.Box(-np.inf, np.inf, (obs_size,), np.float32)
    agent = Agent(space, action_space, Args(norm_obs=False, hidden_size=hidden_size))
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += noise * torch.randn_like(parameter)
    return agent


def distribution(agent, pi):
    """The torch.distributions equivalent of the parameters that Agent.policy gave."""
    if agent.discrete:
        return Categorical(logits=pi)
    mean, log_std = pi.tensor_split(2, -1)
    return Independent(Normal(mean, log_std.exp()), 1)


def vector(module):
    return torch.nn.utils.parameters_to_vector(module.parameters()).detach()


# What it shares with PPO, whose tests speak for both.


@pytest.mark.parametrize("name", ["RunningNorm", "NatureCNN", "mlp", "compute_gae",
                                  "kl_divergence", "explained_variance"])
def test_what_it_shares_with_ppo_is_the_same_text(name):
    assert inspect.getsource(getattr(trpo, name)) == inspect.getsource(getattr(ppo, name))


# The policy.


@pytest.mark.parametrize("space", SPACES)
def test_log_probs_are_those_of_the_distribution(space):
    agent, obs = random_agent(space), torch.randn(50, 3)
    pi = agent.policy(obs)
    expected = distribution(agent, pi)
    actions = expected.sample()
    log_probs = agent.log_probs(pi, actions)
    assert log_probs.shape == (50,)
    assert torch.allclose(log_probs, expected.log_prob(actions), atol=1e-4)
    mode = agent.act(obs, deterministic=True)
    assert torch.allclose(mode, expected.mode if agent.discrete else expected.mean)
    stacked = agent.log_probs(pi.reshape(5, 10, -1), actions.reshape(5, 10, *actions.shape[1:]))
    assert torch.equal(stacked.flatten(), log_probs)


@pytest.mark.parametrize("space", SPACES)
def test_actions_are_sampled_from_the_policy_of_log_probs(space):
    agent, obs = random_agent(space), torch.randn(1, 3)
    torch.manual_seed(1)
    actions = agent.act(obs.expand(40_000, 3))
    pi = agent.policy(obs).detach()
    expected = distribution(agent, pi)
    if agent.discrete:
        frequencies = actions.bincount(minlength=3) / 40_000
        assert torch.allclose(frequencies, expected.probs[0], atol=0.01)
    else:
        assert torch.allclose(actions.mean(0), expected.mean[0], atol=0.15)
        assert torch.allclose(actions.std(0), expected.stddev[0], rtol=0.02)
    # The mean of -log pi over samples of pi, which is logged as the entropy, estimates it.
    estimate = -agent.log_probs(pi.expand(40_000, -1), actions).mean()
    assert estimate.item() == pytest.approx(expected.entropy().item(), abs=0.05)


@pytest.mark.parametrize("space", SPACES)
def test_kl_is_that_of_old_from_new_in_this_order(space):
    agent, obs = random_agent(space), torch.randn(50, 3)
    old = agent.policy(obs)
    new = old + 0.3 * torch.randn_like(old)
    expected = kl_divergence(distribution(agent, old), distribution(agent, new))
    reverse = kl_divergence(distribution(agent, new), distribution(agent, old))
    assert not torch.allclose(expected, reverse, rtol=0.01)
    kl = trpo.kl_divergence(old, new, agent.discrete)
    assert kl.shape == (50,) and torch.allclose(kl, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("size", [1e-2, 1e-3])
def test_a_tiny_mean_kl_is_precise_in_single_precision(space, size):
    agent, obs = random_agent(space), torch.randn(1000, 3)
    old = agent.policy(obs).detach()
    new = old + size * torch.randn_like(old)
    exact = trpo.kl_divergence(old.double(), new.double(), agent.discrete).mean().item()
    assert size**2 / 10 < exact < size**2 * 10
    kl = trpo.kl_divergence(old, new, agent.discrete).mean().item()
    assert kl == pytest.approx(exact, rel=2e-2)


@pytest.mark.parametrize("env", ["probes:ImageLast-v0", "probes:BoxImage-v0", "Pendulum-v1"])
def test_actor_and_critic_share_no_parameter_and_the_stds_are_the_actors(env):
    args = Args(**small("trpo", env=env))
    envs = trpo.VecEnv(env, 2, torch.device("cpu"))
    agent = Agent(envs.obs_space, envs.action_space, args)
    actor, critic = ({id(x) for x in net.parameters()} for net in (agent.actor, agent.critic))
    assert not actor & critic and len(actor | critic) == len(list(agent.parameters()))
    assert agent.discrete or id(agent.actor.log_std) in actor


# The Fisher product and conjugate gradients.


def tiny_agent(space):
    """Two inputs, one hidden unit in each layer: few enough weights for a dense Hessian."""
    return random_agent(space, obs_size=2, hidden_size=1, noise=1).double()


def kl_of_weights(agent, obs, old):
    """The mean KL as a function of the actor's weights in one vector, by torch.distributions."""
    shapes = {name: x.shape for name, x in agent.actor.named_parameters()}

    def kl(weights):
        parts = weights.split([shape.numel() for shape in shapes.values()])
        actor = {name: part.view(shape) for part, (name, shape) in zip(parts, shapes.items())}
        outputs = torch.func.functional_call(
            agent.actor, actor, (obs,), tie_weights=False)
        if agent.discrete:
            new = Categorical(logits=outputs)
        else:
            std = actor["log_std"].exp().expand_as(outputs)
            new = Independent(Normal(agent.center + agent.scale * outputs, std), 1)
        return kl_divergence(old, new).mean()

    return kl


def dense_fisher(agent, obs):
    old = distribution(agent, agent.policy(obs).detach())
    return torch.autograd.functional.hessian(kl_of_weights(agent, obs, old), vector(agent.actor))


def product_of(agent, obs, damping):
    policy = agent.policy(obs)
    kl = trpo.kl_divergence(policy.detach(), policy, agent.discrete).mean()
    return trpo.fisher_vector_product(kl, list(agent.actor.parameters()), damping)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("damping", [0, 0.3])
def test_the_fisher_vector_product_is_that_of_the_dense_hessian_of_the_kl(space, damping):
    agent, obs = tiny_agent(space), torch.randn(40, 2, dtype=torch.double)
    fisher = dense_fisher(agent, obs)
    product = product_of(agent, obs, damping)
    assert 10 <= len(fisher) <= 20 and torch.linalg.matrix_rank(fisher) > 4
    columns = torch.stack([product(v) for v in torch.eye(len(fisher), dtype=torch.double)])
    assert torch.allclose(columns, fisher + damping * torch.eye(len(fisher)), atol=1e-10)


def test_the_fisher_vector_product_is_that_of_the_covariance_of_the_score():
    agent, obs = tiny_agent(gym.spaces.Discrete(3)), torch.randn(40, 2, dtype=torch.double)
    expected = 0
    for one in obs:
        log_pi = agent.actor(one).log_softmax(-1)
        for log_p in log_pi:
            score = torch.cat([x.flatten() for x in torch.autograd.grad(
                log_p, list(agent.actor.parameters()), retain_graph=True)])
            expected = expected + log_p.exp().detach() * torch.outer(score, score) / len(obs)
    product = product_of(agent, obs, 0)
    columns = torch.stack([product(v) for v in torch.eye(len(expected), dtype=torch.double)])
    assert torch.allclose(columns, expected, atol=1e-10)


def test_conjugate_gradients_solve_what_a_dense_solver_solves():
    torch.manual_seed(0)
    root, b = torch.randn(12, 12, dtype=torch.double), torch.randn(12, dtype=torch.double)
    matrix = root @ root.T + 0.1 * torch.eye(12)
    x = trpo.conjugate_gradient(lambda v: matrix @ v, b, 12)
    assert torch.allclose(x, torch.linalg.solve(matrix, b), rtol=1e-6)
    # After fewer iterations x.b is still x.Fx, on which the length of the step rests.
    for iters in (1, 3, 7):
        x = trpo.conjugate_gradient(lambda v: matrix @ v, b, iters)
        assert x.dot(b).item() == pytest.approx(x.dot(matrix @ x).item(), rel=1e-6)
        assert (matrix @ x - b).norm() > 1e-3


def test_conjugate_gradients_stay_at_the_solution_and_at_zero():
    torch.manual_seed(0)
    root, b = torch.randn(5, 5), torch.randn(5)
    matrix = root @ root.T + torch.eye(5)
    x = trpo.conjugate_gradient(lambda v: matrix @ v, b, 200)  # r underflows on the way
    assert torch.allclose(x, torch.linalg.solve(matrix, b), rtol=1e-4)
    assert torch.equal(trpo.conjugate_gradient(lambda v: matrix @ v, 0 * b, 10), 0 * b)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("iters, damping", [(10, 0.1), (25, 0.1), (15, 1e-3)])
def test_single_precision_costs_conjugate_gradients_no_accuracy(space, iters, damping):
    """A network and a batch of real size, in single and in double precision."""
    agent, solutions = random_agent(space, 8, 64, noise=0.05), []
    obs = torch.randn(2048, 8)
    pi = agent.policy(obs).detach()
    actions, advantages = distribution(agent, pi).sample(), torch.randn(2048)
    loss = -(agent.log_probs(agent.policy(obs), actions) * advantages).mean()
    b = -torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(agent.actor.parameters()))])
    for dtype in (torch.float, torch.double):
        product = product_of(agent.to(dtype), obs.to(dtype), damping)
        x = trpo.conjugate_gradient(product, b.to(dtype), iters)
        solutions.append((x.double(), x.dot(b.to(dtype)).item(), x.dot(product(x)).item()))
    (x, xb, xFx), (exact, exact_xb, _) = solutions
    assert torch.cosine_similarity(x, exact, dim=0) > 1 - 1e-5
    assert (x - exact).norm() < 5e-3 * exact.norm()
    assert xb == pytest.approx(exact_xb, rel=1e-4) and xb == pytest.approx(xFx, rel=1e-4)


# The step.


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_the_step_is_the_natural_gradient_scaled_to_max_kl(env, spy):
    policy, log_probs, gae = spy(Agent, "policy"), spy(Agent, "log_probs"), spy(trpo, "compute_gae")
    spy_cg = spy(trpo, "conjugate_gradient")
    agent, _ = train(env, total_timesteps=64, hidden_size=2, cg_iters=60, cg_damping=0.05,
                     max_kl=1e-4, line_search=False)
    moved = vector(agent.actor)
    obs, actions = policy[0]["obs"].double(), log_probs[0]["actions"].double()
    assert obs.shape[:2] == (16, 4)

    first = start(env, hidden_size=2)
    weights = vector(first.actor)
    first = first.double()
    fisher = dense_fisher(first, obs.flatten(0, 1)) + 0.05 * torch.eye(len(weights))
    advantages = gae[0]["out"][0].double()
    pi = distribution(first, first.policy(obs))
    gain = (pi.log_prob(actions) * (advantages - advantages.mean())).mean()
    g = torch.cat([x.flatten() for x in torch.autograd.grad(gain, list(first.actor.parameters()))])
    assert torch.allclose(spy_cg[0]["b"].double(), g, atol=1e-4 * g.norm())
    x = torch.linalg.solve(fisher, g)
    step = x * math.sqrt(2 * 1e-4 / (x @ fisher @ x))
    assert torch.allclose((moved - weights).double(), step, atol=0.01 * step.norm())


def test_the_scale_of_the_advantages_does_not_matter(monkeypatch):
    settings = dict(total_timesteps=64, line_search=False)
    expected, _ = train("CartPole-v1", **settings)
    gae = trpo.compute_gae
    monkeypatch.setattr(trpo, "compute_gae", lambda *args: (
        1e-5 * gae(*args)[0], gae(*args)[1]))
    agent, _ = train("CartPole-v1", **settings)
    assert torch.allclose(vector(agent.actor), vector(expected.actor), atol=1e-4)
    assert not torch.allclose(vector(agent.actor), vector(start("CartPole-v1").actor), atol=1e-3)


def test_each_batch_has_a_gradient_of_its_own(spy):
    log_probs, gae = spy(Agent, "log_probs"), spy(trpo, "compute_gae")
    policy, spy_cg = spy(Agent, "policy"), spy(trpo, "conjugate_gradient")
    agent, _ = train("CartPole-v1", total_timesteps=128, line_search=False, max_kl=0)
    obs, actions = (calls[len(calls) // 2] for calls in (policy, log_probs))  # the second batch's
    advantages = gae[1]["out"][0]
    pi = distribution(agent, agent.policy(obs["obs"]))
    gain = (pi.log_prob(actions["actions"]) * (advantages - advantages.mean())).mean()
    g = torch.cat([x.flatten() for x in torch.autograd.grad(gain, list(agent.actor.parameters()))])
    assert len(gae) == 2 and torch.allclose(spy_cg[1]["b"], g, atol=1e-4 * g.norm())


def start(env, **changes):
    """The agent that a run begins with."""
    args = Args(**DEFAULTS | small("trpo", **PLAIN) | dict(env=env) | changes)
    device = trpo.setup(args)
    envs = trpo.VecEnv(env, args.num_envs, device)
    return Agent(envs.obs_space, envs.action_space, args)


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", "probes:Bounds-v0"])
@pytest.mark.parametrize("max_kl", [0.01, 1.0])
def test_an_accepted_step_improves_and_stays_within_max_kl(env, max_kl, spy):
    policy, log_probs, gae = spy(Agent, "policy"), spy(Agent, "log_probs"), spy(trpo, "compute_gae")
    searches = spy(trpo, "line_search")
    agent, history = train(env, total_timesteps=64, max_kl=max_kl, cg_damping=1e-3, seed=2)
    obs, actions = policy[0]["obs"], log_probs[0]["actions"]
    first = start(env, seed=2)
    assert torch.equal(vector(first.actor), searches[0]["weights"])
    old, new = (distribution(a, a.policy(obs).detach()) for a in (first, agent))
    kl = kl_divergence(old, new).mean().item()
    advantages = gae[0]["out"][0] - gae[0]["out"][0].mean()
    ratio = (new.log_prob(actions) - old.log_prob(actions)).exp()
    loss = -sum((r - 1) * a for r, a in zip(ratio.flatten().tolist(),
                                            advantages.flatten().tolist())) / 64
    assert 0.2 * max_kl < kl <= max_kl * 1.001 and loss < 0
    assert history[-1]["kl"] == pytest.approx(kl, rel=1e-2)
    assert history[-1]["policy_loss"] == pytest.approx(loss, rel=1e-2, abs=1e-5)
    assert history[-1]["step_fraction"] == searches[0]["out"][0] > 0
    entropy = -old.log_prob(actions).mean().item()
    assert history[-1]["entropy"] == pytest.approx(entropy, rel=1e-3)


def test_the_policy_is_the_old_one_until_the_step(spy):
    log_probs, kls = spy(Agent, "log_probs"), spy(trpo, "kl_divergence")
    train("Pendulum-v1", total_timesteps=64)
    new, old, *_, last_new, last_old, _ = (call["out"] for call in log_probs)  # the last: entropy
    assert torch.allclose(new, old, atol=1e-6) and not torch.allclose(last_new, last_old, atol=1e-3)
    assert kls[0]["out"].abs().max() < 1e-6 and kls[-1]["out"].mean() > 1e-3


def searched(losses, max_kl=1.0):
    """line_search from weights 1 to 11, where evaluate_step gives these losses in turn."""
    weights, seen, answers = torch.tensor([1.0, math.pi]), [], iter(losses)

    def evaluate_step():
        seen.append(weights[0].item())
        return torch.tensor(next(answers))

    found = trpo.line_search(weights, torch.tensor([10.0, 1.0]), evaluate_step, max_kl, 0.5)
    return found, weights, seen


def test_the_search_takes_the_longest_step_that_improves_within_max_kl():
    nan = math.nan
    for losses, expected in [
            ([[-1, 0.5]], 1), ([[-1, 1.0]], 1), ([[-1, 1.5], [-0.1, 0.9]], 0.5),
            ([[1, 0.1], [-1, 0.1]], 0.5), ([[0, 0.1], [-1, 0.1]], 0.5),
            ([[nan, 0.1], [-1, nan], [-1, 0.1]], 0.25)]:
        found, weights, seen = searched(losses)
        assert found == pytest.approx((expected, *losses[-1])) and len(seen) == len(losses)
        assert seen == [1 + 10 * 0.5 ** k for k in range(len(losses))]
        assert weights.tolist() == pytest.approx([1 + 10 * expected, math.pi + expected])


@pytest.mark.parametrize("answer", [[-1, 2], [1, 0.1], [0, 0.1], [math.nan, 0.1], [-1, math.nan]])
def test_a_search_that_fails_restores_the_weights_bit_for_bit(answer):
    found, weights, seen = searched([answer] * 99)
    assert found == (0, 0, 0) and 5 <= len(seen) < 99
    assert torch.equal(weights, torch.tensor([1.0, math.pi]))


@pytest.mark.parametrize("line_search", [True, False])
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("advantage", [0.0, 0.9])
def test_equal_advantages_leave_the_policy_bit_identical(env, line_search, advantage, monkeypatch):
    gae = trpo.compute_gae
    monkeypatch.setattr(trpo, "compute_gae", lambda *args: (
        torch.full_like(gae(*args)[0], advantage), gae(*args)[1]))
    agent, history = train(env, total_timesteps=256, line_search=line_search)
    assert torch.equal(vector(agent.actor), vector(start(env).actor))
    assert history[-1]["kl"] == pytest.approx(0, abs=1e-7)


def test_a_search_that_fails_in_training_leaves_the_policy_and_still_fits_the_critic(monkeypatch):
    kl = trpo.kl_divergence
    monkeypatch.setattr(trpo, "kl_divergence", lambda old, new, discrete: kl(old, new, discrete) + (
        0 if new.requires_grad else 9))
    agent, history = train("Pendulum-v1", total_timesteps=256)
    first = start("Pendulum-v1")
    assert torch.equal(vector(agent.actor), vector(first.actor))
    assert not torch.equal(vector(agent.critic), vector(first.critic))
    assert {row["step_fraction"] for row in history} == {0.0}
    assert {row["policy_loss"] for row in history} == {0.0}


def test_without_the_search_the_whole_step_is_always_taken(spy):
    searches = spy(trpo, "line_search")
    settings = dict(total_timesteps=64, max_kl=1.0, cg_damping=1e-3, seed=2)
    _, history = train("CartPole-v1", **settings)
    assert searches[0]["out"][0] < 1 and history[-1]["kl"] <= 1
    natural, history = train("CartPole-v1", line_search=False, **settings)
    assert len(searches) == 1 and history[-1]["kl"] > 1 and history[-1]["step_fraction"] == 1
    whole = searches[0]["weights"] + searches[0]["step"]
    assert torch.allclose(vector(natural.actor), whole, atol=1e-6)


# The critic.


def test_the_critic_is_fitted_to_constant_returns_and_only_the_critic(spy):
    policy, gae = spy(Agent, "policy"), spy(trpo, "compute_gae")
    agent, history = train("Pendulum-v1", total_timesteps=64, num_minibatches=1, update_epochs=2,
                           learning_rate=0)  # in the second epoch the gradient is still the same
    got = {name: p.grad.clone() for name, p in agent.critic.named_parameters()}
    loss, returns = 0, gae[0]["out"][1].flatten().tolist()
    for obs, target in zip(policy[0]["obs"].flatten(0, 1), returns, strict=True):
        loss = loss + (agent.critic(obs).squeeze() - target).square() / 64
    assert history[-1]["value_loss"] == pytest.approx(loss.item(), rel=1e-4)
    names = [name for name, _ in agent.critic.named_parameters()]
    for name, expected in zip(names, torch.autograd.grad(loss, list(agent.critic.parameters()))):
        assert torch.allclose(got[name], expected, rtol=1e-3, atol=1e-4 * expected.abs().max())


def test_policy_and_critic_are_trained_apart():
    for still, moves, changes in [("critic", "actor", dict(learning_rate=0)),
                                  ("actor", "critic", dict(max_kl=0))]:
        agent, _ = train("Pendulum-v1", total_timesteps=256, **changes)
        first = start("Pendulum-v1")
        assert same(getattr(agent, still).state_dict(), getattr(first, still).state_dict())
        for name, value in getattr(agent, moves).named_parameters():
            assert not torch.equal(value, getattr(first, moves).get_parameter(name)), name


@pytest.mark.parametrize("num_minibatches", [1, 4, 21])
def test_every_transition_is_fitted_once_an_epoch_whatever_the_remainder(num_minibatches, spy):
    loss, gae = spy(trpo.F, "mse_loss"), spy(trpo, "compute_gae")
    train("Pendulum-v1", total_timesteps=21, num_envs=3, num_steps=7, update_epochs=2,
          num_minibatches=num_minibatches)
    returns = gae[0]["out"][1].flatten()
    used = [call["target"] for call in loss]
    assert len(used) == 2 * num_minibatches
    assert all(call["input"].shape == call["target"].shape for call in loss)
    first, second = torch.cat(used[:num_minibatches]), torch.cat(used[num_minibatches:])
    assert len(returns.unique()) == 21  # so that returns tell transitions apart
    assert torch.equal(first.sort()[0], returns.sort()[0])
    assert torch.equal(second.sort()[0], returns.sort()[0])
    assert not torch.equal(first, second) and not torch.equal(first, returns)  # shuffled anew


def test_a_minibatch_keeps_observations_and_returns_together(spy):
    values, loss, gae = spy(Agent, "value"), spy(trpo.F, "mse_loss"), spy(trpo, "compute_gae")
    train("Pendulum-v1", total_timesteps=64, update_epochs=1, num_minibatches=4)
    whole, _, *parts = values
    known = dict(zip(map(tuple, whole["obs"].flatten(0, 1).tolist()),
                     gae[0]["out"][1].flatten().tolist(), strict=True))
    for part, call in zip(parts, loss, strict=True):
        assert [known[tuple(obs)] for obs in part["obs"].tolist()] == call["target"].tolist()


def test_minibatches_of_one_step_leave_everything_finite():
    agent, history = train("probes:Truncated-v0", total_timesteps=64, norm_returns=True,
                           norm_obs=True, num_steps=8, num_minibatches=32)
    assert all(value.isfinite().all() for value in agent.state_dict().values())


@pytest.mark.parametrize("settings", [dict(num_steps=8, num_minibatches=33),
                                      dict(num_envs=1, num_steps=1, num_minibatches=1)])
def test_a_batch_too_small_to_learn_from_is_refused(settings):
    with pytest.raises(trpo.UserError, match="too small.*--num-minibatches"):
        train("probes:Truncated-v0", **settings)


# Several processes.


@pytest.mark.parametrize("mean", [0, 7])
def test_all_gradients_and_losses_of_a_batch_are_averaged_over_the_processes(
        mean, monkeypatch, spy):
    """If every average is the same number, nothing of this process must remain."""
    monkeypatch.setattr(trpo, "all_reduce_mean", lambda x: x.fill_(mean) if x.dim() else x)
    solutions = spy(trpo, "conjugate_gradient")
    agent, history = train("Pendulum-v1", total_timesteps=64, line_search=False, cg_iters=1,
                           cg_damping=10)
    first, b = start("Pendulum-v1"), solutions[0]["b"]
    assert torch.equal(b, torch.full_like(b, mean))
    assert torch.allclose(solutions[0]["product"](b + 1), mean + 10 * (b + 1))
    assert history[-1]["policy_loss"] == history[-1]["kl"] == mean
    assert same(vector(agent.critic), vector(first.critic)) == (mean == 0)
    assert all((x.grad == mean).all() for x in agent.critic.parameters())


# Schedules.


@pytest.mark.parametrize("anneal", [True, False])
def test_step_size_and_trust_region_shrink_linearly_from_the_start_to_the_end(
        anneal, monkeypatch, spy):
    rates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *args: (
        rates.append(float(self.param_groups[0]["lr"])), step(self, *args))[1])
    searches, solutions = spy(trpo, "line_search"), spy(trpo, "conjugate_gradient")
    train("probes:Counter-v0", total_timesteps=640, num_minibatches=1, update_epochs=1,
          anneal=anneal, learning_rate=1e-3, max_kl=0.05)
    remaining = [1 - k / 10 if anneal else 1 for k in range(10)]  # start 1, middle 0.5, end 0.1
    assert rates == pytest.approx([1e-3 * x for x in remaining])
    assert [call["max_kl"] for call in searches] == pytest.approx([0.05 * x for x in remaining])
    for search, solution, left in zip(searches, solutions, remaining, strict=True):
        x, g = solution["out"], solution["b"]
        assert torch.allclose(search["step"], x * (2 * 0.05 * left / x.dot(g)).sqrt(), rtol=1e-3)


# Learning.


@pytest.mark.parametrize("line_search", [True, False])
def test_the_arm_that_pays_becomes_more_probable(line_search):
    agent, _ = train("probes:Arms-v0", total_timesteps=2048, line_search=line_search)
    assert agent.policy(torch.zeros(1, 1)).softmax(-1)[0, 1] > 0.8


def test_continuous_actions_move_to_the_best_one():
    agent, _ = train("probes:Target-v0", total_timesteps=8192, num_steps=64, max_kl=0.05,
                     norm_returns=True)
    assert torch.allclose(agent.act(torch.zeros(1, 1), True), torch.ones(1, 2), atol=0.35)


def test_cartpole_is_learned_within_10_thousand_steps():
    args = Args(env="CartPole-v1", total_timesteps=10_000, seed=1, device="cpu")
    agent, _ = trpo.train(args)
    # A random policy gets 22.
    assert trpo.evaluate(agent, args, 20).mean() > 100
