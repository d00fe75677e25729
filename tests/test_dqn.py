"""DQN against independent oracles: definitions, loops, streams of episodes, numbers by hand."""
import dataclasses
import importlib
import pathlib
import shutil

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import same, small, timeless

import dqn
from dqn import Agent, Args, ReplayBuffer

COUNT = gym.spaces.Box(0, np.inf, (1,), np.float32)
DEFAULTS = {field.name: field.default for field in dataclasses.fields(Args)}


def arguments(env, **changes):
    """A short run without presets or annealing, which would hide the numbers."""
    return Args(**DEFAULTS | small("dqn", anneal=False, env=env) | changes)


def train(env, **changes):
    return dqn.train(arguments(env, **changes))


@pytest.fixture
def states(monkeypatch):
    """What each Run was given to keep: agent, target, optimizer, buffer."""
    states, init = [], dqn.Run.__init__
    monkeypatch.setattr(dqn.Run, "__init__", lambda self, *args, **state: (
        states.append(state), init(self, *args, **state))[1])
    return states


# Targets.


@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("env, goes_on", [
    ("probes:Truncated-v0", 1), ("probes:Terminated-v0", 0), ("probes:Both-v0", 0)])
def test_a_truncation_bootstraps_from_the_true_last_observation_a_termination_does_not(
        env, goes_on, n_step, spy):
    calls = spy(dqn, "td_target")
    agent, _ = train(env, learning_rate=0, n_step=n_step, gamma=0.9)  # Q stays what it was
    start, end = agent.q_values(torch.tensor([[0.0], [1.0]])).amax(-1).tolist()
    assert abs(start - end) > 1e-3  # else the reset observation would pass for the last one
    for call in calls:
        expected = torch.full_like(call["out"], 2 + goes_on * 0.9 * end)
        assert torch.allclose(call["out"], expected, atol=1e-5)


def test_one_network_chooses_and_the_other_values():
    next_q_values = torch.tensor([[1.0, 5.0, 2.0], [4.0, -1.0, 0.0]])
    choosing = torch.tensor([[9.0, 1.0, 3.0], [0.0, 2.0, 7.0]])
    returns, discounts = torch.tensor([10.0, 20.0]), torch.tensor([0.5, 0.25])
    targets = dqn.td_target(returns, discounts, next_q_values, choosing)
    assert targets.tolist() == [10.5, 20.0]
    targets = dqn.td_target(returns, discounts, next_q_values, next_q_values)
    assert targets.tolist() == [12.5, 21.0]
    assert dqn.td_target(returns, 0 * discounts, next_q_values, choosing).tolist() == [10, 20]


@pytest.mark.parametrize("double", [True, False])
def test_if_double_the_network_chooses_what_the_target_network_values(double, states, spy,
                                                                     monkeypatch):
    q_values = Agent.q_values

    def disagree(self, obs):  # the target network prefers action 1, the other one action 0
        return q_values(self, obs) + torch.tensor(
            [0.0, 100.0] if self is states[0]["target"] else [100.0, 0.0])

    monkeypatch.setattr(Agent, "q_values", disagree)
    calls = spy(dqn, "td_target")
    train("CartPole-v1", double=double, total_timesteps=64)
    assert calls
    for call in calls:
        assert (call["next_q_values"].argmax(-1) == 1).all()
        assert (call["choosing_q_values"].argmax(-1) == (0 if double else 1)).all()
        assert not call["choosing_q_values"].requires_grad and not call["out"].requires_grad


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
    assert torch.equal(*seen[0])  # both begin alike


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
    _, obs, actions, _, _, _, importance = sampled[-1]["out"]
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


def test_the_step_size_falls_linearly_to_0(monkeypatch):
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
    for b in range(5):  # the mean over actions is V; differences are those of the advantages
        assert q_values[b].mean().item() == pytest.approx(outputs[b, 0].item(), abs=1e-6)
        assert torch.allclose(q_values[b] - q_values[b, 0], outputs[b, 1:] - outputs[b, 1])
    with torch.no_grad():
        agent.q_network[-1].bias[1:] += 7.0
        assert torch.allclose(agent.q_values(obs), q_values, atol=1e-5)
        agent.q_network[-1].bias[0] += 7.0
        assert torch.allclose(agent.q_values(obs), q_values + 7, atol=1e-5)


# Exploration.


Q = torch.tensor([1.0, 3.0, 2.0, 0.0])


def test_scaled_observations_have_their_bounds_at_1_and_without_bounds_stay_as_they_are():
    space = gym.spaces.Box(np.array([-1.2, -0.07, -np.inf, 0, 3], np.float32),
                           np.array([0.6, 0.07, 5, np.inf, 3], np.float32))
    scale = dqn.Scale(space)
    corners = torch.tensor([[-1.2, -0.07, 2, 8, 3], [0.6, 0.07, -9, 0, 4]])
    expected = torch.tensor([[-1, -1, 2, 8, 3], [1, 1, -9, 0, 4]]).float()
    torch.testing.assert_close(scale(corners), expected)
    agent = Agent(space, gym.spaces.Discrete(2), arguments("x", scale_obs=True))
    assert isinstance(agent.encoder, dqn.Scale)
    torch.testing.assert_close(agent.q_values(corners), agent.q_network(expected))


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
def test_epsilon_greedy_takes_any_action_with_probability_epsilon(level):
    torch.manual_seed(0)
    noise = dqn.draw_noise((500, 100, 4), "epsilon", level, "cpu")
    actions = (Q + noise).argmax(-1)
    frequencies = actions.flatten().bincount(minlength=4) / 50_000
    expected = level / 4 + (1 - level) * torch.tensor([0.0, 1, 0, 0])
    assert torch.allclose(frequencies, expected, atol=0.01)
    # Each environment has a draw of its own: in a row some explore and some do not.
    p, spread = 0.75 * level, (actions != 1).float().mean(-1).std().item()
    assert spread == pytest.approx(np.sqrt(p * (1 - p) / 100), abs=0.01)


@pytest.mark.parametrize("level", [0.0, 0.5, 2.0])
def test_boltzmann_draws_from_the_softmax_at_its_temperature(level):
    torch.manual_seed(0)
    noise = dqn.draw_noise((50_000, 1, 4), "boltzmann", level, "cpu")
    frequencies = (Q + noise).argmax(-1).flatten().bincount(minlength=4) / 50_000
    expected = (Q / level).softmax(-1) if level else torch.tensor([0.0, 1, 0, 0])
    assert torch.allclose(frequencies, expected, atol=0.01)


@pytest.mark.parametrize("exploration", ["epsilon", "boltzmann"])
def test_exploration_is_uniform_before_learning_and_then_falls_linearly(exploration, spy):
    noises, acts = spy(dqn, "draw_noise"), spy(Agent, "act")
    train("CartPole-v1", exploration=exploration, exploration_start=0.9, exploration_end=0.1,
          exploration_fraction=0.5, learning_starts=32, total_timesteps=640)
    levels = [call["level"] for call in noises]
    assert len(levels) == 40 and min(levels[:2]) >= 1e9  # any action, whatever Q is
    expected = [0.9 - 0.8 * min(1, 2 * k / 40) for k in range(2, 40)]
    assert levels[2:] == pytest.approx(expected)
    assert levels[20:] == pytest.approx([0.1] * 20)  # from the middle of the run on
    given = torch.cat([call["out"].flatten(0, 1) for call in noises])
    assert torch.equal(torch.cat([call["noise"] for call in acts]), given)


def test_the_mode_ignores_the_noise_and_the_noise_changes_actions():
    args = arguments("CartPole-v1")
    torch.manual_seed(0)
    agent = Agent(COUNT, gym.spaces.Discrete(3), args)
    obs = torch.arange(6.0).unsqueeze(-1)
    best = agent.q_values(obs).argmax(-1)
    noise = torch.zeros(6, 3).scatter_(1, (best.unsqueeze(-1) + 1) % 3, 1e9)
    assert torch.equal(agent.act(obs, deterministic=True, noise=noise), best)
    assert torch.equal(agent.act(obs), best)
    assert torch.equal(agent.act(obs, noise=noise), (best + 1) % 3)


# The replay buffer.


def episodes(T, N, frame_stack=0):
    """Streams of episodes of random lengths, each ended in one of three ways: by a termination, by
    a time limit, or by a reset of all environments, as a checkpoint does. Every observation has a
    number of its own, or is a stack of frames of bytes, black where there are none before."""
    dice, rows, number = np.random.default_rng(0), [], 0
    fresh = torch.ones(N)
    obs = [None] * N

    def observation(n, begins):
        nonlocal number
        number += 1
        if not frame_stack:
            return torch.tensor([float(number)])
        frame = torch.from_numpy(dice.integers(1, 256, (1, 2, 3), np.uint8))
        before = torch.zeros(frame_stack, 2, 3, dtype=torch.uint8) if begins else obs[n]
        return torch.cat([before[1:], frame])

    for t in range(T):
        for n in range(N):
            obs[n] = observation(n, True) if fresh[n] else obs[n]
        terminations = torch.from_numpy((dice.random(N) < 0.15).astype(np.float32))
        truncations = torch.from_numpy((dice.random(N) < 0.15).astype(np.float32))
        next_obs = [observation(n, False) for n in range(N)]
        rows.append(dict(
            obs=torch.stack(obs), begins=fresh, actions=torch.from_numpy(dice.integers(0, 9, N)),
            next_obs=torch.stack(next_obs), rewards=torch.from_numpy(
                dice.random(N).astype(np.float32)), terminations=terminations))
        obs, fresh = next_obs, torch.maximum(terminations, truncations)
        if t % 23 == 22:
            fresh = torch.ones(N)
    return rows


def filled(rows, size, frame_stack=1, T=3):
    """A buffer to which the rows were added, T at a time."""
    rollouts = [[torch.stack(x) for x in zip(*(row.values() for row in rows[t:t + T]))]
                for t in range(0, len(rows), T)]
    buffer = ReplayBuffer(size, frame_stack, *(x[:1] for x in rollouts[0]))
    for rollout in rollouts:
        buffer.add(*rollout)
        buffer.sample(1, 0.9, 1)  # which may not leave a trace
    return buffer


@pytest.mark.parametrize("n_step", [1, 2, 5])
@pytest.mark.parametrize("count", [7, 20, 74])  # not yet full, just full, and long since full
def test_every_sample_is_a_transition_with_n_rewards_up_to_the_end_of_its_episode(count, n_step):
    T, N, gamma = 20, 3, 0.9
    rows = episodes(count, N)
    buffer = filled(rows, T * N + 2)
    index, obs, actions, returns, next_obs, discounts, importance = buffer.sample(
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
            if k == n_step or t + k == count or rows[t + k]["begins"][n]:
                break
        assert returns[i].item() == pytest.approx(expected, rel=1e-5)
        assert next_obs[i] == last["next_obs"][n]
        bootstrap = 0 if last["terminations"][n] else gamma**k
        assert discounts[i].item() == pytest.approx(bootstrap)


@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("count", [14, 74])
def test_frames_kept_once_make_the_stacks_that_were_seen(count, n_step):
    T, N, k = 20, 3, 4
    rows = episodes(count, N, frame_stack=k)
    buffer = filled(rows, T * N, frame_stack=k)
    assert sum(x.nbytes for x in buffer.data if x.dtype == torch.uint8) == T * N * 6
    index, obs, _, _, next_obs, discounts, importance = buffer.sample(3000, 0.9, n_step)
    assert obs.shape == next_obs.shape == (3000, k, 2, 3) and 0 < importance.mean() < 1
    for i in range(3000):
        row, n = divmod(index[i].item(), N)
        t = max(t for t in range(count) if t % T == row)
        last = t
        while last < t + n_step - 1 and last + 1 < count and not rows[last + 1]["begins"][n]:
            last += 1
        back = range(t - k + 2, t + 1)
        whole = t - k + 1 >= max(0, count - T) and not any(rows[j]["begins"][n] for j in back)
        goes_on = last + 1 < count and not rows[last + 1]["begins"][n]
        terminated = bool(rows[last]["terminations"][n])
        assert importance[i] == (whole and (goes_on or terminated))
        if importance[i]:
            assert torch.equal(obs[i], rows[t]["obs"][n])
            assert terminated and discounts[i] == 0 or torch.equal(
                next_obs[i], rows[last]["next_obs"][n])


def test_a_million_stacks_of_atari_frames_fit_in_8_gigabytes():
    obs, zeros = torch.zeros(1, 8, 4, 84, 84, dtype=torch.uint8), torch.zeros(1, 8)
    buffer = ReplayBuffer(1000, 4, obs, zeros, zeros.long(), obs, zeros, zeros)
    assert 1000 * sum(x.nbytes for x in buffer.data) < 8e9


def test_training_stores_true_successors_and_what_was_done(spy):
    calls = spy(ReplayBuffer, "sample")
    train("probes:Counter-v0", checkpoint_every=128)
    for call in calls:
        _, obs, actions, returns, next_obs, discounts, _ = call["out"]
        assert torch.equal(next_obs, obs + 1) and (returns == 1).all()
        assert torch.equal(discounts == 0, obs.squeeze(-1) == 4)
        assert torch.allclose(discounts[discounts > 0], torch.tensor(0.99))
    calls.clear()
    train("probes:Arms-v0")  # whose reward is the action
    for call in calls:
        assert torch.equal(call["out"][2].float(), call["out"][3])


def test_a_reset_at_a_checkpoint_is_no_step_of_an_episode(spy):
    calls = spy(ReplayBuffer, "sample")
    train("probes:Endless-v0", checkpoint_every=64, n_step=3, gamma=0.5)
    short = 0
    for call in calls:
        _, obs, _, returns, next_obs, discounts, _ = call["out"]
        steps = (next_obs - obs).squeeze(-1)
        assert ((steps >= 1) & (steps <= 3)).all() and next_obs.max() <= 16
        assert torch.allclose(discounts, 0.5**steps)
        assert torch.allclose(returns, 2 - 2 * 0.5**steps)
        short += (steps < 3).sum()
    assert short > 0


def test_samples_are_uniform_over_what_is_filled():
    buffer = filled(episodes(10, 2), 1000)
    torch.manual_seed(0)
    index = buffer.sample(40_000, 0.9, 1)[0]
    frequencies = index.bincount() / 40_000
    assert len(frequencies) == 20 and torch.allclose(frequencies, torch.tensor(1 / 20), atol=0.006)


def test_a_buffer_saves_what_is_filled_and_loads_it():
    rows = episodes(10, 2)
    buffer, other = filled(rows, 1000), filled(rows[:1], 1000)
    saved = buffer.state_dict()
    assert sum(x.nbytes for x in saved["data"]) < 1000 and saved["count"] == 10
    torch.save(saved, "buffer.pt")
    assert pathlib.Path("buffer.pt").stat().st_size < 10_000
    other.load_state_dict(torch.load("buffer.pt", weights_only=True))
    results = []
    for one in (buffer, other):
        torch.manual_seed(0)
        results.append(one.sample(50, 0.9, 2, 0.5))
    assert same(*results)


@pytest.mark.parametrize("name", ["dqn", "ddpg", "naf"])
@pytest.mark.parametrize("num_envs", [2, 8])
def test_a_full_buffer_of_other_environments_is_refused(name, num_envs):
    module = importlib.import_module(name)
    settings = small(name, env="Pendulum-v1" if name != "dqn" else "CartPole-v1", num_envs=4,
                     run_dir="run", buffer_size=64, total_timesteps=256)
    module.train(module.Args(**settings))
    with pytest.raises(module.UserError, match="its buffer is"):  # as many numbers, other rows
        module.train(module.Args(**settings | dict(num_envs=num_envs)), "run")


def test_a_resumed_run_with_every_option_is_the_run_that_never_stopped(monkeypatch):
    save, kept = dqn.Run.save, []

    def keep(self):
        save(self)
        shutil.copytree(self.folder, f"copy{self.step}", dirs_exist_ok=True)

    settings = dict(prioritized=True, n_step=3, dueling=True, exploration="boltzmann",
                    checkpoint_every=200, total_timesteps=640)
    monkeypatch.setattr(dqn.Run, "save", keep)
    whole, history = train("CartPole-v1", run_dir="whole", **settings)
    monkeypatch.setattr(dqn.Run, "save", save)
    copies = sorted(path.name for path in pathlib.Path().glob("copy*"))
    assert copies == ["copy0", "copy208", "copy400", "copy608", "copy640"]
    for copy in copies[1:4]:
        args = arguments("CartPole-v1", run_dir=copy, **settings)
        agent, resumed = dqn.train(args, copy)
        assert same(agent.state_dict(), whole.state_dict())
        assert same(timeless(resumed), timeless(history))


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
    # One point in each quarter of the sum: of four draws one is of the first, always.
    for _ in range(50):
        index, importance = dqn.draw_prioritized(priorities, 4, 1.0)
        assert index.tolist() == [0, 1, 1, 1]


def test_draws_follow_the_priorities_wherever_they_lie_and_never_take_a_0():
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
    priorities[0] = 1e8  # in single precision sums would now go on in steps of 8
    torch.manual_seed(0)
    index, _ = dqn.draw_prioritized(priorities, 1_000_000, 1.0)
    assert (index > 0).float().mean().item() == pytest.approx(1e-3, rel=0.1)
    assert len((index[index > 0] % 8).unique()) == 8


def test_a_draw_at_the_very_edge_takes_no_priority_of_0(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: torch.zeros(*size, **kwargs))
    index, _ = dqn.draw_prioritized(torch.tensor([0.0, 1.0, 0.0, 1.0]), 2, 1.0)
    assert index.tolist() == [1, 3]


def test_new_transitions_have_the_highest_priority_and_used_ones_that_of_their_error():
    rows = episodes(6, 2)
    buffer = filled(rows[:3], 100)
    priorities = buffer.data[-1]
    assert (priorities[:3] == 1).all() and not priorities[3:].any()
    buffer.prioritize(torch.tensor([0, 3]), torch.tensor([-4.0, 0.0]), 0.5)
    assert priorities[:2].flatten().tolist() == pytest.approx([2, 1, 1, 1e-3])
    buffer.add(*(x.unsqueeze(0) for x in rows[3].values()))
    assert torch.allclose(priorities[3], torch.tensor(2.0))
    buffer.prioritize(torch.tensor([0]), torch.tensor([0.25]), 0.5)
    buffer.add(*(x.unsqueeze(0) for x in rows[4].values()))
    assert torch.allclose(priorities[4], torch.tensor(2.0))  # the highest ever seen
    assert torch.allclose(priorities[0, 0], torch.tensor(0.5))


def test_training_draws_by_priority_and_sets_priorities_by_the_error_after_each_update(spy):
    sampled, calls = spy(ReplayBuffer, "sample"), spy(dqn, "td_target")
    prioritized = spy(ReplayBuffer, "prioritize")
    agent, _ = train("CartPole-v1", prioritized=True, learning_rate=0, alpha=0.7, beta=0.4,
                     total_timesteps=640)
    assert len(prioritized) == len(sampled) == len(calls)
    for sample, call, given in zip(sampled, calls, prioritized):
        index, obs, actions, *_ = sample["out"]
        q_values = agent.q_values(obs)[torch.arange(16), actions]
        assert torch.equal(given["index"], index) and given["alpha"] == 0.7
        assert torch.allclose(given["td_errors"], q_values - call["out"], atol=1e-5)
    # beta rises from its start in steps of a fortieth of the way: a round is 16 steps of 640.
    expected = [0.4 + 0.6 * k / 40 for k in range(1, 40) for _ in range(2)]
    assert [sample["beta"] for sample in sampled] == pytest.approx(expected)
    sampled.clear(), prioritized.clear()
    train("CartPole-v1", total_timesteps=64)
    assert all(sample["beta"] is None for sample in sampled) and not prioritized


def test_what_cannot_be_learnt_from_is_not_drawn_for_its_error(spy):
    pytest.importorskip("ale_py")
    sampled, prioritized = spy(ReplayBuffer, "sample"), spy(ReplayBuffer, "prioritize")
    train("ALE/Pong-v5", prioritized=True, frame_stack=4, total_timesteps=96)
    importance = torch.cat([sample["out"][-1] for sample in sampled])
    td_errors = torch.cat([given["td_errors"] for given in prioritized])
    assert torch.equal(td_errors == 0, importance == 0)
    assert 0.02 < (importance == 0).float().mean() < 0.5  # the first frames of each episode


@pytest.mark.parametrize("env, frame_stack", [("ALE/Pong-v5", 2), ("probes:ImageFirst-v0", 3)])
def test_stacks_of_other_frames_are_refused(env, frame_stack):
    if env.startswith("ALE"):
        pytest.importorskip("ale_py")
    with pytest.raises(dqn.UserError, match=f"frame_stack is {frame_stack}"):
        train(env, frame_stack=frame_stack)


# Settings.


@pytest.mark.parametrize("changes, words", [
    (dict(learning_starts=600), ["learning_starts", "600", "512"]),
    (dict(buffer_size=15), ["buffer_size", "15", "batch_size"]),
    (dict(buffer_size=10**12), ["buffer_size", "1,000,000,000,000", "56,000,000,000,000 bytes"]),
    (dict(frame_stack=4, env="probes:ImageFirst-v0"), ["frame_stack", "4"]),
    (dict(frame_stack=4), ["frame_stack", "4"]),  # four numbers are no four frames
    (dict(exploration="none"), ["exploration", "epsilon, boltzmann"]),
    (dict(env="Pendulum-v1"), ["Box", "ddpg, naf"])])
def test_what_cannot_be_done_is_refused_before_anything_is_written(changes, words, tmp_path):
    with pytest.raises(dqn.UserError) as error:
        train(**dict(env="CartPole-v1", run_dir="run") | changes)
    assert all(word in str(error.value) for word in words) and not list(tmp_path.iterdir())


def test_the_buffer_tells_its_bytes(capsys):
    train("CartPole-v1", buffer_size=1000)  # of 56 bytes each
    assert "replay buffer: 1,000 transitions, 0.1 MB" in capsys.readouterr().out


def test_atari_trains_on_stacks_made_of_single_frames(spy):
    pytest.importorskip("ale_py")
    calls = spy(ReplayBuffer, "sample")
    agent, _ = train("ALE/Pong-v5", frame_stack=4, num_envs=2, total_timesteps=96, batch_size=8,
                     num_updates=1, prioritized=True)
    assert all(value.isfinite().all() for value in agent.state_dict().values())
    assert calls[-1]["out"][1].shape == (8, 4, 84, 84)
    assert calls[-1]["out"][1].dtype == torch.uint8 and calls[-1]["out"][-1].max() > 0


# Learning.


@pytest.mark.parametrize("changes", [
    dict(), dict(double=True, dueling=True, prioritized=True, n_step=3, target_every=0, tau=0.05),
    dict(exploration="boltzmann")])
def test_the_arm_that_pays_is_worth_1_and_the_other_0(changes):
    agent, history = train("probes:Arms-v0", total_timesteps=2048, learning_rate=1e-2, **changes)
    q_values = agent.q_values(torch.zeros(1, 1)).flatten().tolist()
    assert q_values == pytest.approx([0, 1], abs=0.1)


def test_returns_are_raw():
    agent, history = train("probes:Constant-v0")
    assert {row["episode_return"] for row in history} == {50.0}


def test_values_of_a_chain_are_the_discounted_sums_to_its_end():
    agent, _ = train("probes:Counter-v0", total_timesteps=4096, learning_rate=3e-3, gamma=0.5,
                     hidden_size=32, anneal=True, target_every=64)
    q_values = agent.q_values(torch.arange(5.0).unsqueeze(-1)).mean(-1).tolist()
    assert q_values == pytest.approx([1.9375, 1.875, 1.75, 1.5, 1.0], abs=0.15)


def test_cartpole_is_learnt_within_10_thousand_steps():
    args = Args(env="CartPole-v1", total_timesteps=10_000, seed=1, device="cpu", hidden_size=64)
    agent, _ = dqn.train(args)
    # A random policy gets 22.
    assert dqn.evaluate(agent, args, 20).mean() > 50
