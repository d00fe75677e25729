"""Environments whose right answers are known beforehand.

Each observes the number of steps in its episode, in whatever form its space has."""
import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Tuple

COUNT = Box(0, np.inf, (1,), np.float32)


class Probe(gym.Env):
    """After `length` steps, or one of several, an episode `ends` as (terminated, truncated).

    From step `fail_after` on, counted over all episodes, a step has the flaw `fail`: it raises, or
    the reward or the observation is wrong. The observation at the end of an episode is multiplied
    by `last`. The reward is a constant or a function of the action. An action that is no member of
    the action space is refused."""

    metadata = {"render_modes": []}

    def __init__(self, obs_space=COUNT, action_space=Discrete(2), length=5, ends=(True, False),
                 reward=1.0, last=1, fail=None, fail_after=60):
        self.observation_space, self.action_space = obs_space, action_space
        self.lengths, self.ends, self.reward = np.atleast_1d(length), ends, reward
        self.last, self.fail, self.fail_after = last, fail, fail_after
        self.steps, self.all_steps = 0, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        self.length = self.np_random.choice(self.lengths)
        return observe(self.observation_space, self.steps), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.steps, self.all_steps = self.steps + 1, self.all_steps + 1
        obs = observe(self.observation_space, self.steps)
        reward = self.reward(action) if callable(self.reward) else self.reward
        ends = self.ends if self.steps >= self.length else (False, False)
        if any(ends) and self.last != 1:
            obs = obs * self.last
        if self.fail and self.all_steps >= self.fail_after:
            obs, reward = self.fail(obs, reward)
        return obs, reward, *ends, {}


def broken(obs, reward):
    raise RuntimeError("the probe\nbroke")


class Reusing(Probe):
    """Writes every observation into the array that it returned before, as one may."""

    def reset(self, **kwargs):
        obs, info = super().reset(**kwargs)
        self.array = getattr(self, "array", obs)
        self.array[:] = obs
        return self.array, info

    def step(self, action):
        self.array[:], *rest = super().step(action)
        return self.array, *rest


class WholeFirst(Probe):
    """Begins with whole numbers and goes on in halves, so that their arrays differ in kind."""

    def reset(self, **kwargs):
        obs, info = super().reset(**kwargs)
        return obs.astype(int), info

    def step(self, action):
        obs, *rest = super().step(action)
        return obs / 2, *rest


class Single(Probe):
    """Only one may be open at a time."""

    opened = 0

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        if Single.opened:
            raise RuntimeError("another one is open")
        Single.opened += 1
        self.closed = False

    def close(self):
        Single.opened -= not self.closed
        self.closed = True


class Unclosable(Probe):
    def close(self):
        raise RuntimeError("it does not close")


class Alternating(Probe):
    """Every other environment ends after one step, the rest after `length`; counts all steps."""

    made = total_steps = 0

    def __init__(self, length, **kwargs):
        super().__init__(length=length if Alternating.made % 2 else 1, **kwargs)
        Alternating.made += 1

    def step(self, action):
        Alternating.total_steps += 1
        return super().step(action)


def observe(space, steps):
    if isinstance(space, Dict):
        return {key: observe(space[key], steps) for key in space}
    if isinstance(space, Tuple):
        return tuple(observe(part, steps) for part in space)
    if isinstance(space, Discrete):
        return np.int64(space.start + steps % space.n)
    if space.dtype == np.uint8:
        # One bright pixel tells the axes apart: channel 1, row `steps`, column 3.
        frame = np.zeros(space.shape, np.uint8)
        frame[(1, steps, 3) if space.shape[0] < space.shape[2] else (steps, 3, 1)] = 255
        return frame
    return np.full(space.shape, steps, space.dtype)


def image(*shape):
    return Box(0, 255, shape, np.uint8)


VECTORS = Dict(position=Box(-9, 9, (2, 2), np.float64), kind=Discrete(7, start=3))
BOUNDS = Box(np.array([-1, 0], np.float32), np.array([2, 10], np.float32))
UNBOUNDED = Box(-np.inf, np.inf, (2,), np.float32)
FOREVER = dict(length=np.inf)

for name, settings in {
    "Counter": dict(),
    "Reusing": dict(reward=np.ones(1)),
    "Terminated": dict(length=1, ends=(True, False), reward=2.0),
    "Truncated": dict(length=1, ends=(False, True), reward=2.0),
    "Both": dict(length=1, ends=(True, True), reward=2.0),
    "Truncated3": dict(length=3, ends=(False, True)),
    "Endless": FOREVER,
    "Long": dict(length=40),
    "Constant": dict(reward=10.0),
    "Uneven": dict(length=(1, 9)),
    "Arms": dict(length=1, reward=float),  # a bandit: arm 1 pays 1, arm 0 nothing
    "Target": dict(length=1, action_space=UNBOUNDED, reward=lambda a: -((a - 1) ** 2).sum()),
    "Raises": dict(fail=broken),
    "NaNReward": dict(fail=lambda obs, reward: (obs, np.nan)),
    "HugeReward": dict(fail=lambda obs, reward: (obs, 1e39)),  # which is infinite in float32
    "NaNObs": dict(fail=lambda obs, reward: (obs * np.nan, reward)),
    "NaNFirst": dict(fail=lambda obs, reward: (obs * np.nan, reward), fail_after=1),
    "NaNEnd": dict(last=np.nan),  # nothing may depend on what follows a termination
    "InfEnd": dict(last=np.inf),
    "NaNCut": dict(last=np.nan, ends=(False, True)),
    "Misshapen": dict(fail=lambda obs, reward: (np.zeros(3, np.float32), reward)),
    "TurnedTable": dict(obs_space=Box(0, 9, (8, 12), np.float32),
                        fail=lambda obs, reward: (obs.T, reward)),
    "TurnedImage": dict(obs_space=image(40, 36, 3),
                        fail=lambda obs, reward: (obs.swapaxes(0, 1), reward)),
    "Single": dict(),
    "SingleRaises": dict(fail=broken),
    "SingleMulti": dict(action_space=MultiDiscrete([2, 3])),
    "Unclosable": dict(),
    "Alternating": dict(length=100),
    "Start": dict(action_space=Discrete(3, start=-1, dtype=np.int32)),
    "Structured": dict(obs_space=VECTORS, action_space=Discrete(3, start=-1, dtype=np.int32)),
    "Bounds": dict(action_space=BOUNDS, reward=lambda a: float(a.sum())),  # says what was executed
    "Halves": dict(action_space=Box(-0.1, 0.3, (2,), np.float16)),  # neither bound is a half
    "Unbounded": dict(action_space=UNBOUNDED),
    "WholeFirst": dict(length=3),
    "Sequence": dict(obs_space=gym.spaces.Sequence(COUNT)),
    "Multi": dict(action_space=MultiDiscrete([2, 3])),
    "Integers": dict(action_space=Box(0, 4, (2,), np.int64)),
    "Dict": dict(obs_space=VECTORS),
    "Tuple": dict(obs_space=Tuple([COUNT, Discrete(7)])),
    "DiscreteObs": dict(obs_space=Discrete(7)),
    "ImageFirst": dict(obs_space=image(3, 36, 40)),
    "ImageLast": dict(obs_space=image(36, 40, 3)),
    "BoxImage": dict(obs_space=image(36, 40, 3), action_space=BOUNDS),
    "BoxTarget": dict(length=1, action_space=BOUNDS,
                      reward=lambda a: -(a[0] - 1.5) ** 2 - ((a[1] - 3) / 5) ** 2),
}.items():
    kind = dict(Reusing=Reusing, WholeFirst=WholeFirst, Single=Single, SingleRaises=Single,
                SingleMulti=Single, Unclosable=Unclosable, Alternating=Alternating).get(name, Probe)
    gym.register(f"{name}-v0", kind, kwargs=settings, disable_env_checker=True)
    if "action_space" not in settings:  # and the same for those who take no discrete actions
        gym.register(f"Box{name}-v0", kind, kwargs=settings | dict(action_space=BOUNDS),
                     disable_env_checker=True)
