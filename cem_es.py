# SPDX-License-Identifier: MIT
"""Policy search without gradients: the cross-entropy method (CEM) and evolution strategies (ES).

A population of policies is drawn around a mean. Each plays one episode; only its return, the
fitness, is used. CEM fits mean and sigma to the best policies. ES moves the mean along an estimate
of the gradient of the expected fitness.

(1)  samples = mean + sigma * noise, with noise ~ N(0, 1) for each parameter
(2)  CEM: mean = E[elites]
     sigma = max(sqrt(Var[elites] + extra_noise * remaining), min_sigma)
     elites are the best elite_fraction of the samples; remaining falls from 1 to 0 over the run
(3)  ES: gradient = E[centered_ranks(fitness) * noise] / sigma - weight_decay * mean, given to Adam
     the noise comes in antithetic pairs, noise and -noise, which play the same episode

    repeat
        draw a population of samples around the mean (1)
        play one episode with each sample, num_envs at a time; its return is the fitness
        CEM: fit mean and sigma to the elites (2)
        ES: take one Adam step on the mean along the gradient (3)

Szita and Lorincz 2006 (CEM); Salimans et al. 2017, arXiv:1703.03864 (ES). Equal returns share a
rank, so that a plateau has no gradient; most versions of ES rank them by position. An episode that
is cut off by a time limit counts with its return so far. A run plays whole generations, so it takes
up to one generation more than total_timesteps. With several processes each plays a part of the
population. All draw the same noise from a shared seed, so only the returns and lengths of episodes
and the sums for normalization travel between them.

    python cem_es.py --env CartPole-v1 --method es
"""
import argparse, collections, contextlib, csv, fnmatch, functools, io, json, math, os, pathlib
import random, re, signal, sys, time, traceback, typing
from dataclasses import dataclass, field, fields

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


# ============================================================================== Hyperparameters
def arg(default, help, low=-3e38, high=3e38):
    return field(default=default, metadata=dict(help=help, limits=[low, high]))


@dataclass(init=False)
class Args:
    # The run: the same in every script.
    env: str = arg("CartPole-v1", "environment id; module:Id imports the module first")
    total_timesteps: int = arg(1_000_000, "steps over all environments and processes", 1)
    num_envs: int = arg(64, "parallel environments in each process", 1)
    seed: int = arg(1, "seed of networks, environments and sampling", 0, 2**53)
    device: str = arg("auto", "cpu, cuda, cuda:1, ...; auto is cuda if there is one")
    threads: int = arg(1, "CPU threads of torch; one is fastest for small networks", 1)
    run_dir: str = arg("", "folder of the run; empty: a new one in runs/, from Python none")
    checkpoint_every: int = arg(0, "steps between checkpoints; 0: one a minute", 0)
    # The algorithm.
    method: typing.Literal["cem", "es"] = arg("cem", "cem (2) or es (3)")
    population: int = arg(32, "cem: policies in a generation", 2)
    pairs: int = arg(4, "es: antithetic pairs of policies in a generation", 1)
    max_episode_steps: int = arg(10_000, "longer training episodes are cut off", 1)
    hidden_size: int = arg(0, "units in each of the two hidden layers; 0: a linear policy", 0)
    norm_obs: bool = arg(True, "normalize observations by running statistics")
    init_sigma: float = arg(0.5, "cem: initial standard deviation of each parameter", 1e-8)
    elite_fraction: float = arg(0.2, "cem: fraction of the population that is elite", 0, 1)
    extra_noise: float = arg(1e-3, "cem: added to the variance (2), lowered linearly to 0", 0)
    min_sigma: float = arg(1e-3, "cem: lower bound of sigma (2)", 0)
    es_sigma: float = arg(0.05, "es: standard deviation of each parameter", 1e-8)
    learning_rate: float = arg(0.02, "es: step size of Adam", 0)
    weight_decay: float = arg(0.005, "es: weight of the L2 penalty on the mean (3)", 0)

    def __init__(self, **given):
        apply_settings(self, given)


PRESETS = {  # settings that are known to work; keys may be patterns
    "CartPole-v1": dict(total_timesteps=50_000, elite_fraction=0.3, extra_noise=1.0, es_sigma=0.5,
                        learning_rate=0.1, weight_decay=0.3),
    "InvertedPendulum-v5": dict(method="es", total_timesteps=200_000, es_sigma=0.1,
                                learning_rate=0.05),
    "MountainCarContinuous-v0": dict(method="es", total_timesteps=500_000, es_sigma=0.1),
    "HalfCheetah-v5": dict(population=16, elite_fraction=0.3, init_sigma=0.05, min_sigma=0.02),
    # With four pairs, four of ten seeds stay far below the others; with one, one does.
    "Swimmer-v5": dict(method="es", total_timesteps=2_000_000, pairs=1, norm_obs=False,
                       es_sigma=0.1)}
ACTION_SPACES = "Discrete", "Box"


# ===================================================================================== Networks
class RunningNorm(nn.Module):
    """Normalizes (..., size) by the mean and standard deviation of all that was added."""

    def __init__(self, size):
        super().__init__()
        self.mean, self.std = nn.Buffer(torch.zeros(size)), nn.Buffer(torch.ones(size))
        self.sums = nn.Buffer(torch.zeros(3, size, dtype=torch.double))  # of x^0, x^1 and x^2
        self.new_sums = nn.Buffer(torch.zeros_like(self.sums), persistent=False)

    def add(self, x):
        """Add x (B, size); this changes the mean and std only at the next update."""
        x = x.double()  # for means far from 0
        self.new_sums += torch.stack([torch.full_like(x[0], len(x)), x.sum(0), x.square().sum(0)])

    def update(self):
        if WORLD_SIZE > 1:
            torch.distributed.all_reduce(self.new_sums)
        self.sums += self.new_sums
        self.new_sums.zero_()
        mean, square = self.sums[1:] / self.sums[0]
        std = (square - mean.square()).clamp(min=0).sqrt()
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-6 * mean.abs(), std, 1))  # less is rounding error

    def forward(self, x):
        return ((x - self.mean) / self.std).clamp(-10, 10)


class Agent(nn.Module):
    """A deterministic policy, linear or with two hidden layers, with the parameters `weights` (D,).

    The weights are the mean of the population, and `sigma` is its standard deviation in CEM."""

    def __init__(self, obs_space, action_space, args):
        super().__init__()
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        inputs = obs_space.shape[0] * (64 if len(obs_space.shape) == 3 else 1)
        outputs = gym.spaces.flatdim(action_space)  # scores of actions, or actions
        self.norm = RunningNorm(inputs) if args.norm_obs else nn.Identity()
        sizes = [inputs, *[args.hidden_size] * (2 if args.hidden_size else 0), outputs]
        self.shapes = [(m, n + 1) for n, m in zip(sizes, sizes[1:])]  # the last column is the bias
        layers = [torch.randn(shape) / math.sqrt(shape[1]) for shape in self.shapes]
        layers[-1].zero_()  # at first all actions have the same score
        self.weights = nn.Parameter(torch.cat([layer.flatten() for layer in layers]))
        self.sigma = nn.Buffer(torch.full_like(self.weights.data, args.init_sigma))
        if not self.discrete:  # outputs from -1 to 1 cover the bounds
            buffer = functools.partial(nn.Buffer, persistent=False)  # bounds may be infinite
            self.low, self.high, self.center, self.scale = map(buffer, box_bounds(action_space))

    def features(self, obs):
        """Vectors as they are, images (N, C, H, W) as the means of a grid of 8 by 8 blocks."""
        return F.adaptive_avg_pool2d(obs / 255, 8).flatten(1) if obs.dim() == 4 else obs

    def layers(self, weights):
        """The layers (..., outputs, inputs + 1) of policies with the weights (..., D)."""
        parts = weights.split([m * n for m, n in self.shapes], -1)
        return [part.unflatten(-1, shape) for part, shape in zip(parts, self.shapes)]

    def policies(self, features, *layers):
        """Actions (N,) or (N, action_dim) of N policies: the i-th acts on features[i]."""
        x = self.norm(features)
        for k, layer in enumerate(layers):
            x = F.pad(x.tanh() if k else x, (0, 1), value=1.0)  # 1 is the input of the bias
            # torch.bmm would round differently for another number of policies.
            x = (layer * x.unsqueeze(-2)).sum(-1)
        return x.argmax(-1) if self.discrete else self.center + self.scale * x

    @torch.inference_mode()
    def act(self, obs, deterministic=False):
        """Actions (N,) or (N, action_dim) of the mean; they are never random."""
        actions = self.policies(self.features(obs), *self.layers(self.weights))
        return actions if self.discrete else actions.clamp(self.low, self.high)


class OneEpisode(gym.Wrapper):
    """After its episode, the environment waits until it is reset with a seed.

    Otherwise the vector environment would start another episode, whose steps would be wasted."""

    def reset(self, *, seed=None, options=None):
        self.playing = seed is not None
        self.obs, info = self.env.reset(seed=seed, options=options)
        return self.obs, info

    def step(self, action):
        if self.playing:
            return self.env.step(action)
        return self.obs, 0.0, False, False, {}


# ==================================================================================== Algorithm
def worst_if_nan(fitness):
    return torch.where(fitness.isnan(), -math.inf, fitness)


def cem(samples, fitness, num_elites, extra_noise, min_sigma):
    """Mean and sigma (D,) of the elites of the samples (population, D) (2)."""
    fitness, indices = worst_if_nan(fitness).topk(num_elites)
    elites = samples[indices[fitness > -math.inf]]
    variance = elites.var(0, correction=0)  # 0 if there is only one
    return elites.mean(0), (variance + extra_noise).sqrt().clamp(min=min_sigma)             # (2)


def centered_ranks(fitness):
    """Ranks from -1/2, the worst, to 1/2, the best; equal ones share the mean of their ranks."""
    fitness = worst_if_nan(fitness)
    worse = (fitness.unsqueeze(1) > fitness).sum(1)
    better = (fitness.unsqueeze(1) < fitness).sum(1)
    return (worse - better) / (2 * len(fitness) - 2)


def es_gradient(utilities, noise, sigma):
    """E[utilities * noise] / sigma (D,): the gradient of the expected utility by the mean (3)."""
    return utilities @ noise / len(noise) / sigma                                           # (3)


def train(args, resume=""):
    """Train a new agent, or resume the run in the folder `resume`; return (agent, history)."""
    device = setup(args)
    population = args.population if args.method == "cem" else 2 * args.pairs
    if population < WORLD_SIZE:
        raise UserError(f"{WORLD_SIZE} processes are too many for a population of {population}")
    members = torch.arange(population).tensor_split(WORLD_SIZE)[RANK]  # this process plays these
    num_envs = min(args.num_envs, len(members))
    time_limit = functools.partial(gym.wrappers.TimeLimit, max_episode_steps=args.max_episode_steps)
    envs = VecEnv(args.env, num_envs, device, [time_limit, OneEpisode])
    agent = Agent(envs.obs_space, envs.action_space, args).to(device)
    mean = agent.weights.detach()  # shares memory with the weights
    optimizer = torch.optim.Adam([agent.weights], args.learning_rate, maximize=True, fused=True)
    run = Run(args, envs, resume, agent=agent, optimizer=optimizer)
    act = cuda_graph(agent.policies, device)

    @torch.inference_mode()
    def play(samples, seeds):
        """Play one episode with each of the samples; return [return, length] of each (N, 2)."""
        envs.episodes.clear()
        unused = num_envs - len(seeds)  # environments that get no seed and wait
        layers, observed = agent.layers(F.pad(samples, (0, 0, 0, unused))), []
        envs.reset([*seeds, *[None] * unused])
        while len(envs.episodes) < len(seeds):
            features = agent.features(envs.obs)
            envs.step(act(features, *layers))
            if args.norm_obs:
                observed.append(features)
        episodes = torch.tensor(sorted(envs.episodes), dtype=torch.double, device=device)[:, 1:]
        if args.norm_obs:
            for features, length in zip(torch.stack(observed, 1), episodes[:, 1].int().tolist()):
                agent.norm.add(features[:length])  # not what followed the end
        return episodes

    while run.step < args.total_timesteps:
        run.checkpoint()
        remaining = 1 - run.step / args.total_timesteps
        sigma = agent.sigma if args.method == "cem" else torch.full_like(mean, args.es_sigma)
        rng = np.random.default_rng([args.seed, run.step])  # draws the same in all processes
        num_draws = population if args.method == "cem" else args.pairs
        noise = torch.from_numpy(rng.standard_normal((num_draws, len(mean)), np.float32)).to(device)
        seeds = torch.from_numpy(rng.integers(2**31, size=num_draws))
        if args.method == "es":  # antithetic pairs, which play the same episode
            noise, seeds = torch.cat([noise, -noise]), torch.cat([seeds, seeds])
        samples = mean + sigma * noise                                                      # (1)

        episodes = torch.zeros(population, 2, dtype=torch.double, device=device)
        for batch in members.split(num_envs):
            episodes[batch] = play(samples[batch], seeds[batch].tolist())
        if WORLD_SIZE > 1:  # a member's row is 0 in all processes but the one that played it
            torch.distributed.all_reduce(episodes)
        envs.episodes = [(i, *episode) for i, episode in enumerate(episodes.tolist())]
        fitness, lengths = episodes.unbind(1)
        run.step += int(lengths.sum())

        if args.method == "cem":
            num_elites = round(args.elite_fraction * population)
            num_elites = min(max(num_elites, 1), population - 1)  # all would be no selection
            new_mean, new_sigma = cem(samples, fitness, num_elites, args.extra_noise * remaining,
                                      args.min_sigma)                                       # (2)
            mean.copy_(new_mean), sigma.copy_(new_sigma)
        else:
            ranks = centered_ranks(fitness)
            gradient = es_gradient(ranks, noise, sigma)
            agent.weights.grad = gradient - args.weight_decay * mean                        # (3)
            # If each pair ties, Adam would follow rounding errors and the weight decay alone.
            if (ranks[:args.pairs] != ranks[args.pairs:]).any():
                optimizer.step()
        if args.norm_obs:  # only now: all members must see the same observations
            agent.norm.update()
        run.log(sigma=sigma.mean(), weight_norm=mean.norm())
    run.finish()
    return agent, run.history


# ===================================================================================== Plumbing
# The same text in all nine scripts: processes, environments, run folder and command line.

NAME = pathlib.Path(globals().get("__file__", "notebook.py")).stem
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # processes that torchrun started
RANK = int(os.environ.get("RANK", 0)) if WORLD_SIZE > 1 else 0
OPENED = []  # environments and writers, for clean_up to close
CLEAR = "\033[K" * sys.stderr.isatty()  # erases the progress line, which the cursor is on


class UserError(ValueError):
    """A mistake that the user can correct: one line on the command line, exit code 2."""


def apply_settings(args, given):
    """Given settings beat the preset of the environment, which beats the defaults."""
    env = str(given.get("env", args.env))
    preset = next((PRESETS[key] for key in PRESETS if fnmatch.fnmatchcase(env, key)), {})
    if unknown := given.keys() - {f.name for f in fields(args)}:
        raise UserError(f"{NAME} has no setting {', '.join(unknown)}")
    for f in fields(args):
        value, kind = given.get(f.name, preset.get(f.name, f.default)), type(f.default)
        (low, high), choices = f.metadata["limits"], typing.get_args(f.type)
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            new = os.fspath(value) if kind is str else kind(float(value))  # 1e5 is an int, too
            valid = new in choices if choices else kind is str or low <= new == float(value) <= high
            if valid:
                setattr(args, f.name, new)
                continue
        limits = f" >= {low:g}" * (low > -3e38) + f" and <= {high:g}" * (high < 3e38)
        wanted = " or ".join(choices) or kind.__name__ + limits
        raise UserError(f"{f.name} is {value}, but must be {wanted}")


def seed_everything(*key):
    """Seed all generators with a number made from the key; return it for the environments."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0]) >> 1
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    return seed


@contextlib.contextmanager
def clean_up():
    """On exit, close what was opened, and restore torch's threads and all random states."""
    opened, threads = len(OPENED), torch.get_num_threads()
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(states[0]), np.random.set_state(states[1])
        torch.set_num_threads(threads)
        while len(OPENED) > opened:
            with contextlib.suppress(Exception):  # it must not cost the result
                OPENED.pop().close()


def setup(args):
    """Choose the device, join the other processes, and seed the networks alike in all of them."""
    gpus = torch.cuda.device_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # per process
    name = args.device.replace("auto", "cuda" if gpus else "cpu")
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.zeros(1, dtype=torch.double, device=device).item()  # mps has no double
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UserError(f"device {name} cannot be used: {error}") from error
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))  # graphs refuse the default stream
    if WORLD_SIZE > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.set_num_threads(args.threads)
    seed_everything(args.seed)
    return device


def all_reduce_mean(tensor):
    """Average a tensor over the processes, in place."""
    if WORLD_SIZE > 1 and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
        tensor /= WORLD_SIZE


def flatten_parameters(module):
    """Make the parameters views of one vector: this saves a fifth of an update on the CPU."""
    parameters = list(module.parameters())
    vector = nn.utils.parameters_to_vector(parameters).detach()
    vector.grad = torch.zeros_like(vector)
    nn.utils.vector_to_parameters(vector, parameters)
    for p, grad in zip(parameters, vector.grad.split([p.numel() for p in parameters])):
        p.grad = grad.view_as(p)
    return vector


def cuda_graph(function, device):
    """On one GPU, replay `function` (tensors to a tensor) as a CUDA graph per set of shapes."""
    if device.type != "cuda" or WORLD_SIZE > 1:
        return function
    calls, graphs = collections.Counter(), {}

    def replay(*inputs):
        shapes = tuple(x.shape for x in inputs)
        calls[shapes] += 1
        if calls[shapes] <= 3:  # warm-up; they are real calls, too
            return function(*inputs)
        if shapes not in graphs:
            graph, static_inputs = torch.cuda.CUDAGraph(), [x.clone() for x in inputs]
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device)):
                graphs[shapes] = graph, static_inputs, function(*static_inputs)
        graph, static_inputs, output = graphs[shapes]
        for static, x in zip(static_inputs, inputs):
            static.copy_(x)
        graph.replay()
        return output.clone()

    return replay


def box_bounds(space):
    """Low, high, center and half-width of a flattened Box (size,).

    Where a bound is missing, the center is the allowed number nearest to 0, the half-width 1."""
    low, high = (torch.tensor(x, dtype=torch.float32).flatten() for x in (space.low, space.high))
    bounded = (high - low).isfinite() & (high > low)
    center = torch.where(bounded, (low + high) / 2, 0.0).clamp(low, high)
    return low, high, center, torch.where(bounded, (high - low) / 2, 1.0)


def make_env(env_id, wrappers=(), **kwargs):
    """One environment: Atari frames are preprocessed, observations that are no Box flattened."""
    env = gym.make(env_id, **kwargs, **dict(frameskip=1) if "ALE/" in env_id else {})
    OPENED.append(env)
    if "ALE/" in env_id:
        env = gym.wrappers.AtariPreprocessing(env)
        env = gym.wrappers.FrameStackObservation(env, 4, padding_type="zero")
    for wrapper in wrappers:
        env = wrapper(env)
    if not isinstance(env.observation_space, gym.spaces.Box):
        env = gym.wrappers.FlattenObservation(env)
    return env


class SyncVectorEnv(gym.vector.SyncVectorEnv):
    """gymnasium's in SAME_STEP mode, a quarter faster: it keeps no infos but `final_obs`."""

    def step(self, actions):
        results, final_obs = [], {}
        for i, (env, action) in enumerate(zip(self.envs, actions)):
            obs, reward, termination, truncation, _ = env.step(action)
            if termination or truncation:
                final_obs[i] = np.array(obs)
                obs, _ = env.reset()
            results.append((obs, float(reward), bool(termination), bool(truncation)))
        obs, *columns = zip(*results)
        return obs, *map(np.array, columns), dict(final_obs=final_obs)


class VecEnv:
    """Parallel copies of an environment, as tensors (num_envs, ...) on `device`.

    Observations are vectors, or images of bytes (C, H, W). `obs` is the one to act on,
    `episode_starts` is 1 where it is the first of an episode, and `episodes` collects
    (environment, return, length) of the episodes that end."""

    def __init__(self, env_id, num_envs, device, wrappers=(), **kwargs):
        if atari := "ALE/" in env_id:
            import ale_py  # registers them
        if atari and not kwargs and not wrappers:  # in C++ threads
            self.envs = gym.make_vec(env_id, num_envs, "vector_entry_point", use_fire_reset=False,
                                     reward_clipping=False, autoreset_mode="SameStep")
        else:
            self.envs = SyncVectorEnv([lambda: make_env(env_id, wrappers, **kwargs)] * num_envs,
                                      autoreset_mode="SameStep")
        OPENED.append(self.envs)
        space, self.action_space = self.envs.single_observation_space, self.envs.single_action_space
        self.id, self.device, self.shape, self.episodes = env_id, device, space.shape, []
        kind = type(self.action_space).__name__
        if not isinstance(space, gym.spaces.Box):
            raise UserError(f"{env_id} observes {space}, which has no fixed size")
        if kind not in ACTION_SPACES or kind == "Box" and self.action_space.dtype.kind != "f":
            raise UserError(f"{NAME} takes {' and '.join(ACTION_SPACES)} actions, {env_id} has "
                            f"{self.action_space}; ppo takes Discrete and float Box actions")
        # NatureCNN needs images of 36 x 36 or more; smaller ones become vectors.
        self.image = space.dtype == np.uint8 and len(self.shape) == 3 and sorted(self.shape)[1] > 35
        low, high = (self.to_array(x[None])[0] for x in (space.low, space.high))
        self.obs_space = gym.spaces.Box(low, high, dtype=low.dtype)

    def to_array(self, obs):
        """Check the shape of observations; return vectors (N, size) or images (N, C, H, W)."""
        if wrong := {np.shape(x) for x in obs} - {self.shape}:
            raise UserError(f"{self.id} observes shape {self.shape}, but gave {wrong}")
        if not self.image:
            return np.array(obs, np.float32).reshape(len(obs), -1)
        array = np.array(obs, np.uint8)
        return array if self.shape[0] < self.shape[2] else np.moveaxis(array, 3, 1).copy()

    def to_tensor(self, array, checked=slice(None)):
        if not np.isfinite(array[checked]).all():
            wrong = array[~np.isfinite(array)]
            raise UserError(f"{self.id} gave observations or rewards that are not finite: {wrong}")
        return torch.from_numpy(array).to(self.device)

    def reset(self, seed):
        """Begin an episode everywhere; environment i gets seed + i, or seed[i] of a list."""
        self.obs = self.to_tensor(self.to_array(self.envs.reset(seed=seed)[0]))
        self.episode_starts = torch.ones(len(self.obs), device=self.device)
        self.returns, self.lengths = np.zeros((2, len(self.obs)))  # of the episodes so far

    def step(self, actions):
        """Act in all environments; return next_obs, rewards, terminations and dones.

        next_obs is the true successor, also where an episode ends and `obs` is of the next one."""
        actions, space = actions.cpu().numpy(), self.action_space
        if isinstance(space, gym.spaces.Discrete):
            actions = actions + space.start
        elif not np.isfinite(actions).all():
            raise FloatingPointError("the agent's actions are not finite")
        else:
            actions = actions.reshape(-1, *space.shape).clip(space.low, space.high)
        obs, rewards, terminations, truncations, infos = self.envs.step(
            actions.astype(space.dtype, copy=False))
        array, dones = self.to_array(obs), terminations | truncations
        self.obs = next_obs = self.to_tensor(array)
        self.returns += rewards
        self.lengths += 1
        if ended := dones.nonzero()[0].tolist():
            array = array.copy()
            for i in ended:
                array[i] = self.to_array([infos["final_obs"][i]])
                self.episodes.append((i, float(self.returns[i]), float(self.lengths[i])))
                self.returns[i] = self.lengths[i] = 0
            next_obs = self.to_tensor(array, ~terminations)  # what follows those does not count
        rewards, terminations, self.episode_starts = self.to_tensor(
            np.array([rewards, terminations, dones], np.float32)).unbind()
        return next_obs, rewards, terminations, self.episode_starts


def load_checkpoint(folder, device="cpu", **modules):
    """Read a run's checkpoint, which can hold no code, and load the states of these modules."""
    path = pathlib.Path(folder, "checkpoint.pt")
    try:
        saved = torch.load(path, device, weights_only=True)
        Args(**saved["args"])  # refuses those of another script
        for name, module in modules.items():
            if isinstance(module, torch.optim.Optimizer):  # its settings are those of args
                saved[name]["param_groups"] = module.state_dict()["param_groups"]
            module.load_state_dict(saved[name])
    except Exception as error:
        raise UserError(f"cannot load {path}: {type(error).__name__}: {error}") from error
    return saved


class Run:
    """A training run: its step, metrics and folder, and checkpoints of the modules' states."""

    stop_signal = 0  # the last signal that asked to stop

    def __init__(self, args, envs, resume, **modules):
        self.args, self.envs, self.modules, self.writer = args, envs, modules, None
        saved = load_checkpoint(resume, envs.device, **modules) if resume else dict(
            args=vars(args), step=0, history=[], recent=[], seconds=0)
        self.step, self.history, self.recent = saved["step"], saved["history"], saved["recent"]
        self.start_time, self.next_save = time.time() - saved["seconds"], 0
        # The last batch may end beyond total_timesteps; such a run can still be resumed.
        if args.total_timesteps < min(self.step, saved["args"]["total_timesteps"]):
            raise UserError(f"{resume} is at step {self.step:,}, beyond {args.total_timesteps:,}")
        self.folder = pathlib.Path(args.run_dir) if args.run_dir and RANK == 0 else None
        if self.folder:
            exists = os.path.exists(self.folder / "checkpoint.pt")
            if exists and not (resume and self.folder.samefile(resume)):
                raise UserError(f"{self.folder} holds a run; --resume {self.folder} continues it")
            self.write("args.json", lambda path: path.write_text(json.dumps(vars(args), indent=2)))
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter
                self.writer = SummaryWriter(self.folder, purge_step=self.step + 1)
                OPENED.append(self.writer)
        if RANK == 0:
            print(f"{NAME} on {envs.device}:", {name: value for name, value in vars(args).items()
                                                if value != getattr(Args, name)}, flush=True)
        # A resumed run starts new episodes; its random numbers depend only on seed, step and rank.
        envs.reset(seed_everything(args.seed, self.step, RANK))

    def write(self, name, save):
        """Call save(path) for a temporary file, then rename it: a kill cannot leave half of it."""
        path, part = self.folder / name, self.folder / f"{name}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save(part)
            os.replace(part, path)
        except (OSError, RuntimeError) as error:  # a RuntimeError of torch.save hides the cause
            hint = "; is the disk full?" * isinstance(error, RuntimeError)
            raise UserError(f"cannot write {path}: {error}{hint}") from error

    def checkpoint(self):
        """Call once per iteration: save if a checkpoint is due, stop if a signal asked for it."""
        stop = torch.tensor(float(Run.stop_signal), device=self.envs.device)
        all_reduce_mean(stop)  # all processes stop as soon as one is asked to
        if stop:
            self.finish()
            if self.folder:
                print(f"{CLEAR}stopped; --resume {self.folder} continues", file=sys.stderr)
            raise SystemExit(128 + (Run.stop_signal or signal.SIGTERM))
        if (self.step if self.args.checkpoint_every else time.time()) >= self.next_save:
            self.save()

    def save(self):
        every = self.args.checkpoint_every
        self.next_save = self.step + every if every else time.time() + 60
        state = {name: module.state_dict() for name, module in self.modules.items()}
        if not all(value.isfinite().all() for value in state["agent"].values()):
            raise FloatingPointError(f"the agent's weights are not finite at step {self.step:,}")
        if self.folder:
            state |= dict(args=vars(self.args), step=self.step, history=self.history,
                          recent=self.recent, seconds=time.time() - self.start_time)
            self.write("checkpoint.pt", lambda path: torch.save(state, path))

    def log(self, **metrics):
        """At most 200 times a run, add a row of metrics to the history and print the progress."""
        self.recent = (self.recent + self.envs.episodes)[-20:]
        self.envs.episodes.clear()
        last, total = self.history[-1]["step"] if self.history else 0, self.args.total_timesteps
        if self.step * 200 // total == last * 200 // total:
            return
        _, score, length = np.mean(self.recent or [[math.nan] * 3], 0).tolist()
        metrics = {name: float(value) for name, value in metrics.items()}
        if not all(map(math.isfinite, metrics.values())):
            raise FloatingPointError(f"not finite at step {self.step:,}: {metrics}")
        self.history.append(row := dict(step=self.step, seconds=time.time() - self.start_time,
                                        episode_return=score, episode_length=length) | metrics)
        if self.folder:
            columns = dict.fromkeys(name for row in self.history for name in row)
            table = csv.DictWriter(text := io.StringIO(), columns, lineterminator="\n")
            table.writeheader(), table.writerows(self.history)
            self.write("metrics.csv", lambda path: path.write_text(text.getvalue()))
        for name, value in row.items() if self.writer else ():
            self.writer.add_scalar(name, value, self.step)
        if RANK == 0:
            speed = self.step / row["seconds"]
            score = f"return {score:.1f}" if self.recent else "no episode has ended yet"
            line = (f"step {self.step:,} of {total:,} ({self.step / total:.0%}): {score}, "
                    f"{speed:,.0f} steps/s, {max(0, total - self.step) / speed:.0f} s left")
            in_place = sys.stdout.isatty() and self.step < total  # the last line stays
            print(line, end="\033[K\r" if in_place else "\n", flush=True)

    def finish(self):
        """Save, and draw the learning curve."""
        self.save()
        if not self.folder:
            return
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return print("learning_curve.png needs matplotlib", file=sys.stderr)
        axes = Figure((7, 4), dpi=150, layout="constrained").subplots()
        axes.plot(*zip(*((row["step"], row["episode_return"]) for row in self.history)))
        axes.set(title=f"{NAME} on {self.args.env}, seed {self.args.seed}",
                 xlabel="environment steps", ylabel="return, mean of 20 episodes")
        self.write("learning_curve.png", lambda path: axes.figure.savefig(path, format="png"))


@clean_up()
def load_agent(run, **changes):
    """The agent of the run folder `run`, and its Args with these changes: agent, args."""
    args = Args(**load_checkpoint(run)["args"] | changes)
    envs = VecEnv(args.env, 1, setup(args))
    agent = Agent(envs.obs_space, envs.action_space, args).to(envs.device)
    load_checkpoint(run, envs.device, agent=agent)
    return agent, args


@clean_up()
def evaluate(agent, args, episodes=100, **kwargs):
    """The returns (episodes,) of the deterministic policy on fresh episodes; kwargs: of gym.make.

    Each environment plays equally many, so that short episodes do not count more often."""
    torch.set_num_threads(args.threads)
    returns, next_print = [[] for _ in range(min(episodes, 20))], time.time() + 60
    envs = VecEnv(args.env, len(returns), next(agent.parameters()).device, **kwargs)
    envs.reset(seed_everything(args.seed, 0, 0, 1))  # the 1: other episodes than in training
    while (done := min(map(len, returns)) * len(returns)) < episodes:
        if hasattr(agent, "reset"):  # a planner forgets its plans where an episode starts
            agent.reset(envs.episode_starts)
        envs.step(agent.act(envs.obs, deterministic=True))
        for i, episode_return, _ in envs.episodes:
            returns[i].append(episode_return)
        envs.episodes.clear()
        if time.time() > next_print:
            print(f"evaluation: {done} of {episodes} episodes", flush=True)
            next_print = time.time() + 60
        if Run.stop_signal:
            raise SystemExit(128 + Run.stop_signal)
    return np.array(list(zip(*returns))).flatten()[:episodes]


def parse_args():
    """The command line: what to do, and the settings that are given."""
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s [--env ENV] [...]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{NAME}.py: {message}\n")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", metavar="RUN", type=pathlib.Path, help="resume a run")
    group.add_argument("--evaluate", metavar="RUN", type=pathlib.Path, help="score a run's agent")
    parser.add_argument("--episodes", help="episodes to score (100)", default=100, type=int)
    parser.add_argument("--video", help="film an episode", action="store_true")
    parser.add_argument("--render", help="show an episode", action="store_true")
    for f in fields(Args):
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else {}
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=f"{f.metadata['help']} ({f.default})", **kind)
    options = parser.parse_args()
    given = {f.name: getattr(options, f.name) for f in fields(Args) if f.name in options}
    for name in given:
        if options.resume and name == "run_dir" or options.evaluate and name not in (
                "env", "seed", "device", "threads"):
            parser.error(f"{name} has no effect here")
    if options.episodes < 1:
        parser.error("episodes is at least 1")
    return options, given


def main():
    def request_stop(number, frame):
        Run.stop_signal = number
        signal.signal(number, signal.SIG_DFL)  # a second one kills

    sys.path += {os.getcwd()} - set(sys.path)  # where the module of module:Env-v0 may be
    np.seterr(over="ignore")  # what overflows becomes inf, which VecEnv refuses
    options, given = parse_args()
    signal.signal(signal.SIGINT, request_stop)
    signal.signal(signal.SIGTERM, request_stop)
    try:
        folder = options.resume or options.evaluate  # a Path, which is true even if it is empty
        if folder:
            given = load_checkpoint(folder)["args"] | given | dict(run_dir=folder)
        args, trained = Args(**given), ""
        if options.evaluate:
            agent, _ = load_agent(folder, **given)
        else:
            args.run_dir = args.run_dir or "runs/{}__{}__{}__{}".format(
                re.sub("[:/]", "-", args.env), NAME, args.seed, time.time_ns() // 10**6)
            agent, history = train(args, folder)
            step, seconds = history[-1]["step"], history[-1]["seconds"]
            trained = f", {step:,} steps in {seconds:.1f} s, {step / seconds:,.0f} steps/s"
        if WORLD_SIZE > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if RANK == 0:
            returns = evaluate(agent, args, options.episodes)
            print(f"{args.env}: return {returns.mean():.1f} +/- {returns.std():.1f} over "
                  f"{len(returns)} episodes{trained}; {args.run_dir}", flush=True)
            if options.video:
                film = functools.partial(gym.wrappers.RecordVideo, episode_trigger=lambda i: i == 0,
                                         video_folder=f"{args.run_dir}/videos")
                evaluate(agent, args, 1, wrappers=[film], render_mode="rgb_array")
            if options.render:
                evaluate(agent, args, 1, render_mode="human")
    except (UserError, FloatingPointError, ImportError, gym.error.Error, BrokenPipeError) as error:
        print(f"{CLEAR}{NAME}.py:", " ".join(str(error).split())[:500], file=sys.stderr)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)
    except Exception as error:  # a bug here or in the environment: show where
        hint = "; without a display MuJoCo needs MUJOCO_GL=egl" * (options.video or options.render)
        print(f"{CLEAR}{NAME}.py failed on {args.env}: {error}{hint}", file=sys.stderr)
        traceback.print_exc()
        sys.exit(2)


train = clean_up()(train)  # here, as a decorator above would need the plumbing to come first

if __name__ == "__main__":
    main()
