# SPDX-License-Identifier: MIT
"""Policy search without gradients: CEM, evolution strategies (ES) and CMA-ES.

A generation is a population of policies, parameter vectors drawn around a mean. The return of an
episode is all that is asked of each. The methods differ in what they make of the returns: CEM fits
the next generation to the best, ES climbs an estimated gradient, CMA-ES learns a whole covariance.

(1)  CEM     samples = mean + sigma * noise
             mean = E[elites], sigma^2 = Var[elites] + extra_noise, and sigma >= min_sigma
(2)  ES      samples = mean + sigma * noise, where noise comes in pairs of opposite signs
             gradient = E[centered_ranks(fitness) * noise] / sigma - weight_decay * mean, for Adam
(3)  CMA-ES  samples = mean + sigma * steps, steps ~ N(0, C)
             mean = mean + sigma * step, where step = sum of w[k] * steps[k] over the best half
             sigma grows if p_sigma, a running sum of whitened steps, is longer than by chance
             C moves to w-weighted squares of the best steps, and of p_c, a running sum of steps

    repeat
        draw a population of policies around the mean, by (1), (2) or (3)
        play with all of them, num_envs at a time, each in an environment of its own
        fitness = the mean return of each
        renew mean, sigma and what else the method keeps

Szita and Lorincz 2006 (CEM), Salimans et al. 2017, arXiv:1703.03864 (ES), Hansen 2016,
arXiv:1604.00772 (CMA-ES). Several processes draw the same noise and each plays with a part of the
population, so that only sums travel. Where most versions of ES rank equal returns by position,
which makes a slope of a plateau, here they share a rank. Example: --env CartPole-v1 --method es
"""
import argparse, collections, contextlib, fnmatch, functools, gc, json, math, os, pathlib
import random, re, signal, sys, time, traceback, typing
from dataclasses import asdict, dataclass, field, fields

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


# ============================================================================== Hyperparameters
def arg(default, help, low=-3e38, high=3e38):
    return field(default=default, metadata=dict(help=help, limits=[low, high]))


@dataclass
class Args:
    # The run: the same in every script.
    env: str = arg("CartPole-v1", "environment id; module:Id imports the module first")
    total_timesteps: int = arg(1_000_000, "steps over all environments and processes", 1)
    num_envs: int = arg(64, "parallel environments in each process", 1)
    seed: int = arg(1, "seed of the networks, the environments and every draw", 0)
    device: str = arg("auto", "cpu, cuda, cuda:1, ...; auto is cuda where there is one")
    threads: int = arg(1, "CPU threads of torch; one is fastest for small networks", 1)
    run_dir: str = arg("", "folder to write; empty is a new one in runs/, or none from Python")
    checkpoint_every: int = arg(0, "steps between checkpoints, each a reset; 0 is a tenth or so", 0)
    # The algorithm.
    method: typing.Literal["cem", "es", "cma"] = arg("cem", "cem, es or cma")
    population: int = arg(32, "cem, cma: policies in a generation", 2)
    pairs: int = arg(4, "es: pairs of policies in a generation", 1)
    episodes_per_member: int = arg(1, "episodes whose mean return is the fitness of a policy", 1)
    max_episode_steps: int = arg(10_000, "steps after which training leaves an episode", 1)
    hidden_size: int = arg(0, "units in each of two hidden layers; 0 is a linear policy", 0)
    norm_obs: bool = arg(True, "standardise observations by running statistics")
    init_sigma: float = arg(0.5, "cem, cma: the first deviation of each parameter", 1e-8)
    elite_fraction: float = arg(0.2, "cem: the part of the population that are elites", 0, 1)
    extra_noise: float = arg(1e-3, "cem: added to the variance of the elites, annealed to 0", 0)
    min_sigma: float = arg(1e-3, "cem: floor under the deviation", 0)
    es_sigma: float = arg(0.05, "es: the deviation of each parameter", 1e-8)
    learning_rate: float = arg(0.02, "es: Adam's step size", 0)
    weight_decay: float = arg(0.005, "es: this part of the mean is taken from the gradient (2)", 0)

    def __init__(self, **given):
        settle(self, given)  # what is given beats the preset, which beats the default


PRESETS = {  # what is known to work; keys may be patterns
    "CartPole-v1": dict(total_timesteps=50_000, elite_fraction=0.3, extra_noise=1.0, es_sigma=0.5,
                        learning_rate=0.1, weight_decay=0.3),
    "InvertedPendulum-v5": dict(total_timesteps=100_000, es_sigma=0.1, learning_rate=0.05),
    "HalfCheetah-v5": dict(population=16, elite_fraction=0.3, init_sigma=0.05, min_sigma=0.02),
    "Swimmer-v5": dict(total_timesteps=2_000_000, norm_obs=False, es_sigma=0.1)}
ACTION_SPACES = "Discrete", "Box"


# ===================================================================================== Networks
class RunningNorm(nn.Module):
    """Standardises (..., size) by the mean and deviation of all that `update` was given."""

    def __init__(self, size):
        super().__init__()
        self.mean, self.std = nn.Buffer(torch.zeros(size)), nn.Buffer(torch.ones(size))
        self.sums = nn.Buffer(torch.zeros(1 + 2 * size, dtype=torch.double))

    def update(self, sums):
        """Add the number of new vectors, their sum and the sum of their squares."""
        self.sums += sums
        mean, square = (self.sums[1:] / self.sums[0]).chunk(2)
        std = (square - mean.square()).clamp(min=0).sqrt()
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-6 * mean.abs(), std, 1))  # less is rounding

    def forward(self, x):
        return ((x - self.mean) / self.std).clamp(-10, 10)


class Agent(nn.Module):
    """A deterministic policy, linear or with two hidden layers; `weights` (D,) is all it learns."""

    def __init__(self, obs_space, action_space, args):
        super().__init__()
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        outputs = gym.spaces.flatdim(action_space)  # one per action, or per part of one
        inputs = obs_space.shape[0] * (64 if len(obs_space.shape) == 3 else 1)
        self.norm = RunningNorm(inputs) if args.norm_obs else nn.Identity()
        sizes = [inputs, *[args.hidden_size] * (2 if args.hidden_size else 0), outputs]
        self.shapes = [(m, n + 1) for n, m in zip(sizes, sizes[1:])]
        layers = [torch.randn(shape) / math.sqrt(shape[1]) for shape in self.shapes]
        layers[-1].zero_()  # at first all actions are alike
        self.weights = nn.Parameter(torch.cat([layer.flatten() for layer in layers]))
        if not self.discrete:  # the outputs' [-1, 1] is stretched over finite bounds
            _, _, self.center, self.scale = map(nn.Buffer, bounds(action_space))

    def features(self, obs):
        """Observations as vectors (N, inputs): images as 8 by 8 means of each channel."""
        return F.adaptive_avg_pool2d(obs / 255, 8).flatten(1) if obs.dim() == 4 else obs

    def layers(self, weights):
        """The layers (N, outputs, inputs and bias) of policies with the weights (N, D)."""
        parts = weights.split([m * n for m, n in self.shapes], -1)
        return [part.unflatten(-1, shape) for part, shape in zip(parts, self.shapes)]

    def policies(self, features, *layers):
        """Actions (N,) or (N, action_dim): policy i acts on features[i].

        They have the same bits whoever the others are, which bmm would not promise."""
        x = self.norm(features)
        for k, layer in enumerate(layers):
            x = F.pad(x.tanh() if k else x, (0, 1), value=1.0)
            x = (layer * x.unsqueeze(-2)).sum(-1)
        return x.argmax(-1) if self.discrete else self.center + self.scale * x

    @torch.inference_mode()
    def act(self, obs, deterministic=False):
        """The actions of the mean policy. Parameters are drawn here, actions never are."""
        return self.policies(self.features(obs), *self.layers(self.weights))


class Rest(gym.Wrapper):
    """After its episode an environment rests until it is reset with a seed.

    Left to itself the vector environment would begin an episode that nobody asked for."""

    def reset(self, *, seed=None, options=None):
        self.resting = seed is None
        if not self.resting:
            self.obs, _ = self.env.reset(seed=seed, options=options)
        return self.obs, {}

    def step(self, action):
        if self.resting:
            return self.obs, 0.0, False, False, {}
        self.obs, *outcome = self.env.step(action)
        return self.obs, *outcome


# ==================================================================================== Algorithm
def worst_if_nan(fitness):
    return torch.where(fitness.isnan(), -math.inf, fitness)


def cem(samples, fitness, num_elites, extra_noise, min_sigma):
    """The new mean and sigma (D,), from the best of the samples (P, D) by (1)."""
    fitness, best = worst_if_nan(fitness).topk(num_elites)
    elites = samples[best[fitness > -math.inf]]
    variance = elites.var(0, correction=0) + extra_noise  # that of a lone elite is 0
    return elites.mean(0), variance.sqrt().clamp(min=min_sigma)


def centered_ranks(fitness):
    """Ranks from -1/2, the worst, to 1/2, the best; equals share the middle of theirs."""
    fitness = worst_if_nan(fitness)
    worse = (fitness.unsqueeze(1) > fitness).sum(1)
    better = (fitness.unsqueeze(1) < fitness).sum(1)
    return (worse - better) / (2 * len(fitness) - 2)


def es_gradient(utilities, noise, sigma):
    """The gradient (D,) by the mean of the expected utility of mean + sigma * noise (2)."""
    return utilities @ noise / (len(noise) * sigma)


def es(mean, sigma, first, second, generation, noise, fitness, learning_rate, weight_decay):
    """The first five arguments renewed: a step of Adam, of two moments, up the gradient (2)."""
    gradient = es_gradient(centered_ranks(fitness), noise, sigma) - weight_decay * mean
    generation = generation + 1
    first, second = first.lerp(gradient, 0.1), second.lerp(gradient.square(), 0.001)
    scale = (second / (1 - 0.999 ** generation)).sqrt() + 1e-8
    mean = mean + learning_rate * first / (1 - 0.9 ** generation) / scale
    return mean, sigma, first, second, generation


def square_root(C):
    """The symmetric matrix whose square is C."""
    variances, axes = torch.linalg.eigh(C.double())
    return (axes * variances.clamp(min=0).sqrt() @ axes.T).to(C)


def cma(mean, sigma, C, p_sigma, p_c, generation, noise, fitness):
    """The first six arguments renewed by (3); samples = mean + sigma * noise @ square_root(C)."""
    (population, n), generation = noise.shape, generation + 1
    w = math.log(population / 2 + 0.5) - torch.arange(1, population // 2 + 1).to(C).log()
    w = w / w.sum()
    mu = 1 / w.square().sum().item()  # as many equal weights would vary as much
    c_sigma, c_c = (mu + 2) / (n + mu + 5), (4 + mu / n) / (n + 4 + 2 * mu / n)
    c_1 = 2 / ((n + 1.3) ** 2 + mu)
    c_mu = min(1 - c_1, 2 * (mu - 2 + 1 / mu) / ((n + 2) ** 2 + mu))
    damping = 1 + c_sigma + 2 * max(0, math.sqrt((mu - 1) / (n + 1)) - 1)

    best = noise[worst_if_nan(fitness).topk(len(w)).indices]
    steps = best @ square_root(C)
    step = w @ steps
    mean = mean + sigma * step
    p_sigma = (1 - c_sigma) * p_sigma + math.sqrt(c_sigma * (2 - c_sigma) * mu) * (w @ best)
    length = p_sigma.norm() / (math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n)))
    usual = length < (1.4 + 2 / (n + 1)) * (1 - (1 - c_sigma) ** (2 * generation)).sqrt()
    usual = usual.to(C)  # 0 while p_sigma is so long that p_c had better wait
    p_c = (1 - c_c) * p_c + math.sqrt(c_c * (2 - c_c) * mu) * step * usual
    lost = c_1 * c_c * (2 - c_c) * (1 - usual)  # by that wait
    C = (1 - c_1 - c_mu + lost) * C + c_1 * torch.outer(p_c, p_c) + c_mu * (w * steps.T) @ steps
    sigma = sigma * (c_sigma / damping * (length - 1)).exp()
    return mean, sigma, C, p_sigma, p_c, generation


class Search(nn.Module):
    """What a method is given and renews: mean and sigma (D,) and all that it remembers."""

    def __init__(self, method, mean, sigma):
        super().__init__()
        self.mean, self.sigma = nn.Buffer(mean), nn.Buffer(torch.full_like(mean, sigma))
        if method == "es":
            self.first, self.second = nn.Buffer(0 * mean), nn.Buffer(0 * mean)
        elif method == "cma":
            if len(mean) > 500:
                raise UserError(f"cma takes at most 500 parameters; this policy has {len(mean):,}")
            self.C = nn.Buffer(torch.eye(len(mean), device=mean.device))
            self.p_sigma, self.p_c = nn.Buffer(0 * mean), nn.Buffer(0 * mean)
        if method != "cem":
            self.generation = nn.Buffer(mean.new_zeros(()))


def train(args, resume=""):
    """Train, from the start or on from the run folder `resume`; return agent and history."""
    device = setup(args)
    population = 2 * args.pairs if args.method == "es" else args.population
    # Episode k is one of `repeats` of member k // repeats; a process plays a slice of them all.
    repeats, num_episodes = args.episodes_per_member, population * args.episodes_per_member
    if num_episodes < WORLD_SIZE:
        raise UserError(f"{WORLD_SIZE} processes are more than a generation has episodes")
    mine = torch.arange(num_episodes).tensor_split(WORLD_SIZE)[RANK]
    num_envs = min(args.num_envs, len(mine))
    envs = Envs(args.env, num_envs, device, [Rest])
    agent = Agent(envs.obs_space, envs.action_space, args).to(device)
    search = Search(args.method, agent.weights.data,  # in place: its mean is the agent's weights
                    args.es_sigma if args.method == "es" else args.init_sigma)
    run = Run(args, envs, resume, agent=agent, search=search)
    if args.method == "es":
        search.sigma.fill_(args.es_sigma)  # or a resumed run keeps the old
    act = capture(agent.policies, device)

    @torch.inference_mode()
    def play(samples, seeds):
        """An episode of each: sums of reward and steps and, for the norm, features and squares."""
        idle, playing, rollout = num_envs - len(seeds), len(seeds), []
        layers = agent.layers(F.pad(samples, (0, 0, 0, idle)))
        envs.reset((*seeds, *[None] * idle))
        for _ in range(args.max_episode_steps):
            features = agent.features(envs.obs)
            _, rewards, _, dones = envs.step(act(features, *layers))
            rollout.append((rewards, dones, features if args.norm_obs else features[:, :0]))
            run.step += playing
            playing = len(seeds) - len(envs.episodes)
            if not playing or run.step > args.total_timesteps:
                break
        rewards, dones, features = (torch.stack(x, 1) for x in zip(*rollout))  # (N, T, ...)
        lengths = (dones.cumsum(1) == dones).sum(1)  # up to its end; who rests has no other
        sums = []
        for reward, length, x in zip(rewards, lengths, features[:len(seeds)]):
            reward, x = reward[:length].double(), x[:length].double()
            sums.append(torch.cat([torch.stack([reward.sum(), length]), x.sum(0),
                                   x.square().sum(0)]))
        whole = run.step <= args.total_timesteps  # else the short episodes alone have ended
        envs.episodes = [(i, *x[:2].tolist()) for i, x in enumerate(sums)] if whole else []
        run.progress()
        return torch.stack(sums)

    while run.step < args.total_timesteps:
        run.checkpoint()
        start, remaining = run.step, 1 - run.step / args.total_timesteps
        seed = seed_all(3, args.seed, run.step)  # so that all processes draw the same noise
        noise = torch.randn(population, len(search.mean), device=device)
        if args.method == "es":
            noise[1::2] = -noise[::2]  # antithetic pairs
        steps = noise @ square_root(search.C) if args.method == "cma" else noise
        samples = search.mean + search.sigma * steps

        plays = []
        for part in mine.split(num_envs):
            seeds = seed + part // repeats // 2 * repeats + part % repeats  # equal in pairs
            plays.append(play(samples[part // repeats], seeds.tolist()))
        sums = F.pad(torch.cat(plays), (0, 0, mine[0], num_episodes - 1 - mine[-1]))
        if WORLD_SIZE > 1:  # of all this only the sums of episodes travel
            torch.distributed.all_reduce(sums)
        fitness = sums[:, 0].view(population, repeats).mean(1).float()
        run.step = start + int(sums[:, 1].sum())
        if run.step > args.total_timesteps and start == 0:
            raise UserError(f"{args.total_timesteps:,} steps are not enough for one generation; "
                            "lower its size or max_episode_steps")

        if run.step <= args.total_timesteps:  # else the end of the budget cut it short
            state = list(search.buffers())
            if args.method == "cem":
                num_elites = max(1, round(args.elite_fraction * population))
                new = cem(samples, fitness, num_elites, args.extra_noise * remaining,
                          args.min_sigma)
            elif args.method == "es":
                new = es(*state, noise, fitness, args.learning_rate, args.weight_decay)
            else:
                new = cma(*state, noise, fitness)
            for old, value in zip(state, new):
                old.copy_(value)
            if args.norm_obs:
                agent.norm.update(sums[:, 1:].sum(0))
        run.log(sigma=search.sigma.mean(), weight_norm=search.mean.norm())
    run.finish()
    return agent, run.history


# ===================================================================================== Plumbing
# The same text in all nine scripts: processes, environments, run folder and command line.

NAME = pathlib.Path(__file__).stem
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0)) if WORLD_SIZE > 1 else 0  # a stray one must not silence it
SCRIPTS = {"Discrete": "reinforce, a2c, ppo, trpo, dqn, cem_es, mbrl_mpc",
           "Box": "reinforce, a2c, ppo, trpo, ddpg, naf, cem_es, mbrl_mpc"}


class UserError(ValueError):
    """Something the user can put right: one line on the command line, exit code 2."""


@dataclass
class blame:
    """Tell any exception of a `with` block as a UserError about `what`.

    A class, since contextlib's generators would cost every step some time."""
    what: str

    def __enter__(self):
        pass

    def __exit__(self, kind, error, trace):
        if isinstance(error, (Exception, SystemExit)):  # a module may exit when it is imported
            at = traceback.extract_tb(trace)[-1]
            why = " ".join(f"{kind.__name__}: {error}".split())[:300]
            place = f"{os.path.basename(at.filename)}:{at.lineno}"
            raise UserError(f"{self.what}: {why} ({place})") from error


def preset(env):
    return next((PRESETS[key] for key in PRESETS if fnmatch.fnmatchcase(str(env), key)), {})


def settle(args, given):
    """Fill in args: the defaults, over them the environment's preset, over that what is given.

    Refuse settings that do not exist, are of a wrong type or are outside their limits."""
    known = {f.name: f for f in fields(args)}
    defaults = {name: f.default for name, f in known.items()}
    for name, wanted in (defaults | preset(given.get("env", args.env)) | given).items():
        if name not in known:
            raise UserError(f"there is no setting {name}")
        with blame(f"{name} cannot be {wanted!r}"):
            kind = type(known[name].default)
            vars(args)[name] = value = kind(wanted)  # numpy's numbers would spoil a checkpoint
            if wanted is None or value != wanted and str(value) != str(wanted):
                raise TypeError(f"it is no {kind.__name__}")
        (low, high), choices = known[name].metadata["limits"], typing.get_args(known[name].type)
        if isinstance(value, (int, float)) and not low <= value <= high:
            raise UserError(f"{name} is {value}, which is not between {low} and {high}")
        if choices and value not in choices:
            raise UserError(f"{name} is {value}, which is none of {', '.join(choices)}")


def seed_all(*key):
    """Seed every generator with a number drawn from the key; return it for the environments."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0]) >> 1
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    return seed


def setup(args):
    """Take the device, join the other processes, and seed the networks alike in all of them."""
    name = args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    with blame(f"device {name} cannot be used"):
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.zeros(1, dtype=torch.double, device=device).item()  # Apple's mps has none
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))  # warm-up must not use the default stream
    torch.set_num_threads(args.threads)
    if WORLD_SIZE > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    seed_all(0, args.seed)
    return device


def flatten(module):
    """Make all parameters views of one vector, and their gradients views of the vector's.

    Optimisers, which treat all weights alike, then take one call: a fifth of an update is saved."""
    parameters = list(module.parameters())
    vector = nn.utils.parameters_to_vector(parameters).detach()
    vector.grad = torch.zeros_like(vector)
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, data, grad in zip(parameters, vector.split(sizes), vector.grad.split(sizes)):
        parameter.data, parameter.grad = data.view_as(parameter), grad.view_as(parameter)
    return vector


def average(*tensors):
    """Average tensors over the processes, in place; alone, do nothing."""
    for tensor in tensors if WORLD_SIZE > 1 else ():
        torch.distributed.all_reduce(tensor)
        tensor /= WORLD_SIZE


def capture(function, device):
    """On a GPU, replay `function` (tensors to a tensor) as one CUDA graph per set of shapes.

    Three calls warm up, the fourth is recorded, and all count. Elsewhere, and where there are
    several processes, `function` itself."""
    if device.type != "cuda" or WORLD_SIZE > 1:
        return function
    calls, graphs = collections.Counter(), {}

    def replay(*inputs):
        shapes = tuple(x.shape for x in inputs)
        calls[shapes] += 1
        if calls[shapes] <= 3:
            return function(*inputs)
        if shapes not in graphs:
            graph, held = torch.cuda.CUDAGraph(), [x.clone() for x in inputs]
            with torch.cuda.graph(graph):
                graphs[shapes] = graph, held, function(*held)
        graph, held, output = graphs[shapes]
        for mine, given in zip(held, inputs):
            mine.copy_(given)
        graph.replay()
        return output.clone()

    return replay


def prepare(env):
    """Byte images channels first, every other observation as a flat vector."""
    space = env.observation_space
    if space.dtype == np.uint8 and len(space.shape) == 3 and sorted(space.shape)[1] >= 36:
        if space.shape[0] > space.shape[2]:
            box = gym.spaces.Box(0, 255, (space.shape[2], *space.shape[:2]), np.uint8)
            env = gym.wrappers.TransformObservation(env, lambda x: np.moveaxis(x, 2, 0), box)
    elif not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
        env = gym.wrappers.FlattenObservation(env)
    return env


def bounds(space):
    """Low and high of a Box, its center and half its width (size,), or 0 and 1 where unbounded."""
    low, high = (torch.tensor(x, dtype=torch.float32).flatten() for x in (space.low, space.high))
    bounded = (high - low).isfinite() & (high > low)
    center = torch.where(bounded, (low + high) / 2, 0.0)
    return low, high, center, torch.where(bounded, (high - low) / 2, 1.0)


class Serial(gym.vector.SyncVectorEnv):
    """gymnasium's, that begins an episode within the step that ended one.

    Its steps gather no infos but `final_obs`, where the episode ended; that halves their time."""

    def step(self, actions):
        results, final_obs = [], {}
        for i, (env, action) in enumerate(zip(self.envs, actions)):
            obs, reward, termination, truncation, _ = env.step(action)
            if termination or truncation:
                final_obs[i] = np.array(obs)
                obs, _ = env.reset()
            results.append((obs, float(reward), bool(termination), bool(truncation)))
        return *map(np.array, zip(*results)), dict(final_obs=final_obs)


class Envs:
    """Copies of an environment, stepped in turn; every tensor is (num_envs, ...) on `device`.

    `obs` is what to act on, `begins` is 1 where it begins an episode; `episodes` gathers
    (environment, return, length) of those that end."""

    def __init__(self, env_id, num_envs, device, wrappers=(), **kwargs):
        sys.path += {os.getcwd()} - set(sys.path)  # where the module of module:Id may be
        with blame(f"cannot make {env_id}"):
            if atari := "ALE/" in env_id:  # ale_py:ALE/Pong-v5 too
                gym.register_envs(__import__("ale_py"))
            if atari and not kwargs and not wrappers:
                envs = gym.make_vec(env_id, num_envs, "vector_entry_point", reward_clipping=False,
                                    use_fire_reset=False, autoreset_mode="SameStep")
            else:  # the fast version of Atari can neither be filmed nor wrapped
                def make():
                    env = gym.make(env_id, **kwargs, **dict(frameskip=1) if atari else {})
                    if atari:
                        env = gym.wrappers.AtariPreprocessing(env)
                        env = gym.wrappers.FrameStackObservation(env, 4, padding_type="zero")
                    for wrapper in wrappers:
                        env = wrapper(env)
                    return prepare(env)

                envs = Serial([make] * num_envs, autoreset_mode="SameStep")
            self.obs_space = envs.single_observation_space
            self.dtype = np.uint8 if len(self.obs_space.shape) == 3 else np.float32
        self.id, self.device, self.envs, self.episodes = env_id, device, envs, []
        self.action_space = envs.single_action_space
        kind = type(self.action_space).__name__
        if kind == "Box" and self.action_space.dtype.kind != "f":
            kind = "integer Box"
        if kind not in ACTION_SPACES:
            raise UserError(f"{env_id} has {kind} actions, which {NAME} does not take; "
                            f"these scripts do: {SCRIPTS.get(kind, 'none')}")

    def tensor(self, array, dtype=np.float32):
        return torch.from_numpy(np.array(array, dtype)).to(self.device)

    def reset(self, seed):
        """Begin an episode everywhere, in environment i with seed + i or, of a list, seed[i]."""
        with blame(f"{self.id} failed to reset"):
            self.obs = self.tensor(self.envs.reset(seed=seed)[0], self.dtype)
        self.begins = torch.ones(len(self.obs), device=self.device)
        self.returns, self.lengths = np.zeros((2, len(self.obs)))  # of the episodes that go on

    def step(self, actions):
        """Act; return next_obs, rewards, terminations and dones.

        next_obs is where the actions led, also where an episode ended and `obs` begins the next."""
        actions, space = actions.cpu().numpy(), self.action_space
        if isinstance(space, gym.spaces.Discrete):
            actions = actions + space.start
        else:
            if not math.isfinite(actions.sum()):
                raise FloatingPointError("the agent's actions are not finite")
            actions = actions.reshape(-1, *space.shape).clip(space.low, space.high)
            actions = actions.astype(space.dtype, copy=False)
        with blame(f"{self.id} failed"):
            obs, rewards, terminations, truncations, infos = self.envs.step(actions)
            self.obs = next_obs = self.tensor(obs, self.dtype).view_as(self.obs)
            dones = terminations | truncations
            ended = dones.nonzero()[0].tolist()
            if ended:
                obs = np.array(obs, self.dtype)  # a first observation may be of whole numbers
                for i in ended:
                    obs[i] = infos["final_obs"][i]
                next_obs = self.tensor(obs, self.dtype).view_as(self.obs)
        self.returns += rewards
        self.lengths += 1
        if not math.isfinite(sum(self.returns.tolist())):  # faster than numpy's
            raise UserError(f"{self.id} gave the rewards {rewards.tolist()}")
        for i in ended:
            self.episodes.append((i, float(self.returns[i]), float(self.lengths[i])))
            self.returns[i] = self.lengths[i] = 0
        rewards, terminations, self.begins = self.tensor([rewards, terminations, dones]).unbind()
        return next_obs, rewards, terminations, self.begins


def load(folder, device="cpu"):
    """The checkpoint of the run in `folder`."""
    with blame(f"{folder} holds no checkpoint that can be read"):
        saved = torch.load(pathlib.Path(folder, "checkpoint.pt"), device, weights_only=True)
        script = saved["script"]
    if script != NAME:
        raise UserError(f"{folder} is a run of {script}.py, not of {NAME}.py")
    return saved


class Run:
    """A training run: its progress, its folder, and checkpoints from which it goes on exactly.

    The trainer counts `step`. `state` are the objects whose state_dict a checkpoint keeps."""

    signal = 0  # the last that asked to stop

    def __init__(self, args, envs, resume, **state):
        self.args, self.envs, self.state, self.board = args, envs, state, None
        saved = dict(step=0, history=[], recent=[], seconds=0)
        if resume:
            saved = load(resume, envs.device)
            with blame(f"{resume} does not fit these settings"):
                for name in state:
                    for group in saved[name].get("param_groups", ()):  # saved on whichever device
                        group["capturable"] = envs.device.type == "cuda"
                    state[name].load_state_dict(saved[name])
        self.step, self.due, self.history = saved["step"], saved["step"], saved["history"]
        self.recent = collections.deque(saved["recent"], maxlen=20)  # the latest of envs.episodes
        self.began, self.said = time.time() - saved["seconds"], saved["seconds"]
        self.folder = pathlib.Path(args.run_dir) if args.run_dir and RANK == 0 else None
        if self.folder:
            if not resume and os.path.exists(self.folder / "checkpoint.pt"):
                raise UserError(f"{self.folder} holds a run; --resume goes on with it")
            text = json.dumps(asdict(args), indent=2)
            self.write("args.json", lambda path: path.write_text(text))
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(self.folder, purge_step=self.step)
        if RANK == 0:
            chosen = [f"{name}={value}" + "*" * (preset(args.env).get(name) == value)
                      for name, value in asdict(args).items() if value != getattr(Args, name)]
            print(f"{NAME}: {args.env} on {envs.device} (* from the preset):", *chosen, flush=True)
        # What exists by now stays; searching it for garbage slowed rollouts by 10 %.
        gc.unfreeze(), gc.collect(), gc.freeze()

    @classmethod
    def ask_to_stop(cls, number, frame):
        cls.signal = number
        signal.signal(number, signal.SIG_DFL)  # a second one does not ask

    def checkpoint(self):
        """Where one is due: save, seed everything from the step, and begin new episodes.

        What follows depends on the checkpoint alone, so a resumed run repeats an unbroken one."""
        stop = Run.signal
        if WORLD_SIZE > 1:  # all stop as soon as one is asked to
            average(stop := torch.tensor(float(stop), device=self.envs.device))
        if stop:
            self.finish()
            if self.folder:
                print(f"stopped; --resume {self.folder} goes on from here", file=sys.stderr)
            raise SystemExit(128 + (Run.signal or signal.SIGTERM))
        if due := self.step >= self.due:
            self.save()
            every = self.args.checkpoint_every or max(  # leave episodes the time to end
                self.args.total_timesteps // 10, 2000 * self.args.num_envs * WORLD_SIZE)
            self.due = (self.step // every + 1) * every
            self.envs.reset(seed_all(1, self.args.seed, self.step, RANK))
        return due

    def save(self):
        for name, value in self.state["agent"].state_dict().items():
            if not value.isfinite().all():
                raise FloatingPointError(f"the agent's {name} is not finite at step {self.step:,}")
        saved = dict(script=NAME, args=asdict(self.args), step=self.step, history=self.history,
                     recent=list(self.recent), seconds=time.time() - self.began)
        saved |= {name: module.state_dict() for name, module in self.state.items()}
        self.write("checkpoint.pt", lambda path: torch.save(saved, path))

    def write(self, name, write):
        """Write beside the file, then rename: neither a kill nor a full disk can break it."""
        if self.folder:
            with blame(f"cannot write {self.folder / name}"):
                self.folder.mkdir(parents=True, exist_ok=True)
                write(self.folder / f"{name}.part")
                os.replace(self.folder / f"{name}.part", self.folder / name)

    def progress(self, always=False):
        """Take in the finished episodes and, every two seconds, say where the run is."""
        self.recent += self.envs.episodes
        self.envs.episodes.clear()
        seconds = time.time() - self.began
        if RANK == 0 and (always or seconds > self.said + 2):
            speed, self.said = self.step / seconds, seconds
            left = max(0, self.args.total_timesteps - self.step) / max(speed, 1e-8)
            print(f"step {self.step:,} of {self.args.total_timesteps:,}: "
                  f"return {self.mean_episode()[1]:.1f}, {speed:,.0f} steps/s, {left:.0f} s left"
                  + ", stopping" * bool(Run.signal), flush=True)

    def mean_episode(self):
        return np.mean(self.recent or [[math.nan] * 3], 0).tolist()

    def log(self, **metrics):
        """Keep at most 200 rows of metrics a run: in history, metrics.csv and TensorBoard."""
        self.progress()
        last, total = self.history[-1]["step"] if self.history else 0, self.args.total_timesteps
        if self.step * 200 // total == last * 200 // total:
            return
        row = dict(step=self.step, seconds=time.time() - self.began)
        _, row["episode_return"], row["episode_length"] = self.mean_episode()
        for name, value in metrics.items():
            row[name] = float(value)
            if not math.isfinite(row[name]):
                raise FloatingPointError(f"{name} is {row[name]} at step {self.step:,}")
        self.history.append(row)
        rows = [",".join(map(str, x)) for x in (row, *(x.values() for x in self.history))]
        self.write("metrics.csv", lambda path: path.write_text("\n".join(rows) + "\n"))
        for name, value in row.items() if self.board else ():
            self.board.add_scalar(name, value, self.step)

    def finish(self):
        """Save what there is and draw the learning curve."""
        self.progress(always=True)
        self.save()
        if not self.folder:
            return
        try:
            from matplotlib.figure import Figure
        except ImportError:
            print("learning_curve.png needs matplotlib", file=sys.stderr)
            return
        axes = Figure((7, 4), dpi=150, layout="constrained").subplots()
        axes.plot(*zip(*((row["step"], row["episode_return"]) for row in self.history)))
        axes.set(title=f"{NAME} on {self.args.env}, seed {self.args.seed}",
                 xlabel="environment steps", ylabel="return, mean of 20 episodes")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(alpha=0.3)
        self.write("learning_curve.png", lambda path: axes.figure.savefig(path, format="png"))


def evaluate(agent, args, episodes=100, **kwargs):
    """The returns (episodes,) of the deterministic policy on fresh episodes.

    In each round every environment counts once, so that short episodes do not count more often."""
    num_envs, returns = min(episodes, 20), []
    envs = Envs(args.env, num_envs, next(agent.parameters()).device, **kwargs)
    while len(returns) < episodes:
        envs.reset(seed_all(2, args.seed, len(returns)))
        envs.episodes, first, steps = [], {}, 0
        while len(first) < num_envs:
            if hasattr(agent, "begin"):  # a planner forgets its plans where an episode begins
                agent.begin(envs.begins)
            envs.step(agent.act(envs.obs, deterministic=True))
            first, steps = {i: r for i, r, _ in reversed(envs.episodes)}, steps + 1
            if Run.signal:
                raise SystemExit(128 + Run.signal)
            if steps == 100_000:
                raise UserError(f"{args.env} goes on for {steps:,} steps and cannot be scored; it "
                                "needs a time limit, max_episode_steps where it is registered")
        returns += [first[i] for i in range(num_envs)]
    envs.envs.close()
    return np.array(returns[:episodes])


def main():
    parser = argparse.ArgumentParser(description=__doc__, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    old = parser.add_mutually_exclusive_group()  # normpath makes '.' of '', which is no run either
    old.add_argument("--resume", metavar="RUN", type=os.path.normpath, help="go on with this run")
    old.add_argument("--evaluate", metavar="RUN", type=os.path.normpath, help="score its agent")
    parser.add_argument("--episodes", type=int, default=100, help="how many to score (100)")
    parser.add_argument("--video", action="store_true", default=False, help="film the first one")
    parser.add_argument("--render", action="store_true", default=False, help="show the first one")
    for f in fields(Args):
        kind = str if typing.get_args(f.type) else f.type
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=kind)
        help = f"{f.metadata['help']} ({f.default})"
        parser.add_argument("--" + f.name.replace("_", "-"), help=help, **kind)
    codes = {UserError: 2, FloatingPointError: 1, BrokenPipeError: 141}
    parser.error = lambda message: parser.exit(2, f"{NAME}.py: {message}\n")
    given = vars(parser.parse_args())
    episodes, video, render = (given.pop(name) for name in ("episodes", "video", "render"))
    if episodes < 1:
        parser.error(f"episodes is {episodes}, which is not at least 1")
    resume, score = given.pop("resume", ""), given.pop("evaluate", "")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, Run.ask_to_stop)
    try:
        saved = load(resume or score) if resume or score else dict(args={})
        args = Args(**saved["args"] | given)
        args.run_dir = resume or score or args.run_dir or "runs/{}__{}__{}__{}-{}".format(
            re.sub("[:/]", "-", args.env), NAME, args.seed, time.strftime("%y%m%d-%H%M%S"),
            os.getpid())
        if score:
            envs, history = Envs(args.env, 1, setup(args)), saved["history"] or [saved]
            agent = Agent(envs.obs_space, envs.action_space, args).to(envs.device)
            with blame(f"{score} does not fit these settings"):
                agent.load_state_dict(saved["agent"])
        else:
            del saved  # the buffer of a resumed run would stay in memory twice
            agent, history = train(args, resume)
        if WORLD_SIZE > 1:
            torch.distributed.barrier()  # which would not wait as long as a score may take
        if RANK == 0:
            returns = evaluate(agent, args, episodes)
            step, seconds = history[-1]["step"], history[-1]["seconds"]
            print(f"{args.env}: return {returns.mean():.1f} ± {returns.std():.1f} over {episodes} "
                  f"episodes, {step:,} steps in {seconds:.1f} s, {step / seconds:,.0f} steps/s; "
                  f"{args.run_dir}")
            if video:
                film = functools.partial(gym.wrappers.RecordVideo, episode_trigger=lambda i: i == 0,
                                         video_folder=f"{args.run_dir}/videos")
                evaluate(agent, args, 1, wrappers=[film], render_mode="rgb_array")
            if render:
                evaluate(agent, args, 1, render_mode="human")
        if WORLD_SIZE > 1:  # at an ordinary exit gloo's threads now and then abort the process
            sys.stdout.flush(), os._exit(0)
    except tuple(codes) as error:
        parser.exit(codes[type(error)], f"{NAME}.py: {error}\n")


if __name__ == "__main__":
    main()
