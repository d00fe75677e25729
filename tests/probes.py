"""Environments whose right answers are known beforehand.

Each observes the number of steps in its episode, in whatever form its space has."""
import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Tuple

COUNT = Box(0, np.inf, (1,), np.float32)


class Probe(gym.Env):
    """After `length` steps, or one of several, an episode `ends` as (terminated, truncated).

    `raise_after` and `nan_after` count the steps of all episodes. The reward is a constant or a
    function of the action. Actions that are not in the space are refused."""

    metadata = {"render_modes": []}

    def __init__(self, obs_space=COUNT, action_space=Discrete(2), length=5, ends=(True, False),
                 reward=1.0, raise_after=np.inf, nan_after=np.inf):
        self.observation_space, self.action_space = obs_space, action_space
        self.lengths, self.ends, self.reward = np.atleast_1d(length), ends, reward
        self.raise_after, self.nan_after, self.steps, self.all_steps = raise_after, nan_after, 0, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        self.length = self.np_random.choice(self.lengths)
        return observe(self.observation_space, self.steps), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.steps, self.all_steps = self.steps + 1, self.all_steps + 1
        if self.all_steps > self.raise_after:
            raise RuntimeError("the probe\nbroke")
        reward = self.reward(action) if callable(self.reward) else self.reward
        reward = np.nan if self.all_steps > self.nan_after else reward
        ends = self.ends if self.steps >= self.length else (False, False)
        return observe(self.observation_space, self.steps), reward, *ends, {}


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


class Misshapen(Probe):
    """From the 60th step on, its observations have another shape than they should."""

    def step(self, action):
        obs, *rest = super().step(action)
        return np.zeros(3, np.float32) if self.all_steps >= 60 else obs, *rest


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
    "Constant": dict(reward=10.0),
    "Uneven": dict(length=(1, 9)),
    "Arms": dict(length=1, reward=float),  # a bandit: arm 1 pays 1, arm 0 nothing
    "Target": dict(length=1, action_space=UNBOUNDED, reward=lambda a: -((a - 1) ** 2).sum()),
    "Raises": dict(raise_after=60),
    "NaNReward": dict(nan_after=60),
    "Start": dict(action_space=Discrete(3, start=5)),
    "Bounds": dict(action_space=BOUNDS, reward=lambda a: float(a.sum())),  # says what was executed
    "Halves": dict(action_space=Box(-0.1, 0.3, (2,), np.float16)),  # neither bound is a half
    "Unbounded": dict(action_space=UNBOUNDED),
    "WholeFirst": dict(length=3),
    "Misshapen": dict(),
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
    kind = dict(Reusing=Reusing, WholeFirst=WholeFirst, Misshapen=Misshapen).get(name, Probe)
    gym.register(f"{name}-v0", kind, kwargs=settings, disable_env_checker=True)
    if "action_space" not in settings:  # and the same for those who take no discrete actions
        gym.register(f"Box{name}-v0", kind, kwargs=settings | dict(action_space=BOUNDS),
                     disable_env_checker=True)
