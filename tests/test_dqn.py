"""DQN against independent oracles: definitions, loops, made-up episodes, numbers by hand."""
import dataclasses
import importlib
import inspect
import math
import pathlib
import shutil

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import same, small, timeless

import ddpg
import dqn
from dqn import Agent, Args, ReplayBuffer

COUNT = gym.spaces.Box(0, np.inf, (1,), np.float32)
DEFAULTS = {field.name: field.default for field in dataclasses.fields(Args)}


def arguments(env, **changes):
    """The settings of a short run without presets or annealing."""
    return Args(**DEFAULTS | small("dqn", anneal=False, env=env) | changes)


def train(env, **changes):
    return dqn.train(arguments(env, **changes))


@pytest.mark.parametrize("name", ["NatureCNN", "mlp"])
def test_what_it_shares_with_ddpg_is_the_same_text(name):
    assert inspect.getsource(getattr(dqn, name)) == inspect.getsource(getattr(ddpg, name))


@pytest.fixture
def states(monkeypatch):
    """The modules of each Run: agent, target, optimizer, buffer."""
    states, init = [], dqn.Run.__init__
    monkeypatch.setattr(dqn.Run, "__init__", lambda self, *args, **state: (
        states.append(state), init(self, *args, **state))[1])
    return states


# Targets.


@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("env, bootstraps", [
    ("probes:Truncated-v0", 1), ("probes:Terminated-v0", 0), ("probes:Both-v0", 0)])
def test_a_truncation_bootstraps_from_the_true_last_observation_a_termination_does_not(
        env, bootstraps, n_step, spy):
    calls = spy(dqn, "td_target")
    agent, _ = train(env, learning_rate=0, n_step=n_step, gamma=0.9)  # Q stays what it was
    start, end = agent.q_values(torch.tensor([[0.0], [1.0]])).amax(-1).tolist()
    assert abs(start - end) > 1e-3  # the test can tell the reset from the last observation
    for call in calls:
        expected = torch.full_like(call["out"], 2 + bootstraps * 0.9 * end)
        assert torch.allclose(call["out"], expected, atol=1e-5)


def test_the_target_is_the_return_and_the_discounted_next_value():
    returns, next_values = torch.tensor([10.0, 20.0]), torch.tensor([1.0, 4.0])
    discounts, terminations = torch.tensor([0.5, 0.25]), torch.tensor([0.0, 1.0])
    targets = dqn.td_target(returns, next_values, torch.zeros(2), discounts)
    assert targets.tolist() == [10.5, 21.0]
    assert dqn.td_target(returns, next_values, terminations, discounts).tolist() == [10.5, 20.0]


@pytest.mark.parametrize("unknown", [math.nan, math.inf, -math.inf])
def test_the_target_ignores_what_follows_a_termination(unknown):
    targets = dqn.td_target(torch.ones(2), torch.tensor([unknown, 2.0]), torch.tensor([1.0, 0.0]),
                            torch.full((2,), 0.5))
    assert targets.tolist() == [1, 2]
    rewards = torch.tensor([1.0, 2.0, unknown])  # the third step belongs to another episode
    last, returns, discounts = dqn.n_step_returns(
        torch.tensor([0, 1]), rewards, torch.tensor([1.0, 0.0, 1.0]), 1, 0.5, 3)
    assert last.tolist() == [1, 1] and returns.tolist() == [2, 2]
    assert discounts.tolist() == [0.25, 0.5]


@pytest.mark.parametrize("env", ["probes:NaNEnd-v0", "probes:InfEnd-v0"])
@pytest.mark.parametrize("changes", [dict(), dict(n_step=3, double=True, dueling=True,
                                                  prioritized=True)])
def test_nan_after_a_termination_changes_nothing(env, changes, spy):
    samples = spy(ReplayBuffer, "sample")
    agent, history = train(env, **changes)
    assert any(not call["out"][3].isfinite().all() for call in samples)
    assert all(x.isfinite().all() for x in agent.state_dict().values())
    usual, usual_history = train("probes:Counter-v0", **changes)
    assert same(agent.state_dict(), usual.state_dict())
    assert same(timeless(history), timeless(usual_history))


@pytest.mark.parametrize("double", [True, False])
def test_if_double_the_network_chooses_what_the_target_network_values(double, states, spy,
                                                                     monkeypatch):
    q_values = Agent.q_values

    def disagree(self, obs):  # the target network prefers action 1, the other one action 0
        return q_values(self, obs) + torch.tensor(
            [0.0, 100.0] if self is states[0]["target"] else [100.0, 0.0])

    monkeypatch.setattr(Agent, "q_values", disagree)
    samples, calls = spy(ReplayBuffer, "sample"), spy(dqn, "td_target")
    train("CartPole-v1", double=double, total_timesteps=64, learning_rate=0)
    assert len(samples) == len(calls) > 0
    for sample, call in zip(samples, calls):
        q = states[0]["target"].q_values(sample["out"][3])
        assert torch.allclose(call["next_values"], q[:, 0 if double else 1])
        assert not call["next_values"].requires_grad and not call["out"].requires_grad


def test_the_target_network_shares_no_memory_and_is_copied_every_so_many_steps(
        states, monkeypatch):
    seen, targets = [], dqn.td_target

    def watch(*args):
        agent, target = (torch.cat([p.detach().flatten() for p in states[0][name].parameters()])
                         for name in ("agent", "target"))
        seen.append((agent, target))
        return targets(*args)

    monkeypatch.setattr(dqn, "td_target", watch)
    train("CartPole-v1", num_updates=1, total_timesteps=320, learning_rate=1e-2, target_every=64)
    pointers = [{p.data_ptr() for p in states[0][name].parameters()}
                for name in ("agent", "target")]
    assert not pointers[0] & pointers[1]
    steps = range(32, 321, 16)  # a round is 4 steps of 4 environments
    assert len(seen) == len(steps)
    for number, (step, (agent, target)) in enumerate(zip(steps, seen)):
        if step % 64 == 0:
            assert torch.equal(agent, target)
        elif number:
            assert torch.equal(target, seen[number - 1][1]) and not torch.equal(agent, target)
    assert torch.equal(*seen[0])  # both start with the same weights


def test_a_soft_target_moves_a_part_of_the_way_at_each_update(states, monkeypatch):
    seen, targets = [], dqn.td_target
    monkeypatch.setattr(dqn, "td_target", lambda *args: (seen.append([
        torch.cat([p.detach().flatten() for p in states[0][name].parameters()])
        for name in ("agent", "target")]), targets(*args))[1])
    train("CartPole-v1", target_every=0, tau=0.3, learning_rate=1e-2, total_timesteps=128)
    for (_, old), (agent, target) in zip(seen, seen[1:]):
        assert torch.allclose(target, old + 0.3 * (agent - old), atol=1e-6)
    assert len(seen) > 10 and not torch.equal(*seen[-1])


# The loss.


@pytest.mark.parametrize("prioritized", [False, True])
def test_the_loss_and_its_gradient_are_those_of_a_loop_over_the_batch(prioritized, states, spy):
    sampled, calls = spy(ReplayBuffer, "sample"), spy(dqn, "td_target")
    agent, history = train("CartPole-v1", prioritized=prioritized, num_updates=1, learning_rate=0,
                           total_timesteps=256)
    _, obs, actions, *_, importance = sampled[-1]["out"]
    targets = calls[-1]["out"]
    assert len(importance.unique()) > 1 if prioritized else (importance == 1).all()
    loss = 0
    for i in range(16):
        error = agent.q_values(obs[i])[actions[i]] - targets[i]
        huber = error**2 / 2 if abs(error) <= 1 else abs(error) - 0.5
        loss = loss + importance[i] * huber / 16
    assert history[-1]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    q = [agent.q_values(obs[i])[actions[i]].item() for i in range(16)]
    assert history[-1]["q_values"] == pytest.approx(np.mean(q), rel=1e-4)
    got = {name: p.grad.clone() for name, p in agent.named_parameters()}
    for (name, _), expected in zip(agent.named_parameters(), torch.autograd.grad(
            loss, list(agent.parameters()))):
        assert torch.allclose(got[name], expected, rtol=1e-3, atol=1e-6), name
    assert all(not p.grad.any() for p in states[0]["target"].parameters())


def test_the_learning_rate_falls_linearly_to_0(monkeypatch):
    rates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *args: (
        rates.append(float(self.param_groups[0]["lr"])), step(self, *args))[1])
    settings = dict(total_timesteps=160, learning_starts=0, num_updates=1, learning_rate=1e-3)
    train("CartPole-v1", anneal=True, **settings)
    assert rates == pytest.approx([1e-3 * (1 - k / 10) for k in range(10)])
    rates.clear()
    train("CartPole-v1", **settings)
    assert rates == pytest.approx([1e-3] * 10)


# The values.


def test_dueling_values_do_not_change_with_a_constant_added_to_all_advantages():
    torch.manual_seed(0)
    space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    agent = Agent(space, gym.spaces.Discrete(4), Args(**DEFAULTS | dict(dueling=True)))
    obs = torch.randn(5, 3)
    outputs, q_values = agent.q_network(obs), agent.q_values(obs)
    assert q_values.shape == (5, 4)
    for b in range(5):  # the mean over actions is V, and differences are those of A
        assert q_values[b].mean().item() == pytest.approx(outputs[b, 0].item(), abs=1e-6)
        assert torch.allclose(q_values[b] - q_values[b, 0], outputs[b, 1:] - outputs[b, 1])
    with torch.no_grad():
        agent.q_network[-1].bias[1:] += 7.0
        assert torch.allclose(agent.q_values(obs), q_values, atol=1e-5)
        agent.q_network[-1].bias[0] += 7.0
        assert torch.allclose(agent.q_values(obs), q_values + 7, atol=1e-5)


# Exploration.


Q = torch.tensor([1.0, 3.0, 2.0, 0.0])


def test_scale_maps_bounds_to_minus_1_and_1_and_scales_nothing_else():
    space = gym.spaces.Box(np.array([-1.2, -0.07, -np.inf, 0, 3], np.float32),
                           np.array([0.6, 0.07, 5, np.inf, 3], np.float32))
    scale = dqn.Scale(space)
    corners = torch.tensor([[-1.2, -0.07, 2, 8, 3], [0.6, 0.07, -9, 0, 4]])
    expected = torch.tensor([[-1, -1, 2, 8, 0], [1, 1, -9, 0, 1]]).float()
    torch.testing.assert_close(scale(corners), expected)
    agent = Agent(space, gym.spaces.Discrete(2), arguments("x", scale_obs=True))
    torch.testing.assert_close(agent.q_values(corners), agent.q_network[1:](expected))


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_epsilon_greedy_takes_random_actions_with_probability_epsilon(epsilon, spy):
    added, num_envs = spy(ReplayBuffer, "add"), 40
    agent, _ = train("probes:Start-v0", exploration_start=epsilon, exploration_end=epsilon,
                     num_envs=num_envs, total_timesteps=16_000, learning_starts=0, learning_rate=0,
                     num_updates=1, train_every=40, buffer_size=1600)
    rollouts = [call["rollout"] for call in added]
    obs, actions = (torch.cat([rollout[i] for rollout in rollouts]) for i in (0, 2))
    assert actions.shape == (400, num_envs)
    greedy = agent.q_values(obs).argmax(-1)
    for action in range(3):  # given a greedy action, each of the others is equally probable
        others = actions[greedy != action] == action
        assert others.float().mean().item() == pytest.approx(epsilon / 3, abs=0.015)
    # Each environment at each step has a draw of its own.
    explored, p = (actions != greedy).float(), 2 / 3 * epsilon
    assert explored.mean().item() == pytest.approx(p, abs=0.015)
    for dim in range(2):
        expected = math.sqrt(p * (1 - p) / explored.shape[dim])
        assert explored.mean(dim).std().item() == pytest.approx(expected, rel=0.3)


@pytest.mark.parametrize("temperature", [1e-8, 0.5, 2.0])
def test_boltzmann_samples_the_softmax_at_its_temperature(temperature, monkeypatch):
    torch.manual_seed(0)
    agent = Agent(COUNT, gym.spaces.Discrete(4), arguments("x", exploration="boltzmann"))
    monkeypatch.setattr(agent, "q_values", lambda obs: Q.expand(len(obs), 4))
    agent.temperature.fill_(temperature)
    obs = torch.zeros(50_000, 1)
    frequencies = agent.act(obs).bincount(minlength=4) / 50_000
    assert torch.allclose(frequencies, (Q / temperature).softmax(-1), atol=0.01)
    assert (agent.act(obs, deterministic=True) == 1).all()


@pytest.mark.parametrize("exploration", ["epsilon", "boltzmann"])
def test_exploration_falls_linearly_and_then_stays(exploration, monkeypatch):
    temperatures, act = [], Agent.act
    monkeypatch.setattr(Agent, "act", lambda self, obs: (
        temperatures.append(self.temperature.item()), act(self, obs))[1])
    _, history = train("CartPole-v1", exploration=exploration, exploration_start=0.9, train_every=1,
                       exploration_end=0.1, exploration_fraction=0.5, total_timesteps=160)
    expected = [0.9 - 0.8 * min(1, 2 * k / 40) for k in range(40)]
    assert expected[20:] == pytest.approx([0.1] * 20)  # from the middle of the run on
    used = [row["exploration"] for row in history if "exploration" in row]
    assert used == pytest.approx(expected[7:]) and len(temperatures) == 40
    assert temperatures == pytest.approx(expected if exploration == "boltzmann" else [1] * 40)


@pytest.mark.parametrize("exploration", ["epsilon", "boltzmann"])
def test_actions_are_uniform_before_learning_starts(exploration, spy):
    added = spy(ReplayBuffer, "add")
    agent, _ = train("probes:Start-v0", exploration=exploration, exploration_start=0,
                     exploration_end=0, learning_starts=4000, total_timesteps=6000, train_every=20,
                     num_envs=20, learning_rate=0, buffer_size=400)
    obs, actions = (torch.cat([call["rollout"][i] for call in added]) for i in (0, 2))
    frequencies = actions[:200].flatten().bincount(minlength=3) / 4000
    assert torch.allclose(frequencies, torch.tensor(1 / 3), atol=0.03)
    assert torch.equal(actions[200:], agent.q_values(obs[200:]).argmax(-1))  # epsilon is 0


def test_without_boltzmann_act_is_greedy_and_deterministic():
    torch.manual_seed(0)
    agent = Agent(COUNT, gym.spaces.Discrete(3), arguments("x"))
    obs = torch.arange(6.0).unsqueeze(-1)
    best = agent.q_values(obs).argmax(-1)
    assert torch.equal(agent.act(obs), best) and torch.equal(agent.act(obs, True), best)


def test_forward_hooks_of_the_layers_fire():
    agent, calls = Agent(COUNT, gym.spaces.Discrete(3), arguments("x")), []
    layers = [layer for layer in agent.modules() if isinstance(layer, torch.nn.Linear)]
    for layer in layers:
        layer.register_forward_hook(lambda *args: calls.append(args[0]))
    agent.q_values(torch.zeros(1, 1))
    assert calls == layers and len(layers) == 3


# The replay buffer.


def episodes(T, N):
    """Transitions of episodes of random length, each ended by a termination, by a time limit, or
    by a resume, which begins new episodes everywhere. Each observation has its own number."""
    rng, rows, number = np.random.default_rng(0), [], 0
    episode_starts, obs = torch.ones(N), None

    def new_obs():
        nonlocal number
        number += N
        return torch.arange(number - N, number).float().unsqueeze(-1)

    for t in range(T):
        obs = new_obs() if obs is None else torch.where(
            episode_starts.unsqueeze(-1) > 0, new_obs(), obs)
        terminations, truncations = torch.from_numpy((rng.random((2, N)) < 0.15).astype(np.float32))
        next_obs = new_obs()
        rows.append(dict(
            obs=obs, episode_starts=episode_starts, actions=torch.from_numpy(rng.integers(0, 9, N)),
            next_obs=next_obs, rewards=torch.from_numpy(rng.random(N).astype(np.float32)),
            terminations=terminations))
        obs, episode_starts = next_obs, torch.maximum(terminations, truncations)
        if t % 23 == 22:
            episode_starts = torch.ones(N)
    return rows


def filled(rows, size, T=3):
    """A buffer to which the rows were added, T at a time."""
    buffer = ReplayBuffer(size, len(rows[0]["obs"]), COUNT, "cpu")
    for t in range(0, len(rows), T):
        buffer.add(*(torch.stack(x) for x in zip(*(row.values() for row in rows[t:t + T]))))
        buffer.sample(1, 0.9, 1)  # which may not leave a trace
    return buffer


@pytest.mark.parametrize("n_step", [1, 2, 5])
@pytest.mark.parametrize("count", [7, 20, 74])  # not yet full, just full, and long since full
def test_every_sample_is_a_transition_with_n_rewards_up_to_the_end_of_its_episode(count, n_step):
    T, N, gamma = 20, 3, 0.9
    rows = episodes(count, N)
    buffer = filled(rows, T * N + 2)
    index, obs, actions, next_obs, returns, terminations, discounts, importance = buffer.sample(
        3000, gamma, n_step)
    assert len(index.unique()) == min(count, T) * N and (importance == 1).all()
    for i in range(3000):
        row, n = divmod(index[i].item(), N)
        t = max(t for t in range(count) if t % T == row)
        assert t >= count - T and obs[i] == rows[t]["obs"][n]
        assert actions[i] == rows[t]["actions"][n]
        expected, k = 0, 0
        while True:
            last = rows[t + k]
            expected, k = expected + gamma**k * last["rewards"][n].item(), k + 1
            if k == n_step or t + k == count or rows[t + k]["episode_starts"][n]:
                break
        assert returns[i].item() == pytest.approx(expected, rel=1e-5)
        assert next_obs[i] == last["next_obs"][n]
        assert terminations[i] == last["terminations"][n]
        assert discounts[i].item() == pytest.approx(gamma**k)


def test_training_stores_true_successors_and_what_was_done(spy):
    calls = spy(ReplayBuffer, "sample")
    train("probes:Counter-v0")
    for call in calls:
        _, obs, _, next_obs, returns, terminations, discounts, _ = call["out"]
        assert torch.equal(next_obs, obs + 1) and (returns == 1).all()
        assert torch.equal(terminations == 1, obs.squeeze(-1) == 4)
        assert torch.allclose(discounts, torch.tensor(0.99))
    calls.clear()
    train("probes:Arms-v0")  # whose reward is the action
    for call in calls:
        assert torch.equal(call["out"][2].float(), call["out"][4])


@pytest.mark.parametrize("buffer_size", [120, 2000])
def test_a_resumed_run_takes_no_old_row_for_the_continuation_of_a_new_one(buffer_size, spy):
    settings = dict(n_step=3, gamma=0.5, buffer_size=buffer_size, run_dir="run")
    train("probes:Endless-v0", total_timesteps=256, **settings)
    calls = spy(ReplayBuffer, "sample")
    dqn.train(arguments("probes:Endless-v0", total_timesteps=512, **settings), "run")
    longest = shortened = 0
    for call in calls:
        _, obs, _, next_obs, returns, _, discounts, _ = call["out"]
        steps = (next_obs - obs).squeeze(-1)
        assert ((steps >= 1) & (steps <= 3)).all()
        assert torch.allclose(discounts, 0.5**steps)
        assert torch.allclose(returns, 2 - 2 * 0.5**steps)
        longest, shortened = max(longest, next_obs.max()), shortened + (steps < 3).sum()
    assert shortened > 0 and longest == 64  # steps of each environment, without any reset


@pytest.mark.parametrize("count", [5, 10, 13])
def test_the_newest_row_of_a_loaded_buffer_is_not_continued(count):
    rows = episodes(count, 2)
    for row in rows:
        row["episode_starts"] = torch.zeros(2)
    buffer, loaded = filled(rows, 20), ReplayBuffer(20, 2, COUNT, "cpu")
    loaded.load_state_dict(buffer.state_dict())
    indices, _, _, next_obs, *_ = loaded.sample(1000, 0.9, 10)
    newest = (count - 1) % 10 * 2 + indices % 2
    assert torch.equal(next_obs, buffer.flat[3][newest])


def test_samples_are_uniform_over_what_is_filled():
    buffer = filled(episodes(10, 2), 1000)
    torch.manual_seed(0)
    index = buffer.sample(40_000, 0.9, 1)[0]
    frequencies = index.bincount() / 40_000
    assert len(frequencies) == 20 and torch.allclose(frequencies, torch.tensor(1 / 20), atol=0.006)


def test_a_buffer_saves_what_is_filled_and_loads_it():
    rows = episodes(10, 2)
    buffer, other = filled(rows, 1000), filled(rows[:1], 1000)
    buffer.update_priorities(torch.arange(20), torch.linspace(0, 9, 20), 0.6)
    saved = buffer.state_dict()
    assert sum(x.nbytes for x in saved["data"].values()) < 1000 and saved["count"] == 10
    torch.save(saved, "buffer.pt")
    assert pathlib.Path("buffer.pt").stat().st_size < 10_000
    other.load_state_dict(torch.load("buffer.pt", weights_only=True))
    results = []
    for one in (buffer, other):
        torch.manual_seed(0)
        results.append(one.sample(50, 0.9, 2, 0.5))
    assert same(*results) and same(buffer.state_dict(), other.state_dict())


@pytest.mark.parametrize("name", ["dqn", "ddpg", "naf"])
@pytest.mark.parametrize("num_envs", [2, 8])
def test_a_full_buffer_of_other_environments_is_refused(name, num_envs):
    module = importlib.import_module(name)
    settings = small(name, env="Pendulum-v1" if name != "dqn" else "CartPole-v1", num_envs=4,
                     run_dir="run", buffer_size=64, total_timesteps=256)
    module.train(module.Args(**settings))
    with pytest.raises(module.UserError, match="its buffer is"):  # as many numbers, other rows
        module.train(module.Args(**settings | dict(num_envs=num_envs)), "run")


def test_two_resumes_of_a_run_with_every_option_are_alike_to_the_last_bit(states):
    settings = dict(prioritized=True, n_step=3, dueling=True, exploration="boltzmann", anneal=True)
    train("CartPole-v1", run_dir="run", total_timesteps=320, **settings)
    shutil.copytree("run", "copy")
    runs = [dqn.train(arguments("CartPole-v1", run_dir=folder, **settings), folder)
            for folder in ("run", "copy")]
    assert same(timeless(runs[0][1]), timeless(runs[1][1])) and runs[0][1][-1]["step"] == 512
    for name in ("agent", "target", "buffer"):
        first, *resumed = (state[name].state_dict() for state in states)
        assert same(*resumed) and not same(first, resumed[0])
    assert states[1]["buffer"].count == 128 and states[1]["buffer"].max_priority >= 1


# Priorities.


def test_priorities_1_and_3_are_drawn_once_and_three_times_in_four():
    torch.manual_seed(0)
    priorities = torch.tensor([1.0, 3.0])
    index, importance = dqn.draw_prioritized(priorities, 40_000, 1.0)
    assert index.float().mean().item() == pytest.approx(0.75, abs=0.01)
    expected = torch.tensor([1.0, 1 / 3])  # 1 / (2 * 1/4) and 1 / (2 * 3/4), over the highest
    assert torch.allclose(importance, expected[index])
    index, importance = dqn.draw_prioritized(priorities, 40_000, 0.5)
    assert torch.allclose(importance, expected[index].sqrt())
    _, importance = dqn.draw_prioritized(priorities, 40_000, 0.0)
    assert (importance == 1).all()
    # One draw in each quarter of the sum: exactly one of four draws is the first.
    for _ in range(50):
        index, importance = dqn.draw_prioritized(priorities, 4, 1.0)
        assert index.tolist() == [0, 1, 1, 1]


def test_draws_are_in_proportion_to_the_priorities_and_never_take_a_0():
    torch.manual_seed(0)
    priorities = torch.tensor([0.0, 2, 0, 5, 0.5, 0, 2.5, 0])
    index, importance = dqn.draw_prioritized(priorities, 100_000, 0.7)
    frequencies = index.bincount(minlength=8) / 100_000
    assert torch.allclose(frequencies, priorities / 10, atol=1e-3)
    raw = (8 * priorities[index] / 10) ** -0.7
    assert torch.allclose(importance, raw / raw.max())
    for _ in range(200):
        assert priorities[dqn.draw_prioritized(priorities, 1, 1.0)[0]] > 0


def test_priorities_far_smaller_than_their_sum_are_all_drawn():
    priorities = torch.ones(100_000)
    priorities[0] = 1e8  # in single precision, sums would now be multiples of 8
    torch.manual_seed(0)
    index, _ = dqn.draw_prioritized(priorities, 1_000_000, 1.0)
    assert (index > 0).float().mean().item() == pytest.approx(1e-3, rel=0.1)
    assert len((index[index > 0] % 8).unique()) == 8


def test_a_draw_at_the_very_edge_takes_no_priority_of_0(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: torch.zeros(*size, **kwargs))
    index, _ = dqn.draw_prioritized(torch.tensor([0.0, 1.0, 0.0, 1.0]), 2, 1.0)
    assert index.tolist() == [1, 3]
    largest = torch.tensor(1 - 2**-53, dtype=torch.double)
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: largest.expand(size))
    assert dqn.draw_prioritized(torch.ones(2), 128, 1.0)[0].max() == 1


def test_new_transitions_have_the_highest_priority_and_used_ones_that_of_their_error():
    rows = episodes(6, 2)
    buffer = filled(rows[:3], 100)
    priorities = buffer.data["priorities"]
    assert (priorities[:3] == 1).all() and not priorities[3:].any()
    buffer.update_priorities(torch.tensor([0, 3]), torch.tensor([-4.0, 0.0]), 0.5)
    assert priorities[:2].flatten().tolist() == pytest.approx([2, 1, 1, 1e-3])
    buffer.add(*(x.unsqueeze(0) for x in rows[3].values()))
    assert torch.allclose(priorities[3], torch.tensor(2.0))
    buffer.update_priorities(torch.tensor([0]), torch.tensor([0.25]), 0.5)
    buffer.add(*(x.unsqueeze(0) for x in rows[4].values()))
    assert torch.allclose(priorities[4], torch.tensor(2.0))  # the highest ever seen
    assert torch.allclose(priorities[0, 0], torch.tensor(0.5))


def test_training_draws_by_priority_and_sets_priorities_by_the_error_after_each_update(spy):
    sampled, calls = spy(ReplayBuffer, "sample"), spy(dqn, "td_target")
    prioritized = spy(ReplayBuffer, "update_priorities")
    agent, _ = train("CartPole-v1", prioritized=True, learning_rate=0, alpha=0.7, beta=0.4,
                     total_timesteps=640)
    assert len(prioritized) == len(sampled) == len(calls)
    for sample, call, given in zip(sampled, calls, prioritized):
        index, obs, actions, *_ = sample["out"]
        q_values = agent.q_values(obs)[torch.arange(16), actions]
        assert torch.equal(given["indices"], index) and given["alpha"] == 0.7
        assert torch.allclose(given["td_errors"], q_values - call["out"], atol=1e-5)
    # beta rises linearly to 1: a round is 16 steps of 640.
    expected = [0.4 + 0.6 * k / 40 for k in range(1, 40) for _ in range(2)]
    assert [sample["beta"] for sample in sampled] == pytest.approx(expected)
    sampled.clear(), prioritized.clear()
    train("CartPole-v1", total_timesteps=64)
    assert all(sample["beta"] is None for sample in sampled) and not prioritized


# Settings.


@pytest.mark.parametrize("changes, words", [
    (dict(learning_starts=600), ["learning_starts is 600", "512", "pass --learning-starts 51"]),
    (dict(buffer_size=15), ["buffer_size is 15", "batch_size", "pass --buffer-size 16"]),
    (dict(buffer_size=39, train_every=10), ["buffer_size is 39", "pass --buffer-size 40"]),
    (dict(buffer_size=10**15), ["buffer_size is 1,000,000,000,000,000", "memory", "--buffer-size"]),
    (dict(exploration="none"), ["exploration is none", "epsilon or boltzmann"]),
    (dict(exploration_start=5), ["epsilon is a probability", "--exploration-start"]),
    (dict(exploration_end=5), ["epsilon is a probability", "--exploration-start"]),
    (dict(env="Pendulum-v1"), ["Box", "ppo"])])
def test_what_cannot_be_done_is_refused_before_anything_is_written(changes, words, tmp_path):
    with pytest.raises(dqn.UserError) as error:
        train(**dict(env="CartPole-v1", run_dir="run") | changes)
    assert all(word in str(error.value) for word in words) and not list(tmp_path.iterdir())


def test_atari_trains_on_bytes(spy):
    pytest.importorskip("ale_py")
    calls = spy(ReplayBuffer, "sample")
    agent, _ = train("ALE/Pong-v5", num_envs=2, total_timesteps=48, batch_size=8, num_updates=1)
    assert all(value.isfinite().all() for value in agent.state_dict().values())
    _, obs, _, next_obs, *_ = calls[-1]["out"]
    assert obs.shape == next_obs.shape == (8, 4, 84, 84) and obs.dtype == torch.uint8
    assert torch.equal(obs[:, 1:], next_obs[:, :-1])  # a stack of frames moves on by one


# Learning.


@pytest.mark.parametrize("changes", [
    dict(), dict(double=True, dueling=True, prioritized=True, n_step=3, target_every=0, tau=0.05),
    dict(exploration="boltzmann")])
def test_the_arm_that_pays_has_value_1_and_the_other_0(changes):
    agent, history = train("probes:Arms-v0", total_timesteps=2048, learning_rate=1e-2, **changes)
    q_values = agent.q_values(torch.zeros(1, 1)).flatten().tolist()
    assert q_values == pytest.approx([0, 1], abs=0.1)


def test_returns_are_raw():
    agent, history = train("probes:Constant-v0")
    assert {row["episode_return"] for row in history[1:]} == {50.0}


def test_values_of_a_chain_are_the_discounted_sums_to_its_end():
    agent, _ = train("probes:Counter-v0", total_timesteps=3200, learning_rate=3e-3, gamma=0.5,
                     hidden_size=32, anneal=True, target_every=64, exploration_end=1)
    q_values = agent.q_values(torch.arange(5.0).unsqueeze(-1)).mean(-1).tolist()
    assert q_values == pytest.approx([1.9375, 1.875, 1.75, 1.5, 1.0], abs=0.15)


def test_cartpole_is_learned_within_10_thousand_steps():
    args = Args(env="CartPole-v1", total_timesteps=10_000, seed=1, device="cpu", hidden_size=64)
    agent, _ = dqn.train(args)
    # A random policy gets 22.
    assert dqn.evaluate(agent, args, 20).mean() > 50
