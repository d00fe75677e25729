# SPDX-License-Identifier: MIT
"""REINFORCE: play whole episodes, then raise the probability of actions that did well.

J is the mean return of episodes played with pi: the sum over all possible episodes of probability
times return. The gradient of a probability p is p * grad log p, and only the factors pi of an
episode's probability depend on the weights. So grad J is a mean over episodes, and playing some
episodes estimates it:

    grad J = E[sum over t of grad log pi(actions[t] | obs[t]) * (returns[t] - b(obs[t]))]

Here returns[t] is the sum of the rewards from t on, and b is a baseline. The rewards before t and b
do not depend on the action at t. Times grad log pi, such a term adds 0 on average, because in every
state the mean of grad log pi(a) is the sum over a of pi(a) * grad log pi(a) = grad pi(a), which is
the gradient of 1. So leaving out the earlier rewards or subtracting a baseline adds no bias, and a
b near the mean of returns[t] greatly reduces the variance of the estimate.

(1)  returns[t] = rewards[t] + gamma * (0 if t is a termination, V(next_obs[t]) if a truncation,
     otherwise returns[t + 1]), where rewards, V and returns are in units of return_norm.std,
     the running standard deviation of all earlier returns
(2)  advantages = returns - b, where b is 0, the mean of the other environments' returns, or V(obs)
(3)  policy_loss = -E[log pi(actions | obs) * advantages]
(4)  loss = policy_loss + vf_coef * E[(V(obs) - returns)^2]; the second term only if b is V(obs)

    repeat
        play one whole episode with pi in each of num_envs environments
        compute the returns (1) and advantages (2) of its steps
        take one Adam step on the loss (4)

Williams 1992, doi:10.1007/BF00992696. As in most code, E is a mean over the steps of the batch, not
a sum over each episode, and without the factor gamma^t that the gradient of the discounted return
has at step t. As the number of steps depends on the actions, too, that mean has a bias of about
1 / num_envs: with --num-envs 1, no baseline and a reward of 1 per step, it cancels the advantage of
long episodes. Normalized observations and returns and clipped gradients are not in the paper. A
time limit (truncation) bootstraps from V(next_obs) if V is the baseline; otherwise it counts as a
termination.

    python reinforce.py --env InvertedPendulum-v5 --baseline mean
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
    num_envs: int = arg(8, "parallel environments in each process", 1)
    seed: int = arg(1, "seed of networks, environments and sampling", 0, 2**53)
    device: str = arg("auto", "cpu, cuda, cuda:1, ...; auto is cuda if there is one")
    threads: int = arg(1, "CPU threads of torch; one is fastest for small networks", 1)
    run_dir: str = arg("", "folder of the run; empty: a new one in runs/, from Python none")
    checkpoint_every: int = arg(0, "steps between checkpoints; 0: one a minute", 0)
    # The algorithm.
    baseline: typing.Literal["none", "mean", "value"] = arg(
        "value", "b in (2): 0, the mean return of the other environments, or V(obs)")
    learning_rate: float = arg(1e-3, "step size of Adam", 0)
    gamma: float = arg(0.99, "discount factor", 0, 1)
    anneal: bool = arg(True, "lower learning_rate linearly to 0")
    vf_coef: float = arg(0.5, "weight of the value loss", 0)
    max_grad_norm: float = arg(0.5, "gradients are clipped to this norm", 1e-8)
    hidden_size: int = arg(64, "units in each of the two hidden layers", 1)
    log_std: float = arg(0.0, "initial log standard deviation of actions scaled to [-1, 1]")
    norm_obs: bool = arg(True, "normalize vector observations by running statistics")
    norm_returns: bool = arg(True, "divide rewards by the running std of the returns")

    def __init__(self, **given):
        apply_settings(self, given)


PRESETS = {  # settings that are known to work; keys may be patterns
    "CartPole-v1": dict(total_timesteps=200_000, learning_rate=4e-3, norm_obs=False),
    "Acrobot-v1": dict(total_timesteps=500_000, num_envs=4, learning_rate=4e-3),
    "Pendulum-v1": dict(num_envs=4, learning_rate=4e-3, gamma=0.95, norm_obs=False),
    "InvertedPendulum-v5": dict(total_timesteps=2_000_000, learning_rate=3e-3, log_std=-1.0),
    "HalfCheetah-v5": dict(total_timesteps=3_000_000, num_envs=2, learning_rate=3e-3,
                           log_std=-0.5)}
ACTION_SPACES = "Discrete", "Box"


# ===================================================================================== Networks
class RunningNorm(nn.Module):
    """Normalizes (..., *shape) by the mean and standard deviation of all inputs of `update`."""

    def __init__(self, shape):
        super().__init__()
        self.mean, self.std = nn.Buffer(torch.zeros(shape)), nn.Buffer(torch.ones(shape))
        self.sums = nn.Buffer(torch.zeros(3, *shape, dtype=torch.double))  # of x^0, x^1 and x^2

    @torch.no_grad()
    def update(self, x):
        """Add x (B, *shape) to the statistics, in double precision for means far from 0."""
        x = x.double()
        sums = torch.stack([torch.ones_like(x), x, x.square()]).sum(1)
        all_reduce_mean(sums)
        self.sums += sums
        mean, square = self.sums[1:] / self.sums[0]
        std = (square - mean.square()).clamp(min=0).sqrt()
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-6 * mean.abs(), std, 1))  # less is rounding error

    def forward(self, x):
        return ((x - self.mean) / self.std).clamp(-10, 10)


class NatureCNN(nn.Sequential):
    """Features (..., 512) of images (..., C, H, W) of bytes, as in Mnih et al. 2015."""

    def __init__(self, shape):
        super().__init__(nn.Conv2d(shape[0], 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2),
                         nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten())
        self.extend([nn.Linear(self(torch.zeros(1, *shape)).shape[-1], 512), nn.ReLU()])

    def forward(self, images):
        features = super().forward(images.flatten(0, -4) / 255)
        return features.unflatten(0, images.shape[:-3])


def mlp(*sizes):
    layers = [layer for n, m in zip(sizes, sizes[1:]) for layer in (nn.Linear(n, m), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


class Agent(nn.Module):
    """The policy pi (actor) and the value function V (critic)."""

    def __init__(self, obs_space, action_space, args):
        super().__init__()
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        outputs = gym.spaces.flatdim(action_space)  # logits, or means
        if len(obs_space.shape) == 3:
            self.encoder, sizes = NatureCNN(obs_space.shape), [512]
        else:
            self.encoder = RunningNorm(obs_space.shape) if args.norm_obs else nn.Identity()
            sizes = [obs_space.shape[0], args.hidden_size, args.hidden_size]
        self.actor, self.critic = mlp(*sizes, outputs), mlp(*sizes, 1)
        for p in self.parameters():
            nn.init.orthogonal_(p, math.sqrt(2)) if p.dim() > 1 else nn.init.zeros_(p)
        nn.init.orthogonal_(self.actor[-1].weight, 0.01)  # at first, actions hardly depend on obs
        nn.init.orthogonal_(self.critic[-1].weight, 1)
        self.return_norm = RunningNorm(())
        if not self.discrete:  # outputs from -1 to 1 cover the bounds
            _, _, self.center, self.scale = map(nn.Buffer, box_bounds(action_space))
            self.log_std = nn.Parameter(self.scale.log() + args.log_std)

    def value(self, obs):
        return self.critic(self.encoder(obs)).squeeze(-1)

    def evaluate_actions(self, obs, actions):
        """log pi(actions | obs), the entropy of pi(. | obs) and V(obs), each of shape (...).

        The same as torch.distributions gives, in three quarters of the time."""
        features = self.encoder(obs)
        outputs, values = self.actor(features), self.critic(features).squeeze(-1)
        if self.discrete:
            log_pi = outputs.log_softmax(-1)
            log_probs = log_pi.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
            return log_probs, -(log_pi.exp() * log_pi).sum(-1), values
        z = (actions - self.center - self.scale * outputs) / self.log_std.exp()
        log_normalizer = self.log_std.sum() + len(self.log_std) / 2 * math.log(2 * math.pi)
        log_probs = -z.square().sum(-1) / 2 - log_normalizer
        return log_probs, (log_normalizer + len(self.log_std) / 2).expand_as(values), values

    @torch.inference_mode()
    def act(self, obs, deterministic=False):
        """Sample actions (N,) or (N, action_dim) for obs (N, *shape), or take the most probable."""
        outputs = self.actor(self.encoder(obs))
        if self.discrete:
            if not deterministic:  # the argmax with Gumbel noise is a sample of the softmax
                outputs = outputs - torch.empty_like(outputs).exponential_().log()
            return outputs.argmax(-1)
        mean = self.center + self.scale * outputs
        return mean if deterministic else mean + self.log_std.exp() * torch.randn_like(mean)


# ==================================================================================== Algorithm
def compute_returns(rewards, next_values, terminations, dones, gamma):
    """Returns (1); every tensor is (T, N)."""
    next_values = torch.where(terminations > 0, 0.0, next_values)  # not a product: 0 * NaN is NaN
    returns, next_return = [], next_values[-1]
    for reward, next_value, done in zip(rewards.flip(0), next_values.flip(0), dones.flip(0)):
        next_return = reward + gamma * torch.where(done > 0, next_value, next_return)
        returns.append(next_return)
    return torch.stack(returns).flip(0)


def mean_of_others(returns, mask):
    """For each environment, the mean return of all others where mask is 1; tensors are (T, N)."""
    sums, counts = torch.where(mask > 0, returns, 0.0).sum(0), mask.sum(0)
    return ((sums.sum() - sums) / (counts.sum() - counts)).expand_as(returns)


def explained_variance(values, returns):
    """1 if V predicts every return, 0 if it does no better than a constant."""
    return 1 - (returns - values).var(correction=0) / returns.var(correction=0).clamp(min=1e-8)


def train(args, resume=""):
    """Train a new agent, or resume the run in the folder `resume`; return (agent, history)."""
    if args.baseline == "mean" and args.num_envs == 1:
        raise UserError("baseline mean is of the other environments, but num_envs is 1")
    device = setup(args)
    envs = VecEnv(args.env, args.num_envs, device)
    agent = Agent(envs.obs_space, envs.action_space, args).to(device)
    weights = flatten_parameters(agent)
    optimizer = torch.optim.Adam([weights], args.learning_rate, eps=1e-5, fused=True)
    run = Run(args, envs, resume, agent=agent, optimizer=optimizer)

    def update(obs, actions, returns, b):
        """One Adam step on a batch (B, ...); return what is logged (4,)."""
        log_probs, entropy, values = agent.evaluate_actions(obs, actions)
        if args.baseline == "value":
            b = values
        advantages = returns - b.detach()                                                   # (2)
        policy_loss = -(log_probs * advantages).mean()                                      # (3)
        value_loss = F.mse_loss(b, returns)  # has a gradient only if b is V(obs)
        loss = policy_loss + args.vf_coef * value_loss                                      # (4)
        weights.grad.zero_()  # zero_grad() would set it to None; each p.grad is a view of it
        loss.backward()
        all_reduce_mean(weights.grad)
        weights.grad.mul_((args.max_grad_norm / weights.grad.norm()).clamp(max=1))
        optimizer.step()
        return torch.stack([policy_loss, value_loss, entropy.mean(),
                            explained_variance(b, returns)]).detach()

    act = cuda_graph(agent.act, device)  # not update: the size of batches varies
    while run.step < args.total_timesteps:
        run.checkpoint()
        remaining = 1 - run.step / args.total_timesteps if args.anneal else 1
        optimizer.param_groups[0]["lr"] = args.learning_rate * remaining

        # Only the first episode of each environment counts. Of the later ones, only those would be
        # complete that end before the longest first episode, and these are mostly short.
        envs.reset(None)  # drops what was still running after the last batch
        rollout, first_episode = [], torch.ones(args.num_envs, device=device)
        while first_episode.any():
            if len(rollout) == 30_000:
                raise UserError(f"an episode of {args.env} takes more than 30,000 steps; if it "
                                "never ends, register it with max_episode_steps=1000")
            obs, actions = envs.obs, act(envs.obs)
            rollout.append((obs, actions, *envs.step(actions), first_episode))
            first_episode = first_episode * (1 - envs.episode_starts)
        obs, actions, next_obs, rewards, terminations, dones, first_episode = [
            torch.stack(x) for x in zip(*rollout)]  # each (T, N, ...)
        firsts = {episode[0]: episode for episode in reversed(envs.episodes)}
        envs.episodes = sorted(firsts.values())  # by environment: by end, the last are the longest
        steps = torch.tensor(float(dones.numel()), device=device)
        all_reduce_mean(steps)  # the length of the longest episode differs between processes
        run.step += round(steps.item() * WORLD_SIZE)

        next_values = b = torch.zeros_like(rewards)  # without V, a truncation is a termination
        if args.baseline == "value":
            with torch.no_grad():
                next_values = agent.value(next_obs)
        returns = compute_returns(rewards / agent.return_norm.std, next_values, terminations,
                                  dones, args.gamma)                                        # (1)
        if args.baseline == "mean":
            b = mean_of_others(returns, first_episode)
        batch = [x[first_episode > 0] for x in (obs, actions, returns, b)]  # each (B, ...)
        policy_loss, value_loss, entropy, explained_var = update(*batch)
        if args.norm_returns:
            agent.return_norm.update(batch[2] * agent.return_norm.std)
        if isinstance(agent.encoder, RunningNorm):
            agent.encoder.update(batch[0])
        run.log(policy_loss=policy_loss, value_loss=value_loss, entropy=entropy,
                explained_variance=explained_var)
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
